"""Boxes, points and hints in every mixture that the settings allow, one answer a component, by every segmenter."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from helpers.segmenter_suite import images, random_sam

from kmine.config import PromptsConfig
from kmine.errors import UserError
from kmine.mining.prompts import prompts_from_probs, reprompt_from_candidate
from kmine.segmenters import NEEDS_BOX, check_prompting
from kmine.segmenters.ellipse import Ellipse
from kmine.segmenters.sam.segmenter import SamSegmenter
from kmine.segmenters.tiny.segmenter import open_tiny
from kmine.segmenters.tiny.weights import SHIPPED
from kmine.types import Probs

SIZE = (60, 90)
MIXTURES = [
    {"box": box, "points": points, "mask_hint": hint}
    for box, points, hint in product((True, False), repeat=3)
    if box or points
]
OPEN = {
    "ellipse": Ellipse,
    "tiny": lambda: open_tiny(SHIPPED),
    "sam_vit_b": lambda: SamSegmenter(random_sam(), name="sam_vit_b"),
}


@pytest.fixture(scope="module", params=OPEN)
def opened(request):
    return request.param, OPEN[request.param]()


@pytest.fixture(scope="module")
def probs() -> Probs:
    belief = np.full(SIZE, 0.1, np.float32)
    belief[5:25, 10:30] = 0.9
    belief[5:12, 22:30] = 0.1  # a notch: room for a point beside it
    belief[35:50, 50:80] = 0.8
    return Probs("a", np.stack([1 - belief, belief]))


@pytest.mark.parametrize("mixture", MIXTURES, ids=lambda m: "+".join(name for name, on in m.items() if on))
@pytest.mark.parametrize("passes", [1, 2])
def test_every_component_gets_its_answer(opened, probs, mixture, passes) -> None:
    name, segmenter = opened
    cfg = PromptsConfig(num_jitters=2, **mixture)
    asked = prompts_from_probs(probs, cfg, seed=0, round_idx=1)
    assert len(asked) == 2
    for one in asked:
        assert (one.box is not None) == mixture["box"] and (one.point_coords is not None) == mixture["points"]
        assert (one.mask_input is not None) == mixture["mask_hint"]
    embeddings = segmenter.encode(images(sizes=[SIZE]))
    if name in NEEDS_BOX and not cfg.box:
        with pytest.raises(UserError, match=r"prompts\.box"):
            check_prompting(name, cfg)
        with pytest.raises(UserError, match=r"prompts\.box"):
            segmenter.decode(embeddings, [asked])
        return
    check_prompting(name, cfg)
    (answers,) = segmenter.decode(embeddings, [asked])
    if passes == 2:
        asked = [reprompt_from_candidate(one, answer, cfg, seed=0) for one, answer in zip(asked, answers, strict=True)]
        (answers,) = segmenter.decode(embeddings, [asked])
    assert len(answers) == 2
    for answer in answers:
        assert answer.masks.shape[1:] == SIZE and len(answer.jittered_masks) == (2 if cfg.box else 0)

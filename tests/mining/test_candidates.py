"""`prompts.source auto`: what is asked comes from proposals, each image is encoded once, calibration asks the same."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from helpers.small import CFG

from kmine.config import PromptsConfig
from kmine.errors import UserError
from kmine.mining.calibration import step as calibration
from kmine.mining.candidates import generate_prompts, median_object_area, segment_prompts
from kmine.mining.prompts import prompts_from_probs
from kmine.mining.tables import decision_rows
from kmine.ops.masks import grow_box, tight_box
from kmine.segmenters.base import proposals_of
from kmine.segmenters.ellipse import Ellipse
from kmine.types import Decision, Evidence, Probs

AUTO = replace(CFG, rounds=1, prompts=PromptsConfig(source="auto"))
BELIEVED = (slice(4, 14), slice(4, 14))
FOUND = (slice(5, 15), slice(5, 15))  # IoU 81 / 119 with what the local model believes
PIECES = ((20, 20), (20, 24), (24, 20), (24, 24))


class Finder(Ellipse):
    """Proposes one square and the place of the pieces in every image, and counts what it is asked."""

    def __init__(self) -> None:
        self.encoded, self.proposed = 0, 0

    def encode(self, images):
        self.encoded += len(images)
        return super().encode(images)

    def propose(self, embeddings):
        for embedding in embeddings:
            self.proposed += 1
            found = np.zeros((2, *embedding.size), bool)
            found[0][FOUND] = True
            found[1, 20:27, 20:27] = True
            yield proposals_of(embedding.size, found, [0.9, 0.9], [0.9, 0.9])


def believing(sample, *places) -> Probs:
    belief = np.full(sample.image.shape[:2], 0.02, np.float32)
    for place in places:
        belief[place] = 0.9
    return Probs(sample.sample_id, np.stack([1 - belief, belief]))


def pieces() -> list:
    return [(slice(y, y + 3), slice(x, x + 3)) for y, x in PIECES]  # 9 px each, no component


@pytest.fixture
def opened(task_of):
    task, store = task_of(AUTO, segmenter=Finder())
    return task, store, [task.unlabeled.sample(i) for i in task.unlabeled.ids[:3]]


def test_the_picked_mask_becomes_the_prompt_and_the_component_stays_local(opened) -> None:
    task, _, images = opened
    probs = [believing(images[0], BELIEVED), believing(images[1]), believing(images[2], BELIEVED, *pieces())]
    prompts, embedded = generate_prompts(task, task.segmenter, images, probs, 1)
    assert [len(some) for some in prompts] == [1, 0, 2]
    assert set(embedded) == {0, 2} and task.segmenter.encoded == 2, "where nothing is seen, nothing is asked"
    (one,), (own,) = prompts[0], prompts_from_probs(probs[0], AUTO.prompts, seed=AUTO.seed, round_idx=1)
    mask = np.zeros(images[0].image.shape[:2], bool)
    mask[FOUND] = True
    assert (one.box == grow_box(tight_box(mask), AUTO.prompts.box_margin, *mask.shape)).all()
    assert (one.box != own.box).any() and (one.component == own.component).all()
    assert one.jittered_boxes.shape == (3, 4) and ((one.mask_input > 0) == mask).all()
    assert prompts[2][1].component is None and prompts[2][1].box.tolist() == [18, 18, 28, 28]


def test_an_image_is_encoded_once_for_proposals_and_answers(opened) -> None:
    task, _, images = opened
    probs = [believing(image, BELIEVED) for image in images]
    for passes in (1, 2):
        settings = replace(task.cfg, prompts=replace(task.cfg.prompts, passes=passes))
        task.segmenter.encoded = 0
        prompts, embedded = generate_prompts(replace(task, cfg=settings), task.segmenter, images, probs, 1)
        _, answers = segment_prompts(replace(task, cfg=settings), task.segmenter, images, prompts, 1, embedded)
        assert task.segmenter.encoded == 3 and [len(some) for some in answers] == [1, 1, 1]
    # A prompt that came from elsewhere, such as a classifier's activation: that image is encoded then.
    task.segmenter.encoded = 0
    segment_prompts(task, task.segmenter, images, prompts, 1, {n: embedded[n] for n in (0, 1)})
    assert task.segmenter.encoded == 1


def test_jitter_depends_on_seed_round_and_sample_alone(opened) -> None:
    task, _, images = opened
    probs = [believing(image, BELIEVED) for image in images]

    def boxes(task, some, round_idx: int = 1):
        prompts, _ = generate_prompts(
            task, task.segmenter, [images[n] for n in some], [probs[n] for n in some], round_idx
        )
        return np.stack([asked[0].jittered_boxes for asked in prompts])

    first = boxes(task, (0, 1, 2))
    np.testing.assert_array_equal(first[[2, 0]], boxes(task, (2, 0)))
    assert (first != boxes(task, (0, 1, 2), 2)).any() and (first[0] != first[1]).any()
    assert (first != boxes(replace(task, cfg=replace(task.cfg, seed=1)), (0, 1, 2))).any()


def test_an_image_known_to_be_free_is_left_alone(opened) -> None:
    task, _, images = opened
    free = [replace(images[0], image_label=0)]
    generate_prompts(task, task.segmenter, free, [believing(images[0], BELIEVED)], 1)
    assert task.segmenter.encoded == 0
    generate_prompts(replace(task, num_classes=3), task.segmenter, free, [believing(images[0], BELIEVED)], 1)
    assert task.segmenter.proposed == 1, "of three classes another one may be there"


def test_the_tables_hold_what_was_asked_also_without_a_component(opened) -> None:
    task, _, images = opened
    probs = [believing(images[0], BELIEVED, *pieces())]
    prompts, embedded = generate_prompts(task, task.segmenter, images[:1], probs, 1)
    prompts, answers = segment_prompts(task, task.segmenter, images[:1], prompts, 1, embedded)
    kept = [[Decision(True, "kept", Evidence())] * 2]
    tables, _ = decision_rows(images[:1], prompts, answers, kept, [None])
    assert [row["box"] for row in tables["prompts"]] == [one.box.tolist() for one in prompts[0]]
    assert len(tables["decisions"]) == 2


def test_a_segmenter_without_proposals_is_refused(opened) -> None:
    task, _, images = opened
    with pytest.raises(UserError, match=r"prompts\.source: auto .*`ellipse`"):
        generate_prompts(task, Ellipse(), images, [believing(image) for image in images], 1)


def test_local_prompts_are_as_ever_and_nothing_is_proposed(opened) -> None:
    task, _, images = opened
    task = replace(task, cfg=CFG)
    probs = [believing(image, BELIEVED) for image in images]
    prompts, embedded = generate_prompts(task, task.segmenter, images, probs, 1)
    own = [prompts_from_probs(p, CFG.prompts, seed=CFG.seed, round_idx=1) for p in probs]
    assert [[one.box.tolist() for one in some] for some in prompts] == [[o.box.tolist() for o in some] for some in own]
    assert embedded == {} and task.segmenter.proposed == task.segmenter.encoded == 0


def test_the_gate_is_calibrated_on_the_prompts_that_will_be_asked(opened, monkeypatch) -> None:
    task, _, _ = opened
    ids = task.labeled.ids[:2]
    probs = [believing(task.labeled.sample(i), BELIEVED, *pieces()) for i in ids]
    monkeypatch.setattr(calibration, "infer", lambda *args, **more: iter(probs))
    seen, real = [], calibration.segment_prompts

    def ask(task, segmenter, images, prompts, round_idx, embedded):
        assert all(image.mask is None and image.image_label is None for image in images)
        seen.extend(prompts)
        return real(task, segmenter, images, prompts, round_idx, embedded)

    monkeypatch.setattr(calibration, "segment_prompts", ask)
    rows = list(calibration._evidence_rows(task, None, None, task.segmenter, ids, {}))
    expected, _ = generate_prompts(task, task.segmenter, [task.labeled.sample(i) for i in ids], probs, 0)
    assert [[one.box.tolist() for one in some] for some in seen] == [
        [one.box.tolist() for one in some] for some in expected
    ]
    assert [len(some) for some in seen] == [2, 2] and len(rows) == 4
    # The local model's mask of an object that it has not is empty.
    assert [row["dice_local"] for row in rows[1::2]] == [0.0, 0.0]


def test_object_areas_are_medians_per_class():
    class Two:
        ids = ("a", "b")

        def mask_resized(self, sample_id):
            mask = np.zeros((10, 10), np.uint8)
            mask[:2, :5] = 1  # 10 %
            mask[5:7, :2] = 1 if sample_id == "a" else 0  # 4 %
            return mask

    assert median_object_area(Two(), 3) == {1: pytest.approx(0.1)}

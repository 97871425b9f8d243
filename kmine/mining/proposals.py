"""Match a segmenter's unprompted masks to the objects of the local model.

Legend: K classes with background 0, H, W the image's own frame, N proposals.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kmine.config import PromptsConfig
from kmine.mining.prompts import min_object_area
from kmine.ops import masks, metrics
from kmine.segmenters.base import Proposals
from kmine.types import Bool, Probs, Prompts

MIN_MATCH = 0.5
"""Minimum soft IoU of a local object and its proposal; below it the object's own prompt is used. Own choice."""
NMS_IOU = 0.5
"""Minimum IoU of two proposals of one object."""
MIN_MEAN_PROB = 0.5
"""Minimum mean probability of a proposal that becomes a new object."""

Plane = NDArray[np.float32]


class MatchedProposal(NamedTuple):
    """Prompts of an object, without box, points and component if it is new; its (H, W) proposal, None without one."""

    prompts: Prompts
    mask: Bool | None


def has_foreground(probs: Probs, local: Sequence[Prompts], cfg: PromptsConfig) -> bool:
    """Whether `match_proposals` can return anything; if not, no proposals are needed. Arguments as there."""
    return bool(local) or bool((probs.probs[1:] >= (cfg.doubtful or MIN_MEAN_PROB)).any())


def match_proposals(
    probs: Probs, local: Sequence[Prompts], proposals: Proposals, cfg: PromptsConfig
) -> list[MatchedProposal]:
    """Match proposals to the local model's objects, at most one each, and add new objects.

    Each local object gets the proposal with the highest soft IoU with its probabilities, best pair first, if that is at
    least `MIN_MATCH`; of two proposals of one object (`NMS_IOU`) only one is used. Objects without a match keep their
    local prompt. One proposal per object, because a grid of prompts also returns parts of an object and the object with
    its surroundings, which would all match. Further proposals with a mean probability of at least `MIN_MEAN_PROB`
    outside the local objects become new objects without a component, such as scattered pieces below the minimum area.
    Of a class without any object, the proposal with the highest mean probability becomes one, where that is at least
    `cfg.doubtful`.

    `probs` and `local`, prompts with their components, are of the local model; `cfg` has the minimum area of an object
    and the margin of its box. Returns the local objects in their order, then the new ones by class.
    """
    out = [MatchedProposal(prompts, None) for prompts in local]
    large = [mask for mask in proposals.masks if np.count_nonzero(mask) >= min_object_area(cfg, mask.size)]
    for class_id in range(1, len(probs.probs)):
        prob = probs.probs[class_id]
        own = [k for k, prompts in enumerate(local) if prompts.class_id == class_id and prompts.component is not None]
        components = [local[k].component for k in own]
        claimed = np.any(components, axis=0) if components else np.zeros(prob.shape, np.bool_)
        maps = [_object_map(np.where(claimed & ~component, 0, prob), component, cfg) for component in components]
        for k, n in _matches(maps, proposals.masks):
            out[own[k]] = MatchedProposal(local[own[k]], proposals.masks[n])
            claimed = claimed | proposals.masks[n]
        new = list(_unclaimed_proposals(prob, claimed, large, cfg))
        if cfg.doubtful and large and not own and not new:
            new = [mask for mask in large if prob[mask].mean() >= cfg.doubtful]
            new = sorted(new, key=lambda mask: -float(prob[mask].mean()))[:1]
        out += [MatchedProposal(Prompts(class_id), mask) for mask in new]
    return out


def soft_iou(mask: Bool, prob: Plane) -> float:
    """Sum of the pixelwise minima over that of the maxima; equals IoU if the map is a mask.

    `mask` is (H, W), `prob` (H, W) in [0, 1]; not both are empty.
    """
    inside = float(prob[mask].sum())
    return inside / (np.count_nonzero(mask) + float(prob.sum()) - inside)


def _object_map(prob: Plane, component: Bool, cfg: PromptsConfig) -> Plane:
    """(H, W): probability of one object; 0 outside its box, so that low values of a whole image do not add up."""
    x0, y0, x1, y1 = masks.grow_box(masks.tight_box(component), cfg.box_margin, *component.shape).astype(int)
    out = np.zeros(component.shape, np.float32)
    out[y0 : y1 + 1, x0 : x1 + 1] = prob[y0 : y1 + 1, x0 : x1 + 1]
    return out


def _matches(maps: Sequence[Plane], proposals: Bool) -> Iterator[tuple[int, int]]:
    """Pairs (object, proposal), best match first; no object and no proposal twice."""
    scores = np.array([[soft_iou(mask, prob) for mask in proposals] for prob in maps])
    scores = scores.reshape(len(maps), len(proposals))
    taken: dict[int, int] = {}
    for flat in np.argsort(-scores, axis=None, kind="stable"):
        k, n = divmod(int(flat), len(proposals))
        if scores[k, n] < MIN_MATCH:
            return
        if k not in taken and all(metrics.iou(proposals[n], proposals[other]) < NMS_IOU for other in taken.values()):
            taken[k] = n
            yield k, n


def _unclaimed_proposals(prob: Plane, claimed: Bool, remaining: list[Bool], cfg: PromptsConfig) -> Iterator[Bool]:
    """Those of `remaining` that are probable outside the claimed pixels; each claims its pixels for the next."""
    while remaining:
        unclaimed_prob = np.where(claimed, np.float32(0), prob)
        remaining = [mask for mask in remaining if unclaimed_prob[mask].mean() >= MIN_MEAN_PROB]
        if remaining:
            best = max(remaining, key=lambda mask: soft_iou(mask, _object_map(unclaimed_prob, mask, cfg)))
            yield best
            claimed = claimed | best

"""Which of a segmenter's unprompted masks the local model picks.

Legend: K classes with background 0, H, W the image's own frame, N proposals.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kmine.config import PromptsConfig
from kmine.ops import masks, metrics
from kmine.segmenters.base import Proposals
from kmine.types import Probs, Prompts

MIN_MATCH = 0.5
"""Soft IoU from which on a proposal stands for a local object. An answer that agrees less with the object would not
pass the gate (`gate.min_agreement`), so below, the object's own prompt has the better chance."""
SAME_MASK = 0.5
"""IoU from which on two proposals are of one object."""
BELIEVED = 0.5
"""Mean probability from which on the local model believes in a proposal where it has no object of its own."""

Bool = NDArray[np.bool_]
Plane = NDArray[np.float32]


@dataclass(frozen=True)
class Pick:
    """One object: what the local model would ask, and the proposal that it picked."""

    asked: Prompts
    """Its own prompt; without box, points and component where it had no object there."""
    mask: Bool | None
    """(H, W), the proposal; None where none matches and its own prompt stands."""


def may_pick(probs: Probs, local: Sequence[Prompts]) -> bool:
    """Whether `pick` could find anything; where not, no proposals have to be made. Arguments as of `pick`."""
    return bool(local) or bool((probs.probs[1:] >= BELIEVED).any())


def pick(probs: Probs, local: Sequence[Prompts], proposals: Proposals, cfg: PromptsConfig) -> list[Pick]:
    """Proposals for the objects that the local model sees, one each at most.

    Every local object gets the proposal with the highest soft IoU with its probabilities, the best pair of object and
    proposal first, if that is at least `MIN_MATCH`; two proposals of one object (`SAME_MASK`) are not both picked.
    Objects that get none keep the local prompt, so none is lost. One proposal an object and not more: a grid of
    prompts answers an object also in parts and with its surroundings, and all of these would match. Then proposals
    in which the local model believes beside its objects (mean probability at least `BELIEVED`, not counting its
    objects), such as the scattered pieces that were too small to be one, become objects without a component.

    Args:
        probs: the local model's, of the image.
        local: its own prompts, each with its component.
        proposals: of the segmenter.
        cfg: what counts as an object, and how far its box reaches.

    Returns:
        The local objects in their order, then the new ones by class.
    """
    out = [Pick(one, None) for one in local]
    min_area = int(np.ceil(max(cfg.min_area_px, cfg.min_area_fraction * probs.probs[0].size)))
    for class_id in range(1, len(probs.probs)):
        prob = probs.probs[class_id]
        own = [k for k, one in enumerate(local) if one.class_id == class_id and one.component is not None]
        parts = [local[k].component for k in own]
        claimed = np.any(parts, axis=0) if parts else np.zeros(prob.shape, np.bool_)
        maps = [_object_map(np.where(claimed & ~part, 0, prob), part, cfg) for part in parts]
        for k, n in _matches(maps, proposals.masks):
            out[own[k]] = Pick(local[own[k]], proposals.masks[n])
            claimed = claimed | proposals.masks[n]
        new = _believed(prob, claimed, proposals.masks, min_area, cfg)
        out += [Pick(Prompts(class_id), mask) for mask in new]
    return out


def soft_iou(mask: Bool, belief: Plane) -> float:
    """Sum of the pixelwise minima over that of the maxima; IoU where the map is a mask, too.

    Args:
        mask: (H, W).
        belief: (H, W) in [0, 1]; one of the two is not empty.
    """
    inside = float(belief[mask].sum())
    return inside / (np.count_nonzero(mask) + float(belief.sum()) - inside)


def _object_map(belief: Plane, part: Bool, cfg: PromptsConfig) -> Plane:
    """(H, W): the belief in one object; 0 outside its prompt's box, or the doubts of a whole image would add up."""
    x0, y0, x1, y1 = masks.grow_box(masks.tight_box(part), cfg.box_margin, *part.shape).astype(int)
    out = np.zeros(part.shape, np.float32)
    out[y0 : y1 + 1, x0 : x1 + 1] = belief[y0 : y1 + 1, x0 : x1 + 1]
    return out


def _matches(maps: Sequence[Plane], found: Bool) -> Iterator[tuple[int, int]]:
    """(object, proposal) that belong together, the best match first; no object and no proposal twice."""
    scores = np.array([[soft_iou(mask, one) for mask in found] for one in maps]).reshape(len(maps), len(found))
    taken: dict[int, int] = {}
    for flat in np.argsort(-scores, axis=None, kind="stable"):
        k, n = divmod(int(flat), len(found))
        if scores[k, n] < MIN_MATCH:
            return
        if k not in taken and all(metrics.iou(found[n], found[other]) < SAME_MASK for other in taken.values()):
            taken[k] = n
            yield k, n


def _believed(prob: Plane, claimed: Bool, found: Bool, min_area: int, cfg: PromptsConfig) -> Iterator[Bool]:
    """The proposals that the local model believes in beside what is claimed; each claims its own pixels in turn."""
    left = [mask for mask in found if np.count_nonzero(mask) >= min_area]
    while left:
        belief = np.where(claimed, np.float32(0), prob)
        left = [mask for mask in left if belief[mask].mean() >= BELIEVED]
        if left:
            best = max(left, key=lambda mask: soft_iou(mask, _object_map(belief, mask, cfg)))
            yield best
            claimed = claimed | best

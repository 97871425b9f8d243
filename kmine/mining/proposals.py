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
NMS_IOU = 0.5
"""IoU from which on two proposals are of one object."""
MIN_MEAN_PROB = 0.5
"""Mean probability from which on the local model believes in a proposal where it has no object of its own."""

Bool = NDArray[np.bool_]
Plane = NDArray[np.float32]


@dataclass(frozen=True)
class MatchedProposal:
    """One object: what the local model would ask, and the proposal that it picked."""

    prompts: Prompts
    """Its own prompt; without box, points and component where it had no object there."""
    mask: Bool | None
    """(H, W), the proposal; None where none matches and its own prompt stands."""


def has_foreground(probs: Probs, local: Sequence[Prompts]) -> bool:
    """Whether `match_proposals` could find anything; where not, no proposals have to be made. Arguments as of `match_proposals`."""
    return bool(local) or bool((probs.probs[1:] >= MIN_MEAN_PROB).any())


def match_proposals(
    probs: Probs, local: Sequence[Prompts], proposals: Proposals, cfg: PromptsConfig
) -> list[MatchedProposal]:
    """Proposals for the objects that the local model sees, one each at most.

    Every local object gets the proposal with the highest soft IoU with its probabilities, the best pair of object and
    proposal first, if that is at least `MIN_MATCH`; two proposals of one object (`NMS_IOU`) are not both picked.
    Objects that get none keep the local prompt, so none is lost. One proposal an object and not more: a grid of
    prompts answers an object also in parts and with its surroundings, and all of these would match. Then proposals
    in which the local model believes beside its objects (mean probability at least `MIN_MEAN_PROB`, not counting its
    objects), such as the scattered pieces that were too small to be one, become objects without a component.

    Args:
        probs: the local model's, of the image.
        local: its own prompts, each with its component.
        proposals: of the segmenter.
        cfg: what counts as an object, and how far its box reaches.

    Returns:
        The local objects in their order, then the new ones by class.
    """
    out = [MatchedProposal(prompts, None) for prompts in local]
    min_area = int(np.ceil(max(cfg.min_area_px, cfg.min_area_fraction * probs.probs[0].size)))
    for class_id in range(1, len(probs.probs)):
        prob = probs.probs[class_id]
        own = [k for k, prompts in enumerate(local) if prompts.class_id == class_id and prompts.component is not None]
        components = [local[k].component for k in own]
        claimed = np.any(components, axis=0) if components else np.zeros(prob.shape, np.bool_)
        maps = [_object_map(np.where(claimed & ~component, 0, prob), component, cfg) for component in components]
        for k, n in _matches(maps, proposals.masks):
            out[own[k]] = MatchedProposal(local[own[k]], proposals.masks[n])
            claimed = claimed | proposals.masks[n]
        new = _unclaimed_proposals(prob, claimed, proposals.masks, min_area, cfg)
        out += [MatchedProposal(Prompts(class_id), mask) for mask in new]
    return out


def soft_iou(mask: Bool, prob: Plane) -> float:
    """Sum of the pixelwise minima over that of the maxima; IoU where the map is a mask, too.

    Args:
        mask: (H, W).
        prob: (H, W) in [0, 1]; one of the two is not empty.
    """
    inside = float(prob[mask].sum())
    return inside / (np.count_nonzero(mask) + float(prob.sum()) - inside)


def _object_map(prob: Plane, component: Bool, cfg: PromptsConfig) -> Plane:
    """(H, W): the belief in one object; 0 outside its prompt's box, or the doubts of a whole image would add up."""
    x0, y0, x1, y1 = masks.grow_box(masks.tight_box(component), cfg.box_margin, *component.shape).astype(int)
    out = np.zeros(component.shape, np.float32)
    out[y0 : y1 + 1, x0 : x1 + 1] = prob[y0 : y1 + 1, x0 : x1 + 1]
    return out


def _matches(maps: Sequence[Plane], proposals: Bool) -> Iterator[tuple[int, int]]:
    """(object, proposal) that belong together, the best match first; no object and no proposal twice."""
    scores = np.array([[soft_iou(mask, prob) for mask in proposals] for prob in maps]).reshape(
        len(maps), len(proposals)
    )
    taken: dict[int, int] = {}
    for flat in np.argsort(-scores, axis=None, kind="stable"):
        k, n = divmod(int(flat), len(proposals))
        if scores[k, n] < MIN_MATCH:
            return
        if k not in taken and all(metrics.iou(proposals[n], proposals[other]) < NMS_IOU for other in taken.values()):
            taken[k] = n
            yield k, n


def _unclaimed_proposals(
    prob: Plane, claimed: Bool, proposals: Bool, min_area: int, cfg: PromptsConfig
) -> Iterator[Bool]:
    """The proposals that the local model believes in beside what is claimed; each claims its own pixels in turn."""
    remaining = [mask for mask in proposals if np.count_nonzero(mask) >= min_area]
    while remaining:
        unclaimed_prob = np.where(claimed, np.float32(0), prob)
        remaining = [mask for mask in remaining if unclaimed_prob[mask].mean() >= MIN_MEAN_PROB]
        if remaining:
            best = max(remaining, key=lambda mask: soft_iou(mask, _object_map(unclaimed_prob, mask, cfg)))
            yield best
            claimed = claimed | best

"""From kept candidates to one pseudo-label per image, with doubtful pixels ignored."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from kmine.config import RefineConfig
from kmine.ops import masks
from kmine.types import IGNORE_INDEX, LESION_FREE, Bool, Candidate, Decision, Probs, Prompts, PseudoLabel


def refine(
    probs: Probs,
    prompts: Sequence[Prompts],
    candidates: Sequence[Candidate],
    decisions: Sequence[Decision],
    cfg: RefineConfig,
    *,
    image_label: int | None = None,
) -> PseudoLabel | None:
    """The pseudo-label of one image, or None where no object was kept: an empty mask would train nothing.

    A pixel of a kept object gets its class where at least `cfg.min_vote` of the masks (box and jitters) agree, and 255
    where they disagree. A dropped object is ignored as a whole: it may be a lesion, so it must not become background.
    With `cfg.ask_local`, pixels that the local model classifies otherwise are ignored as well, except in objects for
    which the gate found one of the two masks better (`Decision.source`): there, that mask counts.

    Background pixels outside all objects where the local model's foreground probability is in [`cfg.doubt`, 0.5] are
    ignored; the lesion counts in it unless the image is labeled lesion-free.

    An image labeled lesion-free (`image_label` 0) gets an empty mask if lesions are the only class; one labeled with a
    lesion (1) gets none without a pixel of it. The lesion is the last class. `probs` are of the local model; `prompts`,
    `candidates` and `decisions` have one entry per object.
    """
    lesion = len(probs.probs) - 1
    if image_label == 0 and lesion == 1 and not prompts:
        return PseudoLabel(np.zeros(probs.probs.shape[1:], np.uint8), LESION_FREE)
    kept = [decision for decision in decisions if decision.kept]
    if not kept:
        return None
    objects = zip(prompts, candidates, decisions, strict=True)
    mask, trusted, outside = merge_objects(probs.probs.shape[1:], objects, cfg.min_vote)
    if cfg.ask_local:
        np.copyto(mask, IGNORE_INDEX, where=(mask != probs.mask) & ~trusted)
    if cfg.doubt is not None and cfg.doubt < 0.5:
        planes = probs.probs[1 : lesion + (image_label != 0)]
        foreground = planes[0] if len(planes) == 1 else planes.sum(axis=0)
        np.copyto(mask, IGNORE_INDEX, where=outside & (foreground >= cfg.doubt) & (foreground <= 0.5))
    lesion_missed = image_label == 1 and not (mask == lesion).any()
    if lesion_missed or not ((mask != 0) & (mask != IGNORE_INDEX)).any():
        return None
    return PseudoLabel(mask, kept[0].reason, mean_estimate(decision.estimated_dice for decision in kept))


def mean_estimate(values: Iterable[float | None]) -> float | None:
    """Mean of estimated Dice values, each limited to [0, 1]; None where none is known."""
    known = [min(max(value, 0.0), 1.0) for value in values if value is not None and not math.isnan(value)]
    return float(np.mean(known)) if known else None


def merge_objects(
    shape: tuple[int, ...], objects: Iterable[tuple[Prompts, Candidate, Decision]], min_vote: float
) -> tuple[NDArray[np.uint8], Bool, Bool]:
    """(H, W) class ids and 255 of all objects, pixels on which the segmenter was found better, those of no object."""
    out, trusted, outside = np.zeros(shape, np.uint8), np.zeros(shape, bool), np.ones(shape, bool)
    for prompt, candidate, decision in objects:
        best, class_id, component = candidate.masks[candidate.best], prompt.class_id, prompt.component
        place = masks.window(best, component, *candidate.jittered_masks)
        best, component, ids = best[place], None if component is None else component[place], out[place]
        either = best if component is None else best | component
        outside[place] &= ~either
        if not decision.kept:
            ids[either] = IGNORE_INDEX
            continue
        votes = masks.vote(np.stack([best, *(mask[place] for mask in candidate.jittered_masks)]), min_vote)
        if decision.source == "local" and component is not None:
            votes = component.astype(votes.dtype)
        if decision.source == "segmenter":
            trusted[place] |= either
        # Of two objects that claim a pixel for different classes neither is known to be right.
        clash = (votes == 1) & (ids != 0) & (ids != class_id)
        ids[(votes == 1) & (ids == 0)] = class_id
        ids[clash | ((votes == -1) & (ids == 0))] = IGNORE_INDEX
    return out, trusted, outside

"""From kept candidates to one pseudo mask an image, with the doubtful pixels ignored."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kmine.config import RefineConfig
from kmine.ops import masks
from kmine.types import (
    IGNORE_INDEX,
    Candidate,
    Decision,
    Probs,
    Prompts,
)


def refine(
    probs: Probs,
    prompts: Sequence[Prompts],
    candidates: Sequence[Candidate],
    decisions: Sequence[Decision],
    cfg: RefineConfig,
    *,
    image_label: int | None = None,
) -> NDArray[np.uint8] | None:
    """The pseudo mask of one image, or None where no object was kept (an empty answer teaches nothing).

    An image-level label is heeded: lesion-free, where lesions are all there is, gives an empty mask; with a lesion,
    a mask without one is no mask. The lesion is the last class.

    A kept object's pixel gets the class where at least `cfg.min_vote` of the answers (box and jitters) say so, and
    255 where they disagree. A dropped object is ignored as a whole: it may be a lesion, so it must not become
    background. With `cfg.ask_local`, pixels on which the local model says otherwise are ignored as well, those of
    objects apart for which the gate found one of the two masks better (`Decision.source`): there, that one counts.

    Args:
        probs: the local model's, of the image.
        prompts, candidates, decisions: one entry per object, in the same order.
        cfg: see `RefineConfig`.
        image_label: 0 lesion-free, 1 a lesion, None unknown.

    Returns:
        (H, W) uint8 class ids and 255, or None.
    """
    lesion = len(probs.probs) - 1
    if image_label == 0 and lesion == 1 and not prompts:
        return np.zeros(probs.probs.shape[1:], np.uint8)
    if not any(d.kept for d in decisions):
        return None
    out = np.zeros(probs.probs.shape[1:], np.uint8)
    trusted = np.zeros(out.shape, bool)
    for prompt, candidate, decision in zip(prompts, candidates, decisions, strict=True):
        best, class_id = candidate.masks[candidate.best], prompt.class_id
        if not decision.kept:
            out[best if prompt.component is None else best | prompt.component] = IGNORE_INDEX
            continue
        votes = masks.vote(np.concatenate([best[None], candidate.jittered_masks]), cfg.min_vote)
        if decision.source == "local" and prompt.component is not None:
            votes = prompt.component.astype(votes.dtype)
        if decision.source == "segmenter":
            trusted |= best if prompt.component is None else best | prompt.component
        # Where two objects claim a pixel for different classes, nobody knows.
        clash = (votes == 1) & (out != 0) & (out != class_id)
        out[(votes == 1) & (out == 0)] = class_id
        out[clash | ((votes == -1) & (out == 0))] = IGNORE_INDEX
    if cfg.ask_local:
        out[(out != probs.mask) & ~trusted] = IGNORE_INDEX
    if image_label == 1 and not (out == lesion).any():
        return None
    return out if ((out != 0) & (out != IGNORE_INDEX)).any() else None

"""What a chunk of mining came to, as rows of the two tables that the run folder keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kmine.ops.masks import to_rle
from kmine.types import (
    Candidate,
    Decision,
    Prompts,
    Sample,
)

EMPTY = "lesion_free"
"""Reason of an image whose label says that there is nothing: nobody was asked, its pseudo mask is empty."""


def rows_of(
    images: Sequence[Sample],
    prompts: Sequence[Sequence[Prompts]],
    candidates: Sequence[Sequence[Candidate]],
    decisions: Sequence[Sequence[Decision]],
    pseudo: Sequence[NDArray[np.uint8] | None],
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, NDArray[np.uint8]]]:
    """Table rows and pseudo masks of a chunk, for the store."""
    tables: dict[str, list[dict[str, Any]]] = {"prompts": [], "decisions": []}
    masks = {image.sample_id: mask for image, mask in zip(images, pseudo, strict=True) if mask is not None}
    for image, asked, answers, verdicts in zip(images, prompts, candidates, decisions, strict=True):
        key = {"sample_id": image.sample_id, "in_training": image.sample_id in masks}
        if not asked:
            empty = key["in_training"]  # nothing was asked, yet there is a mask: the label says that it is empty
            nothing = {"object_idx": -1, "class_id": 0, "kept": empty, "reason": EMPTY if empty else "no_component"}
            tables["decisions"].append({**key, **nothing})
        for n, (prompt, answer, verdict) in enumerate(zip(asked, answers, verdicts, strict=True)):
            key |= {"object_idx": n, "class_id": prompt.class_id}
            tables["prompts"].append(_prompt_row(key, prompt))
            tables["decisions"].append(_decision_row(key, prompt, answer, verdict))
    return tables, masks


def judged_rows(rejected: Sequence[str], accepted: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of decisions of images that a person judged: nobody was asked, and nothing was estimated."""
    return [
        {"sample_id": i, "in_training": kept, "object_idx": -1, "class_id": 0, "kept": kept, "reason": reason}
        for ids, kept, reason in ((rejected, False, "rejected"), (accepted, True, "accepted"))
        for i in ids
    ]


def _prompt_row(key: dict[str, Any], prompt: Prompts) -> dict[str, Any]:
    def plain(array: NDArray[Any] | None) -> list[Any] | None:
        return None if array is None else array.tolist()

    return {
        **{k: v for k, v in key.items() if k != "in_training"},
        "box": plain(prompt.box),
        "point_coords": plain(prompt.point_coords),
        "point_labels": plain(prompt.point_labels),
        "has_mask_input": prompt.mask_input is not None,
        "jittered_boxes": plain(prompt.jittered_boxes),
    }


def _decision_row(key: dict[str, Any], prompt: Prompts, answer: Candidate, verdict: Decision) -> dict[str, Any]:
    best = answer.masks[answer.best]
    local = prompt.component if prompt.component is not None else np.zeros_like(best)
    return {
        **key,
        "kept": verdict.kept,
        "reason": verdict.reason,
        **asdict(verdict.evidence),
        **{
            name: getattr(verdict, name)
            for name in ("source", "estimated_dice", "estimated_segmenter", "estimated_local")
        },
        "height": best.shape[0],
        "width": best.shape[1],
        "local_rle": to_rle(local),
        "segmenter_rle": to_rle(best),
    }

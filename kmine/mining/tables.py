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

LESION_FREE = "lesion_free"
"""Reason of an image whose label says that there is nothing: nobody was asked, its pseudo mask is empty."""


def decision_rows(
    images: Sequence[Sample],
    prompts: Sequence[Sequence[Prompts]],
    candidates: Sequence[Sequence[Candidate]],
    decisions: Sequence[Sequence[Decision]],
    pseudo: Sequence[NDArray[np.uint8] | None],
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, NDArray[np.uint8]]]:
    """Table rows and pseudo masks of a chunk, for the store."""
    tables: dict[str, list[dict[str, Any]]] = {"prompts": [], "decisions": []}
    masks = {image.sample_id: mask for image, mask in zip(images, pseudo, strict=True) if mask is not None}
    for image, image_prompts, image_candidates, image_decisions in zip(
        images, prompts, candidates, decisions, strict=True
    ):
        key = {"sample_id": image.sample_id, "in_training": image.sample_id in masks}
        if not image_prompts:
            empty = key["in_training"]  # nothing was asked, yet there is a mask: the label says that it is empty
            row = {"object_idx": -1, "class_id": 0, "kept": empty, "reason": LESION_FREE if empty else "no_component"}
            tables["decisions"].append({**key, **row})
        for n, (prompt, candidate, decision) in enumerate(
            zip(image_prompts, image_candidates, image_decisions, strict=True)
        ):
            key |= {"object_idx": n, "class_id": prompt.class_id}
            tables["prompts"].append(_prompt_row(key, prompt))
            tables["decisions"].append(_decision_row(key, prompt, candidate, decision))
    return tables, masks


def reviewed_rows(rejected: Sequence[str], accepted: Sequence[str]) -> list[dict[str, Any]]:
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


def _decision_row(key: dict[str, Any], prompt: Prompts, candidate: Candidate, decision: Decision) -> dict[str, Any]:
    best = candidate.masks[candidate.best]
    local = prompt.component if prompt.component is not None else np.zeros_like(best)
    return {
        **key,
        "kept": decision.kept,
        "reason": decision.reason,
        **asdict(decision.evidence),
        **{
            name: getattr(decision, name)
            for name in ("source", "estimated_dice", "estimated_segmenter", "estimated_local")
        },
        "height": best.shape[0],
        "width": best.shape[1],
        "local_rle": to_rle(local),
        "segmenter_rle": to_rle(best),
    }

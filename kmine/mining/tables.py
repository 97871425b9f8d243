"""Rows of prompts.parquet and decisions.parquet from a batch of mined images."""

from __future__ import annotations

from collections.abc import Container, Sequence

import numpy as np

from kmine.data.pool import UnreadSample
from kmine.ops.masks import to_rle
from kmine.store.tables import DecisionRow, PromptRow
from kmine.types import LESION_FREE, Candidate, Decision, Prompts, PseudoLabel, Sample


def table_rows(
    images: Sequence[Sample | UnreadSample],
    prompts: Sequence[Sequence[Prompts]],
    candidates: Sequence[Sequence[Candidate]],
    decisions: Sequence[Sequence[Decision]],
    labels: Sequence[PseudoLabel | None],
    vetoed: Container[str] = (),
) -> tuple[list[PromptRow], list[DecisionRow]]:
    """Rows of a batch: one per object, and one decision for an image without objects; `vetoed` has ids of images."""
    prompt_rows: list[PromptRow] = []
    rows: list[DecisionRow] = []
    for image, label, *stages in zip(images, labels, prompts, candidates, decisions, strict=True):
        sample_id, in_training = image.sample_id, label is not None
        objects = list(enumerate(zip(*stages, strict=True)))
        if not objects:  # without an object only an image-level label gives a mask
            reason = LESION_FREE if in_training else "vetoed" if sample_id in vetoed else "no_component"
            rows.append(DecisionRow(sample_id, -1, 0, in_training, reason, in_training=in_training))
        for n, (prompt, candidate, decision) in objects:
            prompt_rows.append(PromptRow.from_prompts(sample_id, n, prompt))
            rows.append(_decision_row(sample_id, n, prompt, candidate, decision, in_training=in_training))
    return prompt_rows, rows


def reviewed_rows(rejected: Sequence[str], accepted: Sequence[str]) -> list[DecisionRow]:
    """Decisions on images with a reviewer's verdict: neither segmented nor estimated."""
    return [
        DecisionRow(sample_id, -1, 0, kept, reason, in_training=kept)
        for ids, kept, reason in ((rejected, False, "rejected"), (accepted, True, "accepted"))
        for sample_id in ids
    ]


def _decision_row(
    sample_id: str, object_idx: int, prompt: Prompts, candidate: Candidate, decision: Decision, *, in_training: bool
) -> DecisionRow:
    best = candidate.masks[candidate.best]
    local = prompt.component if prompt.component is not None else np.zeros_like(best)
    (height, width), lengths = best.shape, {"local_rle": to_rle(local), "segmenter_rle": to_rle(best)}
    place = {"sample_id": sample_id, "object_idx": object_idx, "class_id": prompt.class_id, "in_training": in_training}
    return DecisionRow(**place, **vars(decision), height=height, width=width, **lengths)

"""Images of a batch and what they share."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from helpers.small import CFG, context

from kmine.feedback.verdict_effects import NO_VERDICTS
from kmine.mining.candidates import read_batch
from kmine.mining.context import ImageBatch
from kmine.types import Sample


def test_embeddings_belong_to_one_batch():
    samples = [Sample(i, i, np.zeros((2, 2, 3), np.uint8)) for i in "ab"]
    first, second = ImageBatch(samples), ImageBatch(samples)
    first.embedded[0] = None
    assert first.ids == ["a", "b"] and second.embedded == {}


def test_a_batch_reads_the_images_without_a_verdict(task_of):
    task, _ = task_of(CFG)
    a, b, c = task.unlabeled.ids[:3]
    ctx = context(replace(task, review=replace(NO_VERDICTS, rejected=frozenset([b]))))
    batch = read_batch(ctx, [a, b, c], 7)
    assert (batch.ids, list(batch.reviewed), batch.batch_idx) == ([a, c], [b], 7)
    assert all(image.mask is None for image in batch.images)

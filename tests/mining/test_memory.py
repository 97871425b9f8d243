"""Proposals from memory: what is shown, in which order volumes are tracked, and what becomes of the masks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from helpers.memory_source import MemorySource
from helpers.small import CFG, context

from kmine.config import PromptsConfig
from kmine.data.cache.sample_cache import SampleCache
from kmine.data.pool import Pool
from kmine.errors import UserError
from kmine.mining import memory as module
from kmine.mining.memory import Memory, memory_of
from kmine.segmenters.base import MemorySegmenter
from kmine.segmenters.ellipse import Ellipse
from kmine.segmenters.registry import check_prompting, fitted_prompts
from kmine.types import Probs, slice_id

SLICES = [slice_id("v", n) for n in range(5)]
OTHERS = ["a", "b"]


class Remembering(Ellipse):
    """Recalls, in each frame, the last mask of the memory; knows an image by its first pixel."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[int], list[int], bool]] = []

    def sign_memory(self) -> str:
        return "remembered"

    def recall(self, memory, frames, *, track):
        seen: list[int] = []
        self.asked.append(([int(image[0, 0, 0]) for image, _ in memory], seen, track))
        for frame in frames:
            seen.append(int(frame[0, 0, 0]))
            yield memory[-1][1].copy()


@pytest.fixture
def ctx(task_of, tmp_path, monkeypatch):
    """Five slices of a volume, of which number 2 shows the largest object, and two further images."""
    names = [*SLICES, *OTHERS]
    images = {name: np.full((32, 32, 3), 10 * n, np.uint8) for n, name in enumerate(names)}
    pool = Pool(SampleCache(MemorySource(images, {}), 32, tmp_path / "c", "stop"), names, dict.fromkeys(names, "g"))

    def infer(model, pool, ids, **_):
        for sample_id in ids:
            side = {SLICES[1]: 6, SLICES[2]: 12}.get(sample_id, 0)
            p = np.full((32, 32), 0.1, np.float32)
            p[4 : 4 + side, 4 : 4 + side] = 0.9
            yield Probs(sample_id, np.stack([1 - p, p]))

    monkeypatch.setattr(module, "infer", infer)
    cfg = replace(CFG, rounds=1, prompts=PromptsConfig(source="memory", min_area_px=1))
    task, _ = task_of(replace(CFG, rounds=1), segmenter=Remembering())
    return replace(context(replace(task, cfg=cfg)), pool=pool, memory=Memory(task.labeled, 2))


def test_a_volume_is_tracked_once_from_its_clearest_slice_to_both_ends(ctx):
    found = list(ctx.memory.proposals(ctx, SLICES))
    assert ctx.segmenter.asked == [([20], [30, 40], True), ([20], [10, 0], True)]
    key = found[2].masks[0]
    assert key[10, 10] and key.sum() < 200, "the segmenter's answer to the prompt of slice 2, an ellipse in its box"
    assert all(len(f.masks) == 1 and np.array_equal(f.masks[0], key) for f in found)
    assert next(iter(ctx.memory.proposals(ctx, SLICES[:1]))).masks.shape == (1, 32, 32)
    assert len(ctx.segmenter.asked) == 2, "the volume was kept"
    assert np.array_equal(next(iter(ctx.memory.proposals(ctx, SLICES[4:]))).masks[0], key)


def test_other_images_are_asked_with_labeled_ones_that_show_the_class(ctx):
    labeled = ctx.task.labeled
    shown = [i for i in labeled.ids if (labeled.mask_resized(i) == 1).any()]
    (proposals,) = ctx.memory.proposals(ctx, ["a"])
    ((images, seen, track),) = ctx.segmenter.asked
    assert seen == [50] and not track and len(images) == min(len(shown), module.MOST_SHOWN)
    union = proposals.masks.any(axis=0)
    chosen = shown[(module.MOST_SHOWN - 1) * len(shown) // module.MOST_SHOWN]
    assert np.array_equal(union, labeled.sample(chosen).mask == 1), "the components of what was recalled"


def test_without_an_object_in_the_volume_nothing_is_recalled(ctx, monkeypatch):
    empty = Probs("", np.stack([np.ones((32, 32), np.float32), np.zeros((32, 32), np.float32)]))
    monkeypatch.setattr(module, "infer", lambda model, pool, ids, **_: (replace(empty, sample_id=i) for i in ids))
    assert [len(p.masks) for p in ctx.memory.proposals(ctx, SLICES)] == [0] * 5 and not ctx.segmenter.asked


def test_memory_is_for_its_source_and_its_segmenters_alone(ctx):
    assert isinstance(ctx.segmenter, MemorySegmenter) and memory_of(ctx.task, ctx.task.labeled) is not None
    assert memory_of(replace(ctx.task, cfg=CFG), ctx.task.labeled) is None
    with pytest.raises(UserError, match=r"memory expects a SAM 2 with its video model, got `tiny`"):
        check_prompting("tiny", ctx.task.cfg.prompts)
    with pytest.raises(UserError, match=r"memory expects a SAM 2"):
        fitted_prompts(Ellipse(), ctx.task.cfg.prompts)
    assert fitted_prompts(Remembering(), ctx.task.cfg.prompts).source == "memory"

"""SAM's image encoder sees each image once: in three rounds, with two seeds, in a second run, adaptation included."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
import torch
from helpers.small import CFG
from segment_anything.modeling import ImageEncoderViT

from kmine.config import AdaptConfig, SegmenterConfig
from kmine.methods.mining import mine
from kmine.mining.adaptation.step import adapt_segmenter
from kmine.segmenters.sam import build as module
from kmine.segmenters.sam import proposals as sam_auto
from kmine.segmenters.sam import segmenter as segmenter_module
from kmine.segmenters.sam.build import ARCHITECTURES, Architecture, build_sam
from kmine.store.settings import RESUMABLE_CHANGES


@pytest.fixture
def encoded(monkeypatch) -> list[str]:
    """A hash of every image that any encoder saw; whatever SAM is opened is the same small one."""
    seen, forward = [], ImageEncoderViT.forward

    def listen(self, pixels):
        seen.extend(hashlib.sha256(one.numpy().tobytes()).hexdigest() for one in pixels)
        return forward(self, pixels)

    def small(name, path):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return build_sam(name, None, image_size=128)

    monkeypatch.setattr(ImageEncoderViT, "forward", listen)
    monkeypatch.setattr(module, "build_sam", small)
    monkeypatch.setitem(ARCHITECTURES, "sam_vit_b", Architecture(32, 2, 2, (1,)))
    return seen


@pytest.mark.slow
def test_each_image_is_encoded_once(task_of, tmp_path, encoded) -> None:
    cfg = replace(
        CFG,
        rounds=3,
        adopt_tolerance=1.0,
        adapt=AdaptConfig(folds=1, steps=2, batch_size=1, val_every=1),
        segmenter=SegmenterConfig("sam_vit_b", "own.pth", cache_dir=str(tmp_path / "embeddings")),
    )
    counts, asked = {}, 0
    for seed in (0, 1):
        for run in ("first", "again"):
            before = len(encoded)
            task, _store = task_of(replace(cfg, seed=seed), f"{run}_{seed}")
            for result in mine(adapt_segmenter(task)):
                counts[run, seed, result.round_idx] = len(encoded) - before
                asked += result.num_pseudo
                before = len(encoded)
    assert len(set(encoded)) == len(encoded), "an image was encoded twice"
    assert 0 < len(encoded) <= 24
    assert asked > 2 * len(encoded), "without a cache, many more would have been encoded"
    assert counts["first", 0, 0] + counts["first", 0, 1] > 0
    # Later rounds may ask about an image for the first time, a second run never.
    assert {key: count for key, count in counts.items() if key[0] == "again" and count} == {}
    assert len(list((tmp_path / "embeddings").rglob("*.emb"))) == len(encoded)


@pytest.mark.slow
def test_proposals_and_answers_of_a_round_share_one_encoding_without_a_cache(task_of, encoded, monkeypatch) -> None:
    monkeypatch.setattr(sam_auto, "POINTS_PER_SIDE", 2)
    for name in ("MIN_PREDICTED_IOU", "MIN_STABILITY"):
        monkeypatch.setattr(sam_auto, name, -9.0)
    proposed, real = [], sam_auto.propose
    monkeypatch.setattr(
        segmenter_module, "propose", lambda *args, **more: proposed.append(real(*args, **more)) or proposed[-1]
    )
    segmenter = SegmenterConfig("sam_vit_b", "own.pth", cache_gb=0)
    cfg = replace(CFG, rounds=1, segmenter=segmenter, prompts=replace(CFG.prompts, source="auto"))
    task, store = task_of(cfg)
    list(mine(task))
    assert any(row.is_object for row in store.decisions(1))
    assert len(proposed) == len(encoded) == len(set(encoded)) > 0


def test_the_cache_may_move_between_two_sessions_of_a_run_its_precision_may_not() -> None:
    assert {"segmenter.cache_dir", "segmenter.cache_gb"} <= set(RESUMABLE_CHANGES)
    assert "segmenter.cache_dtype" not in RESUMABLE_CHANGES

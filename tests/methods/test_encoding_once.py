"""SAM encodes each image once: over three rounds, two seeds and a second run, adaptation included."""

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
from kmine.segmenters.sam import build, proposals, segmenter
from kmine.segmenters.sam.build import ARCHITECTURES, Architecture, build_sam
from kmine.store.settings import RESUMABLE_CHANGES


@pytest.fixture
def encoded(monkeypatch) -> list[str]:
    """SHA-256 of each encoded image, in order; every SAM that is opened is the same small one."""
    digests, forward = [], ImageEncoderViT.forward

    def recording_forward(self, pixels):
        digests.extend(hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in pixels)
        return forward(self, pixels)

    def build_small_sam(name, path):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return build_sam(name, None, image_size=128)

    monkeypatch.setattr(ImageEncoderViT, "forward", recording_forward)
    monkeypatch.setattr(build, "build_sam", build_small_sam)
    monkeypatch.setitem(ARCHITECTURES, "sam_vit_b", Architecture(32, 2, 2, (1,)))
    return digests


@pytest.mark.slow
def test_each_image_is_encoded_once(task_of, tmp_path, encoded) -> None:
    cfg = replace(
        CFG,
        rounds=3,
        adopt_tolerance=1.0,
        data=replace(CFG.data, num_samples=14),
        fit=replace(CFG.fit, steps=6, round_steps=2, val_every=6),
        adapt=AdaptConfig(folds=1, steps=2, batch_size=1, val_every=1),
        segmenter=SegmenterConfig("sam_vit_b", "own.pth", cache_dir=str(tmp_path / "embeddings")),
    )
    num_encoded, num_segmented = {}, 0
    for seed in (0, 1):
        for run in ("first", "again"):
            before = len(encoded)
            task, _store = task_of(replace(cfg, seed=seed), f"{run}_{seed}")
            for result in mine(adapt_segmenter(task)):
                num_encoded[run, seed, result.round_idx] = len(encoded) - before
                num_segmented += result.num_pseudo
                before = len(encoded)
    assert len(set(encoded)) == len(encoded), "an image was encoded twice"
    assert 0 < len(encoded) <= 14
    assert num_segmented > 2 * len(encoded), "without a cache, many more would have been encoded"
    assert num_encoded["first", 0, 0] + num_encoded["first", 0, 1] > 0
    # A later round may prompt an image for the first time, a second run does not.
    assert not any(count for (run, _, _), count in num_encoded.items() if run == "again")
    assert len(list((tmp_path / "embeddings").rglob("*.emb"))) == len(encoded)


@pytest.mark.slow
def test_proposals_and_candidates_of_a_round_share_one_encoding_without_a_cache(task_of, encoded, monkeypatch) -> None:
    monkeypatch.setattr(proposals, "POINTS_PER_SIDE", 2)
    for name in ("MIN_PREDICTED_IOU", "MIN_STABILITY"):
        monkeypatch.setattr(proposals, name, -9.0)
    proposed, propose = [], proposals.propose

    def recording_propose(*args, **settings):
        proposed.append(propose(*args, **settings))
        return proposed[-1]

    monkeypatch.setattr(segmenter, "propose", recording_propose)
    uncached = SegmenterConfig("sam_vit_b", "own.pth", cache_gb=0)
    cfg = replace(CFG, rounds=1, segmenter=uncached, prompts=replace(CFG.prompts, source="auto"))
    task, store = task_of(cfg)
    list(mine(task))
    assert any(row.is_object for row in store.decisions(1))
    assert len(proposed) == len(encoded) == len(set(encoded)) > 0


def test_a_resumed_run_may_change_place_and_size_of_the_cache_but_not_its_precision() -> None:
    assert {"segmenter.cache_dir", "segmenter.cache_gb"} <= set(RESUMABLE_CHANGES)
    assert "segmenter.cache_dtype" not in RESUMABLE_CHANGES

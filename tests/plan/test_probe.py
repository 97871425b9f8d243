"""Probes: a tiny network is timed, nothing is written where the data are."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kmine.config import DataConfig, FitConfig, LoopConfig, ModelConfig, SegmenterConfig
from kmine.data import open_source
from kmine.plan.probe import SAM_ON_CPU, SAM_ON_GPU, Speed, measure_network, measure_segmenter

CFG = LoopConfig(
    data=DataConfig(num_samples=6, size=32),
    model=ModelConfig("unet", "tu-mobilenetv3_small_050", encoder_depth=3, decoder_width=1),
    fit=FitConfig(batch_size=2),
    device="cpu",
)


def test_a_probe_measures_steps_and_predictions():
    source = open_source(CFG.data)
    speed = measure_network(CFG, source, [ref.sample_id for ref in source.refs()])
    assert (speed.size, speed.batch_size) == (32, 2)
    assert 0 < speed.infer < 5 and 0 < speed.step < 5 and speed.peak_gb > 0


def test_time_grows_with_the_pixels():
    speed = Speed(96, 8, 0.2, 0.02, 1.0)
    assert speed.at(192).step == pytest.approx(0.8) and speed.at(192).infer == pytest.approx(0.08)
    assert speed.at(96) == speed


def test_the_segmenter_is_timed_and_sam_is_looked_up():
    source = open_source(CFG.data)
    ids = [ref.sample_id for ref in source.refs()][:2]
    found = measure_segmenter(CFG, source, ids, "cpu")
    assert found.adapt_step > 0 and found.prompt > 0 and found.adapt_steps == 200
    sam = replace(CFG, segmenter=SegmenterConfig("sam_vit_b"))
    assert measure_segmenter(sam, source, ids, "cpu") == SAM_ON_CPU
    assert measure_segmenter(sam, source, ids, "cuda") == SAM_ON_GPU
    assert measure_segmenter(replace(CFG, rounds=0), source, ids, "cpu").adapt_step == 0

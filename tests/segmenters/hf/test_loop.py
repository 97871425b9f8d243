"""The loop with a model of transformers: two rounds on a few images, resumed, every image encoded once."""

from __future__ import annotations

import json

import pytest
from helpers.hf_models import save_random
from helpers.loop_command import FEW_STEPS, OPEN_GATE, SMALL, run_loop

pytest.importorskip("transformers")


@pytest.mark.slow
def test_two_rounds_resume_and_encode_each_image_once(tmp_path, monkeypatch) -> None:
    from kmine.segmenters.hf.segmenter import HfEncoder

    encoded, forward = [], HfEncoder.forward
    monkeypatch.setattr(HfEncoder, "forward", lambda self, images: encoded.append(len(images)) or forward(self, images))
    folder = save_random("sam", tmp_path / "sam-tiny")
    settings = SMALL | FEW_STEPS | OPEN_GATE | {"segmenter.name": f"hf:{folder}", "rounds": 2, "adapt.folds": 1}
    settings |= {"data.num_samples": 14, "segmenter.cache_dir": str(tmp_path / "embeddings"), "adopt_tolerance": 1}
    out = tmp_path / "run"
    assert run_loop(settings, out) == 0
    run = json.loads((out / "run.json").read_text())
    assert run["segmenter"] == "hf:sam-tiny" and len(run["segmenter_sha256"]) == 64
    num_unlabeled, first, results = run["splits"]["unlabeled"], sum(encoded), (out / "results.csv").read_bytes()
    assert 0 < first <= num_unlabeled <= 8, "each image at most once in two rounds"
    assert run_loop(settings, out) == 0
    assert sum(encoded) == first and (out / "results.csv").read_bytes() == results
    assert run_loop(settings, tmp_path / "again", cache=out.parent / "cache") == 0
    assert sum(encoded) == first, "the second run reads all embeddings of the first"

"""KnowledgeMiner: parameters, settings of a run, refusals; `fit` leaves a run folder and its attributes."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
from helpers.loop_command import FEW_STEPS, OPEN_GATE, SMALL

from kmine.api.arrays import ArrayDataset
from kmine.api.miner import KnowledgeMiner, _labeled_round
from kmine.api.run import Run
from kmine.cli import to_dict
from kmine.config import DataConfig, LoopConfig, ModelConfig, SegmenterConfig
from kmine.errors import UserError
from kmine.feedback.verdicts import FORMAT
from kmine.io.files import encode_png
from kmine.store.run_folder import RunFolder


def test_parameters_are_read_and_set_by_name():
    miner = KnowledgeMiner(rounds=2, fit__steps=50)
    assert miner.get_params()["rounds"] == 2 and miner.get_params()["fit__steps"] == 50
    same = miner.set_params(seed=7, fit__steps=60)
    assert same is miner and miner.get_params() == KnowledgeMiner(rounds=2, seed=7, fit__steps=60).get_params()


def test_arguments_win_over_config_and_settings_over_both(tmp_path):
    config = LoopConfig(rounds=9, adopt_tolerance=0.5)
    miner = KnowledgeMiner(segmenter="ellipse", rounds=1, config=config, data__size=64, fit__steps=5)
    cfg = miner._loop_config(DataConfig(num_samples=30), tmp_path)
    assert (cfg.rounds, cfg.adopt_tolerance, cfg.fit.steps, cfg.segmenter.name) == (1, 0.5, 5, "ellipse")
    assert (cfg.data.num_samples, cfg.data.size, cfg.out) == (30, 64, str(tmp_path))


def test_what_is_not_given_is_as_in_config(tmp_path):
    config = LoopConfig(rounds=9, seed=4, device="cpu", model=ModelConfig("sks"), segmenter=SegmenterConfig("ellipse"))
    assert KnowledgeMiner(config=config)._loop_config(config.data, tmp_path) == replace(config, out=str(tmp_path))
    assert KnowledgeMiner()._loop_config(DataConfig(), tmp_path) == LoopConfig(out=str(tmp_path))


def test_all_masks_of_arrays_are_labels_unless_settings_differ(tmp_path):
    image, mask = np.zeros((8, 8, 3), np.uint8), np.eye(8, dtype=int)
    data = ArrayDataset([image, image], [mask, None])
    cfg = KnowledgeMiner()._loop_config(data, tmp_path / "a")
    assert (cfg.data.name, cfg.data.label_fraction, cfg.data.test_fraction) == ("folder", 1.0, 0.0)
    assert KnowledgeMiner(data__test_fraction=0.2)._loop_config(data, tmp_path / "b").data.test_fraction == 0.2


def test_settings_are_paths_and_numbers_of_numpy_too_and_no_other_objects(tmp_path):
    settings = {"segmenter__checkpoint": tmp_path / "w.pth", "fit__steps": np.int64(60), "fit__lr": np.float32(0.5)}
    miner = KnowledgeMiner(seed=np.int64(3), data__window=np.array([-160, 240]), adapt__enabled=np.False_, **settings)
    cfg = miner._loop_config(DataConfig(), tmp_path)
    assert (cfg.segmenter.checkpoint, cfg.fit.steps, cfg.fit.lr) == (str(tmp_path / "w.pth"), 60, 0.5)
    assert (cfg.seed, cfg.data.window, cfg.adapt.enabled) == (3, (-160, 240), False)
    for value in (object(), [object()], b"w.pth", {1j}):
        with pytest.raises(UserError, match=r"KnowledgeMiner: fit\.steps: expected text, .* got \w+; convert it"):
            KnowledgeMiner(fit__steps=value)._loop_config(DataConfig(), tmp_path)


def test_labels_dropped_by_a_reviewer_never_enter_and_corrected_images_enter_as_labels(tmp_path):
    splits = {"kept": "labeled", "dropped": "labeled", "drawn": "unlabeled", "mined": "unlabeled", "v": "val"}
    (tmp_path / "drawn.png").write_bytes(encode_png(np.ones((2, 2), np.uint8), "", 0))
    rows = [{"sample_id": i, "kind": "labeled", "verdict": "reject"} for i in ("dropped", "v")]
    value = {"format": FORMAT, "verdicts": rows, "corrected": {"drawn": {"file": "drawn.png"}}}
    (tmp_path / "verdicts.json").write_text(json.dumps(value))
    with closing(RunFolder(tmp_path / "run")) as run:
        run.claim(to_dict(LoopConfig(verdicts=str(tmp_path / "verdicts.json"))), "f")
        run.write_csv("splits.csv", ("sample_id", "group_id", "split"), [(i, i, side) for i, side in splits.items()])
    assert _labeled_round(Run(tmp_path / "run")) == {"kept": 0, "drawn": 0}


def test_an_unknown_setting_suggests_the_nearest(tmp_path):
    with pytest.raises(UserError, match=r"KnowledgeMiner: unknown setting fit\.step; did you mean fit\.steps"):
        KnowledgeMiner(fit__step=5)._loop_config(DataConfig(), tmp_path)


def test_an_estimator_without_a_run_cannot_predict():
    with pytest.raises(UserError, match="call fit"):
        KnowledgeMiner().predict(np.zeros((8, 8, 3), np.uint8))


def test_fit_leaves_a_run_and_predicts_in_the_frame_of_the_image(tmp_path):
    settings = {**SMALL, **FEW_STEPS, **OPEN_GATE, "data.cache_dir": str(tmp_path / "cache")}
    outer = {name: settings.pop(name) for name in ("rounds", "seed", "device") if name in settings}
    model, segmenter = settings.pop("model.name", "unet"), settings.pop("segmenter.name", "ellipse")
    named = {name.replace(".", "__"): value for name, value in settings.items() if not name.startswith("out")}
    miner = KnowledgeMiner(model=model, segmenter=segmenter, out=tmp_path / "run", **outer, **named)
    assert miner.fit(DataConfig()) is miner
    assert len(miner.rounds_) == 2 and miner.run_.root == tmp_path / "run"
    assert {0, 1} >= set(miner.labeled_round_.values()) and set(miner.pseudo_labels_) <= miner.labeled_round_.keys()
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    probs = miner.predict_proba(image)
    assert probs.shape == (2, 20, 30) and np.array_equal(miner.predict(image), probs.argmax(axis=0))

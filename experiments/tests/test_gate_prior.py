"""The fit of the ranked gate's weights finds what orders masks on every data set, and skips what orders none."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from kmine.ops.calibrator import FEATURES

PATH = Path(__file__).resolve().parents[1] / "gate" / "prior.py"


@pytest.fixture
def prior():
    spec = importlib.util.spec_from_file_location("experiment_gate_prior", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_folder(folder: Path, dataset: str, seed: int, level: float) -> Path:
    """A run whose Dice rises with agreement and falls with the deviation over flips; predicted IoU says nothing."""
    rng = np.random.default_rng(seed)
    (folder / "calibration").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"dataset": dataset, "segmenter": "made up"}))
    rows = []
    for agreement, std, iou in rng.uniform(0, 1, (120, 3)):
        known = {"agreement_iou": agreement, "tta_std": std, "predicted_iou": iou}
        rows.append(dict.fromkeys(FEATURES) | known | {"dice_segmenter": level + 0.2 * agreement - 0.1 * std})
    for n in (0, 1):
        (folder / "calibration" / f"fold_{n}.json").write_text(json.dumps({"objects": rows[n::2]}))
    return folder


def test_weights_are_those_of_the_scores_that_order_masks_on_every_data_set(prior, tmp_path, capsys):
    runs = [run_folder(tmp_path / name, name, n, level) for n, (name, level) in enumerate((("a", 0.2), ("b", 0.7)))]
    prior.main([str(run) for run in runs])
    lines = capsys.readouterr().out.splitlines()
    weights = {name: float(value) for name, value in (line.split() for line in lines if line.startswith("  "))}
    assert weights["agreement_iou"] == pytest.approx(-2 * weights["tta_std"], rel=0.25)
    assert abs(weights["predicted_iou"]) < 0.2 and weights["jitter_dice"] == 0
    assert "120 objects of a" in lines[0] and float(lines[0].split(" by weights")[0].split()[-1]) > 0.95


def test_a_run_without_a_calibration_is_named(prior, tmp_path):
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"expected calibration/fold_\*\.json"):
        prior.read(tmp_path)

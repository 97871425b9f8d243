"""Rankings beside the audit's, by hand."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers.planted_faults import FAULTS, likeness, object_of

path = Path(__file__).resolve().parents[1] / "pseudo_label_audit" / "run.py"
spec = importlib.util.spec_from_file_location("audit_run", path)
run = importlib.util.module_from_spec(spec)
spec.loader.exec_module(run)


def test_scores_of_a_mask_of_two_known_pixels():
    foreground = np.array([[0.8, 0.5, 0.1]])
    found = run.other_rankings(np.stack([1 - foreground, foreground]), np.array([[1, 0, 255]], np.uint8))
    # Of the mask's classes .8 and .5: weights e^2 / (e^2 + e^5) and e^5 / (e^2 + e^5); cleanlab 2.9.0 agrees.
    assert found["cleanlab"] == pytest.approx(-(0.8 + 0.5 * np.e**3) / (1 + np.e**3))
    assert found["loss"] == pytest.approx(-(np.log(0.8) + np.log(0.5)) / 2)
    assert found["entropy"] == pytest.approx(-(0.8 * np.log(0.8) + 0.2 * np.log(0.2) + np.log(0.5)) / 2)


def test_the_table_counts_what_stands_in_the_first_tenth_and_fifth(tmp_path):
    names = ["sample_id", "fault", "dice", *run.RANKINGS]
    rows = [
        ("a", "flipped", np.nan, 0.1, 0.1, 0.05, 0.1),
        ("b", "flipped", np.nan, 0.15, 0.2, 0.3, 0.2),
        ("c", "none", 0.5, 0.5, 0.3, 0.9, 0.3),
        ("d", "none", 0.9, 0.9, 0.4, 0.2, 0.4),
    ]
    frame = pd.DataFrame(rows, columns=names).assign(run="r", share=0.1, planting=0, kind="pseudo")
    frame.to_csv(tmp_path / "masks.csv", index=False)
    lines = run.table(tmp_path).splitlines()
    assert "| pseudo | flipped | 2 | 50% | 100% | 50% | 100% | 50% | 50% | 50% | 100% |" in lines
    assert "| suspicion | 2 | 1 | 0% | 0% | 1.00 | 1.00 |" in lines
    assert "| loss | 2 | 1 | 0% | 0% | 0.00 | -1.00 |" in lines


def test_faults_by_hand():
    mask, rng = np.zeros((40, 40), np.uint8), np.random.default_rng(0)
    mask[2:22, 4:24], mask[30:34, 30:34], mask[0, :2] = 1, 2, 255
    wrong = {name: make(mask, mask.T.copy(), rng) for name, (make, _) in FAULTS.items()}
    assert likeness(mask, mask) == 1 and all(new.shape == mask.shape for new in wrong.values())
    assert (np.unique(wrong["missing object"][2:22, 4:24]), wrong["missing object"][31, 31]) == ([0], 2)
    assert wrong["swapped class"][5, 5] == 2 and wrong["swapped class"][31, 31] == 1
    assert np.array_equal(wrong["neighbour's mask"], mask.T) and np.array_equal(wrong["flipped"], mask[:, ::-1])
    assert 0 < object_of(wrong["eroded"]).sum() < 400 and not (object_of(wrong["eroded"]) & ~object_of(mask)).any()
    assert likeness(wrong["coarse polygon"], mask) > 0.9, "squares have four corners"
    disc = (np.hypot(*np.mgrid[-20:20, -20:20]) < 15).astype(np.uint8)
    assert 0.6 < likeness(FAULTS["coarse polygon"][0](disc, disc, rng), disc) < 0.9

"""parts.py: shares by hand, and differences paired by fold."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pandas as pd
import pytest

spec = importlib.util.spec_from_file_location("parts", Path(__file__).resolve().parents[1] / "mining_engine/parts.py")
parts = importlib.util.module_from_spec(spec)
spec.loader.exec_module(parts)
IMAGES = [
    {"in_training": True, "dice_pseudo": 0.9, "wrong": 60, "corrected": 30, "broken": 10, "lesion": 100,
     "lesion_taught": 80, "wrong_taught": 20},
    {"in_training": False, "wrong": 40, "lesion": 100},
]  # fmt: skip


def test_dropped_images_count_as_taught_nothing():
    found = parts.measures(pd.DataFrame(IMAGES))
    assert found == pytest.approx(
        {"coverage": 0.5, "dice": 0.9, "lesion": 0.4, "wrong": 0.2, "corrected": 0.3, "broken": 0.1, "net": 0.2}
    )


def test_differences_are_paired_by_fold_and_have_an_interval_over_folds(tmp_path):
    rows = []
    for fold, (part, gain) in ((f, pair) for f in (0, 1) for pair in (("whole", 0), ("points", 10 * (f + 1)))):
        kept = IMAGES[0] | {"corrected": 30 + gain}
        about = {"set": "kvasir", "labels": 15.0, "fold": fold, "segmenter": "tiny", "part": part}
        rows += [about | {"sample_id": f"{fold}-{n}"} | row for n, row in enumerate([kept, IMAGES[1]])]
    pd.DataFrame(rows).to_csv(tmp_path / "parts.csv", index=False)
    whole, points = parts.table(tmp_path / "parts.csv").splitlines()[2:]
    assert whole == "| kvasir, 15 | tiny | whole | 2 | 0.500 | 0.900 | 0.400 | 0.200 | 0.30 / 0.10 | – | – | – |"
    # mean of .1 and .2; half the interval is t of one degree, 12.706, times .05
    assert points.split(" | ")[-3:] == [
        "+0.150 [-0.485, +0.785]",
        "+0.000 [+0.000, +0.000]",
        "+0.000 [+0.000, +0.000] |",
    ]


def test_every_part_is_a_change_of_the_settings(tmp_path):
    args = parts.make_parser("").parse_args(["OUT"])
    whole = parts.config(args, 15, 0, "mining", tmp_path)
    changed = {part: parts.with_part(whole, part) for part in parts.PARTS}
    assert changed.pop(parts.WHOLE) == changed.pop("on_validation") == whole
    assert all(cfg != whole for cfg in changed.values())

"""Folds cover all images once, keep groups together, and give differences with hand-computed intervals."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

spec = importlib.util.spec_from_file_location("folds", Path(__file__).resolve().parents[1] / "folds.py")
folds = importlib.util.module_from_spec(spec)
spec.loader.exec_module(folds)
GROUPS = {f"i{n:03}": f"g{n // 3}" for n in range(90)}


@pytest.mark.parametrize("num_labels", [10, 90])
def test_every_image_is_in_one_part_and_a_group_in_one_part(num_labels):
    tests = []
    for fold in range(folds.NUM_FOLDS):
        parts = folds.parts_of(GROUPS, fold, num_labels)
        tests += parts["test"]
        assert len(parts["labeled"]) == min(num_labels, 72)
        if num_labels == 10:
            used = [i for name in parts for i in parts[name]]
            assert len(used) == len({*used}) and 0 <= len(GROUPS) - len(used) < 3
            sets = [{GROUPS[i] for i in ids} for ids in parts.values()]
            assert len(set.union(*sets)) == sum(map(len, sets))
        else:
            assert parts["others"] == [] and parts["checked"] == parts["labeled"][: folds.NUM_CHECKED]
    assert sorted(tests) == sorted(GROUPS)


def test_the_interval_over_folds_by_hand():
    rows = [
        {"arm": arm, "fold": fold, "group": f"{fold}{n}", "sample_id": f"{fold}{n}", "dice": 0.5 + gain * (arm == "b")}
        for fold, gain in ((0, 0.01), (1, 0.03))
        for n in range(3)
        for arm in "ab"
    ]
    found = folds.difference(pd.DataFrame(rows), "b", "a")
    assert found.mean == pytest.approx(0.02) and found.num_images == 6
    # Two folds: standard deviation .01 * sqrt(2), of the mean .01; t with one degree of freedom is 12.706.
    assert found.folds == pytest.approx((0.02 - 0.12706, 0.02 + 0.12706), abs=1e-5)
    one = folds.difference(pd.DataFrame([row for row in rows if row["fold"] == 0]), "b", "a")
    assert np.isnan(one.folds[0]) and "folds" not in str(one)
    assert folds.table([pd.DataFrame(rows).assign(labels=60)], "a").splitlines()[2:] == [
        "| a | 60 | 0.500 | 6 | 2 |  |  |",
        "| b | 60 | 0.520 | 6 | 2 | +0.020 [+0.009, +0.031] | +0.020 [-0.107, +0.147] |",
    ]

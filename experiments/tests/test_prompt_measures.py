"""What experiments/prompts counts, by hand, and its table."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from kmine.types import Candidate, Probs, Prompts

_path = Path(__file__).resolve().parents[1] / "prompts" / "run.py"
_spec = importlib.util.spec_from_file_location("experiment_prompts", _path)
prompts_of = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(prompts_of)
NONE = np.zeros((0, 10, 20), bool)


def rectangle(rows: slice, columns: slice) -> np.ndarray:
    mask = np.zeros((10, 20), bool)
    mask[rows, columns] = True
    return mask


def candidate(mask: np.ndarray) -> Candidate:
    return Candidate(mask[None], np.ones(1, np.float32), np.ones(1, np.float32), None, NONE)


def test_sums_of_an_image_by_hand():
    # Two true objects of 36 px. Of the left one the local model sees a half, and further 18 px beside it.
    left, right = rectangle(slice(0, 6), slice(0, 6)), rectangle(slice(0, 6), slice(10, 16))
    local = rectangle(slice(0, 6), slice(3, 9))
    prob = np.where(local, 0.9, 0.1).astype(np.float32)
    probs = Probs("a", np.stack([1 - prob, prob]))
    truth = (left | right).astype(np.uint8)
    truth[9, 19] = 255
    known, missed = Prompts(1, component=local), Prompts(1)
    found = prompts_of.scores(truth, probs, [known], [candidate(left)])
    assert found == {
        **{"candidates": 1, "dice": 1.0, "objects": 2, "found": 1},
        **{"wrong": 18 + 18 + 36, "corrected": 36, "broken": 0, "gained": 36},
    }
    alarm = rectangle(slice(8, 10), slice(10, 20))  # 19 px that count, one ignored
    both = prompts_of.scores(truth, probs, [known, missed, missed], [candidate(m) for m in (left, right, alarm)])
    assert both["found"] == 2 and both["dice"] == 2.0 and (both["corrected"], both["broken"]) == (72, 19)
    empty = prompts_of.scores(truth, probs, [known], [candidate(np.zeros_like(left))])
    assert (empty["found"], empty["dice"], empty["gained"]) == (0, 0.0, 0), "the local object stays"


def rows(arm: str, dice: float, found: int) -> list[dict]:
    sums = {"candidates": 2, "objects": 2, "found": found, "wrong": 10, "corrected": 5, "broken": 1, "gained": 4}
    return [
        {"run": "r", "segmenter": "s", "arm": arm, "sample_id": f"i{n}", "group_id": f"g{n // 2}", "dice": dice, **sums}
        for n in range(8)
    ]


def test_the_table_has_ratios_of_sums_and_differences_to_one_box():
    text = prompts_of.table(pd.DataFrame(rows("one box", 1.6, 1) + rows("three boxes", 1.8, 2)))
    assert text.startswith("s: 1 runs, 8 images")
    base, other = (line.split(" | ") for line in text.splitlines()[4:])
    assert base[0] == "| one box" and base[1:] == ["2.00", "0.800", "0.500", "0.500", "0.100", "0.400 |"]
    assert other[2:4] == ["0.900 (+0.100 [+0.100, +0.100])", "1.000 (+0.500 [+0.500, +0.500])"]
    uneven = pd.DataFrame(rows("one box", 1.6, 1) + rows("three boxes", 1.8, 2))
    uneven.loc[15, "dice"] = 0.0
    low, high = map(float, prompts_of.table(uneven).splitlines()[5].split("[")[1].split("]")[0].split(", "))
    assert low < -0.01 < 0.0999 < high == pytest.approx(0.1)

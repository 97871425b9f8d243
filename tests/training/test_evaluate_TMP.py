"""Evaluation of predictions against given masks."""

from __future__ import annotations

import numpy as np
import pytest

from kmine.training.evaluation import evaluate
from kmine.types import Sample


def sample(sample_id: str, mask: np.ndarray | None) -> Sample:
    return Sample(sample_id, sample_id, np.zeros((4, 4, 3), np.uint8), mask)


def test_the_mean_is_over_cases_and_cases_are_kept():
    half = np.zeros((4, 4), np.uint8)
    half[:2] = 1
    quarter = np.zeros((4, 4), np.uint8)
    quarter[:1] = 1
    found = evaluate([(sample("a", half), half), (sample("b", half), quarter)], 2)
    assert [c.sample_id for c in found.cases] == ["a", "b"]
    assert found.dice == pytest.approx((1 + 2 / 3) / 2)
    assert found.iou == pytest.approx((1 + 0.5) / 2)


def test_a_sample_without_its_mask_is_our_own_mistake():
    with pytest.raises(ValueError, match="without its mask"):
        evaluate([(sample("a", None), np.zeros((4, 4), np.uint8))], 2)

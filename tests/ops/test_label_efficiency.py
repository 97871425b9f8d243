"""Labels needed, read off a curve: cases by hand, and what the interval is worth on simulated data."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kmine.ops.label_efficiency import labels_needed, labels_to_match


@pytest.mark.parametrize(
    ("scores", "target", "needed"),
    [
        ([0.2, 0.6], 0.4, 31.6227766),  # half way, on a logarithmic axis, between 10 and 100
        ([0.2, 0.6], 0.2, 10),
        ([0.2, 0.6], 0.1, 10),
        ([0.2, 0.6], 0.6, 100),
        ([0.2, 0.6], 0.61, np.inf),
    ],
)
def test_two_points(scores, target, needed):
    assert labels_needed([10, 100], np.array(scores), target) == pytest.approx(needed)


def test_a_dip_is_levelled_out():
    """.5 and .3 become .4 both: the curve reaches .4 at its second point, not before it falls."""
    assert labels_needed([10, 20, 40, 80], np.array([0.1, 0.5, 0.3, 0.8]), 0.4) == pytest.approx(20)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=6), st.floats(0, 1), st.floats(0, 1))
def test_a_higher_target_never_needs_fewer(scores, one, other):
    counts = [10 * 2**n for n in range(len(scores))]
    low, high = sorted((one, other))
    assert labels_needed(counts, np.array(scores), low) <= labels_needed(counts, np.array(scores), high)


def test_the_interval_holds_the_truth_and_narrows_with_seeds():
    """Dice rises by .1 for each doubling of 10, 20, 40, 80 labels; the other method is worth 28.3 labels."""
    rng = np.random.default_rng(0)
    images = rng.normal(0, 0.2, 60)

    def scores(mean, seeds):
        return mean + images + rng.normal(0, 0.02, (seeds, 1)) + rng.normal(0, 0.1, (seeds, 60))

    widths = []
    for seeds in (2, 20):
        curve = [scores(mean, seeds) for mean in (0.4, 0.5, 0.6, 0.7)]
        found = labels_to_match([10, 20, 40, 80], curve, scores(0.55, seeds), [str(n) for n in range(60)], seed=0)
        assert found.low <= 28.3 <= found.high
        assert found.low <= found.needed <= found.high
        widths.append(found.high - found.low)
    assert widths[1] < widths[0]


def test_images_of_a_group_are_drawn_together():
    """All images in two groups: more doubt than with each image for itself."""
    rng = np.random.default_rng(1)
    effect = np.repeat(rng.normal(0, 0.3, 12), 5)  # twelve groups of five, each with a gap of its own
    curve = [np.full((3, 60), mean) for mean in (0.2, 0.4, 0.6)]
    other = np.tile(0.4 + effect, (3, 1))
    alone = labels_to_match([10, 20, 40], curve, other, [str(n) for n in range(60)], seed=0)
    together = labels_to_match([10, 20, 40], curve, other, [str(n // 5) for n in range(60)], seed=0)
    assert together.high - together.low > alone.high - alone.low

"""Pairing of masks and images: shifts are found with their direction, outlines and edges by hand."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest
from helpers.image_stats import severities, square_mask

from kmine.data.datasets.phantom.dataset import PhantomSource
from kmine.data.quality.mask_alignment import (
    MIN_Z,
    AlignmentScore,
    MaskAlignment,
    NeighbourAlignment,
    check_alignment,
    check_shifted_runs,
    edges,
    find_shifted_runs,
    measure_alignment,
    outline,
)


@functools.cache
def rendered() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Edges and outlines of 120 polyps."""
    source = PhantomSource("polyp", 120, 96)
    ids = [ref.sample_id for ref in source.refs()]
    return [edges(source.image(i)) for i in ids], [outline(source.mask(i)) for i in ids]


def alignment_of(shift: int, count: int = 40) -> MaskAlignment:
    images, outlines = (arrays[:count] for arrays in rendered())
    return measure_alignment(images, outlines[shift:] + outlines[:shift])


def test_true_pairs_have_a_large_z_and_shifts_are_found():
    assert alignment_of(0).z > 5 and alignment_of(0).better_shift == 0
    for shift, better in ((1, 1), (-1, -1), (7, 0)):
        found = alignment_of(shift)
        assert found.z < MIN_Z and found.better_shift == better
        assert severities(check_alignment(found)) == {"pairing": "fault"}


def scores_of(count: int, start: int, stop: int, shift: int) -> list[AlignmentScore]:
    """Scores with masks [start, stop) taken from the image `shift` places later."""
    images, outlines = rendered()
    alignment = NeighbourAlignment()
    for n in range(count):
        alignment.add(str(n), images[n], outlines[(n + shift) % count if start <= n < stop else n])
    return alignment.finish()


@pytest.mark.parametrize("shift", [-1, 1])
@pytest.mark.parametrize(("start", "stop"), [(0, 20), (30, 45), (60, 80)])
def test_a_shifted_run_is_found_with_its_ends_and_direction(start, stop, shift):
    (found,) = find_shifted_runs(scores_of(80, start, stop, shift))
    assert found.shift == shift
    assert abs(int(found.first) - start) <= 3 and abs(int(found.last) - (stop - 1)) <= 3
    pairs = alignment_of(0, 20)
    (finding,) = check_shifted_runs([found], pairs)
    assert (finding.code, finding.severity) == ("pairing_part", "fault")
    assert f"one place {'before' if shift < 0 else 'after'} better" in finding.text
    assert check_shifted_runs([found], replace(pairs, better_shift=shift)) == []  # reported by check_alignment


def test_two_shifted_runs_are_found_and_none_in_true_pairs():
    first, second = scores_of(120, 20, 40, 1), scores_of(120, 80, 100, -1)
    assert [run.shift for run in find_shifted_runs(first[:60] + second[60:])] == [1, -1]
    assert find_shifted_runs(scores_of(120, 0, 0, 0)) == find_shifted_runs([]) == []


def test_chance_gives_no_shifted_run():
    rng = np.random.default_rng(0)
    for spread in (0.2, 0.5, 1.0):
        for _ in range(50):
            own, before, after = np.exp(rng.normal((0.4, 0, 0), spread, (300, 3))).T
            made = [AlignmentScore(str(n), *row) for n, row in enumerate(zip(own, before, after, strict=True))]
            assert find_shifted_runs(made) == []


def test_missing_images_and_masks_are_left_out_of_the_scores():
    pictures = [np.full((128, 128), value, np.float32) for value in (1, 2, 3)]
    at = np.arange(10)
    found = NeighbourAlignment()
    found.add("a", pictures[0], at)
    found.add("b", None, None)  # cannot be read
    found.add("c", pictures[1], None)
    found.add("d", pictures[2], at)
    a, d = found.finish()
    np.testing.assert_equal((a.sample_id, a.own, a.before, a.after), ("a", 1, np.nan, np.nan))
    np.testing.assert_equal((d.sample_id, d.own, d.before, d.after), ("d", 3, 2, np.nan))


def test_too_few_pairs_are_a_note():
    for count in (2, 19):
        assert severities(check_alignment(alignment_of(0, count))) == {"pairing_unknown": "note"}


def test_empty_and_full_masks_and_the_rim_have_no_outline():
    assert len(outline(square_mask(0, 0))) == len(outline(square_mask(0, 96))) == 0
    half = np.zeros((128, 128), np.uint8)
    half[:, :64] = 1
    cols = outline(half) % 128
    assert set(cols) == {63, 64} and len(cols) == 2 * 124


def test_edges_have_mean_1_at_any_contrast():
    picture = PhantomSource("polyp", 1, 96).image("polyp_000000")
    np.testing.assert_allclose(edges(picture).mean(), 1, rtol=1e-4)
    assert edges(np.zeros((50, 60, 3), np.uint8)).max() == 0

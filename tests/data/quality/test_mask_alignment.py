"""pairing: true pairs stand out, shifted ones say which way, outlines and edges by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kmine.data.datasets.phantom.dataset import PhantomSource
from kmine.data.quality import mask_alignment as stage
from kmine.types import Finding


def codes(found: list[Finding]) -> dict[str, str]:
    return {f.code: f.severity for f in found}


def square(low: int, high: int) -> np.ndarray:
    mask = np.zeros((96, 96), np.uint8)
    mask[low:high, low:high] = 1
    return mask


def pairing(shift: int, count: int = 40) -> stage.MaskAlignment:
    source = PhantomSource("polyp", count, 96)
    ids = [ref.sample_id for ref in source.refs()]
    images = [stage.edges(source.image(i)) for i in ids]
    outlines = [stage.outline(source.mask(i)) for i in ids]
    return stage.measure_alignment(images, outlines[shift:] + outlines[:shift])


def test_true_pairs_stand_out_and_shifted_ones_say_which_way():
    assert pairing(0).z > 5 and pairing(0).better_shift == 0
    for shift, better in ((1, 1), (-1, -1), (7, 0)):
        found = pairing(shift)
        assert found.z < stage.MIN_Z and found.better_shift == better
        assert codes(stage.check_alignment(found)) == {"pairing": "fault"}


def fits(count: int, start: int, stop: int, shift: int) -> list[stage.AlignmentScore]:
    """Masks from `start` to `stop` are those of the image `shift` places on."""
    source = PhantomSource("polyp", count, 96)
    ids = [ref.sample_id for ref in source.refs()]
    found = stage.NeighbourAlignment()
    for n, name in enumerate(ids):
        other = ids[(n + shift) % count] if start <= n < stop else name
        found.add(str(n), stage.edges(source.image(name)), stage.outline(source.mask(other)))
    return found.finish()


@pytest.mark.parametrize("shift", [-1, 1])
@pytest.mark.parametrize(("start", "stop"), [(0, 20), (30, 45), (60, 80)])
def test_a_shifted_part_is_found_with_its_ends_and_its_way(start, stop, shift):
    (found,) = stage.find_shifted_runs(fits(80, start, stop, shift))
    assert found.shift == shift
    assert abs(int(found.first) - start) <= 3 and abs(int(found.last) - (stop - 1)) <= 3
    pairs = pairing(0, 20)
    (said,) = stage.check_shifted_runs([found], pairs)
    assert (said.code, said.severity) == ("pairing_part", "fault")
    assert f"one place {'before' if shift < 0 else 'after'} better" in said.text
    assert stage.check_shifted_runs([found], replace(pairs, better_shift=shift)) == []  # said already


def test_two_parts_are_told_apart_and_true_pairs_have_none():
    one, two = fits(120, 20, 40, 1), fits(120, 80, 100, -1)
    assert [stretch.shift for stretch in stage.find_shifted_runs(one[:60] + two[60:])] == [1, -1]
    assert stage.find_shifted_runs(fits(120, 0, 0, 0)) == stage.find_shifted_runs([]) == []


def test_chance_makes_no_stretch_whatever_the_spread():
    rng = np.random.default_rng(0)
    for spread in (0.2, 0.5, 1.0):
        for _ in range(50):
            own, before, after = np.exp(rng.normal((0.4, 0, 0), spread, (300, 3))).T
            made = [stage.AlignmentScore(str(n), *row) for n, row in enumerate(zip(own, before, after, strict=True))]
            assert stage.find_shifted_runs(made) == []


def test_neighbours_are_those_in_the_order_of_the_files_and_what_is_missing_counts_for_nothing():
    pictures = [np.full((128, 128), value, np.float32) for value in (1, 2, 3)]
    at = np.arange(10)
    found = stage.NeighbourAlignment()
    found.add("a", pictures[0], at)
    found.add("b", None, None)  # cannot be read
    found.add("c", pictures[1], None)
    found.add("d", pictures[2], at)
    a, d = found.finish()
    np.testing.assert_equal((a.sample_id, a.own, a.before, a.after), ("a", 1, np.nan, np.nan))
    np.testing.assert_equal((d.sample_id, d.own, d.before, d.after), ("d", 3, 2, np.nan))


def test_too_few_pairs_are_a_note():
    for count in (2, 19):
        assert codes(stage.check_alignment(pairing(0, count))) == {"pairing_unknown": "note"}


def test_no_outline_of_an_empty_or_full_mask_and_none_on_the_rim():
    assert len(stage.outline(square(0, 0))) == len(stage.outline(square(0, 96))) == 0
    half = np.zeros((128, 128), np.uint8)
    half[:, :64] = 1
    cols = stage.outline(half) % 128
    assert set(cols) == {63, 64} and len(cols) == 2 * 124


def test_edges_have_mean_1_whatever_the_contrast():
    picture = PhantomSource("polyp", 1, 96).image("polyp_000000")
    np.testing.assert_allclose(stage.edges(picture).mean(), 1, rtol=1e-4)
    assert stage.edges(np.zeros((50, 60, 3), np.uint8)).max() == 0

"""pairing: true pairs stand out, shifted ones say which way, outlines and edges by hand."""

from __future__ import annotations

import numpy as np

from kmine.data.phantom import PhantomSource
from kmine.records import Finding
from kmine.stages import pairing as stage


def codes(found: list[Finding]) -> dict[str, str]:
    return {f.code: f.severity for f in found}


def square(low: int, high: int) -> np.ndarray:
    mask = np.zeros((96, 96), np.uint8)
    mask[low:high, low:high] = 1
    return mask


def pairing(shift: int, count: int = 40) -> stage.Pairing:
    source = PhantomSource("polyp", count, 96)
    ids = [ref.sample_id for ref in source.refs()]
    images = [stage.edges(source.image(i)) for i in ids]
    outlines = [stage.outline(source.mask(i)) for i in ids]
    return stage.measure_pairing(images, outlines[shift:] + outlines[:shift])


def test_true_pairs_stand_out_and_shifted_ones_say_which_way():
    assert pairing(0).z > 5 and pairing(0).better_shift == 0
    for shift, better in ((1, 1), (-1, -1), (7, 0)):
        found = pairing(shift)
        assert found.z < stage.MIN_Z and found.better_shift == better
        assert codes(stage.examine_pairing(found)) == {"pairing": "fault"}


def test_too_few_pairs_are_a_note():
    for count in (2, 19):
        assert codes(stage.examine_pairing(pairing(0, count))) == {"pairing_unknown": "note"}


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

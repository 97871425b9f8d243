"""Label Studio's run lengths: streams by hand, and round trips of any mask."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kmine.feedback.label_studio_rle import decode, encode


def test_two_pixels_by_hand():
    # Eight bytes: four of 0, four of 255; a value has 8 bits; lengths have 3, 4, 8, 16.
    bits = f"{8:032b}" + f"{7:05b}" + f"{2:04b}{3:04b}{7:04b}{15:04b}"
    bits += "1" + "00" + f"{3:03b}" + f"{0:08b}"  # a run of four zeros, of size 3
    bits += "1" + "00" + f"{3:03b}" + f"{255:08b}"
    bits += "0" * (8 - len(bits) % 8)
    by_hand = [int(bits[n : n + 8], 2) for n in range(0, len(bits), 8)]
    assert encode(np.array([[False, True]])) == by_hand
    assert decode(by_hand, 1, 2).tolist() == [[False, True]]


@pytest.mark.parametrize(
    ("pixels", "code"),
    [(2, "100111"), (4, "1011111"), (64, "11011111111"), (65, "1110000000100000011")],
)
def test_a_run_takes_the_smallest_size_that_holds_it(pixels, code):
    bits = "".join(f"{byte:08b}" for byte in encode(np.zeros((1, pixels), bool)))
    assert bits[53:].startswith(code + "0" * 8)


def test_a_run_of_more_than_65536_bytes_is_split():
    mask = np.ones((1, 16384 * 2 + 1), bool)
    bits = "".join(f"{byte:08b}" for byte in encode(mask))[53:]
    whole = "111" + "1" * 16 + "1" * 8
    assert bits.startswith(whole + whole + "111" + f"{3:016b}" + "1" * 8)
    assert (decode(encode(mask), *mask.shape) == mask).all()


def test_a_stream_is_padded_with_1_to_8_bits():
    sizes = {len(encode(np.zeros((1, n), bool))) * 8 - (53 + 14 + (n > 2) + 4 * (n > 4)) for n in range(1, 60)}
    assert sizes <= set(range(1, 9))


@given(arrays(bool, st.tuples(st.integers(1, 12), st.integers(1, 12))))
def test_a_mask_survives_bit_for_bit(mask):
    assert (decode(encode(mask), *mask.shape) == mask).all()


def test_values_that_do_not_repeat_are_read_and_any_alpha_is_inside():
    bits = f"{8:032b}" + f"{7:05b}" + f"{2:04b}{3:04b}{7:04b}{15:04b}"
    bits += "0" + "00" + f"{7:03b}" + "".join(f"{v:08b}" for v in (9, 9, 9, 0, 0, 0, 0, 1))
    bits += "0" * (-len(bits) % 8)
    assert decode([int(bits[n : n + 8], 2) for n in range(0, len(bits), 8)], 1, 2).tolist() == [[False, True]]


@pytest.mark.parametrize("damage", [lambda d: d[:-4], lambda d: d[:3], lambda d: [300, *d], lambda d: []])
def test_a_damaged_stream_is_refused(damage):
    with pytest.raises(ValueError, match=r"expected|ends"):
        decode(damage(encode(np.eye(9, dtype=bool))), 9, 9)


def test_another_size_is_refused():
    with pytest.raises(ValueError, match="3 x 3"):
        decode(encode(np.eye(9, dtype=bool)), 3, 3)

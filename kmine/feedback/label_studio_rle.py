"""Label Studio's run-length encoding of brush strokes, bit for bit as its converter writes it.

The data are (height, width, 4) bytes in row order; of a mask all four channels are 0 or 255, and alpha, the last one,
defines it. The bit stream is that of thi.ng/rle-pack. Header: 32 bits for the number of bytes, 5 for the bits of a
value less 1, four times 4 for the bits of a length less 1 (3, 4, 8, 16). Runs until all bytes are coded: 1 bit for a
repeated value, 2 for the size of the length, the length less 1, then the value or each of the values.

Conventions of the converter (label_studio_converter/brush.py): a run of up to 8, 16 or 256 bytes takes the smallest
size; a longer one is split into runs of 65,536 and a rest, all of size 16. A single byte is not a repeated value. The
stream is padded with 1 to 8 zero bits, so a whole number of bytes gets one more.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

SIZES = (3, 4, 8, 16)
"""Bits of a length, by the code of its size."""
HEADER = 32 + 5 + 4 * 4
CHANNELS = 4


def encode(mask: NDArray[np.bool_]) -> list[int]:
    """Encode an (H, W) mask as bytes."""
    values = np.repeat(mask.ravel().astype(np.uint8) * 255, CHANNELS)
    bits = [f"{len(values):032b}", f"{8 - 1:05b}", *(f"{size - 1:04b}" for size in SIZES)]
    ends = np.append(np.flatnonzero(values[1:] != values[:-1]), len(values) - 1) if len(values) else np.zeros(0, int)
    for length, value in zip(np.diff(ends, prepend=-1).tolist(), values[ends].tolist(), strict=True):
        bits += _run(length, value)
    text = "".join(bits)
    text += "0" * (8 - len(text) % 8)
    return list(int(text, 2).to_bytes(len(text) // 8, "big"))


def _run(length: int, value: int) -> list[str]:
    if length == 1:
        return [f"000000{value:08b}"]
    for number, size in enumerate(SIZES[:3]):
        if length <= 2**size:
            return [f"1{number:02b}{length - 1:0{size}b}{value:08b}"]
    most = 2 ** SIZES[3]
    whole, rest = divmod(length - 1, most)
    return [f"111{most - 1:016b}{value:08b}"] * whole + [f"111{rest:016b}{value:08b}"]


def decode(data: list[int], height: int, width: int) -> NDArray[np.bool_]:
    """Decode to a (height, width) mask: True where alpha is not 0. Reads streams of other writers too.

    Raises:
        ValueError: an invalid or truncated stream, or one of another size.
    """
    try:
        raw = bytes(data)
    except (TypeError, ValueError) as error:
        raise ValueError(f"expected bytes from 0 to 255 ({error})") from error
    text = f"{int.from_bytes(raw, 'big'):0{8 * len(raw)}b}" if raw else ""
    if len(text) < HEADER:
        raise ValueError(f"expected at least {HEADER} bits, got {len(text)}")
    total, value_bits = int(text[:32], 2), int(text[32:37], 2) + 1
    if total != CHANNELS * height * width or value_bits != 8:
        raise ValueError(
            f"expected {CHANNELS} bytes for each of {height} x {width} pixels, got {total} values of {value_bits} bits"
        )
    sizes = [int(text[at : at + 4], 2) + 1 for at in range(37, HEADER, 4)]
    out, done, at = np.zeros(total, np.uint8), 0, HEADER
    while done < total:
        size = sizes[int(text[at + 1 : at + 3] or "0", 2)]
        is_repeat, start = text[at : at + 1] == "1", at + 3 + size
        length = int(text[at + 3 : start] or "0", 2) + 1
        at = start + value_bits * (1 if is_repeat else length)
        if at > len(text) or done + length > total:
            raise ValueError(f"the stream ends after {done} of {total} values")
        if is_repeat:
            out[done : done + length] = int(text[start:at], 2)
        else:
            out[done : done + length] = [int(text[n : n + value_bits], 2) for n in range(start, at, value_bits)]
        done += length
    return out.reshape(height, width, CHANNELS)[:, :, 3] > 0

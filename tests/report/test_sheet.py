"""The contact sheet: its grid, centred pictures, outlines of masks."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from kmine.report.sheet import Tile, contact_sheet

CELL = (256 + 34 + 6, 256 + 6)


def sheet(tiles: list[Tile], columns: int = 6) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(contact_sheet(tiles, columns))))


def test_tiles_fill_rows_of_the_given_number_of_columns():
    grey = np.full((32, 32, 3), 99, np.uint8)
    drawn = sheet([Tile(grey, None, "title", "subtitle")] * 5, columns=3)
    assert drawn.shape == (2 * CELL[0] + 6, 3 * CELL[1] + 6, 3)
    cells = [drawn[6 + y * CELL[0] :, 6 + x * CELL[1] :][:256, :256] for y in range(2) for x in range(3)]
    assert [bool((cell == 99).all()) for cell in cells] == [True] * 5 + [False]


def test_a_wide_picture_is_centred_and_its_mask_outlined():
    mask = np.zeros((32, 64), np.uint8)
    mask[8:24, 8:56] = 1
    drawn = sheet([Tile(np.full((32, 64, 3), 99, np.uint8), mask, "a" * 99, "\u00e4")])
    cell = drawn[6 : 6 + 256, 6 : 6 + 256]
    rows = np.flatnonzero((cell == 99).all(axis=2).any(axis=1))
    assert (rows.min(), rows.max()) == (64, 191)
    assert (np.abs(cell.astype(int) - (0, 229, 255)) < 12).all(axis=2).sum() > 50


def test_no_tiles_give_one_empty_cell():
    assert sheet([]).shape == (CELL[0] + 6, CELL[1] + 6, 3)

"""A contact sheet: many samples in one picture, with their masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from kmine.report.panels import SIDE, draw_mask, encode_picture, thumbnail

COLUMNS = 6
_CAPTION, _GAP = 34, 6
_INK, _PAPER = (235, 235, 235), 24
_LETTERS = 38
"""Characters that fit in a caption line."""


@dataclass(frozen=True)
class Tile:
    """One sample of the sheet."""

    image: NDArray[np.uint8]
    """(H, W, 3) RGB."""
    mask: NDArray[np.uint8] | None
    """(H, W) class ids."""
    title: str
    subtitle: str


def contact_sheet(tiles: Sequence[Tile], columns: int = COLUMNS) -> bytes:
    """PNG of the tiles in rows, each with two caption lines."""
    cell_h, cell_w = SIDE + _CAPTION + _GAP, SIDE + _GAP
    rows = -(-max(len(tiles), 1) // columns)
    sheet = np.full((rows * cell_h + _GAP, min(columns, max(len(tiles), 1)) * cell_w + _GAP, 3), _PAPER, np.uint8)
    for n, tile in enumerate(tiles):
        top, left = n // columns * cell_h + _GAP, n % columns * cell_w + _GAP
        picture = thumbnail(tile.image)
        picture = picture if tile.mask is None else draw_mask(picture, tile.mask)
        height, width = picture.shape[:2]
        y, x = top + (SIDE - height) // 2, left + (SIDE - width) // 2
        sheet[y : y + height, x : x + width] = picture
        for line, text in enumerate((tile.title, tile.subtitle)):
            _write(sheet, text, (left + 2, top + SIDE + 13 + 15 * line))
    return encode_picture(sheet, ".png")


def _write(sheet: NDArray[np.uint8], text: str, at: tuple[int, int]) -> None:
    """Draw one line; of a long text the end, where names differ. cv2 draws ASCII only."""
    plain = text.encode("ascii", "replace").decode()
    plain = plain if len(plain) <= _LETTERS else f"..{plain[-_LETTERS + 2 :]}"
    cv2.putText(sheet, plain, at, cv2.FONT_HERSHEY_SIMPLEX, 0.4, _INK, 1, cv2.LINE_AA)

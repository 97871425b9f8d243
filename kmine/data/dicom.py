"""DICOM files of one frame as 8-bit grey or colour; sole home of pydicom."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray

from kmine.data.windowing import windowed
from kmine.records import SampleError

HEADER_TAGS = ["Rows", "Columns", "NumberOfFrames", "SeriesInstanceUID", "PixelSpacing", "PhotometricInterpretation"]
GREY = ("MONOCHROME1", "MONOCHROME2")
_UNREADABLE = (
    *(OSError, EOFError, ValueError, TypeError, KeyError, AttributeError, NotImplementedError, RuntimeError),
    pydicom.errors.InvalidDicomError,
    pydicom.errors.BytesLengthException,
)
"""What pydicom says of damaged files and of compressions it cannot undo."""


@dataclass(frozen=True)
class Header:
    """What the index wants to know of a file."""

    shape: tuple[int, int]
    """(H, W)."""
    series: str | None
    """SeriesInstanceUID."""
    spacing: tuple[float, float] | None
    """Millimetres per pixel (row, column), where the file says so."""


def read_header(path: Path) -> Header:
    """Read a file's header alone. Raises `SampleError` for a missing or foreign one, and for several frames."""
    data = _open(path, stop_before_pixels=True, specific_tags=HEADER_TAGS)
    try:
        frames = int(data.get("NumberOfFrames") or 1)
        shape = int(data.Rows), int(data.Columns)
        spacing = data.get("PixelSpacing")
        spacing = (float(spacing[0]), float(spacing[1])) if spacing else None
    except _UNREADABLE as error:
        raise _damaged(path, error) from error
    if frames != 1:
        raise SampleError(str(path), f"expected a DICOM file of one frame, got {frames}; store one frame a file")
    return Header(shape, str(data.get("SeriesInstanceUID") or "") or None, spacing)


def read_dicom(path: Path, window: tuple[float, float] | None) -> NDArray[np.uint8]:
    """Decode a file.

    Stored values are rescaled by the file's slope and intercept, windowed, and with MONOCHROME1 inverted.

    Args:
        path: of the file.
        window: rescaled values at the lower and the upper end of the grey scale; None takes the file's own first window
            (`own_window`). Colour is read as it is.

    Returns:
        (H, W, 3) RGB, [0, 255]; grey three times.

    Raises:
        SampleError: for a damaged file, one of several frames, a compression or colours that cannot be read, and where
            no window is known.
    """
    read_header(path)
    data = _open(path)
    try:
        stored = data.pixel_array
        kind = str(data.PhotometricInterpretation)
        slope, intercept = float(data.get("RescaleSlope", 1)), float(data.get("RescaleIntercept", 0))
        bits = int(data.BitsStored)
    except _UNREADABLE as error:
        raise _damaged(path, error) from error
    if kind == "RGB" and stored.dtype == np.uint8 and stored.ndim == 3:
        return np.ascontiguousarray(stored)
    if kind not in GREY or stored.ndim != 2:
        raise SampleError(
            str(path), f"expected grey (MONOCHROME1, MONOCHROME2) or 8-bit RGB, got {kind} of {bits} bits; convert it"
        )
    values = stored * slope + intercept
    window = window or own_window(path, data)
    if window is None and stored.dtype == np.uint8 and (slope, intercept) == (1, 0):
        window = (0, 2**bits - 1)
    if window is None:
        raise SampleError(
            str(path),
            f"expected a window, got a file without WindowCenter and WindowWidth (values {values.min():g} to "
            f"{values.max():g}); say which values are black and white with --data.window [LOW,HIGH]",
        )
    grey = windowed(values, window)
    return np.repeat((255 - grey if kind == "MONOCHROME1" else grey)[..., None], 3, axis=2)


def own_window(path: Path, data: pydicom.Dataset) -> tuple[float, float] | None:
    """The first window of a file as its two ends; None where it has none.

    DICOM PS3.3, C.11.2.1.2: LINEAR reaches black at center - width / 2 and white at center + width / 2 - 1,
    LINEAR_EXACT at center +- width / 2. Raises `SampleError` for other functions and for an empty window.
    """
    try:
        center, width = _first(data.get("WindowCenter")), _first(data.get("WindowWidth"))
    except _UNREADABLE as error:
        raise _damaged(path, error) from error
    if center is None or width is None:
        return None
    function = str(data.get("VOILUTFunction") or "LINEAR")
    low, high = center - width / 2, center + width / 2 - (1 if function == "LINEAR" else 0)
    if function not in ("LINEAR", "LINEAR_EXACT") or not low < high:
        raise SampleError(
            str(path),
            f"expected a linear window of some width, got {function} of width {width:g}; pass --data.window [LOW,HIGH]",
        )
    return low, high


def _first(value: Any) -> float | None:
    if value is None or (isinstance(value, Sequence) and not len(value)):
        return None
    return float(value[0] if isinstance(value, Sequence) and not isinstance(value, str) else value)


def _open(path: Path, **options: Any) -> pydicom.Dataset:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom's remarks on values that are not used here
            return pydicom.dcmread(path, **options)
    except FileNotFoundError as error:
        raise SampleError(str(path), "expected a DICOM file, found no such file; check the path") from error
    except PermissionError as error:
        raise SampleError(str(path), f"cannot be read ({error.strerror}); check its permissions") from error
    except pydicom.errors.InvalidDicomError as error:
        raise SampleError(str(path), "expected a DICOM file, got something else; copy it again") from error
    except _UNREADABLE as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> SampleError:
    problem = " ".join(str(error).split())
    return SampleError(
        str(path),
        f"expected a whole DICOM file, uncompressed or of a compression that pydicom can undo, got: {problem}; "
        "copy it again, or decompress it",
    )

"""DICOM files of one frame as 8-bit grey or colour."""

from __future__ import annotations

import io
import math
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kmine.data.io.image_file import refuse_size
from kmine.data.io.windowing import grey_as_rgb, windowed
from kmine.data.source import BLOCK_BYTES, require_file
from kmine.errors import SampleError

if TYPE_CHECKING:
    import pydicom

HEADER_TAGS = ["Rows", "Columns", "NumberOfFrames", "SeriesInstanceUID", "PixelSpacing", "PhotometricInterpretation"]
POSITION_TAGS = ["SeriesInstanceUID", "ImagePositionPatient", "ImageOrientationPatient"]
GREY = ("MONOCHROME1", "MONOCHROME2")
MAX_BYTES = 2**29
"""Limit for a file and for the content of a deflated file: no readable image of one frame has more."""


@dataclass(frozen=True)
class Header:
    """Header fields that the index needs."""

    shape: tuple[int, int]
    """(H, W)."""
    series: str | None
    """SeriesInstanceUID."""
    spacing: tuple[float, float] | None
    """Millimetres per pixel (row, column), None where the file has none."""


def read_header(path: Path) -> Header:
    """Read the header only. Raises `SampleError` for a missing or foreign file, and for several frames."""
    data = _open(path, stop_before_pixels=True, specific_tags=HEADER_TAGS)
    try:
        frames = int(data.get("NumberOfFrames") or 1)
        shape = int(data.Rows), int(data.Columns)
        spacing = data.get("PixelSpacing")
        spacing = (float(spacing[0]), float(spacing[1])) if spacing else None
        series = str(data.get("SeriesInstanceUID") or "") or None
    except Exception as error:  # pydicom parses values on access and raises any type
        raise _damaged(path, error) from error
    if frames != 1:
        raise SampleError(path, f"expected a DICOM file of one frame, got {frames}; store one frame a file")
    refuse_size(path, *shape)
    if spacing is not None and not all(math.isfinite(size) and size > 0 for size in spacing):
        raise _damaged(path, f"a pixel spacing of {spacing}")
    return Header(shape, series, spacing)


@dataclass(frozen=True)
class SlicePosition:
    """Position of a slice in the patient (DICOM PS3.3, C.7.6.2), in mm to the left, to the back and up."""

    series: str
    position: tuple[float, float, float]
    """Centre of the first pixel."""
    orientation: tuple[float, float, float, float, float, float]
    """Unit vector along which columns grow, then the one along which rows grow."""


def read_slice_position(path: Path) -> SlicePosition | None:
    """Position from the header of a file; None where a field is missing. Raises `SampleError`."""
    data = _open(path, stop_before_pixels=True, specific_tags=POSITION_TAGS)
    try:
        series = str(data.get("SeriesInstanceUID") or "")
        position, orientation = (tuple(map(float, data.get(name) or ())) for name in POSITION_TAGS[1:])
    except Exception as error:  # as above
        raise _damaged(path, error) from error
    if not series or len(position) != 3 or len(orientation) != 6 or not all(map(math.isfinite, position + orientation)):
        return None
    return SlicePosition(series, position, orientation)


def read_dicom(path: Path, window: tuple[float, float] | None) -> NDArray[np.uint8]:
    """(H, W, 3) RGB, [0, 255]; grey as three equal channels.

    Stored values are rescaled by the slope and intercept of the file, windowed, and inverted for MONOCHROME1. `window`
    holds the rescaled values at the ends of the grey scale; None uses `own_window`. Not used for colour.

    Raises:
        SampleError: for a damaged file, several frames, an unsupported compression or colour space, and where no
            window is known.
    """
    shape = read_header(path).shape
    data = _open(path)
    try:
        _check_frame(data, shape)
        stored = data.pixel_array
        kind = str(data.PhotometricInterpretation)
        slope, intercept = float(data.get("RescaleSlope", 1)), float(data.get("RescaleIntercept", 0))
        bits = int(data.BitsStored)
    except Exception as error:  # as above; decoders raise any type, MemoryError included
        raise _damaged(path, error) from error
    if stored.shape[:2] != shape:
        raise _damaged(path, f"pixels of shape {stored.shape} for {shape}")
    if not (math.isfinite(slope) and slope and math.isfinite(intercept)):
        raise _damaged(path, f"a rescale slope of {slope:g} and intercept of {intercept:g}")
    if kind == "RGB" and stored.dtype == np.uint8 and stored.ndim == 3:
        return np.ascontiguousarray(stored)
    if kind not in GREY or stored.ndim != 2:
        raise SampleError(
            path, f"expected grey (MONOCHROME1, MONOCHROME2) or 8-bit RGB, got {kind} of {bits} bits; convert it"
        )
    window = window or own_window(path, data)
    if window is None and stored.dtype == np.uint8 and (slope, intercept) == (1, 0):
        window = (0, 2**bits - 1)
    if window is None:
        ends = sorted(float(end) * slope + intercept for end in (stored.min(), stored.max()))
        raise SampleError(
            path,
            f"expected a window, got a file without WindowCenter and WindowWidth (values {ends[0]:g} to "
            f"{ends[1]:g}); say which values are black and white with --data.window [LOW,HIGH]",
        )
    grey = windowed(stored, window, slope, intercept)
    return grey_as_rgb(255 - grey if kind == "MONOCHROME1" else grey)


def _check_frame(data: pydicom.Dataset, shape: tuple[int, int]) -> None:
    """Refuse a compressed frame of another size than the header's: the decoder unpacks it before it compares."""
    from pydicom.encaps import get_frame
    from pydicom.uid import JPEG2000TransferSyntaxes, JPEGTransferSyntaxes

    # A frame of these is a complete JPEG file with its own size.
    if data.file_meta.TransferSyntaxUID in (*JPEGTransferSyntaxes, *JPEG2000TransferSyntaxes):
        with Image.open(io.BytesIO(get_frame(data.PixelData, 0, number_of_frames=1))) as frame:
            if (frame.height, frame.width) != shape:
                raise ValueError(f"a frame of {frame.width} x {frame.height}, expected {shape[1]} x {shape[0]}")


def own_window(path: Path, data: pydicom.Dataset) -> tuple[float, float] | None:
    """First window of a file as (low, high); None where it has none.

    DICOM PS3.3, C.11.2.1.2: LINEAR is black at center - width / 2 and white at center + width / 2 - 1, LINEAR_EXACT
    at center +- width / 2. Raises `SampleError` for other functions and for an empty window.
    """
    try:
        center, width = _first(data.get("WindowCenter")), _first(data.get("WindowWidth"))
    except Exception as error:  # as above
        raise _damaged(path, error) from error
    if center is None or width is None:
        return None
    function = str(data.get("VOILUTFunction") or "LINEAR")
    low, high = center - width / 2, center + width / 2 - (1 if function == "LINEAR" else 0)
    if function not in ("LINEAR", "LINEAR_EXACT") or not -math.inf < low < high < math.inf:
        raise SampleError(
            path,
            f"expected a linear window of some width, got {function} of width {width:g}; pass --data.window [LOW,HIGH]",
        )
    return low, high


def _first(value: Any) -> float | None:
    if value is None or (isinstance(value, Sequence) and not len(value)):
        return None
    return float(value[0] if isinstance(value, Sequence) and not isinstance(value, str) else value)


def _open(path: Path, **options: Any) -> pydicom.Dataset:
    import pydicom

    size = require_file(path, "a DICOM file")
    if size > MAX_BYTES:
        raise SampleError(path, f"expected a DICOM file of at most {MAX_BYTES:,} bytes, got {size:,}; split it")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings of pydicom about unused values
            _refuse_bomb(path)
            return pydicom.dcmread(path, **options)
    except PermissionError as error:
        raise SampleError(path, f"cannot be read ({error.strerror}); check its permissions") from error
    except pydicom.errors.InvalidDicomError as error:
        raise SampleError(path, "expected a DICOM file, got something else; copy it again") from error
    except Exception as error:  # pydicom raises any type on damaged bytes
        raise _damaged(path, error) from error


def _refuse_bomb(path: Path) -> None:
    """Count the bytes that a deflated file unpacks to: pydicom unpacks everything at once."""
    from pydicom.filereader import read_dataset, read_preamble
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    with path.open("rb") as file:
        read_preamble(file, force=False)
        meta = read_dataset(file, False, True, stop_when=lambda tag, _vr, _length: tag.group != 2)
        if meta.get("TransferSyntaxUID") != DeflatedExplicitVRLittleEndian:
            return
        unpacker, total = zlib.decompressobj(-zlib.MAX_WBITS), 0
        for block in iter(lambda: file.read(BLOCK_BYTES), b""):
            while block:
                total += len(unpacker.decompress(block, BLOCK_BYTES))
                block = unpacker.unconsumed_tail
                if total > MAX_BYTES:
                    raise ValueError(f"more than {MAX_BYTES:,} bytes unpacked")


def _damaged(path: Path, error: object) -> SampleError:
    problem = " ".join(str(error).split()) or type(error).__name__
    return SampleError(
        path,
        f"expected a whole DICOM file, uncompressed or of a compression that pydicom can undo, got: {problem}; "
        "copy it again, or decompress it",
    )

"""DICOM files as 8-bit grey or colour, frame by frame."""

from __future__ import annotations

import math
import struct
import warnings
import zlib
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kmine.data.io.file_content import BARE_DICOM, foreign_file, problem_text, read_head
from kmine.data.io.image_file import refuse_size
from kmine.data.io.windowing import grey_as_rgb, windowed
from kmine.data.source import BLOCK_BYTES, require_file
from kmine.errors import SampleError

if TYPE_CHECKING:
    import pydicom

HEADER_TAGS = ["Rows", "Columns", "NumberOfFrames", "SeriesInstanceUID", "PixelSpacing", "PhotometricInterpretation"]
HEADER_TAGS += ["ImageType", "SOPInstanceUID", "FrameOfReferenceUID", "SOPClassUID"]
SEG_CLASSES = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")
"""SOP classes Segmentation Storage and Label Map Segmentation Storage."""
POSITION_TAGS = ["SeriesInstanceUID", "ImagePositionPatient", "ImageOrientationPatient"]
GROUPS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
"""Where an enhanced file keeps scale, window, spacing and position of its frame (PS3.3, C.7.6.16)."""
GREY = ("MONOCHROME1", "MONOCHROME2")
COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
"""Colour spaces that pydicom decodes to RGB."""
PALETTE = "PALETTE COLOR"
SIZE_MARKERS = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}
"""Start of a frame, with its size, in JPEG and JPEG-LS."""
J2K_START = b"\xff\x4f\xff\x51"
NO_AXES = 0.05
"""Orientations further from two perpendicular unit vectors are no position."""
MAX_FRAMES = 2**13
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
    is_localizer: bool = False
    """Whether the file says that it is an overview to plan a scan by (PS3.3, C.8.2.1.1.1)."""
    frames: int = 1
    uid: str = ""
    """SOPInstanceUID."""
    frame_of_reference: str = ""
    """FrameOfReferenceUID, empty where the file has none."""


def read_header(path: Path) -> Header:
    """Read the header only. Raises `SampleError` for a missing or foreign file."""
    data = open_dicom(path, stop_before_pixels=True, specific_tags=[*HEADER_TAGS, *GROUPS])
    try:
        frames = int(data.get("NumberOfFrames") or 1)
        shape = int(data.Rows), int(data.Columns)
        rows_columns = _field(data, "PixelSpacing")
        spacing = (float(rows_columns[0]), float(rows_columns[1])) if rows_columns is not None else None
        series = str(data.get("SeriesInstanceUID") or "") or None
        uids = [str(data.get(name) or "") for name in ("SOPInstanceUID", "FrameOfReferenceUID")]
        is_localizer = "LOCALIZER" in map(str, data.get("ImageType") or ())
    except Exception as error:  # pydicom parses values on access and raises any type
        raise damaged_dicom(path, error) from error
    if data.get("SOPClassUID") in SEG_CLASSES:
        raise SampleError(
            path, "expected an image, got a DICOM segmentation; move it, or name its folder as data.masks"
        )
    if not 1 <= frames <= MAX_FRAMES:
        raise SampleError(path, f"expected 1 to {MAX_FRAMES:,} frames, got {frames}; split the file")
    refuse_size(path, *shape)
    if spacing is not None and not all(math.isfinite(size) and size > 0 for size in spacing):
        raise damaged_dicom(path, f"a pixel spacing of {spacing}")
    return Header(shape, series, spacing, is_localizer, frames, *uids)


@dataclass(frozen=True)
class SlicePosition:
    """Position of a slice in the patient (DICOM PS3.3, C.7.6.2), in mm to the left, to the back and up."""

    series: str
    position: tuple[float, float, float]
    """Centre of the first pixel."""
    orientation: tuple[float, float, float, float, float, float]
    """Unit vector along which columns grow, then the one along which rows grow."""


def read_slice_position(path: Path) -> SlicePosition | None:
    """Position of the first frame from the header; None where a field is missing. Raises `SampleError`."""
    return read_positions(path, 1)[0]


def read_positions(path: Path, frames: int) -> list[SlicePosition | None]:
    """Positions of the first `frames` frames. Raises `SampleError`."""
    data = open_dicom(path, stop_before_pixels=True, specific_tags=[*POSITION_TAGS, *GROUPS])
    return [_position(path, data, frame) for frame in range(frames)]


def _position(path: Path, data: pydicom.Dataset, frame: int) -> SlicePosition | None:
    try:
        series = str(data.get("SeriesInstanceUID") or "")
        position, orientation = (tuple(map(float, _field(data, name, frame=frame) or ())) for name in POSITION_TAGS[1:])
    except Exception as error:  # as above
        raise damaged_dicom(path, error) from error
    if not series or len(position) != 3 or len(orientation) != 6 or not all(map(math.isfinite, position + orientation)):
        return None
    row, column = np.array(orientation[:3]), np.array(orientation[3:])
    if not np.allclose([row @ row, column @ column, row @ column], [1, 1, 0], atol=NO_AXES):
        return None
    return SlicePosition(series, position, orientation)


def read_dicom(path: Path, window: tuple[float, float] | None, frame: int = 0) -> NDArray[np.uint8]:
    """(H, W, 3) RGB, [0, 255], of one frame; grey as three equal channels.

    Stored values are rescaled by slope and intercept, or the modality look-up table, windowed, and inverted for
    MONOCHROME1. `window` holds the rescaled values at the ends of the grey scale; None uses `own_window`, else the VOI
    look-up table. Not used for colour.

    Raises:
        SampleError: for a damaged file, an unsupported compression or colour space, and where no window is known.
    """
    header = read_header(path)
    data = _opened(path, path.stat().st_mtime_ns) if header.frames > 1 else open_dicom(path)
    try:
        _check_frame(data, header, frame)
        kind, bits = str(data.PhotometricInterpretation), int(data.BitsStored)
        slope = float(_field(data, "RescaleSlope", 1, frame=frame))
        intercept = float(_field(data, "RescaleIntercept", 0, frame=frame))
        luts = [next(iter(_field(data, f"{n}LUTSequence", frame=frame) or ()), None) for n in ("Modality", "VOI")]
    except Exception as error:  # as above
        raise damaged_dicom(path, error) from error
    stored = _decode(path, data, kind, frame)
    if stored.shape[:2] != header.shape:
        raise damaged_dicom(path, f"pixels of shape {stored.shape} for {header.shape}")
    if not (math.isfinite(slope) and slope and math.isfinite(intercept)):
        raise damaged_dicom(path, f"a rescale slope of {slope:g} and intercept of {intercept:g}")
    if stored.dtype == np.uint8 and stored.ndim == 3 and stored.shape[2] == 3 and kind in (*COLOUR, PALETTE):
        return np.ascontiguousarray(stored)
    if kind not in GREY or stored.ndim != 2:
        raise SampleError(
            path, f"expected grey (MONOCHROME1, MONOCHROME2) or 8-bit colour, got {kind} of {bits} bits; convert it"
        )
    if luts[0] is not None:
        stored, bits = _look_up(path, data, stored, luts[0])
        slope, intercept = 1.0, 0.0
    window = window or own_window(path, data, frame)
    if window is None and luts[1] is not None:
        stored, bits = _look_up(path, data, stored * slope + intercept, luts[1])
        window, slope, intercept = (0, 2**bits - 1), 1.0, 0.0
    if window is None and bits <= 8 and (slope, intercept) == (1, 0) and stored.dtype.kind == "u":
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


@lru_cache(maxsize=2)
def _opened(path: Path, mtime: int) -> pydicom.Dataset:
    """A file of several frames, each of which would else read all of it anew."""
    return open_dicom(path)


def _decode(path: Path, data: pydicom.Dataset, kind: str, frame: int) -> NDArray[Any]:
    """(H, W) stored values, or (H, W, 3) RGB, by the decoders of pydicom that are installed."""
    from pydicom.pixels import apply_color_lut, pixel_array

    try:
        stored = pixel_array(data, index=frame)
        if kind == PALETTE:
            stored = apply_color_lut(stored, data)[..., :3]
            stored = stored if stored.dtype == np.uint8 else (stored >> 8).astype(np.uint8)
    except Exception as error:  # decoders raise any type, MemoryError included
        syntax = data.file_meta.TransferSyntaxUID
        if not syntax.is_encapsulated:
            raise damaged_dicom(path, error) from error
        raise SampleError(
            path,
            f"expected pixels that can be decoded here, got {syntax.name} ({problem_text(error)}); install a decoder "
            "(pip install 'pylibjpeg[all]'), or decompress the file (gdcmconv --raw); if it is damaged, copy it again",
        ) from error
    return stored


def _look_up(
    path: Path, data: pydicom.Dataset, values: NDArray[Any], item: pydicom.Dataset
) -> tuple[NDArray[np.uint16], int]:
    """(H, W) entries of a look-up table (PS3.3, C.11.1) for values, and the bits of an entry. Raises `SampleError`."""
    try:
        count, first, bits = map(int, item.LUTDescriptor)
        count = count or 2**16
        entries = item.LUTData
        if isinstance(entries, bytes):
            wide = len(entries) >= 2 * count
            order = "<" if data.file_meta.TransferSyntaxUID.is_little_endian else ">"
            entries = np.frombuffer(entries[: 2 * count] if wide else entries, f"{order}u2" if wide else "u1")
        table = np.atleast_1d(np.asarray(entries, np.int64)).astype(np.uint16)[:count]
        if len(table) < count or not 8 <= bits <= 16:
            raise ValueError(f"a look-up table of {len(table)} entries for {count}, of {bits} bits")
    except Exception as error:  # pydicom parses values on access and raises any type
        raise damaged_dicom(path, error) from error
    if first >= 2**15 and values.min() < 0:
        first -= 2**16  # stored as unsigned, whatever the values are
    return table[np.clip(np.rint(values) - float(first), 0, count - 1).astype(np.int64)], bits


def _check_frame(data: pydicom.Dataset, header: Header, frame: int) -> None:
    """Refuse a compressed frame of another size than the header's: the decoder unpacks it before it compares."""
    from pydicom.encaps import get_frame
    from pydicom.uid import RLELossless

    syntax = data.file_meta.TransferSyntaxUID
    if not syntax.is_encapsulated or syntax == RLELossless:
        return
    # A frame of these is a complete JPEG file with its own size.
    shape = header.shape
    actual = _frame_size(get_frame(data.PixelData, frame, number_of_frames=header.frames))
    if actual != shape:
        size = f"of {actual[1]} x {actual[0]}" if actual else "without a size"
        raise ValueError(f"a frame {size}, expected {shape[1]} x {shape[0]}")


def _frame_size(frame: bytes) -> tuple[int, int] | None:
    """(H, W) in the header of a JPEG, JPEG-LS or JPEG 2000 file; None where it has none."""
    start = frame.find(J2K_START, 0, 2**16)  # behind the boxes of a JP2 file
    if start >= 0:
        right, bottom, left, top = struct.unpack_from(">4I", frame, start + 8)
        return bottom - top, right - left
    place = 2
    while place + 9 <= len(frame) and frame[place] == 0xFF:
        if frame[place + 1] in SIZE_MARKERS:
            height, width = struct.unpack_from(">HH", frame, place + 5)
            return height, width
        is_fill = frame[place + 1] == 0xFF
        place += 1 if is_fill else 2 + max(2, int.from_bytes(frame[place + 2 : place + 4], "big"))
    return None


def _field(data: pydicom.Dataset, name: str, default: Any = None, *, frame: int = 0) -> Any:
    """Value of a field, here or in the functional groups of a frame; `default` where it is absent or empty."""
    shared, of_frames = (data.get(group) or () for group in GROUPS)
    items = [data, *shared[:1], *of_frames[frame : frame + 1]]
    inner = [part for item in items[1:] for element in item if element.VR == "SQ" for part in element.value[:1]]
    found = (item.get(name) for item in (data, *inner))
    present = (value for value in found if value is not None and (not isinstance(value, Sized) or len(value)))
    return next(present, default)


def own_window(path: Path, data: pydicom.Dataset, frame: int = 0) -> tuple[float, float] | None:
    """First window of a frame as (low, high); None where it has none.

    DICOM PS3.3, C.11.2.1.2: LINEAR is black at center - width / 2 and white at center + width / 2 - 1, LINEAR_EXACT
    at center +- width / 2. Raises `SampleError` for other functions and for an empty window.
    """
    try:
        center, width = (_first(_field(data, name, frame=frame)) for name in ("WindowCenter", "WindowWidth"))
        function = str(_field(data, "VOILUTFunction", frame=frame) or "LINEAR")
    except Exception as error:  # as above
        raise damaged_dicom(path, error) from error
    if center is None or width is None:
        return None
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


def open_dicom(path: Path, **options: Any) -> pydicom.Dataset:
    """`pydicom.dcmread` of a checked file, with its `options`. Raises `SampleError`."""
    import pydicom
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    size = require_file(path, "a DICOM file")
    if size > MAX_BYTES:
        raise SampleError(path, f"expected a DICOM file of at most {MAX_BYTES:,} bytes, got {size:,}; split it")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings of pydicom about unused values
            head = read_head(path)
            is_bare = head[128:132] != b"DICM" and BARE_DICOM.match(head) is not None
            _refuse_bomb(path, force=is_bare)
            data = pydicom.dcmread(path, force=is_bare, **options)
            if "TransferSyntaxUID" not in data.file_meta:
                is_implicit, is_little = data.original_encoding
                explicit = ExplicitVRLittleEndian if is_little else ExplicitVRBigEndian
                data.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if is_implicit else explicit
            return data
    except PermissionError as error:
        raise SampleError(path, f"cannot be read ({error.strerror}); check its permissions") from error
    except pydicom.errors.InvalidDicomError as error:
        foreign = foreign_file(path, "a DICOM file", "rename it by its content, or convert it")
        raise foreign or SampleError(path, "expected a DICOM file, got something else; copy it again") from error
    except Exception as error:  # pydicom raises any type on damaged bytes
        raise damaged_dicom(path, error) from error


def _refuse_bomb(path: Path, *, force: bool) -> None:
    """Count the bytes that a deflated file unpacks to: pydicom unpacks everything at once."""
    from pydicom.filereader import read_dataset, read_preamble
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    with path.open("rb") as file:
        read_preamble(file, force=force)
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


def damaged_dicom(path: Path, error: object) -> SampleError:
    """The error for a file that is cut or damaged."""
    return SampleError(
        path,
        "expected a whole DICOM file, uncompressed or of a compression that pydicom can undo, got: "
        f"{problem_text(error)}; copy it again, or decompress it",
    )

"""NIfTI volumes as stacks of axial slices, with strict checks of header and content.

D slices of height H and width W, in radiological orientation: columns grow to the patient's left, rows to the back;
slice 0 is the lowest. Axes are permuted and flipped by the affine, never resampled: an oblique volume is cut along the
stored axis nearest to the body's. Where the affine is wrong (LiTS 28 to 47 have identity affines), image and mask come
out rotated alike.
"""

from __future__ import annotations

import gzip
import io
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from kmine.data.io.image_file import MAX_PIXELS
from kmine.data.io.windowing import windowed
from kmine.data.source import BLOCK_BYTES, require_file
from kmine.errors import SampleError

MAX_VOXELS = 2**30
"""1024 x 1024 x 1024, more than any CT: a header that claims more is damaged or hostile."""
MAX_GZIP = 1032
"""Largest ratio of deflate: a header that claims more bytes than this times the file's cannot be true."""
MAX_OFFSET = 2**26
"""Limit for the bytes before the first voxel: header and extensions, which are skipped."""
AXES = "LPS"
"""Directions in which columns, rows and slice numbers grow: to the patient's left, to the back (posterior), up."""
SAME_MM = 1e-4
HEADERS = {348: "Nifti1Header", 540: "Nifti2Header"}
"""nibabel's header classes by size in bytes."""
MAGIC = {348: (344, b"n+1\0"), 540: (4, b"n+2\0\r\n\x1a\n")}
"""Offset and value of the magic string of a single file (header and voxels), by header size."""
GRACE = 0.05
"""Seconds to wait for other readers of the cached volume before it is dropped."""
LABELS = (0, 1, 2)
"""Background, liver, tumour."""

Orientation = tuple[tuple[int, int], ...]
"""Per stored axis: index of the axis in `AXES` that it becomes, and 1 or -1 (reversed)."""
ResultT = TypeVar("ResultT")
Convert = Callable[[NDArray[Any], int], NDArray[Any]]
"""From a plane of stored voxels (first two axes) and its number along the third to a plane of uint8."""


@dataclass(frozen=True)
class _Header:
    """Fields of a NIfTI header, as nibabel reads them."""

    shape: tuple[int, int, int]
    affine: NDArray[np.float64]
    dtype: np.dtype[Any]
    offset: int
    """Bytes before the first voxel."""
    slope: float
    """HU or labels are stored values * `slope` + `inter`."""
    inter: float


@dataclass(frozen=True)
class Geometry:
    """Shape and orientation of a volume: cuts any array of its shape into the same slices."""

    shape: tuple[int, int, int]
    """As stored."""
    orientation: Orientation
    spacing: tuple[float, float] | None
    """Millimetres per pixel (row, column) of a slice; None for a header with unit spacing, which means unknown."""

    @property
    def stack_shape(self) -> tuple[int, int, int]:
        """(D, H, W)."""
        sizes = {axis: size for size, (axis, _) in zip(self.shape, self.orientation, strict=True)}
        return sizes[2], sizes[1], sizes[0]


def to_stored_axes(slices: NDArray[Any], orientation: Orientation) -> NDArray[Any]:
    """(D, H, W) slices in the axis order of the file: a view of the same memory."""
    view = slices.T.transpose([axis for axis, _ in orientation])
    return view[tuple(slice(None, None, flip) for _, flip in orientation)]


def to_slice_axes(stored: NDArray[Any], orientation: Orientation) -> NDArray[Any]:
    """Inverse of `to_stored_axes`, also a view."""
    view = stored[tuple(slice(None, None, flip) for _, flip in orientation)]
    return view.transpose(np.argsort([axis for axis, _ in orientation])).T


class VolumeCache:
    """Thread-safe cache of one decoded volume; a damaged volume is cached as its error.

    Threads read neighbouring slices slightly out of order. Before another volume is decoded, threads that wait for the
    present one are served, and its other readers are given `GRACE` seconds. Unpickled, the cache is empty.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._requests: Counter[Path | None] = Counter()
        self._readers: set[int] = set()
        self._decoding = False
        self._path: Path | None = None
        self._volume: NDArray[np.uint8] | SampleError | None = None

    def __reduce__(self) -> tuple[type[VolumeCache], tuple[()]]:
        return VolumeCache, ()

    def read(
        self, path: Path, decode: Callable[[], NDArray[np.uint8]], take: Callable[[NDArray[np.uint8]], ResultT]
    ) -> ResultT:
        """Result of `take` on the volume of `path`, decoded by `decode` unless cached.

        `take` must return a copy, not a view. Raises the `SampleError` of `decode`.
        """
        thread_id = threading.get_ident()
        with self._changed:
            self._requests[path] += 1
            try:
                if self._path != path and self._readers - {thread_id}:
                    self._changed.wait_for(lambda: self._path == path, GRACE)
                self._changed.wait_for(
                    lambda: not self._decoding and (self._path == path or not self._requests[self._path])
                )
                if self._path != path:
                    self._exchange(path, decode)
                self._readers.add(thread_id)
                if isinstance(self._volume, SampleError):
                    raise SampleError(self._volume.path, self._volume.problem)
                assert self._volume is not None, "decoded above"
                return take(self._volume)
            finally:
                self._requests[path] -= 1
                self._changed.notify_all()

    def read_slice(self, path: Path, decode: Callable[[], NDArray[np.uint8]], number: int) -> NDArray[np.uint8]:
        """(H, W) copy of one slice of the volume of `path`, see `read`."""
        return self.read(path, decode, lambda slices: slices[number].copy())

    def _exchange(self, path: Path, decode: Callable[[], NDArray[np.uint8]]) -> None:
        """Replace the cached volume; decodes without the lock, so that other threads can queue."""
        self._decoding, self._path, self._volume = True, None, None
        self._readers.clear()
        self._changed.release()
        try:
            volume: NDArray[np.uint8] | SampleError = decode()
        except SampleError as error:
            volume = error
        finally:
            self._changed.acquire()
            self._decoding = False
        self._path, self._volume = path, volume


def read_geometry(path: Path) -> Geometry:
    """Read the header only.

    Raises:
        SampleError: for a missing, empty or foreign file, and for an impossible shape, affine or data type.
    """
    from nibabel.affines import voxel_sizes
    from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

    header = _read_header(path)
    try:
        with np.errstate(all="ignore"):
            orientation = ornt_transform(io_orientation(header.affine), axcodes2ornt(AXES))
            sizes = voxel_sizes(header.affine)
        has_axes = bool(np.isfinite(orientation).all() and np.isfinite(sizes).all())
    except ValueError:  # the matrix holds NaN, or overflows
        has_axes = False
    if not has_axes:
        raise SampleError(
            path, "expected an affine that gives the axes of the body, got a singular one; convert the scan anew"
        )
    orientation = orientation.astype(int)
    by_axis = {int(axis): float(size) for size, (axis, _) in zip(sizes, orientation, strict=True)}
    unknown = np.allclose(sizes, 1, rtol=0, atol=SAME_MM)
    return Geometry(
        shape=header.shape,
        orientation=tuple((int(axis), int(flip)) for axis, flip in orientation),
        spacing=None if unknown else (by_axis[1], by_axis[0]),
    )


def read_windowed(path: Path, geometry: Geometry, window: tuple[float, float]) -> NDArray[np.uint8]:
    """(D, H, W) grey, [0, 255]: 0 at and below the first value of the window in HU, 255 at and above the second.

    NaN becomes 0. Raises `SampleError`.
    """
    header = _header_of(path, geometry)
    return _convert(path, geometry, header, lambda values, _: windowed(values, window, header.slope, header.inter))


def read_labels(path: Path, geometry: Geometry) -> NDArray[np.uint8]:
    """(D, H, W) of `LABELS`, cut by the geometry of the volume; the affine of the mask is ignored.

    Floating point labels are rounded first. Raises `SampleError`, also for another shape or label.
    """
    return _read_ids(
        path, geometry, lambda values: np.isin(values, LABELS), "the labels 0 (background), 1 (liver) and 2 (tumour)"
    )


def read_integers(path: Path, geometry: Geometry) -> NDArray[np.uint8]:
    """(D, H, W) values of a mask, cut by the geometry of its image.

    Raises:
        SampleError: also for another shape or orientation than the image's, and for values that are no integers in
            [0, 255].
    """
    own = read_geometry(path)
    if own.shape == geometry.shape and own.orientation != geometry.orientation:  # another shape is refused below
        raise SampleError(
            path, "expected a mask with the axis directions of its image, got others; save it with the image's affine"
        )
    return _read_ids(path, geometry, lambda values: (values >= 0) & (values <= 255), "class ids from 0 to 255")


def _read_ids(
    path: Path, geometry: Geometry, is_known: Callable[[NDArray[Any]], NDArray[np.bool_]], expected: str
) -> NDArray[np.uint8]:
    header = _header_of(path, geometry)

    def ids(stored: NDArray[Any], plane: int) -> NDArray[Any]:
        with np.errstate(all="ignore"):
            values = stored if (header.slope, header.inter) == (1, 0) else stored * header.slope + header.inter
        rounded = np.rint(values) if values.dtype.kind == "f" else values
        foreign = ~is_known(rounded)
        if foreign.any():
            examples = ", ".join(f"{value:g}" for value in np.unique(rounded[foreign])[:3])
            first = (*np.argwhere(foreign)[0], plane)
            number = next(
                int(first[n]) if flip == 1 else geometry.shape[n] - 1 - int(first[n])
                for n, (axis, flip) in enumerate(geometry.orientation)
                if axis == 2
            )
            raise SampleError(path, f"expected {expected}, got {examples} in slice {number}; map the labels to these")
        return rounded

    return _convert(path, geometry, header, ids)


def _convert(path: Path, geometry: Geometry, header: _Header, convert: Convert) -> NDArray[np.uint8]:
    """(D, H, W): decode a file plane by plane; memory holds the result and one plane."""
    planes = _stored(path, header.offset, header.dtype, header.shape)
    try:
        first = next(planes)  # checks the size of the file before memory for the claimed shape is allocated
        out = np.empty(geometry.stack_shape, np.uint8)
        view = to_stored_axes(out, geometry.orientation)
        view[:, :, 0] = convert(first, 0)
        for number, values in enumerate(planes, 1):
            view[:, :, number] = convert(values, number)
    except MemoryError as error:
        raise SampleError(
            path, f"expected a volume that fits into memory, got {_size(header.shape)} voxels; crop it"
        ) from error
    return out


def _header_of(path: Path, geometry: Geometry) -> _Header:
    """Header of a file that must have the shape of the volume."""
    header = _read_header(path)
    if header.shape != geometry.shape:
        raise SampleError(
            path,
            f"expected the volume's shape {_size(geometry.shape)}, got {_size(header.shape)}; "
            "it may belong to another volume, or be resampled: get the original pair",
        )
    return header


def _stored(path: Path, offset: int, dtype: np.dtype[Any], shape: tuple[int, int, int]) -> Iterator[NDArray[Any]]:
    """Stored values, plane by plane along the third axis.

    Not by nibabel, which allocates the memory that a header claims and ignores the checksum. Up to a plane of extra
    bytes is tolerated; more means that the header belongs to another volume.
    """
    plane = shape[0] * shape[1] * dtype.itemsize
    num_bytes = offset + plane * shape[2]
    size = require_file(path, "a NIfTI file")
    if num_bytes > size * (MAX_GZIP if _is_gzip(path) else 1):
        raise _damaged(path, f"{size:,} bytes on disk, {num_bytes:,} of voxels in its header")
    try:
        with _open(path) as file:
            for start in range(0, offset, BLOCK_BYTES):
                file.read(min(BLOCK_BYTES, offset - start))
            for number in range(shape[2]):
                content = file.read(plane)
                if len(content) < plane:
                    raise _damaged(path, f"{offset + number * plane + len(content):,} of {num_bytes:,} bytes")
                yield np.frombuffer(content, dtype).reshape(shape[:2], order="F")
            # gzip compares the checksum at the end of the file.
            if len(file.read(plane)) == plane:
                raise _damaged(path, f"more than the {num_bytes:,} bytes of its header")
    except SampleError:
        raise
    except Exception as error:  # decompression raises many types
        raise _damaged(path, error) from error


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path)) if _is_gzip(path) else path.open("rb")


def _is_gzip(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def _read_header(path: Path) -> _Header:
    """Read and check the header. Not `nibabel.load`, which unpacks extensions of any claimed size."""
    import nibabel

    require_file(path, "a NIfTI file")
    try:
        with _open(path) as file:
            raw = file.read(max(HEADERS))
    except PermissionError as error:
        raise SampleError(path, f"cannot be read ({error.strerror}); check its permissions") from error
    except Exception as error:
        raise _damaged(path, error) from error
    size = next((n for n in HEADERS if n in (int.from_bytes(raw[:4], "little"), int.from_bytes(raw[:4], "big"))), None)
    if size is None or len(raw) < size:
        raise _damaged(path, f"no NIfTI header in its first {len(raw)} bytes")
    start, magic = MAGIC[size]
    if raw[start : start + len(magic)] != magic:
        raise SampleError(
            path, "expected a NIfTI volume in one file, got another format, or a header alone; convert it"
        )
    try:
        header = getattr(nibabel, HEADERS[size]).from_fileobj(io.BytesIO(raw[:size]))
        shape, dtype = tuple(map(int, header.get_data_shape())), header.get_data_dtype()
        slope, inter = header.get_slope_inter()
        affine, offset = np.asarray(header.get_best_affine(), np.float64), int(header.get_data_offset())
    except Exception as error:  # errors of nibabel, and of fields that are NaN or too large
        raise _damaged(path, error) from error
    if dtype.kind not in "iuf":
        raise SampleError(path, f"expected plain numbers, got values of type {dtype}; store HU or labels")
    sides = _three_sides(path, shape)
    if not size <= offset <= MAX_OFFSET:
        raise _damaged(path, f"voxels from byte {offset:,}, expected {size} to {MAX_OFFSET:,}")
    slope, inter = 1.0 if slope is None else slope, 0.0 if inter is None else inter
    return _Header(sides, affine, dtype, offset, slope, inter)


def _three_sides(path: Path, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Shape without axes of length 1 beyond the third."""
    if len(shape) < 3 or any(side != 1 for side in shape[3:]) or min(shape) < 1:
        raise SampleError(path, f"expected a volume of three axes, got {_size(shape)}; store one scan a file")
    if math.prod(shape) > MAX_VOXELS or math.prod(sorted(shape)[-2:]) > MAX_PIXELS:
        raise SampleError(
            path,
            f"expected a volume of sane size, got {_size(shape)} voxels, limit {MAX_VOXELS:,}, {MAX_PIXELS:,} a slice; "
            "the header may be damaged",
        )
    return shape[0], shape[1], shape[2]


def _damaged(path: Path, problem: object) -> SampleError:
    text = f"expected a whole NIfTI file, got a truncated or damaged one ({problem}); copy or download it again"
    return SampleError(path, text)


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))

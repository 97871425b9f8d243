"""NIfTI volumes as stacks of axial slices, with strict checks of header and content.

D slices of height H and width W, in radiological orientation: columns grow to the patient's left, rows to the back;
slice 0 is the lowest. Axes are permuted and flipped by the affine, never resampled: an oblique volume is cut along the
stored axis nearest to the body's. Where the affine is wrong (LiTS 28 to 47 have identity affines), image and mask come
out rotated alike.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from kmine.data.io.nifti_header import (
    Geometry,
    NiftiHeader,
    Orientation,
    damaged_nifti,
    is_gzip,
    open_nifti,
    read_geometry,
    read_nifti_header,
    size_text,
)
from kmine.data.io.windowing import windowed
from kmine.data.source import BLOCK_BYTES, require_file
from kmine.errors import SampleError

MAX_GZIP = 1032
"""Largest ratio of deflate: a header that claims more bytes than this times the file's cannot be true."""
GRACE = 0.05
"""Seconds to wait for other readers of the cached volume before it is dropped."""
LABELS = (0, 1, 2)
"""Background, liver, tumour."""

ResultT = TypeVar("ResultT")
Convert = Callable[[NDArray[Any], int], NDArray[Any]]
"""From a plane of stored voxels (first two axes) and its number along the third to a plane of uint8."""


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


def read_windowed(path: Path, geometry: Geometry, window: tuple[float, float]) -> NDArray[np.uint8]:
    """(D, H, W) grey, [0, 255]: 0 at and below the first value of the window in HU, 255 at and above the second.

    NaN becomes 0. Raises `SampleError`.
    """
    header = _header_of(path, geometry)
    return _convert(path, geometry, header, lambda values, _: windowed(values, window, header.slope, header.inter))


def percentile_window(path: Path, geometry: Geometry) -> tuple[float, float]:
    """The 0.5th and 99.5th percentile of the finite values of a volume, of every 2nd row and column (own choice).

    Ends one unit apart where nearly all values are equal. Raises `SampleError`.
    """
    header = _header_of(path, geometry)
    planes = _stored(path, header.offset, header.dtype, header.shape)
    values = np.concatenate([plane[::2, ::2].astype(np.float32).ravel() for plane in planes])
    values = values[np.isfinite(values)] * np.float32(header.slope) + np.float32(header.inter)
    low, high = np.percentile(values, (0.5, 99.5)).tolist() if len(values) else (0.0, 0.0)
    return low, max(high, low + 1)


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


def _convert(path: Path, geometry: Geometry, header: NiftiHeader, convert: Convert) -> NDArray[np.uint8]:
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
            path, f"expected a volume that fits into memory, got {size_text(header.shape)} voxels; crop it"
        ) from error
    return out


def _header_of(path: Path, geometry: Geometry) -> NiftiHeader:
    """Header of a file that must have the shape of the volume."""
    header = read_nifti_header(path)
    if header.shape != geometry.shape:
        raise SampleError(
            path,
            f"expected the volume's shape {size_text(geometry.shape)}, got {size_text(header.shape)}; "
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
    if num_bytes > size * (MAX_GZIP if is_gzip(path) else 1):
        raise damaged_nifti(path, f"{size:,} bytes on disk, {num_bytes:,} of voxels in its header")
    try:
        with open_nifti(path) as file:
            for start in range(0, offset, BLOCK_BYTES):
                file.read(min(BLOCK_BYTES, offset - start))
            for number in range(shape[2]):
                content = file.read(plane)
                if len(content) < plane:
                    raise damaged_nifti(path, f"{offset + number * plane + len(content):,} of {num_bytes:,} bytes")
                yield np.frombuffer(content, dtype).reshape(shape[:2], order="F")
            # gzip compares the checksum at the end of the file.
            if len(file.read(plane)) == plane:
                raise damaged_nifti(path, f"more than the {num_bytes:,} bytes of its header")
    except SampleError:
        raise
    except Exception as error:  # decompression raises many types
        raise damaged_nifti(path, error) from error

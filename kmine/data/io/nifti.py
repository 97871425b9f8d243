"""NIfTI volumes as stacks of axial slices, decoded whole, never trusted; sole home of nibabel.

Which way slices come out: the array is turned by its affine so that, on screen, the patient's right is on the left and
the front on top, as radiologists look at it; slice 0 is the lowest one. Nothing is resampled: an oblique volume is cut
along the stored axis nearest to the body's. Where the affine is wrong about the body (the identity affines of LiTS 28
to 47 say nothing of it), slices come out turned, image and mask alike.
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

from kmine.data.io.windowing import windowed
from kmine.data.source import MAX_PIXELS, require_file
from kmine.errors import SampleError

MAX_VOXELS = 2**30
"""1024 x 1024 x 1024. No CT has as many: a header that says so is damaged, or a trap."""
MAX_GZIP = 1032
"""Bytes that deflate can unpack from one: a header that claims more from its file need not be tried."""
MAX_OFFSET = 2**26
"""Bytes before the first voxel: header and extensions, which are passed over."""
AXES = "LPS"
"""Where columns, rows and slice numbers grow: to the patient's left, to the back, up."""
SAME_MM = 1e-4
BLOCK_BYTES = 2**20
"""Bytes read at once of what is passed over."""
HEADERS = {348: "Nifti1Header", 540: "Nifti2Header"}
"""Of NIfTI-1 and NIfTI-2, nibabel's classes by their size in bytes."""
MAGIC = {348: (344, b"n+1\0"), 540: (4, b"n+2\0\r\n\x1a\n")}
"""Where it stands, and that voxels follow in the same file."""
GRACE = 0.05
"""Seconds; a thread that has its task in hand is at its slice by then."""
LABELS = (0, 1, 2)
"""Background, liver, tumour."""

ResultT = TypeVar("ResultT")
Convert = Callable[[NDArray[Any], int], NDArray[Any]]
"""Takes a plane of stored voxels (first two axes) with its number along the third; gives it as bytes."""


@dataclass(frozen=True)
class _Header:
    """What a header says, as nibabel understands it."""

    shape: tuple[int, int, int]
    affine: NDArray[np.float64]
    dtype: np.dtype[Any]
    offset: int
    """Bytes before the first voxel."""
    slope: float
    """Stored values times this, plus `inter`, are HU or labels."""
    inter: float


@dataclass(frozen=True)
class Geometry:
    """What a volume's header says: all that it takes to cut another array of its shape into the same slices."""

    shape: tuple[int, int, int]
    """As stored."""
    turn: tuple[tuple[int, int], ...]
    """Per stored axis: which of `AXES` it becomes, and 1 or -1 (reversed)."""
    spacing: tuple[float, float] | None
    """Millimetres per pixel (row, column) of a slice; None where the header has the unit spacing of an unknown one."""

    @property
    def sliced(self) -> tuple[int, int, int]:
        """(D, H, W): number, height and width of the slices."""
        sizes = {axis: size for size, (axis, _) in zip(self.shape, self.turn, strict=True)}
        return sizes[2], sizes[1], sizes[0]


class VolumeCache:
    """The volume that was decoded last; whoever asks for another one makes it forget this one.

    Safe to use from threads, which may come a little out of order: before another volume is decoded, those that wait
    for this one are served, and stragglers among its readers are given `GRACE`. A damaged volume is remembered, too.
    Pickled, it comes back empty.
    """

    def __init__(self) -> None:
        self._turn = threading.Condition()
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
        """What `take` finds in the volume of `path`, which `decode` gives where it is not in memory.

        `take` may not keep a view. Raises the `SampleError` of `decode`.
        """
        thread_id = threading.get_ident()
        with self._turn:
            self._requests[path] += 1
            try:
                if self._path != path and self._readers - {thread_id}:
                    self._turn.wait_for(lambda: self._path == path, GRACE)
                self._turn.wait_for(
                    lambda: not self._decoding and (self._path == path or not self._requests[self._path])
                )
                if self._path != path:
                    self._exchange(path, decode)
                self._readers.add(thread_id)
                if isinstance(self._volume, SampleError):
                    raise SampleError(self._volume.path, self._volume.problem)
                assert self._volume is not None, "decoded just now"
                return take(self._volume)
            finally:
                self._requests[path] -= 1
                self._turn.notify_all()

    def _exchange(self, path: Path, decode: Callable[[], NDArray[np.uint8]]) -> None:
        """Decode without the lock, so that others can come and wait."""
        self._decoding, self._path, self._volume = True, None, None
        self._readers.clear()
        self._turn.release()
        try:
            volume: NDArray[np.uint8] | SampleError = decode()
        except SampleError as error:
            volume = error
        finally:
            self._turn.acquire()
            self._decoding = False
        self._path, self._volume = path, volume


def read_geometry(path: Path) -> Geometry:
    """Read the header alone.

    Raises:
        SampleError: for a missing, empty or foreign file, and for a shape, an affine or a type that no CT has.
    """
    from nibabel.affines import voxel_sizes
    from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

    header = _read_header(path)
    try:
        with np.errstate(all="ignore"):
            turn = ornt_transform(io_orientation(header.affine), axcodes2ornt(AXES))
            sizes = voxel_sizes(header.affine)
        has_axes = bool(np.isfinite(turn).all() and np.isfinite(sizes).all())
    except ValueError:  # of a matrix with values that are no numbers, or too large
        has_axes = False
    if not has_axes:
        raise SampleError(
            str(path), "expected an affine that tells the axes of the body, got a singular one; convert the scan anew"
        )
    turn = turn.astype(int)
    by_axis = {int(axis): float(size) for size, (axis, _) in zip(sizes, turn, strict=True)}
    unknown = np.allclose(sizes, 1, rtol=0, atol=SAME_MM)
    return Geometry(
        shape=header.shape,
        turn=tuple((int(axis), int(flip)) for axis, flip in turn),
        spacing=None if unknown else (by_axis[1], by_axis[0]),
    )


def read_windowed(path: Path, geometry: Geometry, window: tuple[float, float]) -> NDArray[np.uint8]:
    """(D, H, W) grey: black at and below the window's first value in HU, white at and above its second.

    Values that are no number are black. Raises `SampleError`.
    """
    header = _header_of(path, geometry)
    return _convert(path, geometry, header, lambda values, _: windowed(values, window, header.slope, header.inter))


def read_labels(path: Path, geometry: Geometry) -> NDArray[np.uint8]:
    """(D, H, W) of `LABELS`, cut as `geometry`, the volume's, says: the mask's own affine is not asked.

    Labels stored as floating point numbers are rounded first. Raises `SampleError`, also for another shape or label.
    """
    return _read_ids(
        path,
        geometry,
        lambda values: np.isin(values, LABELS),
        "the labels 0 (background), 1 (liver) and 2 (tumour)",
    )


def read_integers(path: Path, geometry: Geometry) -> NDArray[np.uint8]:
    """(D, H, W) of a mask's values as they are, cut as `geometry`, the image's, says.

    Raises:
        SampleError: also for another shape or orientation than the image's, and for values that are no whole numbers
            from 0 to 255.
    """
    own = read_geometry(path)
    if own.shape == geometry.shape and own.turn != geometry.turn:  # another shape is named below
        raise SampleError(
            str(path),
            "expected a mask whose axes point where its image's do, got others; save it with the image's affine",
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
                for n, (axis, flip) in enumerate(geometry.turn)
                if axis == 2
            )
            raise SampleError(
                str(path), f"expected {expected}, got {examples} in slice {number}; map the labels to these"
            )
        return rounded

    return _convert(path, geometry, header, ids)


def _convert(path: Path, geometry: Geometry, header: _Header, convert: Convert) -> NDArray[np.uint8]:
    """(D, H, W): decode a file plane by plane; besides the result, one plane is in memory."""
    planes = _stored(path, header.offset, header.dtype, header.shape)
    try:
        first = next(planes)  # before memory is taken for all that a header claims
        out = np.empty(geometry.sliced, np.uint8)
        # The same memory, its axes where the file has them.
        view = out.T.transpose([axis for axis, _ in geometry.turn])
        view = view[tuple(slice(None, None, flip) for _, flip in geometry.turn)]
        view[:, :, 0] = convert(first, 0)
        for number, values in enumerate(planes, 1):
            view[:, :, number] = convert(values, number)
    except MemoryError as error:
        raise SampleError(
            str(path), f"expected a volume that fits into memory, got {_size(header.shape)} voxels; crop it"
        ) from error
    return out


def _header_of(path: Path, geometry: Geometry) -> _Header:
    """The header of an array that must have the volume's shape."""
    header = _read_header(path)
    if header.shape != geometry.shape:
        raise SampleError(
            str(path),
            f"expected the volume's shape {_size(geometry.shape)}, got {_size(header.shape)}; "
            "it may belong to another volume, or be resampled: get the original pair",
        )
    return header


def _stored(path: Path, offset: int, dtype: np.dtype[Any], shape: tuple[int, int, int]) -> Iterator[NDArray[Any]]:
    """The values as stored, plane by plane along the third axis.

    Not by nibabel, which takes the memory that a header claims and asks no checksum. Less than a plane may follow: more
    means that the header tells of another volume.
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
            # At the end of a gzip file its checksum is compared.
            if len(file.read(plane)) == plane:
                raise _damaged(path, f"more than the {num_bytes:,} bytes of its header")
    except SampleError:
        raise
    except Exception as error:  # what is wrong with a compressed stream has many names
        raise _damaged(path, error) from error


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path)) if _is_gzip(path) else path.open("rb")


def _is_gzip(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def _read_header(path: Path) -> _Header:
    """Read and check the header. Of nibabel only this much: its loading unpacks whatever extensions claim to hold."""
    import nibabel

    require_file(path, "a NIfTI file")
    try:
        with _open(path) as file:
            raw = file.read(max(HEADERS))
    except PermissionError as error:
        raise SampleError(str(path), f"cannot be read ({error.strerror}); check its permissions") from error
    except Exception as error:
        raise _damaged(path, error) from error
    size = next((n for n in HEADERS if n in (int.from_bytes(raw[:4], "little"), int.from_bytes(raw[:4], "big"))), None)
    if size is None or len(raw) < size:
        raise _damaged(path, f"no NIfTI header in its first {len(raw)} bytes")
    start, magic = MAGIC[size]
    if raw[start : start + len(magic)] != magic:
        raise SampleError(
            str(path), "expected a NIfTI volume in one file, got another format, or a header alone; convert it"
        )
    try:
        header = getattr(nibabel, HEADERS[size]).from_fileobj(io.BytesIO(raw[:size]))
        shape, dtype = tuple(map(int, header.get_data_shape())), header.get_data_dtype()
        slope, inter = header.get_slope_inter()
        affine, offset = np.asarray(header.get_best_affine(), np.float64), int(header.get_data_offset())
    except Exception as error:  # nibabel's own kinds, and those of numbers that are none
        raise _damaged(path, error) from error
    if dtype.kind not in "iuf":
        raise SampleError(str(path), f"expected plain numbers, got values of type {dtype}; store HU or labels")
    sides = _three_sides(path, shape)
    if not size <= offset <= MAX_OFFSET:
        raise _damaged(path, f"voxels from byte {offset:,}, expected {size} to {MAX_OFFSET:,}")
    slope, inter = 1.0 if slope is None else slope, 0.0 if inter is None else inter
    return _Header(sides, affine, dtype, offset, slope, inter)


def _three_sides(path: Path, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """The three sides of a volume; axes of length 1 beyond the third do not count."""
    if len(shape) < 3 or any(side != 1 for side in shape[3:]) or min(shape) < 1:
        raise SampleError(str(path), f"expected a volume of three axes, got {_size(shape)}; store one scan a file")
    if math.prod(shape) > MAX_VOXELS or math.prod(sorted(shape)[-2:]) > MAX_PIXELS:
        raise SampleError(
            str(path),
            f"expected a volume of sane size, got {_size(shape)} voxels, limit {MAX_VOXELS:,}, {MAX_PIXELS:,} a slice; "
            "the header may be damaged",
        )
    return shape[0], shape[1], shape[2]


def _damaged(path: Path, problem: object) -> SampleError:
    return SampleError(
        str(path), f"expected a whole NIfTI file, got a truncated or damaged one ({problem}); copy or download it again"
    )


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))

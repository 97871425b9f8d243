"""NIfTI volumes as stacks of axial slices, decoded whole, never trusted; sole home of nibabel.

Which way slices come out: the array is turned by its affine so that, on screen, the patient's right is on the left and
the front on top, as radiologists look at it; slice 0 is the lowest one. Nothing is resampled: an oblique volume is cut
along the stored axis nearest to the body's. Where the affine is wrong about the body (the identity affines of LiTS 28
to 47 say nothing of it), slices come out turned, image and mask alike.
"""

from __future__ import annotations

import gzip
import math
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import nibabel
import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.filebasedimages import ImageFileError
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from kmine.data.windowing import windowed
from kmine.records import SampleError

MAX_VOXELS = 2**31
"""No CT has as many: a header that says so is damaged, or a trap."""
AXES = "LPS"
"""Where columns, rows and slice numbers grow: to the patient's left, to the back, up."""
SAME_MM = 1e-4
CHUNK = 2**24
"""Bytes read at once."""
GRACE = 0.05
"""Seconds; a thread that has its task in hand is at its slice by then."""
LABELS = (0, 1, 2)
"""Background, liver, tumour."""

Found = TypeVar("Found")
_UNREADABLE = (OSError, EOFError, zlib.error, ValueError, OverflowError, ImageFileError, HeaderDataError)
"""What nibabel and gzip say of damaged files."""


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


class LastVolume:
    """The volume that was decoded last; whoever asks for another one makes it forget this one.

    Safe to use from threads, which may come a little out of order: before another volume is decoded, those that wait
    for this one are served, and stragglers among its readers are given `GRACE`. A damaged volume is remembered, too.
    Pickled, it comes back empty.
    """

    def __init__(self) -> None:
        self._turn = threading.Condition()
        self._wanted: Counter[Path | None] = Counter()
        self._readers: set[int] = set()
        self._decoding = False
        self._path: Path | None = None
        self._volume: NDArray[np.uint8] | SampleError | None = None

    def __reduce__(self) -> tuple[type[LastVolume], tuple[()]]:
        return LastVolume, ()

    def read(
        self, path: Path, decode: Callable[[], NDArray[np.uint8]], take: Callable[[NDArray[np.uint8]], Found]
    ) -> Found:
        """What `take` finds in the volume of `path`, which `decode` gives where it is not in memory.

        `take` may not keep a view. Raises the `SampleError` of `decode`.
        """
        me = threading.get_ident()
        with self._turn:
            self._wanted[path] += 1
            try:
                if self._path != path and self._readers - {me}:
                    self._turn.wait_for(lambda: self._path == path, GRACE)
                self._turn.wait_for(lambda: not self._decoding and (self._path == path or not self._wanted[self._path]))
                if self._path != path:
                    self._exchange(path, decode)
                self._readers.add(me)
                if isinstance(self._volume, SampleError):
                    raise SampleError(self._volume.path, self._volume.problem)
                assert self._volume is not None, "decoded just now"
                return take(self._volume)
            finally:
                self._wanted[path] -= 1
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
    image = _open(path)
    shape, affine = _shape(path, image), np.asarray(image.affine, np.float64)
    turn = io_orientation(affine) if np.isfinite(affine).all() else np.full((3, 2), np.nan)
    if not np.isfinite(turn).all():
        raise SampleError(
            str(path), "expected an affine that tells the axes of the body, got a singular one; convert the scan anew"
        )
    turn = ornt_transform(turn, axcodes2ornt(AXES)).astype(int)
    sizes = voxel_sizes(affine)
    by_axis = {int(axis): float(size) for size, (axis, _) in zip(sizes, turn, strict=True)}
    unknown = np.allclose(sizes, 1, rtol=0, atol=SAME_MM)
    return Geometry(
        shape=shape,
        turn=tuple((int(axis), int(flip)) for axis, flip in turn),
        spacing=None if unknown else (by_axis[1], by_axis[0]),
    )


def read_windowed(path: Path, geometry: Geometry, window: tuple[float, float]) -> NDArray[np.uint8]:
    """(D, H, W) grey: black at and below the window's first value in HU, white at and above its second.

    Values that are no number are black. Raises `SampleError`.
    """
    return _convert(path, geometry, lambda values, _: windowed(values, window))


def read_labels(path: Path, geometry: Geometry) -> NDArray[np.uint8]:
    """(D, H, W) of `LABELS`, cut as `geometry`, the volume's, says: the mask's own affine is not asked.

    Labels stored as floating point numbers are rounded first. Raises `SampleError`, also for another shape or label.
    """

    def labels(values: NDArray[Any], number: int) -> NDArray[Any]:
        rounded = np.rint(values) if values.dtype.kind == "f" else values
        foreign = ~np.isin(rounded, LABELS)
        if foreign.any():
            some = ", ".join(f"{value:g}" for value in np.unique(rounded[foreign])[:3])
            raise SampleError(
                str(path),
                f"expected the labels 0 (background), 1 (liver) and 2 (tumour), got {some} in slice {number}; "
                "map the labels to these",
            )
        return rounded

    return _convert(path, geometry, labels)


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

    def integers(values: NDArray[Any], number: int) -> NDArray[Any]:
        rounded = np.rint(values) if values.dtype.kind == "f" else values
        foreign = ~((rounded >= 0) & (rounded <= 255))
        if foreign.any():
            some = ", ".join(f"{value:g}" for value in np.unique(rounded[foreign])[:3])
            raise SampleError(
                str(path), f"expected class ids from 0 to 255, got {some} in slice {number}; map the labels to these"
            )
        return rounded

    return _convert(path, geometry, integers)


def _convert(path: Path, geometry: Geometry, convert: Callable[[NDArray[Any], int], NDArray[Any]]) -> NDArray[np.uint8]:
    """Decode a file and convert it slice by slice: at the most its stored values and the result are in memory."""
    slices = _slices(path, geometry)
    out = np.empty(geometry.sliced, np.uint8)  # only now: the header's claim has been seen through
    for number, values in enumerate(slices):
        out[number] = convert(values, number)
    return out


def _slices(path: Path, geometry: Geometry) -> Iterator[NDArray[Any]]:
    """Decode a file; then, one by one, its slices, (H, W) in its own units (HU or labels), lowest first."""
    image = _open(path)
    shape = _shape(path, image)
    if shape != geometry.shape:
        raise SampleError(
            str(path),
            f"expected the volume's shape {_size(geometry.shape)}, got {_size(shape)}; "
            "it may belong to another volume, or be resampled: get the original pair",
        )
    proxy: Any = image.dataobj
    stored = _stored(path, proxy.offset, proxy.dtype, shape)
    turned = apply_orientation(stored, np.array(geometry.turn))
    slope, inter = np.float64(proxy.slope), np.float64(proxy.inter)
    as_stored = (slope, inter) == (1, 0)
    slices = (turned[:, :, number].T for number in range(turned.shape[2]))
    return (values if as_stored else values * slope + inter for values in slices)


def _stored(path: Path, offset: int, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """The values as stored. Not by nibabel, which takes the memory that a header claims and asks no checksum."""
    num_bytes = offset + math.prod(shape) * dtype.itemsize
    content = bytearray()
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            while more := file.read(min(num_bytes - len(content), CHUNK)):
                content += more
            file.read(1)  # at the end of a gzip file its checksum is compared
    except MemoryError as error:
        raise SampleError(
            str(path), f"expected a volume that fits into memory, got {num_bytes:,} bytes; crop it"
        ) from error
    except _UNREADABLE as error:
        raise _damaged(path, error) from error
    if len(content) < num_bytes:
        raise _damaged(path, f"{len(content):,} of {num_bytes:,} bytes")
    return np.frombuffer(content, dtype, offset=offset).reshape(shape, order="F")


def _open(path: Path) -> nibabel.Nifti1Image:
    """Read the header."""
    try:
        image = nibabel.load(path, mmap=False)
    except FileNotFoundError as error:
        raise SampleError(str(path), "expected a NIfTI file, found no such file; check data.root") from error
    except (PermissionError, IsADirectoryError) as error:
        raise SampleError(str(path), f"cannot be read ({error.strerror}); check its permissions") from error
    except (*_UNREADABLE, MemoryError) as error:
        raise _damaged(path, error) from error
    if not isinstance(image, nibabel.Nifti1Image):
        raise SampleError(str(path), f"expected a NIfTI volume, got a {type(image).__name__}; convert it")
    if image.get_data_dtype().kind not in "iuf":
        raise SampleError(
            str(path), f"expected plain numbers, got values of type {image.get_data_dtype()}; store HU or labels"
        )
    return image


def _shape(path: Path, image: nibabel.Nifti1Image) -> tuple[int, int, int]:
    """The three sides of a volume; axes of length 1 beyond the third do not count."""
    shape = tuple(int(side) for side in image.shape)
    if len(shape) < 3 or any(side != 1 for side in shape[3:]) or min(shape) < 1:
        raise SampleError(str(path), f"expected a volume of three axes, got {_size(shape)}; store one scan a file")
    if math.prod(shape) > MAX_VOXELS:
        raise SampleError(
            str(path), f"expected a volume of sane size, got {_size(shape)} voxels; the header may be damaged"
        )
    return shape[:3]


def _damaged(path: Path, problem: object) -> SampleError:
    return SampleError(
        str(path), f"expected a whole NIfTI file, got a truncated or damaged one ({problem}); copy or download it again"
    )


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))

"""Headers of NIfTI files: shape, orientation, sizes in millimetres; every field checked before it is used."""

from __future__ import annotations

import gzip
import io
import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from kmine.data.io.file_content import foreign_file, problem_text
from kmine.data.io.image_file import MAX_PIXELS
from kmine.data.source import require_file
from kmine.errors import SampleError

MAX_VOXELS = 2**30
"""1024 x 1024 x 1024, more than any CT: a header that claims more is damaged or hostile."""
MAX_OFFSET = 2**26
"""Limit for the bytes before the first voxel: header and extensions, which are skipped."""
AXES = "LPS"
"""Directions in which columns, rows and slice numbers grow: to the patient's left, to the back (posterior), up."""
SAME_MM = 1e-4
SIZE_DIGITS = 9
HEADERS = {348: "Nifti1Header", 540: "Nifti2Header"}
"""nibabel's header classes by size in bytes."""
MAGIC = {348: (344, b"n+1\0"), 540: (4, b"n+2\0\r\n\x1a\n")}
"""Offset and value of the magic string of a single file (header and voxels), by header size."""
GZIP = b"\x1f\x8b"
UNIT_MM: dict[int, float | None] = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}
"""Millimetres of the units of length of NIfTI by code: none stated, metre, mm, micron."""
MM_CODE, UNIT_BITS = 2, 7
RENAME = "rename it by its content, or convert it"

Orientation = tuple[tuple[int, int], ...]
"""Per stored axis: index of the axis in `AXES` that it becomes, and 1 or -1 (reversed)."""


@dataclass(frozen=True)
class NiftiHeader:
    """Fields of a NIfTI header, as nibabel reads them."""

    shape: tuple[int, int, int]
    affine: NDArray[np.float64]
    """(4, 4), in units of the file."""
    unit_mm: float | None
    """Millimetres of that unit; None where the header states no true size."""
    has_depth: bool
    """False for a file of two axes."""
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
    """Millimetres per pixel (row, column) of a slice; None where unknown."""
    thickness: float | None = None
    """Millimetres between two slices, along their normal: pixel area times this is the volume of a voxel."""

    @property
    def stack_shape(self) -> tuple[int, int, int]:
        """(D, H, W)."""
        sizes = {axis: size for size, (axis, _) in zip(self.shape, self.orientation, strict=True)}
        return sizes[2], sizes[1], sizes[0]


def read_geometry(path: Path) -> Geometry:
    """Read the header only.

    Raises:
        SampleError: for a missing, empty or foreign file, and for an impossible shape, affine or data type.
    """
    from nibabel.affines import voxel_sizes
    from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

    header = read_nifti_header(path)
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
    unit = header.unit_mm
    by_axis = {int(axis): float(size) * (unit or 1) for size, (axis, _) in zip(sizes, orientation, strict=True)}
    volume = abs(float(np.linalg.det(header.affine[:3, :3]))) * (unit or 1) ** 3  # less than the product if sheared
    return Geometry(
        shape=header.shape,
        orientation=tuple((int(axis), int(flip)) for axis, flip in orientation),
        spacing=(by_axis[1], by_axis[0]) if unit else None,
        thickness=round(volume / (by_axis[1] * by_axis[0]), SIZE_DIGITS) if unit and header.has_depth else None,
    )


def find_misplacement(mask: Path, scan: Path) -> str:
    """How the voxels of a mask lie elsewhere in the body than those of its scan; empty within half a voxel.

    Compares spacing and positions of the corners, for equal shapes only. Raises `SampleError` for damaged headers.
    """
    own, other = read_nifti_header(mask), read_nifti_header(scan)
    if own.shape != other.shape:
        return ""
    matrices = [header.affine[:3] * (header.unit_mm or 1) for header in (own, other)]
    corners = np.array([(*corner, 1) for corner in itertools.product(*((0, side - 1) for side in own.shape))])
    with np.errstate(all="ignore"):
        sizes, true_sizes = (np.linalg.norm(matrix[:, :3], axis=0) for matrix in matrices)
        distance = float(np.linalg.norm(corners @ (matrices[0] - matrices[1]).T, axis=1).max())
        if not distance > true_sizes.min() / 2:
            return ""
        spacings = [" x ".join(f"{size:.3g}" for size in each) for each in (sizes, true_sizes)]
        if not np.allclose(sizes, true_sizes, rtol=0.01, atol=0):
            return f"a spacing of {spacings[0]} mm for {spacings[1]} mm"
    return f"an origin or direction up to {distance:.3g} mm off"


def open_nifti(path: Path) -> BinaryIO:
    """The uncompressed content of a regular file."""
    return cast(BinaryIO, gzip.open(path)) if is_gzip(path) else path.open("rb")


def is_gzip(path: Path) -> bool:
    """By content, as names may lie. Call `require_file` first."""
    with path.open("rb") as file:
        return file.read(len(GZIP)) == GZIP


def read_raw_header(path: Path, *, check: bool = True) -> Any:
    """Header of a single file as nibabel's, checked and mended by nibabel if `check`.

    Not `nibabel.load`, which unpacks extensions of any claimed size. Raises `SampleError`.
    """
    import nibabel

    require_file(path, "a NIfTI file")
    try:
        with open_nifti(path) as file:
            raw = file.read(max(HEADERS))
    except PermissionError as error:
        raise SampleError(path, f"cannot be read ({error.strerror}); check its permissions") from error
    except Exception as error:
        raise damaged_nifti(path, error) from error
    size = next((n for n in HEADERS if n in (int.from_bytes(raw[:4], "little"), int.from_bytes(raw[:4], "big"))), None)
    if size is None or len(raw) < size:
        foreign = None if raw.startswith(GZIP) or is_gzip(path) else foreign_file(path, "a NIfTI volume", RENAME)
        raise foreign or damaged_nifti(path, f"no NIfTI header in its first {len(raw)} bytes")
    start, magic = MAGIC[size]
    if raw[start : start + len(magic)] != magic:
        raise SampleError(
            path, "expected a NIfTI volume in one file, got another format, or a header alone; convert it"
        )
    try:
        return getattr(nibabel, HEADERS[size]).from_fileobj(io.BytesIO(raw[:size]), check=check)
    except Exception as error:  # errors of nibabel, and of fields that are NaN or too large
        raise damaged_nifti(path, error) from error


def read_nifti_header(path: Path) -> NiftiHeader:
    """Read and check the header. Raises `SampleError`."""
    header = read_raw_header(path)
    try:
        shape, dtype = tuple(map(int, header.get_data_shape())), header.get_data_dtype()
        slope, inter = header.get_slope_inter()
        affine, offset = np.array(header.get_best_affine(), np.float64), int(header.get_data_offset())
        size, unit_code = int(header["sizeof_hdr"]), int(header["xyzt_units"]) & UNIT_BITS
    except Exception as error:  # as above
        raise damaged_nifti(path, error) from error
    if dtype.kind not in "iuf":
        raise SampleError(path, f"expected plain numbers, got values of type {dtype}; store HU or labels")
    sides, has_depth = _three_sides(path, shape), len(shape) > 2
    if not has_depth and not affine[:3, 2].any():
        affine[:3, 2] = np.cross(affine[:3, 0], affine[:3, 1])
    if not size <= offset <= MAX_OFFSET:
        raise damaged_nifti(path, f"voxels from byte {offset:,}, expected {size} to {MAX_OFFSET:,}")
    # Converters write unit sizes where they know nothing. True ones have a place in the body, or state millimetres.
    is_unit = np.allclose(np.linalg.norm(affine[:3, :3], axis=0), 1, rtol=0, atol=SAME_MM)
    has_place = affine[:3, 3].any() and (header["sform_code"] or header["qform_code"])
    unit_mm = None if is_unit and not has_place and unit_code != MM_CODE else UNIT_MM.get(unit_code)
    slope, inter = 1.0 if slope is None else slope, 0.0 if inter is None else inter
    return NiftiHeader(sides, affine, unit_mm, has_depth, dtype, offset, slope, inter)


def _three_sides(path: Path, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Shape without axes of length 1 beyond the third; two axes are one slice."""
    if len(shape) < 2 or any(side != 1 for side in shape[3:]) or min(shape) < 1:
        raise SampleError(path, f"expected a volume of three axes, got {size_text(shape)}; store one scan a file")
    shape = (*shape, 1)[: max(3, len(shape))]
    if math.prod(shape) > MAX_VOXELS or math.prod(sorted(shape)[-2:]) > MAX_PIXELS:
        raise SampleError(
            path,
            f"expected a volume of sane size, got {size_text(shape)} voxels, limit {MAX_VOXELS:,}, {MAX_PIXELS:,} a "
            "slice; the header may be damaged",
        )
    return shape[0], shape[1], shape[2]


def damaged_nifti(path: Path, problem: object) -> SampleError:
    """The error for a file that is cut or damaged."""
    text = f"expected a whole NIfTI file, got a truncated or damaged one ({problem_text(problem)})"
    return SampleError(path, f"{text}; copy or download it again")


def size_text(shape: tuple[int, ...]) -> str:
    """`3 x 4 x 5`."""
    return " x ".join(map(str, shape))

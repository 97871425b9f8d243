"""Masks and probabilities of a volume as NIfTI files in the geometry of the volume, written atomically.

D slices of height H and width W, K classes.
"""

from __future__ import annotations

import gzip
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kmine.data.io.dicom_series import Series
from kmine.data.io.nifti import to_slice_axes, to_stored_axes
from kmine.data.io.nifti_header import Geometry, Orientation, read_raw_header

NO_EXTENSIONS = bytes(4)
QUICK = 1
"""Compression level: masks compress well, and higher levels take longer than the prediction."""
PART = ".part"


@dataclass(frozen=True)
class Frame:
    """Geometry of a file to write."""

    header: Any
    """Header of nibabel, with the affine."""
    orientation: Orientation
    thickness: float | None
    """Distance of two slices along their normal in mm, where known."""


GEOMETRY = ("dim", "pixdim", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x")
GEOMETRY += ("qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z", "xyzt_units", "dim_info")
"""Fields of a header that are copied; the others, and extensions, may hold names of patients."""


def geometry_of(header: Any) -> Any:
    """Header of nibabel with nothing but the geometry of another one, which may be little- or big-endian."""
    out = type(header)(endianness=header.endianness)
    for name in GEOMETRY:
        out[name] = header[name]
    return out


def frame_of_nifti(path: Path, geometry: Geometry) -> Frame:
    """Frame of a volume: affines and units of its header."""
    return Frame(geometry_of(read_raw_header(path, check=False)), geometry.orientation, geometry.thickness)


def frame_of_series(series: Series) -> Frame:
    """Frame of a DICOM series: axes columns, rows, slices, and the affine of its headers."""
    import nibabel

    header = nibabel.Nifti1Header()
    header.set_data_shape((series.shape[1], series.shape[0], series.num_slices))
    header.set_sform(series.affine, 1)
    header.set_qform(series.affine, 1, strip_shears=True)
    header.set_xyzt_units("mm")
    return Frame(header, ((0, 1), (1, 1), (2, 1)), series.thickness if series.spacing else None)


def encode_mask(mask: NDArray[np.uint8], frame: Frame) -> bytes:
    """Bytes of a .nii.gz file of uint8 for (D, H, W) class ids."""
    stored = to_stored_axes(mask, frame.orientation)
    start = _start(frame, stored.shape, np.dtype(np.uint8))
    out = io.BytesIO()
    with gzip.GzipFile("", "wb", QUICK, out, mtime=0) as file:
        file.write(start)
        for number in range(stored.shape[2]):
            file.write(stored[:, :, number].tobytes(order="F"))
    return out.getvalue()


class ProbabilityFile:
    """A .nii file of (three axes, K) float32 probabilities, filled slice by slice on disk.

    Uncompressed, as slices are written in any order. The file gets its name in `finish`.
    """

    def __init__(self, path: Path, frame: Frame, shape: tuple[int, int, int, int]) -> None:
        depth, num_classes, height, width = shape
        self.path, self._part = path, path.with_name(f".{path.name}.{os.getpid()}{PART}")
        self._stored_shape = to_stored_axes(np.empty((depth, height, width), bool), frame.orientation).shape
        self.frame = frame
        start = _start(frame, (*self._stored_shape, num_classes), np.dtype(np.float32))
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._part.open("wb") as file:
            file.write(start)
            file.truncate(len(start) + 4 * depth * num_classes * height * width)
        self._start = len(start)

    def write(self, first: int, probs: NDArray[np.float32]) -> None:
        """Write (N, K, H, W) probabilities of the slices from `first` on."""
        num_classes = probs.shape[1]
        values = np.memmap(self._part, "<f4", "r+", self._start, (*self._stored_shape, num_classes), order="F")
        for class_id in range(num_classes):
            slices = to_slice_axes(values[..., class_id], self.frame.orientation)
            slices[first : first + len(probs)] = probs[:, class_id]
        values.flush()

    def finish(self) -> None:
        """Rename the complete file to its path."""
        self._part.replace(self.path)

    def drop(self) -> None:
        """Remove the incomplete file."""
        self._part.unlink(missing_ok=True)


def _start(frame: Frame, shape: tuple[int, ...], dtype: np.dtype[Any]) -> bytes:
    """Header and empty extension of a file of little-endian values with slope 1 and intercept 0."""
    header = frame.header.as_byteswapped("<")
    header.set_data_dtype(dtype)
    header.set_data_shape(shape)
    header.set_slope_inter(1, 0)
    header["cal_min"] = header["cal_max"] = 0
    header["descrip"] = b"kmine"
    header["magic"] = b"n+1" if header["sizeof_hdr"] == 348 else b"n+2"
    header.set_data_offset(int(header["sizeof_hdr"]) + len(NO_EXTENSIONS))
    return header.binaryblock + NO_EXTENSIONS

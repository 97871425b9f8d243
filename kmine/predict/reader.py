"""Decode inputs as in training: windowed to 8 bits and resized to the square input of the local model.

Letters: N slices (1 for an image), S the side of the square, H and W of the native frame.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kmine.data.datasets.nnunet import grey_plane, read_channel, stack_channels
from kmine.data.io.dicom import read_dicom, read_header
from kmine.data.io.dicom_series import Series, open_frames, open_series
from kmine.data.io.nifti import read_windowed
from kmine.data.io.nifti_header import read_geometry
from kmine.data.io.nifti_write import Frame, frame_of_nifti, frame_of_series
from kmine.data.io.pictures import read_picture
from kmine.data.resize import Resizer
from kmine.data.source import size_and_time
from kmine.errors import SampleError
from kmine.predict.inputs import Input

ValueWindow = tuple[float, float]
LOCALIZER = "a localizer, not a slice of a scan"
NO_WINDOW = "expected the values shown as black and as white, which the model does not have; pass --window [LOW,HIGH]"


@dataclass(frozen=True)
class Loaded:
    """One image, or the slices of a volume."""

    small: NDArray[np.uint8]
    """(N, S, S, 3) RGB, input of the local model."""
    shape: tuple[int, int]
    """(H, W)."""
    spacing: tuple[float, float] | None
    """Millimetres per pixel (row, column)."""
    frame: Frame | None
    """Geometry of a volume; None for an image."""
    native: NDArray[np.uint8] | None
    """(N, H, W) grey or (N, H, W, 3) RGB, for overlays; None if not requested."""
    warning: str = ""
    series: Series | None = None
    """Files, or frames, in the order of the slices, of DICOM volumes."""


def load(item: Input, resizer: Resizer, window: ValueWindow | None, *, keep: bool) -> Loaded:
    """Decode an input; `keep` keeps the native image, too.

    `window` has the stored values shown as black and as white; without it DICOM files use their own.

    Raises:
        SampleError: a damaged or unfit file, or a missing window.
    """
    try:
        return _LOADERS[item.kind](item, resizer, window, keep)
    except SampleError as error:
        raise SampleError(error.path, error.problem.replace("--data.window", "--window")) from error
    except OSError as error:
        raise SampleError(str(item.path), f"cannot be read ({error.strerror or error}); copy it again") from error
    except MemoryError as error:
        raise SampleError(str(item.path), "does not fit into memory; crop it") from error


def file_stamps(item: Input) -> list[list[object]]:
    """Names, sizes and modification times of an input's files, for its signature."""
    return [[file.name, *size_and_time(file)] for file in item.files]


def _image(item: Input, resizer: Resizer, window: ValueWindow | None, keep: bool) -> Loaded:
    path, is_dicom = item.files[0], item.kind == "dicom"
    if len(item.files) > 1:
        image = stack_channels(item.files, [grey_plane(file, read_picture(file, window)) for file in item.files])
    else:
        image = read_dicom(path, window) if is_dicom else read_picture(path, window)
    header = read_header(path) if is_dicom else None
    spacing, warning = (header.spacing, LOCALIZER * header.is_localizer) if header else (None, "")
    small, native = resizer.image(image)[None], image[None] if keep else None
    return Loaded(small, image.shape[:2], spacing, None, native, warning or item.warning)


def _nifti(item: Input, resizer: Resizer, window: ValueWindow | None, keep: bool) -> Loaded:
    path = item.files[0]
    geometry = read_geometry(path)
    if len(item.files) > 1:
        slices = stack_channels(item.files, [read_channel(file, geometry, window) for file in item.files])
    elif window is None:
        raise SampleError(str(path), NO_WINDOW)
    else:
        slices = read_windowed(path, geometry, window)
    small = np.empty((len(slices), resizer.size, resizer.size, 3), np.uint8)
    for number, native in enumerate(slices):
        small[number] = resizer.image(native).reshape(resizer.size, resizer.size, -1)
    frame = frame_of_nifti(path, geometry)
    return Loaded(small, slices.shape[1:3], geometry.spacing, frame, slices if keep else None)


def _series(item: Input, resizer: Resizer, window: ValueWindow | None, keep: bool) -> Loaded:
    series = open_series(item.files) if item.kind == "series" else open_frames(item.path)
    small = np.empty((series.num_slices, resizer.size, resizer.size, 3), np.uint8)
    native = np.empty((series.num_slices, *series.shape), np.uint8) if keep else None
    places = [(item.path, n) for n in series.frames] or [(path, 0) for path in series.files]
    for number, (path, frame) in enumerate(places):
        image = read_dicom(path, window, frame)
        small[number] = resizer.image(image)
        if native is not None:
            native[number] = image[..., 0]
    warning = "; ".join(filter(None, (LOCALIZER * read_header(item.files[0]).is_localizer, series.warning)))
    return Loaded(small, series.shape, series.spacing, frame_of_series(series), native, warning, series)


_LOADERS = {"picture": _image, "dicom": _image, "nifti": _nifti, "series": _series, "frames": _series}

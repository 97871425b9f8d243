"""Masks of slices as NIfTI volumes in the geometry of the scan that the slices were cut from."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kmine.data.io.nifti import read_integers
from kmine.data.io.nifti_header import find_misplacement, read_geometry
from kmine.data.io.nifti_write import encode_mask, frame_of_nifti
from kmine.io.files import write_atomic
from kmine.types import IGNORE_INDEX

_log = logging.getLogger(__name__)


def write_mask_volume(path: Path, scan: Path, slices: Mapping[int, NDArray[np.uint8]], fill: int = IGNORE_INDEX) -> int:
    """Write class ids as .nii.gz with shape, axes and affine of the scan; `fill` in all other slices.

    Replaces `path` (.nii.gz) atomically. `slices` holds (H, W) class ids by slice number in `scan`, a NIfTI file.
    Returns the number of slices of the scan.
    """
    geometry = read_geometry(scan)
    stack = np.full(geometry.stack_shape, fill, np.uint8)
    for number, mask in slices.items():
        stack[number] = mask
    write_atomic(path, encode_mask(stack, frame_of_nifti(scan, geometry)))
    return len(stack)


def read_mask_volume(path: Path, scan: Path) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Number and (H, W) class ids of each slice that is not all `IGNORE_INDEX`.

    Raises:
        SampleError: another shape or orientation than the scan's, values that are no class ids, or a damaged file.
    """
    if problem := find_misplacement(path, scan):
        _log.warning("%s: %s, as %s has; voxels are paired by number", path, problem, scan.name)
    for number, mask in enumerate(read_integers(path, read_geometry(scan))):
        if (mask != IGNORE_INDEX).any():
            yield number, mask.copy()

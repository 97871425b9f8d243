"""Masks of slices as volumes: written in the geometry of the scan they were cut from, and cut again as they return."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kmine.data.datasets.folder import Folder
from kmine.data.datasets.lits import Lits
from kmine.data.io.nifti import Geometry, read_geometry, read_integers
from kmine.data.source import Source
from kmine.types import IGNORE_INDEX

SliceLocation = tuple[str, Path, int]
"""Name of a volume, its file, and the number of a slice in it."""


def slice_location(source: Source, sample_id: str) -> SliceLocation | None:
    """Where a sample was cut from; None for a picture of its own, and for one that the source does not have."""
    try:
        if isinstance(source, Lits):
            volume, number = source._locate(sample_id)
            return volume.group_id, volume.image, number
        if isinstance(source, Folder):
            item, number = source._locate(sample_id)
            return (item.name, item.image, number) if item.kind == "nifti" else None
    except KeyError:
        return None
    return None


def write_mask_volume(path: Path, scan: Path, slices: Mapping[int, NDArray[np.uint8]]) -> None:
    """Class ids as .nii.gz: shape, axes and affine of the scan; `IGNORE_INDEX` in slices that are not given.

    Args:
        path: of the new file, ending in .nii.gz.
        scan: the NIfTI file that the slices were cut from.
        slices: (H, W) by number.
    """
    import nibabel

    geometry = read_geometry(scan)
    stack = np.full(geometry.sliced, IGNORE_INDEX, np.uint8)
    for number, mask in slices.items():
        stack[number] = mask
    path.parent.mkdir(parents=True, exist_ok=True)
    header = nibabel.load(scan).header.copy()
    header.set_data_dtype(np.uint8)
    header.set_slope_inter(1, 0)
    image = nibabel.Nifti1Image(np.ascontiguousarray(to_scan_axes(stack, geometry)), header.get_best_affine(), header)
    temp = path.with_name(f".{path.name[: -len('.nii.gz')]}.part.nii.gz")
    try:
        nibabel.save(image, temp)
        temp.replace(path)
    finally:
        temp.unlink(missing_ok=True)


def to_scan_axes(stack: NDArray[np.uint8], geometry: Geometry) -> NDArray[np.uint8]:
    """(D, H, W) slices as the file has them; a view. The inverse of how `volumes` cuts."""
    view = stack.T.transpose([axis for axis, _ in geometry.turn])
    return view[tuple(slice(None, None, flip) for _, flip in geometry.turn)]


def read_mask_volume(path: Path, scan: Path) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Number and (H, W) class ids of each slice of a mask file that is not ignored as a whole.

    Raises:
        SampleError: another shape or orientation than the scan's, values that are no class ids, or a damaged file.
    """
    for number, mask in enumerate(read_integers(path, read_geometry(scan))):
        if (mask != IGNORE_INDEX).any():
            yield number, mask.copy()

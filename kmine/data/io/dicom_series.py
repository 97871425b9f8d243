"""A DICOM series as a volume: slices in order, and the affine from voxels to the patient."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kmine.data.io.dicom import SlicePosition, read_header, read_positions, read_slice_position
from kmine.errors import SampleError

MIN_SLICES = 2
SAME_DIRECTION = 1e-3
SAME_MM = 0.01
UNEVEN = 0.05
"""Largest relative deviation of a slice distance from the median."""


@dataclass(frozen=True)
class Series:
    """Files of one series, ordered along the normal of the slices."""

    files: tuple[Path, ...]
    shape: tuple[int, int]
    """(H, W) of every slice."""
    affine: NDArray[np.float64]
    """(4, 4): (column, row, slice) to mm to the right, to the front and up, as in NIfTI."""
    spacing: tuple[float, float] | None
    """Millimetres per pixel (row, column)."""
    thickness: float
    """Distance of two slices along their normal in mm."""
    warning: str = ""
    frames: tuple[int, ...] = ()
    """Of a file of several frames, which stands in `files` alone: their numbers in the order of the slices."""

    @property
    def num_slices(self) -> int:
        """Number of slices."""
        return len(self.frames or self.files)


def open_frames(path: Path) -> Series:
    """The frames of a file, ordered by their positions; without these as stored, at no known place in the patient.

    Raises:
        SampleError: a damaged file.
    """
    header = read_header(path)
    places = [place for place in read_positions(path, header.frames) if place is not None]
    numbers = tuple(range(header.frames))
    if len(places) == len(numbers) > 1 and all(_is_parallel(places[0], place) for place in places):
        row, column = np.array(places[0].orientation[:3]), np.array(places[0].orientation[3:])
        normal = np.cross(row, column) / np.linalg.norm(np.cross(row, column))
        along = np.array([float(np.dot(place.position, normal)) for place in places])
        order = np.argsort(along, kind="stable")
        if np.diff(along[order]).min() >= SAME_MM:
            ends = [np.array(places[n].position) for n in (order[0], order[-1])]
            affine = _affine(row, column, (ends[1] - ends[0]) / (len(places) - 1), ends[0], header.spacing)
            thickness = float(along.max() - along.min()) / (len(places) - 1)
            frames = tuple(map(int, order))
            return Series((path,), header.shape, affine, header.spacing, thickness, frames=frames)
    spacing = header.spacing or (1.0, 1.0)
    return Series((path,), header.shape, np.diag([spacing[1], spacing[0], 1.0, 1.0]), None, 1.0, frames=numbers)


def _affine(
    row: NDArray[np.float64],
    column: NDArray[np.float64],
    step: NDArray[np.float64],
    start: NDArray[np.float64],
    spacing: tuple[float, float] | None,
) -> NDArray[np.float64]:
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = row * (spacing[1] if spacing else 1), column * (spacing[0] if spacing else 1)
    affine[:3, 2], affine[:3, 3] = step, start
    affine[:2] *= -1  # DICOM axes point to the left and to the back, those of NIfTI to the right and to the front
    return affine


def group_series(files: Sequence[Path]) -> tuple[list[tuple[Path, ...]], list[Path]]:
    """Group the files of one folder into series; returns the series and the remaining single files.

    A series is two or more files of one SeriesInstanceUID, orientation, size and spacing, with positions: a localizer
    among the slices of a scan stays single. Files with an unreadable header are single files; reading them reports the
    fault.
    """
    stacks: dict[tuple[object, ...], list[list[tuple[Path, SlicePosition]]]] = defaultdict(list)
    single_files = []
    for path in files:
        try:
            place, header = read_slice_position(path), read_header(path)
            place = place if header.frames == 1 else None
        except SampleError:
            place = None
        if place is None:
            single_files.append(path)
            continue
        alike = stacks[place.series, header.shape, header.spacing]
        stack = next((s for s in alike if _is_parallel(s[0][1], place)), None)
        if stack is None:
            alike.append([(path, place)])
        else:
            stack.append((path, place))
    found = [tuple(path for path, _ in stack) for key in sorted(stacks, key=str) for stack in stacks[key]]
    single_files += [path for stack in found if len(stack) < MIN_SLICES for path in stack]
    return [stack for stack in found if len(stack) >= MIN_SLICES], sorted(single_files)


def _is_parallel(first: SlicePosition, second: SlicePosition) -> bool:
    return float(np.abs(np.subtract(first.orientation, second.orientation)).max()) < SAME_DIRECTION


def open_series(files: Sequence[Path]) -> Series:
    """Order the slices by the headers of their files.

    Raises:
        SampleError: for damaged files, slices of several sizes or spacings, and two slices in one position.
    """
    placed = [(path, _require_position(path), read_header(path)) for path in files]
    first = placed[0]
    row, column = np.array(first[1].orientation[:3]), np.array(first[1].orientation[3:])
    normal = np.cross(row, column) / np.linalg.norm(np.cross(row, column))
    placed.sort(key=lambda entry: float(np.dot(entry[1].position, normal)))
    for path, _, header in placed:
        if (header.shape, header.spacing) != (first[2].shape, first[2].spacing):
            raise SampleError(
                path,
                f"expected slices of one size and spacing, got {header.shape} at {header.spacing} mm beside "
                f"{first[2].shape} at {first[2].spacing} mm; put other series into folders of their own",
            )
    along = np.array([float(np.dot(place.position, normal)) for _, place, _ in placed])
    steps = np.diff(along)
    if steps.min() < SAME_MM:
        first_file, path = (placed[int(steps.argmin()) + n][0] for n in (0, 1))
        raise SampleError(
            path,
            f"expected one slice a position, got two in one, with {first_file.name}; put other series into folders of "
            "their own",
        )
    usual = float(np.median(steps))
    gaps = int(np.count_nonzero(np.abs(steps - usual) > UNEVEN * usual))
    spacing = first[2].spacing
    start, end = (np.array(placed[n][1].position) for n in (0, -1))
    affine = _affine(row, column, (end - start) / (len(placed) - 1), start, spacing)
    return Series(
        files=tuple(path for path, _, _ in placed),
        shape=first[2].shape,
        affine=affine,
        spacing=spacing,
        thickness=float(along[-1] - along[0]) / (len(placed) - 1),  # less than the distance of positions if tilted
        warning=f"{gaps} of {len(steps)} distances between slices differ from the usual {usual:.3g} mm; slices missing?"
        if gaps
        else "",
    )


def _require_position(path: Path) -> SlicePosition:
    position = read_slice_position(path)
    if position is None:
        raise SampleError(path, "expected a slice with its position in the patient, got none; copy the series again")
    return position

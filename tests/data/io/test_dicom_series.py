"""DICOM series as volumes: order, affine, missing and repeated slices."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.image_files import save_dicom, save_slice

from kmine.data.io.dicom_series import group_series, open_series
from kmine.errors import SampleError

BLANK = np.zeros((4, 5))


def test_slices_are_ordered_by_position_with_the_affine_of_the_patient(tmp_path):
    # Names run against positions. Spacing in mm: 0.5 down a column, 0.25 along a row, 2 between slices.
    files = [save_slice(tmp_path / f"{9 - n}.dcm", BLANK, position=(10, 20, 30 + 2 * n)) for n in range(3)]
    series = open_series(sorted(files))
    assert series.files == tuple(files) and series.thickness == 2 and series.warning == ""
    assert (series.shape, series.spacing) == ((4, 5), (0.5, 0.25))
    # Voxel (column 4, row 3, slice 2) lies at 10 + 4 * .25 to the left, 20 + 3 * .5 to the back, 34 up.
    assert np.allclose(series.affine @ [4, 3, 2, 1], [-11, -21.5, 34, 1])


def test_a_missing_slice_is_a_warning_and_a_repeated_one_an_error(tmp_path):
    files = [save_slice(tmp_path / f"{n}.dcm", BLANK, position=(0, 0, z)) for n, z in enumerate((0, 2, 4, 8, 10))]
    assert "1 of 4 distances between slices differ from the usual 2 mm" in open_series(files).warning
    repeated = save_slice(tmp_path / "9.dcm", BLANK, position=(0, 0, 4))
    with pytest.raises(SampleError, match="two in one"):
        open_series([*files, repeated])
    wide = save_slice(tmp_path / "9.dcm", np.zeros((4, 6)), position=(0, 0, 12))
    with pytest.raises(SampleError, match="one size and spacing"):
        open_series([*files, wide])
    with pytest.raises(SampleError, match="expected a slice with its position"):
        open_series([*files, save_slice(tmp_path / "9.dcm", BLANK)])


def test_a_series_has_two_slices_with_positions(tmp_path):
    first = [save_slice(tmp_path / f"a{n}.dcm", BLANK, position=(0, 0, n), series="1.1") for n in range(3)]
    second = [save_slice(tmp_path / f"b{n}.dcm", BLANK, position=(0, 0, n), series="1.2") for n in range(2)]
    single = save_slice(tmp_path / "c.dcm", BLANK, position=(0, 0, 0), series="1.3")
    without_position = [save_slice(tmp_path / f"d{n}.dcm", BLANK, series="1.4") for n in range(2)]
    (tmp_path / "e.dcm").write_bytes(b"damaged")
    files = sorted(tmp_path.iterdir())
    series, singles = group_series(files)
    assert series == [tuple(first), tuple(second)]
    assert singles == [single, *without_position, tmp_path / "e.dcm"]


def test_a_localizer_stays_single_and_three_stacks_are_three_series(tmp_path):
    def slices(name, orientation, along, count=3, size=(4, 5)):
        return [
            save_dicom(
                tmp_path / f"{name}{n}.dcm",
                np.zeros(size, np.int16),
                ImageOrientationPatient=orientation,
                ImagePositionPatient=[2 * n * part for part in along],
                PixelSpacing=[1, 1],
            )
            for n in range(count)
        ]

    axial, sagittal, coronal = (
        slices("a", [1, 0, 0, 0, 1, 0], (0, 0, 1)),
        slices("b", [0, 1, 0, 0, 0, -1], (1, 0, 0)),
        slices("c", [1, 0, 0, 0, 0, -1], (0, 1, 0)),
    )
    scouts = [
        *slices("d", [0, 0.6, 0.8, 1, 0, 0], (1, 0, 0), 1),
        *slices("e", [1, 0, 0, 0, 1, 0], (0, 0, 1), 1, (9, 9)),
    ]
    no_axes = slices("f", [1, 0, 0, 1, 0, 0], (0, 0, 1))
    series, singles = group_series(sorted(tmp_path.iterdir()))
    assert sorted(series) == [tuple(axial), tuple(sagittal), tuple(coronal)]
    assert singles == [*scouts, *no_axes]


def test_thickness_of_a_tilted_series_is_along_the_normal(tmp_path):
    # Positions 5 mm apart: 4 along the normal and 3 along the columns, as with a gantry tilt.
    files = [save_slice(tmp_path / f"{n}.dcm", BLANK, position=(0, 3 * n, 4 * n)) for n in range(3)]
    series = open_series(files)
    assert series.thickness == pytest.approx(4)
    assert abs(np.linalg.det(series.affine[:3, :3])) == pytest.approx(4 * 0.5 * 0.25)

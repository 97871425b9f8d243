"""Headers of NIfTI files: sizes in millimetres by hand, files of two axes, masks that lie elsewhere."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel
import numpy as np
import pytest

from kmine.data.io.nifti import read_integers, read_windowed
from kmine.data.io.nifti_header import Geometry, find_misplacement, read_geometry, read_nifti_header
from kmine.errors import SampleError

SHAPE = (5, 6, 7)


def save(path: Path, affine=(0.7, 0.8, 2.5), unit=None, shape=SHAPE, origin=(0, 0, 0), codes=None) -> Path:
    matrix = np.diag([*affine, 1.0]) if np.ndim(affine) == 1 else np.array(affine, float)
    matrix[:3, 3] = origin
    image = nibabel.Nifti1Image(np.arange(np.prod(shape), dtype=np.int16).reshape(shape), matrix)
    if unit is not None:
        image.header.set_xyzt_units(unit) if isinstance(unit, str) else image.header.__setitem__("xyzt_units", unit)
    nibabel.save(image, path)
    if codes is not None:
        content = path.read_bytes()
        path.write_bytes(content[:252] + codes + content[256:])  # qform_code and sform_code, int16
    return path


def sizes(path: Path) -> tuple[float, ...] | None:
    geometry = read_geometry(path)
    return geometry.spacing and (*geometry.spacing, geometry.thickness)


@pytest.mark.parametrize(
    ("unit", "scale"), [("mm", 1), ("micron", 1000), ("meter", 0.001), ("unknown", 1), (2 | 8, 1), (3 | 16, 1000)]
)
def test_sizes_are_in_millimetres_whatever_the_unit(tmp_path, unit, scale):
    path = save(tmp_path / "a.nii.gz", tuple(scale * size for size in (0.7, 0.8, 2.5)), unit)
    assert sizes(path) == pytest.approx((0.8, 0.7, 2.5))


def test_an_undefined_unit_of_length_means_unknown(tmp_path):
    assert sizes(save(tmp_path / "a.nii", unit=5)) is None


def test_true_millimetres_are_known_and_a_header_that_knows_nothing_is_not(tmp_path):
    ones = (1, 1, 1)
    assert sizes(save(tmp_path / "a.nii", ones)) is None
    assert sizes(save(tmp_path / "a.nii", ones, origin=(-9, 7, 3), codes=bytes(4))) is None
    assert sizes(save(tmp_path / "a.nii", ones, "mm")) == pytest.approx(ones)
    assert sizes(save(tmp_path / "a.nii", ones, origin=(-90, 126, -72))) == pytest.approx(ones)


def test_the_volume_of_a_sheared_voxel_is_the_determinant(tmp_path):
    # Slices 5 mm apart, 4 along the normal and 3 along the rows: the volume of a voxel is 0.5 x 0.25 x 4.
    tilted = [[0.5, 0, 0, 0], [0, 0.25, 3, 0], [0, 0, 4, 0], [0, 0, 0, 1]]
    assert sizes(save(tmp_path / "a.nii", tilted)) == pytest.approx((0.25, 0.5, 4))


def test_two_axes_are_one_slice_of_unknown_thickness(tmp_path):
    path = save(tmp_path / "a.nii", shape=SHAPE[:2])
    geometry = read_geometry(path)
    assert geometry == Geometry((5, 6, 1), ((0, -1), (1, -1), (2, 1)), pytest.approx((0.8, 0.7)), None)
    assert read_windowed(path, geometry, (0.0, 255.0))[0].tolist() == np.arange(30).reshape(5, 6)[::-1, ::-1].T.tolist()
    mask = save(tmp_path / "b.nii", shape=(5, 6, 1))
    np.testing.assert_array_equal(read_integers(mask, geometry), read_windowed(path, geometry, (0.0, 255.0)))


def test_compression_is_known_by_content_and_not_by_name(tmp_path):
    content = save(tmp_path / "a.nii").read_bytes()
    (tmp_path / "b.nii.gz").write_bytes(content)
    (tmp_path / "c.nii").write_bytes(gzip.compress(content))
    expected = read_windowed(tmp_path / "a.nii", read_geometry(tmp_path / "a.nii"), (0.0, 255.0))
    for name in ("b.nii.gz", "c.nii"):
        np.testing.assert_array_equal(
            read_windowed(tmp_path / name, read_geometry(tmp_path / name), (0.0, 255.0)), expected
        )


def test_a_mask_elsewhere_is_named(tmp_path):
    scan = save(tmp_path / "scan.nii")
    same = save(tmp_path / "same.nii.gz", (700, 800, 2500), "micron", origin=(100, 0, 0))
    assert find_misplacement(same, scan) == ""
    wide = save(tmp_path / "wide.nii", (1.4, 1.6, 5))
    assert find_misplacement(wide, scan) == "a spacing of 1.4 x 1.6 x 5 mm for 0.7 x 0.8 x 2.5 mm"
    assert (
        find_misplacement(save(tmp_path / "off.nii", origin=(30, 40, 0)), scan)
        == "an origin or direction up to 50 mm off"
    )
    assert find_misplacement(save(tmp_path / "other.nii", shape=(5, 6, 8)), scan) == ""


def test_impossible_headers_are_refused(tmp_path):
    with pytest.raises(SampleError, match="expected a volume of three axes, got 5"):
        read_nifti_header(save(tmp_path / "a.nii", shape=(5,)))
    (tmp_path / "b.nii").write_bytes(b"<html>" + bytes(999))
    with pytest.raises(SampleError, match="got a web page; download the file itself"):
        read_nifti_header(tmp_path / "b.nii")

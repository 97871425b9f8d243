"""Masks and probabilities are written into the voxels that they belong to."""

from __future__ import annotations

import gzip

import nibabel
import numpy as np
import pytest
from helpers.image_files import save_slice
from helpers.lits_files import affine_of, save_nifti, scan, stored

from kmine.data.io.dicom_series import open_series
from kmine.data.io.nifti import read_geometry
from kmine.data.io.nifti_write import ProbabilityFile, encode_mask, frame_of_nifti, frame_of_series
from kmine.data.io.volume_masks import write_mask_volume

MASK = np.random.default_rng(0).integers(0, 3, (5, 6, 7)).astype(np.uint8)


@pytest.mark.parametrize("codes", ["LPS", "RAS", "PIR", "SLA"])
def test_a_mask_has_shape_axes_and_affine_of_its_volume(tmp_path, codes):
    path = save_nifti(tmp_path / "scan.nii.gz", scan(), codes)
    frame = frame_of_nifti(path, read_geometry(path))
    assert frame.thickness == pytest.approx(2.5)
    (tmp_path / "mask.nii.gz").write_bytes(encode_mask(MASK, frame))
    written = nibabel.load(tmp_path / "mask.nii.gz")
    assert written.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.asarray(written.dataobj), stored(MASK, codes))
    np.testing.assert_allclose(written.affine, affine_of(codes), rtol=1e-6)


def test_probabilities_are_written_in_any_order_and_named_when_complete(tmp_path):
    path = save_nifti(tmp_path / "scan.nii", scan(), "PIR")
    probs = np.random.default_rng(1).random((5, 2, 6, 7)).astype(np.float32)
    file = ProbabilityFile(tmp_path / "p.nii", frame_of_nifti(path, read_geometry(path)), probs.shape)
    file.write(2, probs[2:])
    file.write(0, probs[:2])
    assert not (tmp_path / "p.nii").exists()
    file.finish()
    written = np.asarray(nibabel.load(tmp_path / "p.nii").dataobj)
    for class_id in range(2):
        np.testing.assert_array_equal(written[..., class_id], stored(probs[:, class_id], "PIR"))
    dropped = ProbabilityFile(tmp_path / "q.nii", frame_of_nifti(path, read_geometry(path)), probs.shape)
    dropped.drop()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["p.nii", "scan.nii"]


def test_a_mask_of_a_series_lies_in_the_patient(tmp_path):
    files = [save_slice(tmp_path / f"{n}.dcm", np.zeros((6, 7)), position=(10, 20, 30 + n)) for n in range(5)]
    series = open_series(files)
    (tmp_path / "mask.nii.gz").write_bytes(encode_mask(MASK, frame_of_series(series)))
    written = nibabel.load(tmp_path / "mask.nii.gz")
    np.testing.assert_array_equal(np.asarray(written.dataobj), MASK.T)
    assert written.header.get_zooms() == (0.25, 0.5, 1)
    np.testing.assert_allclose(written.affine, series.affine)


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("order", ["<", ">"])
def test_nothing_but_the_geometry_of_a_volume_is_written(tmp_path, kind, order):
    header = kind.header_class(endianness=order)
    for name in ("descrip", "db_name", "aux_file", "intent_name"):
        if name in header:
            header[name] = b"DOE^JANE"
    header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"DOE^JANE 1970-01-01"))
    header.set_xyzt_units("mm", "sec")
    nibabel.save(kind(MASK.T.astype(order + "i2"), np.diag([-0.7, -0.8, 2.5, 1]), header), tmp_path / "scan.nii")
    assert (tmp_path / "scan.nii").read_bytes().count(b"DOE^JANE") >= 3
    geometry = read_geometry(tmp_path / "scan.nii")
    (tmp_path / "mask.nii.gz").write_bytes(encode_mask(MASK, frame_of_nifti(tmp_path / "scan.nii", geometry)))
    write_mask_volume(tmp_path / "audit.nii.gz", tmp_path / "scan.nii", dict(enumerate(MASK)))
    for name in ("mask.nii.gz", "audit.nii.gz"):
        assert b"DOE" not in gzip.decompress((tmp_path / name).read_bytes())
        written = nibabel.load(tmp_path / name)
        assert np.allclose(written.affine, np.diag([-0.7, -0.8, 2.5, 1])) and written.header.get_xyzt_units()[0] == "mm"
        assert (np.asarray(written.dataobj) == MASK.T).all() and not written.header.extensions

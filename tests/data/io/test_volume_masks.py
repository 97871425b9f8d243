"""Masks of slices go into the geometry of their scan and come back unchanged."""

from __future__ import annotations

import nibabel
import numpy as np
import pytest
from helpers.lits_files import affine_of, save_nifti, scan

from kmine.data.io.volume_masks import read_mask_volume, write_mask_volume
from kmine.errors import SampleError


@pytest.mark.parametrize("codes", ["LPS", "SPL", "RAI"])
def test_slices_come_back_and_all_others_are_ignored(tmp_path, codes):
    path = save_nifti(tmp_path / "scan.nii.gz", scan(), codes)
    masks = {n: np.random.default_rng(n).integers(0, 3, (6, 7)).astype(np.uint8) for n in (0, 3)}
    write_mask_volume(tmp_path / "out/mask.nii.gz", path, masks)
    found = dict(read_mask_volume(tmp_path / "out/mask.nii.gz", path))
    assert found.keys() == masks.keys()
    for number, mask in masks.items():
        np.testing.assert_array_equal(found[number], mask)
    written = nibabel.load(tmp_path / "out/mask.nii.gz")
    np.testing.assert_allclose(written.affine, affine_of(codes), rtol=1e-6)
    assert (np.asarray(written.dataobj) == 255).sum() == 3 * 6 * 7
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mask.nii.gz"]


def test_a_mask_of_another_orientation_is_refused(tmp_path):
    path = save_nifti(tmp_path / "scan.nii", scan(), "LPS")
    other = save_nifti(tmp_path / "mask.nii", np.zeros((5, 6, 7), np.uint8), "RPS")
    with pytest.raises(SampleError, match="axis directions"):
        list(read_mask_volume(other, path))

"""DICOM segmentations out of an audit and in again as the masks of a folder, bit for bit."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from helpers.dicom_files import SHAPE, multiframe, scan

from kmine.audit.export_dicom_seg import write_dicom_segs
from kmine.config import DataConfig
from kmine.data import open_source
from kmine.errors import UserError

NAMES = ("background", "liver", "tumour")


def opened(tmp_path, masks=None):
    where = {"masks": str(tmp_path / masks)} if masks else {}
    return open_source(
        DataConfig(name="folder", images=str(tmp_path / "images"), class_names=NAMES, window=(0.0, 9.0), **where)
    )


def test_masks_of_series_and_of_frames_come_back(tmp_path):
    pytest.importorskip("highdicom")
    scan(tmp_path / "images" / "ct", 3)
    multiframe(tmp_path / "images" / "enhanced.dcm", 3)
    source = opened(tmp_path)
    ids = [ref.sample_id for ref in source.refs()]
    assert ids == ["ct/s0", "ct/s1", "ct/s2", *(f"enhanced/slice-000{n}" for n in range(3))]
    rng = np.random.default_rng(0)
    masks = {i: rng.choice(np.array([0, 1, 2, 255], np.uint8), SHAPE) for i in ids if i != "enhanced/slice-0001"}
    del masks["ct/s1"]
    write_dicom_segs(tmp_path / "segs", masks.items(), source)
    back = opened(tmp_path, "segs")
    assert {ref.sample_id for ref in back.refs() if ref.has_mask} == {*ids} - {"ct/s1"}
    for sample_id in {*ids} - {"ct/s1"}:
        expected = masks.get(sample_id, np.full(SHAPE, 255, np.uint8))
        np.testing.assert_array_equal(back.mask(sample_id), expected)


def test_images_of_another_kind_are_one_line(tmp_path):
    pytest.importorskip("highdicom")
    with pytest.raises(UserError, match=r"--export dicomseg: expected DICOM images, got another kind for a; use"):
        write_dicom_segs(tmp_path, [("a", np.zeros(SHAPE, np.uint8))], SimpleNamespace(class_names=NAMES))

"""Exported masks: valid COCO, volumes written in sequence, Label Studio tasks."""

from __future__ import annotations

import json
from types import SimpleNamespace

import nibabel
import numpy as np

from kmine.audit.export import ExportedMask, write_coco, write_label_studio, write_masks
from kmine.data.io.volume_masks import read_mask_volume

NAMES = ("background", "organ", "lesion")


def exported(**masks: np.ndarray) -> list[ExportedMask]:
    return [ExportedMask(i, "pseudo", mask, f"pictures/{i}.jpg", 0.25, 1, "made", 1) for i, mask in masks.items()]


def test_coco_is_valid_for_pycocotools(tmp_path):
    from pycocotools.coco import COCO

    mask = np.zeros((6, 8), np.uint8)
    mask[1:3, 2:7], mask[5, 0] = 2, 255
    coco = COCO(write_coco(tmp_path / "coco.json", exported(a=mask, empty=np.zeros((4, 4), np.uint8)), NAMES, "a test"))
    lesion, ignored = (coco.loadAnns(coco.getAnnIds(catIds=[k]))[0] for k in (2, 255))
    assert (coco.annToMask(lesion) == (mask == 2)).all()
    assert lesion["bbox"] == [2, 1, 5, 2] and lesion["area"] == 10 and ignored["iscrowd"] == 1
    assert len(coco.getImgIds()) == 2 and coco.getAnnIds(imgIds=[2]) == []


def test_slices_of_a_volume_are_written_together(tmp_path):
    for name in "uv":
        nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 3), np.int16), np.eye(4)), tmp_path / f"{name}.nii.gz")
    located = {
        "u0": ("u", tmp_path / "u.nii.gz", 0),
        "u2": ("u", tmp_path / "u.nii.gz", 2),
        "v1": ("v", tmp_path / "v.nii.gz", 1),
    }
    ones = np.ones((4, 4), np.uint8)
    masks = exported(u0=ones, u2=2 * ones, v1=ones, plain=np.eye(3, dtype=np.uint8))
    write_masks(tmp_path / "out", masks, SimpleNamespace(slice_location=located.get))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"u.nii.gz", "v.nii.gz", "plain.png"}
    back = dict(read_mask_volume(tmp_path / "out" / "u.nii.gz", tmp_path / "u.nii.gz"))
    assert (back[0] == 1).all() and (back[2] == 2).all()


def test_a_label_studio_task_holds_a_stroke_per_class(tmp_path):
    mask = np.array([[0, 1], [2, 255]], np.uint8)
    (task,) = json.loads(write_label_studio(tmp_path / "ls.json", exported(a=mask), NAMES).read_text())
    strokes = task["predictions"][0]["result"]
    assert [stroke["value"]["brushlabels"] for stroke in strokes] == [["organ"], ["lesion"], ["ignored"]]
    assert task["predictions"][0]["score"] == 0.75 and task["data"]["sample_id"] == "a"

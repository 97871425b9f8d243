"""Corrected masks: each export is read back bit for bit; masks that do not fit are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from kmine.audit.export import (
    ExportedMask,
    write_coco,
    write_label_studio,
    write_masks,
)
from kmine.data.io.mask_palettes import MaskPalettes
from kmine.data.io.nifti import read_geometry
from kmine.data.io.pictures import read_mask_picture
from kmine.data.io.volume_masks import read_mask_volume, write_mask_volume
from kmine.errors import UserError
from kmine.feedback.corrections import read_corrections
from kmine.feedback.expected import ExpectedMasks, picture_name
from kmine.io.files import safe_name

NAMES = ("background", "organ", "lesion")
IDS = ("plain", "volume-001/slice-0002", "ümlaut & 100%.x")


def exported(masks: dict[str, np.ndarray]) -> list[ExportedMask]:
    return [
        ExportedMask(i, "pseudo", mask, f"pictures/{picture_name(i)}.jpg", 0.5, 1, "made", 1)
        for i, mask in masks.items()
    ]


def known(masks: dict[str, np.ndarray], names: tuple[str, ...] = NAMES) -> ExpectedMasks:
    return ExpectedMasks({i: mask.shape for i, mask in masks.items()}, names)


def export(how: str, folder: Path, masks: dict[str, np.ndarray]) -> Path:
    if how == "coco":
        return write_coco(folder / "coco.json", exported(masks), NAMES, "a test")
    if how == "labelstudio":
        return write_label_studio(folder / "ls.json", exported(masks), NAMES)
    return write_masks(folder / "masks", exported(masks), SimpleNamespace(slice_location=lambda _: None))


MASKS = st.tuples(
    *(
        arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.sampled_from((0, 1, 2, 255)))
        for _ in IDS
    )
)


@pytest.mark.parametrize("how", ["coco", "labelstudio", "masks"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(found=MASKS)
def test_masks_survive_the_round_trip_bit_for_bit(how, tmp_path, found):
    masks = dict(zip(IDS, found, strict=True))
    back = dict(read_corrections(export(how, tmp_path, masks), known(masks)))
    assert back.keys() == masks.keys()
    for name, mask in masks.items():
        assert back[name].dtype == np.uint8 and (back[name] == mask).all()


def test_polygons_of_another_tool_are_read_by_file_name(tmp_path):
    value = {
        "images": [{"id": 7, "file_name": "some/where/plain.jpg", "height": 10, "width": 10}],
        "categories": [{"id": 3, "name": "lesion"}],
        "annotations": [{"image_id": 7, "category_id": 3, "segmentation": [[2, 2, 6, 2, 6, 6, 2, 6]]}],
    }
    (tmp_path / "c.json").write_text(json.dumps(value))
    ((name, mask),) = read_corrections(tmp_path / "c.json", ExpectedMasks({"plain": (10, 10)}, NAMES))
    assert name == "plain" and mask[4, 4] == 2 and mask[8, 8] == 0 and mask.any()


def test_a_path_that_is_an_id_comes_before_a_file_name_that_is_another_id(tmp_path):
    masks = {"01": np.eye(4, dtype=np.uint8), "a/01": np.full((4, 4), 2, np.uint8)}
    for name, mask in masks.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(mask).save(tmp_path / f"{name}.png")
    expected = replace(known(masks), pictures=reader(NAMES))
    back = dict(read_corrections(tmp_path, expected))
    assert back.keys() == masks.keys() and all((back[name] == masks[name]).all() for name in masks)
    ((name, _),) = read_corrections(tmp_path / "a", expected)
    assert name == "01", "within a/ the file has no other name"


def test_a_volume_in_a_folder_is_the_one_of_that_path(tmp_path):
    for name in ("01", "a/01", "b/02"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.nii.gz").write_bytes(b"read by the function below")
    ids = {"01": "01/slice-0000", safe_name("a/01"): "a/01/slice-0000", "02": "02/slice-0000"}
    mask = np.eye(4, dtype=np.uint8)
    expected = ExpectedMasks(
        dict.fromkeys(ids.values(), mask.shape),
        NAMES,
        lambda name, _: iter([(ids[name], mask)]) if name in ids else None,
    )
    assert [name for name, _ in read_corrections(tmp_path, expected)] == [*ids.values()]


def test_the_ground_truth_of_label_studio_is_read(tmp_path):
    masks = {"a": np.eye(4, dtype=np.uint8), "b": np.ones((3, 3), np.uint8)}
    tasks = json.loads(export("labelstudio", tmp_path, masks).read_text())
    drawn = json.loads(json.dumps(tasks[1]["predictions"][0]["result"]))
    drawn[0]["value"]["brushlabels"] = ["lesion"]
    tasks[1]["annotations"] = [{"ground_truth": n == 0, "result": r} for n, r in enumerate((drawn, []))]
    tasks[1]["annotations"].append({"updated_at": "2027", "was_cancelled": True, "result": []})
    (tmp_path / "back.json").write_text(json.dumps(tasks))
    ((name, mask),) = read_corrections(tmp_path / "back.json", known(masks))
    assert name == "b" and (mask == 2).all()


def test_white_is_the_single_class_in_a_mask_of_an_image_editor(tmp_path):
    mask = np.zeros((4, 4), np.uint8)
    mask[1, 1:3] = 255
    Image.fromarray(mask).save(tmp_path / "a.png")
    Image.fromarray(mask).convert("RGB").quantize(2).save(tmp_path / "b.png")  # white is colour 0 of the palette
    expected = ExpectedMasks({"a": (4, 4), "b": (4, 4)}, NAMES[:2], pictures=reader(NAMES[:2]))
    for _, found in read_corrections(tmp_path, expected):
        assert (found == (mask == 255)).all()


def reader(names: tuple[str, ...]):
    return lambda paths: partial(read_mask_picture, class_names=names, palettes=MaskPalettes(paths))


def test_a_colour_is_one_class_in_all_files_and_files_of_other_kinds_are_named(tmp_path):
    mask = np.array([[0, 1, 2]], np.uint8)
    for name, order in {"a": (0, 1, 2), "b": (0, 1, 2), "c": (0, 2, 1)}.items():
        picture = Image.fromarray(np.argsort(order).astype(np.uint8)[mask])
        picture.putpalette([value for n in order for value in ((0, 0, 0), (0, 255, 0), (255, 0, 0))[n]])
        picture.save(tmp_path / f"{name}.png")
    expected = ExpectedMasks(dict.fromkeys("abcd", (1, 3)), NAMES, pictures=reader(NAMES))
    assert [found.tolist() for _, found in read_corrections(tmp_path, expected)] == [mask.tolist()] * 3
    np.save(tmp_path / "d.npy", mask)
    refused(tmp_path, expected, r"got d\.npy; convert")
    (tmp_path / "d.npy").rename(tmp_path / "notes.npy")
    Image.fromarray(mask).save(tmp_path / "d.tif")
    assert len(list(read_corrections(tmp_path, expected))) == 4


def test_a_volume_round_trip_keeps_the_geometry(tmp_path):
    affine = np.array([[0, -0.7, 0, 5], [0.8, 0, 0, -3], [0, 0, -2.5, 9], [0, 0, 0, 1.0]])
    nibabel.save(nibabel.Nifti1Image(np.zeros((5, 6, 4), np.int16), affine), tmp_path / "scan.nii.gz")
    depth, height, width = read_geometry(tmp_path / "scan.nii.gz").stack_shape
    rng = np.random.default_rng(0)
    slices = {n: rng.integers(0, 3, (height, width)).astype(np.uint8) for n in (1, depth - 1)}
    write_mask_volume(tmp_path / "out" / "m.nii.gz", tmp_path / "scan.nii.gz", slices)
    image = nibabel.load(tmp_path / "out" / "m.nii.gz")
    assert image.shape == (5, 6, 4) and np.allclose(image.affine, affine) and image.get_data_dtype() == np.uint8
    back = dict(read_mask_volume(tmp_path / "out" / "m.nii.gz", tmp_path / "scan.nii.gz"))
    assert back.keys() == slices.keys() and all((back[n] == slices[n]).all() for n in slices)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["m.nii.gz"]


def refused(path: Path, expected: ExpectedMasks, match: str) -> None:
    with pytest.raises(UserError, match=match):
        list(read_corrections(path, expected))


@pytest.mark.parametrize("how", ["coco", "labelstudio", "masks"])
def test_another_size_and_unknown_ids_are_refused(how, tmp_path):
    path = export(how, tmp_path, {i: np.full((3, 4), 2, np.uint8) for i in "ab"})
    refused(path, ExpectedMasks({"a": (3, 4), "b": (4, 3)}, NAMES), r"(?=.*\bb\b).*3 x 4 .*got 4 x 3")
    refused(path, ExpectedMasks({"a": (3, 4)}, NAMES), "b(.png|.jpg)")
    refused(path, ExpectedMasks({"a": (3, 4), "b": (3, 4)}, ("background", "other")), "classes|class ids|labels")


@pytest.mark.parametrize("text", ["no json", "{}", "[1]", "[]", '{"images": [{"id": 1}]}', '[{"annotations": []}]'])
def test_an_unknown_format_is_refused(text, tmp_path):
    (tmp_path / "x.json").write_text(text)
    refused(tmp_path / "x.json", ExpectedMasks({"a": (3, 3)}, NAMES), "expected")


def test_missing_and_damaged_files_are_refused(tmp_path):
    refused(tmp_path, ExpectedMasks({}, NAMES), "found none")
    refused(tmp_path / "nowhere", ExpectedMasks({}, NAMES), "cannot be read")
    (tmp_path / "a.png").write_bytes(b"no picture")
    refused(tmp_path, ExpectedMasks({"a": (3, 3)}, NAMES), "expected a mask of kmine")


def test_a_picture_and_a_volume_of_one_image_are_refused(tmp_path):
    Image.fromarray(np.eye(4, dtype=np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "v.nii").write_bytes(b"read by the function below")
    expected = ExpectedMasks({"a": (4, 4)}, NAMES, lambda name, path: iter([("a", np.eye(4, dtype=np.uint8))]))
    expected = replace(expected, pictures=reader(NAMES))
    with pytest.raises(UserError, match=r"v\.nii: expected one mask an image, got another of a; remove one"):
        list(read_corrections(tmp_path, expected))

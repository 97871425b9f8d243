"""Masks, overlays, components, columns and files of a prediction."""

from __future__ import annotations

import cv2
import nibabel
import numpy as np
import pytest
from PIL import Image

from kmine.data.io.nifti_write import Frame
from kmine.io.files import class_colours
from kmine.predict.estimates import ObjectEstimate
from kmine.predict.inputs import Input
from kmine.predict.outputs import (
    Prediction,
    class_mask,
    mean_max_probability,
    num_components,
    overlay,
    prediction_columns,
    prediction_row,
    write_outputs,
)
from kmine.predict.reader import Loaded

NAMES = ("background", "a")


def loaded(native=None, frame=None, spacing=None, num_slices=1) -> Loaded:
    return Loaded(np.zeros((num_slices, 4, 4, 3), np.uint8), (6, 8), spacing, frame, native)


def objects(*pairs: tuple[int, float]) -> list[tuple[int, ObjectEstimate]]:
    return [(0, ObjectEstimate(1, area, (0, 0, 1, 1), dice)) for area, dice in pairs]


@pytest.mark.parametrize("num_classes", [2, 3])
def test_the_mask_is_the_most_probable_class_of_the_resized_probabilities(num_classes):
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.ones(num_classes), (8, 8)).astype(np.float32).transpose(2, 0, 1)
    grown = np.stack([cv2.resize(p, (31, 17), interpolation=cv2.INTER_LINEAR) for p in probs])
    assert (class_mask(probs, 17, 31) == grown.argmax(axis=0)).mean() > 0.998
    assert np.array_equal(class_mask(probs, 8, 8), probs.argmax(axis=0))


def test_components_connect_at_corners_in_two_and_three_dimensions():
    flat = np.zeros((4, 4), bool)
    flat[0, 0] = flat[1, 1] = flat[3, 3] = True
    assert num_components(flat) == 2
    deep = np.zeros((3, 4, 4), bool)
    deep[0, 0, 0] = deep[1, 1, 1] = deep[2, 3, 3] = True
    assert num_components(deep) == 2


def test_an_overlay_shows_the_class_colour_and_leaves_the_rest():
    image, mask = np.full((64, 64), 100, np.uint8), np.zeros((64, 64), np.uint8)
    mask[16:48, 16:48] = 1
    drawn = cv2.imdecode(np.frombuffer(overlay(image, mask), np.uint8), cv2.IMREAD_COLOR)[..., ::-1].astype(int)
    assert np.abs(drawn[4, 4] - 100).max() < 10
    expected = 100 * 0.8 + class_colours(2)[1] * 0.2
    assert np.abs(drawn[32, 32] - expected).max() < 12
    assert drawn[32].min() < 60, "a dark casing"
    huge = overlay(np.zeros((3000, 1000), np.uint8), np.zeros((3000, 1000), np.uint8))
    assert cv2.imdecode(np.frombuffer(huge, np.uint8), cv2.IMREAD_COLOR).shape[:2] == (1024, 341)


def test_columns_name_every_class():
    assert {"liver_px", "tumour_mm3"} <= set(prediction_columns(("background", "liver", "tumour")))


def test_the_mean_is_of_the_highest_probability_of_each_pixel():
    probs = np.array([[[0.9, 0.4]], [[0.1, 0.6]]], np.float32)
    assert mean_max_probability(probs) == pytest.approx(0.75)


def test_estimated_dice_is_the_mean_over_the_objects_by_area():
    mask = np.ones((6, 8), np.uint8)
    assert Prediction(mask, 1.0, "", objects((30, 0.9), (10, 0.5))).estimated_dice == pytest.approx(0.8)
    assert Prediction(mask, 1.0, "", []).estimated_dice is Prediction(mask, 1.0, "").estimated_dice is None


def test_an_image_has_png_npz_and_jpg_files(tmp_path):
    names = {"mask": "masks/x/y.png", "probs": "probs/x/y.npz", "overlay": "overlays/x/y.jpg"}
    mask = np.arange(48, dtype=np.uint8).reshape(6, 8) % 2
    probs = np.stack([1 - mask, mask]).astype(np.float32)
    prediction = Prediction(mask, 1.0, "", None, probs)
    write_outputs(loaded(np.full((1, 6, 8), 9, np.uint8)), prediction, tmp_path, names)
    assert np.array_equal(np.asarray(Image.open(tmp_path / names["mask"])), mask)
    assert np.array_equal(cv2.imread(str(tmp_path / names["mask"]))[..., ::-1], class_colours(2)[mask]), "for viewers"
    assert np.array_equal(np.load(tmp_path / names["probs"])["probabilities"], probs)
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")} == set(names.values())


def test_the_overlay_of_a_volume_shows_the_slice_with_the_largest_mask(tmp_path):
    native = np.stack([np.full((6, 8), grey, np.uint8) for grey in (0, 80, 160)])
    mask = np.zeros((3, 6, 8), np.uint8)
    mask[1, 0, 0] = mask[2, 0, 0] = mask[2, 0, 1] = 1
    frame = Frame(nibabel.Nifti1Header(), ((0, 1), (1, 1), (2, 1)), 2.0)
    names = {"mask": "m.nii.gz", "overlay": "o.jpg"}
    write_outputs(loaded(native, frame, num_slices=3), Prediction(mask, 1.0, ""), tmp_path, names)
    assert abs(int(cv2.imread(str(tmp_path / "o.jpg"))[5, 7, 0]) - 160) < 6
    assert nibabel.load(tmp_path / "m.nii.gz").get_fdata().sum() == 3


def test_a_volume_has_cubic_millimetres_and_slices_count_from_the_end_of_a_reversed_axis(tmp_path):
    mask = np.zeros((3, 6, 8), np.uint8)
    mask[0, :2, :2] = 1
    frame = Frame(nibabel.Nifti1Header(), ((0, 1), (1, 1), (2, -1)), 2.0)
    item = Input("v", "nifti", (tmp_path / "v.nii",))
    volume = loaded(frame=frame, spacing=(0.5, 0.25), num_slices=3)
    row = prediction_row(item, volume, Prediction(mask, 0.5, "", objects((4, 0.7))), NAMES, {"mask": "m"})
    assert (row["a_px"], row["a_mm2"], row["a_mm3"], row["slices"]) == (4, "", 1.0, 3)
    assert row["objects"][0]["slice"] == 2 and row["estimated_dice"] == 0.7
    assert set(prediction_columns(NAMES)) == row.keys() - {"objects"}

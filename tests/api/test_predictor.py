"""Predictor: one image as the command predicts its file, files as the command does."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from helpers.made_up_run import make_run
from PIL import Image

from kmine.api.predictor import Predictor
from kmine.errors import UserError


@pytest.fixture(scope="module")
def predictor(tmp_path_factory) -> Predictor:
    return Predictor.from_run(make_run(tmp_path_factory.mktemp("run") / "run"), device="cpu")


def picture(height: int = 40, width: int = 52) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (height, width, 3)).astype(np.uint8)


@pytest.mark.parametrize("tta", ["none", "flips"])
def test_an_image_is_predicted_in_its_own_frame(predictor, tta):
    found = predictor.predict(picture(), tta=tta)
    assert found.mask.shape == (40, 52) and found.mask.dtype == np.uint8
    assert found.probs.shape == (len(predictor.class_names), 40, 52)
    assert found.probs.sum(axis=0) == pytest.approx(1, abs=1e-5)
    assert np.array_equal(found.mask, found.probs.argmax(axis=0))


def test_grey_is_three_equal_channels(predictor):
    grey = picture()[..., 0]
    assert np.array_equal(predictor.predict(grey).mask, predictor.predict(np.stack([grey] * 3, axis=2)).mask)


def test_files_have_the_masks_of_the_arrays(predictor, tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    table = predictor.predict_files([tmp_path / "a.png"], tmp_path / "out")
    assert list(table["width"]) == [52] and not table["error"].any()
    with Image.open(tmp_path / "out" / table["mask"][0]) as written:
        assert np.array_equal(np.asarray(written), predictor.predict(picture()).mask)


@pytest.mark.parametrize("image", [picture().astype(float), picture()[..., :2], picture()[0, 0]])
def test_an_array_that_is_no_image_is_refused(predictor, image):
    with pytest.raises(UserError, match=r"image: expected \(H, W, 3\) RGB"):
        predictor.predict(image)


def test_an_unknown_augmentation_is_refused_with_those_there_are(predictor, tmp_path):
    for call in (partial(predictor.predict, picture()), partial(predictor.predict_files, [tmp_path], tmp_path / "out")):
        with pytest.raises(UserError, match=r"tta: unknown name 'vflip'; .*Known: flips, hflip, none"):
            call(tta="vflip")


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="expected a run folder"):
        Predictor.from_run(tmp_path)

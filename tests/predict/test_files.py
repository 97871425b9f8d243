"""Files into a folder of masks and tables, with a stand-in for the network; a repeated call resumes."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from helpers.made_up_run import ABOUT
from PIL import Image

from kmine import cli
from kmine.errors import UserError
from kmine.predict.files import PredictConfig, PredictedFiles, files_summary, predict_files
from kmine.predict.inputs import Inputs, find_inputs
from kmine.predict.network import BatchProbs

QUIET = cli.Terminal(quiet=True)


class Threshold:
    """A network by which bright pixels are the object; counts its images."""

    count = 0

    def predict(self, images, tta):
        self.count += len(images)
        bright = (images[..., 0] > 127).astype(np.float32)
        return BatchProbs(np.stack([1 - bright, bright], axis=1), None)


@pytest.fixture
def folder(tmp_path):
    for name, grey in (("dark", 0), ("bright", 255)):
        Image.fromarray(np.full((6, 8, 3), grey, np.uint8)).save(tmp_path / f"{name}.png")
    return tmp_path


def predict(folder, network, **settings) -> PredictedFiles:
    cfg = PredictConfig(out=str(folder / "out"), **settings)
    return predict_files(cfg, ABOUT, network, find_inputs([str(folder)], folder / "out"), QUIET)


def test_masks_table_and_classes_are_written(folder):
    predicted = predict(folder, Threshold())
    assert [(row["mask"], row["a_px"]) for row in predicted.rows] == [("masks/bright.png", 48), ("masks/dark.png", 0)]
    with (folder / "out" / "predictions.csv").open(newline="") as file:
        assert [row["a_px"] for row in csv.DictReader(file)] == ["48", "0"]
    classes = json.loads((folder / "out" / "classes.json").read_text())
    assert [c["name"] for c in classes["classes"]] == ["background", "a"] and classes["signature"] == ABOUT.signature
    assert predicted.errors == [] and not (folder / "out" / "objects.csv").exists()


def test_only_changed_images_or_settings_are_predicted_again(folder):
    network = Threshold()
    first = predict(folder, network)
    assert predict(folder, network) == first and network.count == 2
    Image.fromarray(np.full((6, 9, 3), 255, np.uint8)).save(folder / "dark.png")
    assert [row["a_px"] for row in predict(folder, network).rows] == [48, 54] and network.count == 3
    predict(folder, network, tta="hflip")
    assert network.count == 5


def test_an_unreadable_file_is_a_row_and_an_error(folder):
    (folder / "dark.png").write_bytes(b"nonsense")
    predicted = predict(folder, Threshold())
    assert [bool(row["error"]) for row in predicted.rows] == [False, True]
    assert len(predicted.errors) == 1 and "dark.png" in predicted.errors[0]


def test_files_of_which_none_is_readable_are_an_error(folder):
    for name in ("dark", "bright"):
        (folder / f"{name}.png").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="none of 2 images could be read, the first"):
        predict(folder, Threshold())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("round", -1),
        ("batch_size", 0),
        ("window", (2.0, 2.0)),
        ("export", "model.pt"),
        ("device", "tpu"),
    ],
)
def test_unfit_settings_are_refused_by_name(name, value):
    with pytest.raises(UserError, match=f"^{name}: expected"):
        PredictConfig(**{name: value})


def test_the_summary_counts_and_names_the_first_unreadable_files(tmp_path):
    rows = [{"warning": "dark"}, {}] + [{"error": "x"}] * 7
    found = PredictedFiles(rows, [f"{n}.png: damaged" for n in range(7)])
    first, second = files_summary(found, Inputs((), (), 3), tmp_path)
    assert first.startswith("2 predicted, 7 unreadable, 1 with a warning; ")
    assert first.endswith("predictions.csv; 3 files of other kinds skipped")
    assert second.startswith("unreadable: 0.png: damaged; 1.png") and second.endswith("4.png: damaged and 2 more")
    assert len(files_summary(found._replace(errors=[]), Inputs((), (), 0), tmp_path)) == 1

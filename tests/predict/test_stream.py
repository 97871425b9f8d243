"""The stream: order, batches, bounded reading ahead, and what is said of an image."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
from helpers.dicom_files import multiframe, scan
from helpers.image_files import save_dicom
from helpers.made_up_run import ABOUT, ALONE

from kmine.data.io.dicom import read_header
from kmine.data.io.dicom_seg import read_seg_mask
from kmine.errors import SampleError
from kmine.mining.calibration.local_quality import LocalQualityEstimator
from kmine.predict import stream
from kmine.predict.inputs import Input, find_inputs
from kmine.predict.network import BatchProbs
from kmine.predict.reader import Loaded
from kmine.predict.stream import PredictJob, predict_stream


class Threshold:
    """Bright is an object; remembers how many came at once."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def predict(self, images, tta):
        self.batches.append(len(images))
        bright = (images[..., 0] > 127).astype(np.float32) * 0.8 + 0.1
        return BatchProbs(np.stack([1 - bright, bright], axis=1), None)


@pytest.fixture
def job(tmp_path):
    return PredictJob(Threshold(), ABOUT, tmp_path, None, "none", 3, probs=False, overlay=False)


def inputs(tmp_path, count: int) -> list[Input]:
    return [Input(f"{n:03}", "picture", (tmp_path / f"{n:03}.png",)) for n in range(count)]


def pretend(monkeypatch, load) -> None:
    monkeypatch.setattr(stream, "load", load)


def loaded(value: int = 255) -> Loaded:
    return Loaded(np.full((1, 4, 4, 3), value, np.uint8), (6, 8), None, None, None)


def test_images_come_back_in_order_in_batches_of_the_size_of_training(job, tmp_path, monkeypatch):
    pretend(monkeypatch, lambda one, *_, **__: loaded(255 * (int(one.name) % 2)))
    done = list(predict_stream(job, inputs(tmp_path, 8)))
    assert [one.item.name for one in done] == [f"{n:03}" for n in range(8)]
    assert [one.row["a_px"] for one in done] == [0, 48] * 4
    assert job.network.batches == [3, 3, 2]
    assert done[0].row["mean_max_probability"] == pytest.approx(0.9)


def test_areas_are_in_mm2_where_the_spacing_is_known(job, tmp_path, monkeypatch):
    spacing = {"000": None, "001": (0.5, 0.25)}
    pretend(monkeypatch, lambda one, *_, **__: replace(loaded(), spacing=spacing[one.name]))
    first, second = (one.row for one in predict_stream(job, inputs(tmp_path, 2)))
    assert (first["a_px"], first["a_mm2"], first["a_components"]) == (48, "", 1)
    assert second["a_mm2"] == pytest.approx(48 * 0.5 * 0.25) and second["a_mm3"] == ""


def test_images_unlike_those_of_training_are_told_by_their_ranges(job, tmp_path, monkeypatch):
    ranges = {"red": [0, 100], "green": [0, 255], "blue": [0, 255], "contrast": [0, 128]}
    warned = replace(job, metadata=replace(ABOUT, intensity={"num_images": 9, "ranges": ranges}))
    pretend(monkeypatch, lambda one, *_, **__: loaded(255 * (int(one.name) % 2)))
    dark, bright = (one.row["warning"] for one in predict_stream(warned, inputs(tmp_path, 2)))
    assert dark == "" and bright == "unlike the training images: red 255 (training: 0 to 100)"


def test_each_object_is_judged_and_an_image_by_their_areas(job, tmp_path, monkeypatch):
    small = np.zeros((1, 4, 4, 3), np.uint8)
    small[0, :, 0] = 255
    shown = {"000": small, "001": np.zeros_like(small)}
    pretend(monkeypatch, lambda one, *_, **__: Loaded(shown[one.name], (4, 4), None, None, None))
    judged = replace(
        job, estimator=LocalQualityEstimator.from_json(ALONE | {"prompts": ALONE["prompts"] | {"min_area_px": 1}})
    )
    one, none = (done.row for done in predict_stream(judged, inputs(tmp_path, 2)))
    assert one["num_objects"] == 1 and one["estimated_dice"] == pytest.approx(0.9), "the mean probability inside"
    box = {"x0": 0, "y0": 0, "x1": 0, "y1": 3}
    assert one["objects"] == [{"slice": "", "class": "a", "px": 4, **box, "estimated_dice": 0.9}]
    assert (none["num_objects"], none["estimated_dice"], none["objects"]) == (0, "", []), (
        "what is not found is not judged"
    )
    unjudged = next(predict_stream(job, inputs(tmp_path, 1))).row
    assert (unjudged["num_objects"], unjudged["estimated_dice"]) == ("", "")


def test_no_more_is_read_than_a_batch_ahead(job, tmp_path, monkeypatch):
    lock, open_now, most = threading.Lock(), [0], [0]

    def load(one, *_, **__):
        with lock:
            open_now[0] += 1
            most[0] = max(most[0], open_now[0])
        return loaded()

    pretend(monkeypatch, load)
    for _ in predict_stream(job, inputs(tmp_path, 60)):
        with lock:
            open_now[0] -= 1
    assert 0 < most[0] <= 4 * job.batch_size + 2


def test_a_bad_image_stops_nobody(job, tmp_path, monkeypatch):
    def load(one, *_, **__):
        if one.name == "001":
            raise SampleError("x.png", "broken")
        return loaded()

    pretend(monkeypatch, load)
    done = {one.item.name: one for one in predict_stream(job, inputs(tmp_path, 4))}
    assert [name for name, one in done.items() if one.error] == ["001"] and len(done) == 4
    assert done["001"].row["error"] == "broken" and not (tmp_path / "masks" / "001.png").exists()


def test_a_network_that_gives_no_numbers_stops_the_stream(job, tmp_path, monkeypatch):
    pretend(monkeypatch, lambda *_, **__: loaded())

    def predict(images, tta):
        raise FloatingPointError("NaN")

    job.network.predict = predict
    with pytest.raises(FloatingPointError):
        list(predict_stream(job, inputs(tmp_path, 4)))


def test_outputs_are_named_after_their_input_by_kind(job, tmp_path):
    full = replace(job, probs=True, overlay=True)
    image, volume = Input("x/y", "picture", (tmp_path / "y.png",)), Input("v", "nifti", (tmp_path / "v.nii",))
    assert full.names(image) == {"mask": "masks/x/y.png", "probs": "probs/x/y.npz", "overlay": "overlays/x/y.jpg"}
    assert full.names(volume) == {"mask": "masks/v.nii.gz", "probs": "probs/v.nii", "overlay": "overlays/v.jpg"}
    assert job.names(volume) == {"mask": "masks/v.nii.gz"}


def seg_job(out, window):
    return PredictJob(Threshold(), ABOUT, out, window, "none", 2, probs=False, overlay=False, dicom_seg=True)


@pytest.mark.parametrize("kind", ["series", "frames", "dicom"])
def test_masks_of_dicom_are_segmentations_of_it(tmp_path, kind):
    pytest.importorskip("highdicom")
    if kind == "frames":
        multiframe(tmp_path / "in" / "a.dcm", 3)
    else:
        scan(tmp_path / "in", 3 if kind == "series" else 1)
    (item,) = find_inputs([str(tmp_path / "in")], tmp_path / "out").readable
    assert item.kind == kind
    job = PredictJob(
        Threshold(), ABOUT, tmp_path / "out", (0, 3), "none", 2, probs=False, overlay=False, dicom_seg=True
    )
    (done,) = predict_stream(job, [item])
    assert not done.error and not done.row["warning"]
    seg = tmp_path / "out" / done.names["seg"]
    found = [
        read_seg_mask(seg, path, frame, ABOUT.class_names).max()
        for path in sorted(item.files)
        for frame in range(read_header(path).frames)
    ]
    values = [0, 10, 20] if kind == "frames" else range(len(item.files))
    assert found == [int(value > 1.5) for value in values]


def test_an_image_without_place_has_its_mask_and_a_warning(tmp_path):
    pytest.importorskip("highdicom")
    path = save_dicom(tmp_path / "x.dcm", np.full((6, 8), 9, np.uint8))
    job = PredictJob(
        Threshold(), ABOUT, tmp_path / "out", (0, 9), "none", 2, probs=False, overlay=False, dicom_seg=True
    )
    (done,) = predict_stream(job, [Input("x", "dicom", (path,))])
    assert "no DICOM segmentation: expected an image that" in done.row["warning"] and not done.error
    assert (tmp_path / "out/masks/x.png").is_file() and "seg" not in done.names

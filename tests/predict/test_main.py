"""`kmine predict`: the command from a run or an ONNX file to masks, its table, its exit codes."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import cv2
import nibabel
import numpy as np
import pytest
import torch
from helpers.loop_command import (
    FEW_STEPS,
    SMALL,
    UNET,
    run_loop,
)
from helpers.made_up_run import calibrated, make_run
from PIL import Image

from kmine.data.datasets.phantom.dataset import PhantomSource
from kmine.predict import __main__ as predict
from kmine.predict.run_model import load_model, open_run_model
from kmine.training.inference import predict_resized

RNG = np.random.default_rng(0)


def picture(height: int = 40, width: int = 50, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def save(path, image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def table(out) -> dict[str, dict[str, str]]:
    with (out / "predictions.csv").open(newline="") as file:
        return {Path(row["file"]).name: row for row in csv.DictReader(file)}


def expected_mask(run, image, **which) -> np.ndarray:
    """The rule, written anew: squash, ask, resize the probabilities, take the most probable class."""
    found = open_run_model(run, which.get("round_idx"), which.get("checkpoint", "best"))
    small = cv2.resize(image, (32, 32), interpolation=cv2.INTER_AREA)
    probs = predict_resized(load_model(found), small[None], "none", torch.device("cpu"))[0][0]
    grown = [cv2.resize(p, image.shape[1::-1], interpolation=cv2.INTER_LINEAR) for p in probs]
    return np.argmax(grown, axis=0).astype(np.uint8)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    return calibrated(make_run(tmp_path_factory.mktemp("judged") / "run"))


def main(*words: object) -> int:
    return predict.main([str(word) for word in words])


def test_masks_lie_as_their_images_do_and_are_what_the_adopted_model_says(run, tmp_path):
    images = {"a.png": picture(40, 50, 1), "deep/er/b.png": picture(64, 48, 2), "deep/c.tif": picture(33, 70, 3)}
    for name, image in images.items():
        save(tmp_path / "in" / name, image)
    out = tmp_path / "out"
    assert main(run, tmp_path / "in", "--out", out) == 0
    masks = {path.relative_to(out / "masks").as_posix(): path for path in (out / "masks").rglob("*.png")}
    assert masks.keys() == {"a.png", "deep/er/b.png", "deep/c.png"}
    for name, image in images.items():
        mask = np.asarray(Image.open(masks[name.replace(".tif", ".png")]))
        assert mask.dtype == np.uint8 and mask.shape == image.shape[:2]
        assert np.array_equal(mask, expected_mask(run, image))
        row = table(out)[Path(name).name]
        assert int(row["polyp_px"]) == (mask == 1).sum() and row["polyp_mm2"] == ""
        assert row["estimated_dice"] == "" == row["num_objects"], "this run has no calibration"
        assert 0.5 <= float(row["mean_max_probability"]) <= 1
    classes = json.loads((out / "classes.json").read_text())
    assert [(c["id"], c["name"]) for c in classes["classes"]] == [(0, "background"), (1, "polyp")]


@pytest.mark.parametrize(("words", "which"), [(["--round", 0], {"round_idx": 0}), (["--checkpoint", "final"], {})])
def test_another_round_or_checkpoint_is_another_model(run, tmp_path, words, which):
    image = picture(40, 50)
    save(tmp_path / "a.png", image)
    assert main(run, tmp_path / "a.png", "--out", tmp_path / "out", *words) == 0
    mask = np.asarray(Image.open(tmp_path / "out" / "masks" / "a.png"))
    which = which or {"checkpoint": "final"}
    assert np.array_equal(mask, expected_mask(run, image, **which))
    assert not np.array_equal(mask, expected_mask(run, image))


def test_a_cell_of_a_sweep_says_where_its_rounds_are(tmp_path):
    cell = make_run(tmp_path / "cell", with_weights=False, method="mean_teacher", arm="mean_teacher")
    assert open_run_model(cell, None, "best").weights == cell / "mean_teacher" / "round_01" / "model.safetensors"
    assert open_run_model(cell, 0, "best").weights == cell / "round_00" / "model.safetensors"
    assert open_run_model(cell, None, "best").metadata.method == "mean_teacher"


def test_the_same_command_makes_nothing_again_and_a_changed_image_anew(run, tmp_path):
    for n in range(4):
        save(tmp_path / "in" / f"{n}.png", picture(seed=n))
    out = tmp_path / "in" / "out"  # inside of what is searched: its masks are no images
    assert main(run, tmp_path / "in", "--out", out) == 0
    first = table(out)
    before = {path.name: path.stat().st_mtime_ns for path in (out / "masks").iterdir()}
    (out / "masks" / "1.png").unlink()
    save(tmp_path / "in" / "2.png", picture(44, 45, seed=9))
    assert main(run, tmp_path / "in", "--out", out) == 0
    after = {path.name: path.stat().st_mtime_ns for path in (out / "masks").iterdir()}
    assert {name for name in after if after[name] != before[name]} == {"1.png", "2.png"}
    assert table(out).keys() == first.keys() and table(out)["0.png"] == first["0.png"]
    assert main(run, tmp_path / "in", "--out", out, "--round", 0) == 0
    assert all(path.stat().st_mtime_ns != after[path.name] for path in (out / "masks").iterdir())


def test_unreadable_files_are_listed_and_the_code_says_so(run, tmp_path, capsys):
    save(tmp_path / "in" / "good.png", picture())
    (tmp_path / "in" / "bad.png").write_bytes(b"nonsense")
    (tmp_path / "in" / "notes.txt").write_text("left alone")
    assert main(run, tmp_path / "in", "--out", tmp_path / "out") == 1
    rows = table(tmp_path / "out")
    assert rows["bad.png"]["error"].startswith("expected an image") and rows["good.png"]["error"] == ""
    said = capsys.readouterr().err
    assert "1 predicted, 1 unreadable" in said and "1 files of other kinds skipped" in said
    (tmp_path / "in" / "good.png").unlink()
    assert main(run, tmp_path / "in", "--out", tmp_path / "other") == 2
    assert "none of 1 images could be read" in capsys.readouterr().err


def test_deep_pictures_need_a_window_and_are_windowed(run, tmp_path, capsys):
    grey = RNG.integers(0, 4000, (40, 40)).astype(np.uint16)
    save(tmp_path / "deep.png", grey)
    assert main(run, tmp_path / "deep.png", "--out", tmp_path / "o") == 2
    assert "--window [LOW,HIGH]" in capsys.readouterr().err
    assert main(run, tmp_path / "deep.png", "--out", tmp_path / "out", "--window", "[1000, 3000]") == 0
    shown = np.rint((np.clip(grey, 1000, 3000) - 1000.0) * 255 / 2000).astype(np.uint8)
    mask = np.asarray(Image.open(tmp_path / "out" / "masks" / "deep.png"))
    assert np.array_equal(mask, expected_mask(run, np.repeat(shown[..., None], 3, axis=2)))


def test_a_volume_comes_back_in_its_own_geometry(run, tmp_path):
    values = RNG.normal(0, 100, (36, 40, 5)).astype(np.float32)
    affine = np.array([[-0.5, 0, 0, 7], [0, 0.8, 0, -3], [0, 0, 2.5, 11], [0, 0, 0, 1]])
    nibabel.save(nibabel.Nifti1Image(values, affine), tmp_path / "scan.nii")
    out = tmp_path / "out"
    words = ("--window", "[-100, 100]", "--probs", "--overlay")
    assert main(run, tmp_path / "scan.nii", "--out", out, *words) == 0
    mask = nibabel.load(out / "masks" / "scan.nii.gz")
    assert mask.shape == values.shape and mask.get_data_dtype() == np.uint8
    assert np.array_equal(mask.affine, nibabel.load(tmp_path / "scan.nii").affine)
    stored = np.asarray(mask.dataobj)
    # The first axis grows to the left and the second to the front: rows of a slice come from the back of the array.
    for number in range(5):
        shown = np.rint((np.clip(values[:, ::-1, number].T, -100, 100) + 100.0) * 255 / 200).astype(np.uint8)
        assert np.array_equal(stored[:, ::-1, number].T, expected_mask(run, np.repeat(shown[..., None], 3, axis=2)))
    probs = nibabel.load(out / "probs" / "scan.nii")
    assert probs.shape == (*values.shape, 2) and probs.get_data_dtype() == np.float32
    values = np.asarray(probs.dataobj)
    assert np.allclose(values.sum(axis=3), 1, atol=1e-5)
    assert (values.argmax(axis=3) == stored).mean() > 0.999
    row = table(out)["scan.nii"]
    assert float(row["polyp_mm3"]) == pytest.approx(int(row["polyp_px"]) * 0.5 * 0.8 * 2.5)
    assert row["slices"] == "5" and (out / "overlays" / "scan.jpg").is_file()


def test_probabilities_and_overlay_of_a_picture(run, tmp_path):
    image = picture(40, 50)
    save(tmp_path / "a.png", image)
    out = tmp_path / "out"
    assert main(run, tmp_path / "a.png", "--out", out, "--probs", "--overlay", "--card") == 0
    probs = np.load(out / "probs" / "a.npz")["probabilities"]
    assert probs.shape == (2, 40, 50) and probs.dtype == np.float16
    assert (probs.argmax(axis=0) == np.asarray(Image.open(out / "masks" / "a.png"))).mean() > 0.99
    assert Image.open(out / "overlays" / "a.jpg").size == (50, 40)
    assert "Not a medical device" in (out / "model_card.md").read_text()


MISTAKES = [
    (["RUN"], "expected images after it"),
    (["no/such/run", "IN"], "expected a run folder"),
    (["IN", "IN"], "expected a run folder"),
    (["RUN", "no/such/image.png"], "found nothing there"),
    (["RUN", "IN", "--round", "7"], "no best model of round 7; there are round_00, round_01"),
    (["RUN", "IN", "--window", "[3, 1]"], "rising"),
    (["RUN", "IN", "--device", "gpu"], "expected auto, cpu"),
    (["RUN", "--export", "model.pt"], "ends in .onnx"),
    (["x.onnx", "IN"], "found no such file"),
    (["RUN", "EMPTY"], "found none among"),
]


@pytest.mark.parametrize(("words", "said"), MISTAKES, ids=[" ".join(words) for words, _ in MISTAKES])
def test_mistakes_are_one_line(run, tmp_path, capsys, words, said):
    save(tmp_path / "in" / "a.png", picture())
    (tmp_path / "empty").mkdir()
    places = {"RUN": run, "IN": tmp_path / "in", "EMPTY": tmp_path / "empty"}
    try:
        code = main(*(places.get(word, word) for word in words), "--out", tmp_path / "out")
    except SystemExit as stop:
        code = stop.code
    err = capsys.readouterr().err
    assert code == 2 and err.count("\n") == 1 and said in err
    assert not (tmp_path / "out").exists()


def test_a_run_that_is_not_finished_has_no_model_unless_a_round_is_named(tmp_path, capsys):
    run = make_run(tmp_path / "run", stopped_by="interrupted")
    save(tmp_path / "a.png", picture())
    assert main(run, tmp_path / "a.png", "--out", tmp_path / "out") == 2
    assert "not finished" in capsys.readouterr().err
    assert main(run, tmp_path / "a.png", "--out", tmp_path / "out", "--round", 1) == 0


def test_files_of_channels_are_one_image(tmp_path, capsys):
    run = make_run(tmp_path / "run", channels=["T2", "ADC"])
    channels = [picture(seed=n)[..., 0] for n in range(3)]
    for number, grey in enumerate(channels):
        save(tmp_path / "in" / "deep" / f"case_1_{number:04}.png", grey)
    assert main(run, tmp_path / "in", "--out", tmp_path / "out") == 0
    stacked = np.stack([*channels[:2], np.zeros_like(channels[0])], axis=2)
    mask = np.asarray(Image.open(tmp_path / "out" / "masks" / "deep" / "case_1.png"))
    assert (mask == expected_mask(run, stacked)).all() and len(table(tmp_path / "out")) == 1
    assert main(run, "--export", tmp_path / "model.onnx") == 0
    assert main(tmp_path / "model.onnx", tmp_path / "in", "--out", tmp_path / "onnx") == 0
    assert (np.asarray(Image.open(tmp_path / "onnx" / "masks" / "deep" / "case_1.png")) == mask).all()
    (tmp_path / "in" / "deep" / "case_1_0001.png").unlink()
    capsys.readouterr()
    assert main(run, tmp_path / "in", "--out", tmp_path / "out") == 2
    assert "expected a file 0001 (channel ADC) of deep/case_1, found none" in capsys.readouterr().err
    save(tmp_path / "a.png", picture())
    assert main(run, tmp_path / "a.png", "--out", tmp_path / "out") == 2
    message = "a.png: expected pictures or NIfTI files, one for each of T2, ADC, as NAME_0000, got another"
    assert message in capsys.readouterr().err


def test_damaged_weights_are_named(tmp_path, capsys):
    run = make_run(tmp_path / "run")
    (run / "round_01" / "model.safetensors").write_bytes(b"nonsense")
    save(tmp_path / "a.png", picture())
    assert main(run, tmp_path / "a.png", "--out", tmp_path / "out") == 2
    assert "model.safetensors: damaged" in capsys.readouterr().err


@pytest.mark.parametrize("tta", ["none", "hflip"])
def test_a_calibrated_run_estimates_the_dice_of_each_object(judged, tmp_path, tta):
    image = picture(40, 50, 1)
    save(tmp_path / "a.png", image)
    out = tmp_path / "out"
    assert main(judged, tmp_path / "a.png", "--out", out, "--tta", tta, "--card") == 0
    small = cv2.resize(image, (32, 32), interpolation=cv2.INTER_AREA)
    found = load_model(open_run_model(judged, None, "best"))
    probs = predict_resized(found, small[None], tta, torch.device("cpu"))[0][0]
    inside = cv2.resize(probs[1], (50, 40), interpolation=cv2.INTER_LINEAR)
    mask = np.asarray(Image.open(out / "masks" / "a.png"))
    count, labels = cv2.connectedComponents(mask, connectivity=8)
    share = {"none": 1.0, "hflip": 0.5}[tta]
    parts = [labels == n for n in range(1, count) if (labels == n).sum() >= 5]
    expected = {int(part.sum()): share * float(inside[part].mean()) for part in parts}
    with (out / "objects.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert parts and {int(r["px"]): float(r["estimated_dice"]) for r in rows} == pytest.approx(expected, abs=1e-4)
    assert {(r["file"], r["class"], r["slice"]) for r in rows} == {(str(tmp_path / "a.png"), "polyp", "")}
    row = table(out)["a.png"]
    mean = share * float(inside[np.any(parts, axis=0)].mean())  # each pixel counts once: by area
    assert int(row["num_objects"]) == len(parts) and float(row["estimated_dice"]) == pytest.approx(mean, abs=1e-4)
    assert "41 objects of labeled images" in json.loads((out / "classes.json").read_text())["estimated_dice"]
    card = (out / "model_card.md").read_text()
    assert "rank correlation with true Dice 0.62" in card and "fewer labels than the final model" in card


def test_where_nothing_estimates_it_is_said_why(run, judged, tmp_path, capsys):
    save(tmp_path / "a.png", picture())
    out = tmp_path / "out"
    assert main(run, tmp_path / "a.png", "--out", out, "--card") == 0
    assert "no estimated_dice: the run has no calibrated gate" in capsys.readouterr().err
    assert "no calibrated gate" in json.loads((out / "classes.json").read_text())["estimated_dice"]
    assert "so no Dice can be estimated" in (out / "model_card.md").read_text()
    assert main(judged, tmp_path / "a.png", "--out", out, "--tta", "flips") == 0
    assert "with --tta none or hflip, not with flips" in capsys.readouterr().err
    assert table(out)["a.png"]["estimated_dice"] == ""
    assert main(judged, tmp_path / "a.png", "--out", out) == 0
    assert table(out)["a.png"]["num_objects"] != "", "what was made without estimates is made again"


def test_the_slices_of_a_volume_are_numbered_as_they_lie_in_the_file(judged, tmp_path):
    values = np.random.default_rng(3).normal(0, 100, (36, 40, 4)).astype(np.float32)
    (tmp_path / "in").mkdir()
    for name, affine in (("up", np.diag([-1.0, 1, 1, 1])), ("down", np.diag([-1.0, 1, -1, 1]))):
        nibabel.save(nibabel.Nifti1Image(values, affine), tmp_path / "in" / f"{name}.nii")
    out = tmp_path / "out"
    assert main(judged, tmp_path / "in", "--out", out, "--window", "[-100, 100]") == 0
    with (out / "objects.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) > 2
    for name in ("up", "down"):
        stored = np.asarray(nibabel.load(out / "masks" / f"{name}.nii.gz").dataobj)
        for n in range(4):
            parts = cv2.connectedComponents(np.ascontiguousarray(stored[..., n]), connectivity=8)[1]
            there = sorted(size for size in np.bincount(parts.ravel())[1:].tolist() if size >= 5)
            assert there == sorted(int(r["px"]) for r in rows if name in r["file"] and r["slice"] == str(n))


def test_a_run_without_training_brightness_is_reported(run, tmp_path, capsys):
    save(tmp_path / "a.png", picture())
    assert main(run, tmp_path / "a.png", "--out", tmp_path / "out") == 0
    assert "does not hold the brightness" in capsys.readouterr().err


# -- without torch


@pytest.fixture(scope="module")
def exported(judged):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    target = judged.parent / "export" / "model.onnx"
    assert main(judged, "--export", target) == 0
    return target


def test_an_export_predicts_and_estimates_the_same_without_torch(judged, exported, tmp_path):
    run = judged
    for n in range(4):
        save(tmp_path / "in" / f"{n}.png", picture(60, 45, seed=n))
    assert main(run, tmp_path / "in", "--out", tmp_path / "ours") == 0
    words = [str(exported), str(tmp_path / "in"), "--out", str(tmp_path / "theirs"), "--card"]
    program = (
        f"import sys\nfrom kmine.predict import __main__ as predict\ncode = predict.main({words!r})\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for n in range(4):
        ours, theirs = (np.asarray(Image.open(tmp_path / o / "masks" / f"{n}.png")) for o in ("ours", "theirs"))
        assert (ours != theirs).mean() < 1e-3
    ours, theirs = table(tmp_path / "ours"), table(tmp_path / "theirs")
    assert theirs.keys() == ours.keys()
    for name, row in ours.items():
        assert float(theirs[name]["estimated_dice"]) == pytest.approx(float(row["estimated_dice"]), abs=2e-3)
    assert (tmp_path / "theirs" / "model_card.md").read_text() == (exported.parent / "model_card.md").read_text()


def test_flips_agree_between_torch_and_onnx(judged, exported):
    run = judged
    pytest.importorskip("onnxruntime")
    from kmine.predict.network import open_onnx

    about, network = open_onnx(exported, "cpu")
    images = RNG.integers(0, 256, (2, 32, 32, 3), np.uint8)
    model = load_model(open_run_model(run, None, "best"))
    for tta in ("none", "hflip", "flips"):
        ours, apart = predict_resized(model, images, tta, torch.device("cpu"))
        theirs = network.predict(images, tta)
        assert np.abs(theirs.probs - ours).max() < 1e-4
        assert theirs.std is None if tta == "none" else np.abs(theirs.std - apart).max() < 1e-4
    assert about.signature == open_run_model(run, None, "best").metadata.signature and about.class_names[1] == "polyp"


def test_a_foreign_onnx_file_is_refused(tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    (tmp_path / "x.onnx").write_bytes(b"nonsense")
    save(tmp_path / "a.png", picture())
    assert main(tmp_path / "x.onnx", tmp_path / "a.png", "--out", tmp_path / "out") == 2
    assert "not a whole ONNX model" in capsys.readouterr().err


# -- what the loop leaves


def test_a_run_of_the_loop_warns_of_images_unlike_its_own(tmp_path):
    out = tmp_path / "run"
    assert run_loop(SMALL | UNET | FEW_STEPS, out, rounds=0, data__kind="xray") == 0
    of_training = PhantomSource("xray", 24, 32)
    save(tmp_path / "in" / "usual.png", of_training.image(of_training.refs()[0].sample_id))
    save(tmp_path / "in" / "dark.png", np.zeros((40, 40, 3), np.uint8))
    assert main(out, tmp_path / "in", "--out", tmp_path / "masks") == 0
    rows = table(tmp_path / "masks")
    assert "unlike the training images" in rows["dark.png"]["warning"] and rows["usual.png"]["warning"] == ""

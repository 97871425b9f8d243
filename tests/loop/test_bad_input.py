"""Wrong input ends in one line with the cure and exit code 2; nothing computed is lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from helpers.loop_command import (
    FEW_STEPS,
    SMALL,
    UNET,
    run_loop,
)
from PIL import Image
from safetensors.torch import save_file

from kmine.store.run_folder import RunFolder

TINY = SMALL | UNET | FEW_STEPS | {"data.name": "kvasir_seg", "data.label_fraction": 0.4}
COUNT = 12


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A folder laid out as Kvasir-SEG, with smooth noise for images and discs for polyps."""
    root = tmp_path_factory.mktemp("sound") / "data"
    for n in range(COUNT):
        rng = np.random.default_rng(n)
        coarse = rng.integers(40, 255, (5, 6, 3)).astype(np.uint8)
        save(root / "images" / f"p{n:02d}.jpg", cv2.resize(coarse, (80, 64), interpolation=cv2.INTER_CUBIC))
        rows, cols = np.mgrid[:64, :80]
        disc = (rows - rng.integers(20, 44)) ** 2 + (cols - rng.integers(20, 60)) ** 2 < rng.integers(8, 16) ** 2
        save(root / "masks" / f"p{n:02d}.jpg", np.repeat(disc[..., None], 3, axis=2).astype(np.uint8) * 255)
    return root


@pytest.fixture(scope="module")
def splits(sound):
    """Samples by split, as a run on the sound folder draws them."""
    assert run(sound, rounds=0) == 0
    found: dict[str, list[str]] = {}
    for row in (sound.parent / "run" / "splits.csv").read_text().splitlines()[1:]:
        found.setdefault(row.split(",")[2], []).append(row.split(",")[0])
    return found


@pytest.fixture
def root(sound, tmp_path):
    """The sound folder, to be spoiled."""
    return Path(shutil.copytree(sound, tmp_path / "data"))


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def run(root: Path | None, **changes: object) -> int:
    """Exit code of the loop on the folder `root`; run folder and cache lie beside it."""
    beside = root.parent if root else Path(str(changes.pop("beside")))
    data = {"data.root": root} if root else {}
    out = Path(str(changes.pop("out", beside / "run")))
    try:
        return run_loop(TINY | data, out, beside / "cache", **changes)
    except SystemExit as stop:
        return stop.code


def refused(capsys: pytest.CaptureFixture[str], root: Path | None, **changes: object) -> str:
    """The last line of a run that ends with exit code 2."""
    capsys.readouterr()
    assert run(root, **changes) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    errors = [line for line in err.splitlines() if line.startswith("kmine loop: error: ")]
    assert len(errors) == 1 and err.splitlines()[-1] == errors[0], err
    return errors[0].removeprefix("kmine loop: error: ")


def masks_in(root: Path, splits: dict[str, list[str]], *names: str) -> list[Path]:
    """One mask file of each of these splits."""
    return [root / "masks" / f"{splits[name][0]}.jpg" for name in names]


def test_the_unspoiled_folder_runs(root):
    assert run(root) == 0


# -- the folder


def test_a_missing_root_and_a_root_that_is_not_given(tmp_path, capsys):
    said = refused(capsys, None, beside=tmp_path)
    assert "data.root: expected the folder that holds Kvasir-SEG, got nothing; pass --data.root" in said
    said = refused(capsys, tmp_path / "nowhere")
    assert said.startswith(f"{tmp_path / 'nowhere'}: expected the Kvasir-SEG folder, found nothing; pass --data.root")
    assert not (tmp_path / "run").exists(), "nothing is made before the data are found"


def test_no_pairs(root, capsys):
    for path in (root / "masks").iterdir():
        path.rename(path.with_name(f"mask_{path.name}"))
    assert f"found {COUNT} images and {COUNT} masks but no pair; give each mask its image's name" in refused(
        capsys, root
    )


def test_a_mask_without_an_image_stops_or_is_listed(root, capsys):
    (root / "images" / "p03.jpg").unlink()
    said = refused(capsys, root)
    assert "expected an image for each mask" in said and "p03.jpg; restore" in said and "--data.on_error skip" in said
    assert run(root, data__on_error="skip", rounds=0) == 0
    assert skipped(root) == [("p03", "a mask without an image")]


def skipped(root: Path) -> list[tuple[str, str]]:
    told = RunFolder(root.parent / "run").run()
    assert told["num_skipped"] == len(told["skipped"])
    assert all(s["path"] for s in told["skipped"])
    return [(s["sample_id"], s["problem"]) for s in told["skipped"]]


# -- single files


def zero_bytes(path: Path) -> None:
    path.write_bytes(b"")


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 9 // 10])


def cut_in_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:300])


def no_image(path: Path) -> None:
    path.write_bytes(b"<html>not found</html>" * 20)


def replaced(path: Path, pixels: np.ndarray, mode: str | None = None) -> None:
    path.unlink()
    Image.fromarray(pixels, mode).save(path.with_suffix(".png"))


def deep(path: Path) -> None:
    replaced(path, np.full((64, 80), 1000, np.uint16))


def transparent(path: Path) -> None:
    replaced(path, np.full((64, 80, 4), 100, np.uint8))


def grey(path: Path) -> None:
    replaced(path, np.full((64, 80), 100, np.uint8))


BAD_IMAGES = [
    (zero_bytes, "got an empty file (0 bytes); copy or download it again"),
    (truncated, "truncated or damaged file"),
    (no_image, "got a web page; download the file itself"),
    (deep, "expected 8 bits per channel, got 16 or more"),
    (transparent, "expected an image without transparency, got mode RGBA"),
    (grey, "expected a colour image (RGB), got a grey one (L); convert it to RGB"),
]


@pytest.mark.parametrize(("spoil", "said"), BAD_IMAGES, ids=lambda v: getattr(v, "__name__", ""))
def test_a_damaged_image_stops_the_run(root, capsys, spoil, said):
    spoil(root / "images" / "p05.jpg")
    line = refused(capsys, root)
    assert line.startswith(str(root / "images" / "p05.")) and said in line
    assert "or pass --data.on_error skip to list and leave out such files" in line


def test_damaged_images_are_listed(root, capsys):
    for n, (spoil, _) in enumerate(BAD_IMAGES):
        spoil(root / "images" / f"p{n:02d}.jpg")
    refused(capsys, root)
    capsys.readouterr()
    flags = {"data__on_error": "skip", "data__val_fraction": 0.3, "rounds": 0}
    assert run(root, **flags) == 0, "the cure works in the very folder that was refused"
    found = skipped(root)
    assert [sample_id for sample_id, _ in found] == [f"p{n:02d}" for n in range(len(BAD_IMAGES))]
    assert all(said in problem for (_, problem), (_, said) in zip(found, BAD_IMAGES, strict=True))
    said = f"6 files skipped, listed in run.json; the first: {root / 'images' / 'p00.'}"
    assert said in capsys.readouterr().err


def small(path: Path) -> None:
    Image.fromarray(np.full((64, 79, 3), 255, np.uint8)).save(path)


def empty(path: Path) -> None:
    Image.fromarray(np.zeros((64, 80, 3), np.uint8)).save(path)


def ones(path: Path) -> None:
    Image.fromarray(np.ones((64, 80, 3), np.uint8)).save(path)


BAD_MASKS = [
    (small, "expected the image's size 80 x 64 (width x height), got 79 x 64"),
    (empty, "expected a polyp, got no pixel above 127"),
    (cut_in_header, "truncated"),
    (ones, "store the foreground as 255 (not 1)"),
    (zero_bytes, "got an empty file (0 bytes)"),
    (truncated, "truncated or damaged file"),
]


@pytest.mark.parametrize(("spoil", "said"), BAD_MASKS, ids=lambda v: getattr(v, "__name__", ""))
def test_a_damaged_mask_stops_the_run(root, splits, capsys, spoil, said):
    (path,) = masks_in(root, splits, "labeled")
    spoil(path)
    line = refused(capsys, root)
    assert line.startswith(str(path)) and said in line.lower() and "--data.on_error skip" in line


def test_damaged_masks_are_listed(root, splits, capsys):
    spoiled = {}
    for path, (spoil, said) in zip(
        masks_in(root, splits, "labeled", "val"), (BAD_MASKS[0], BAD_MASKS[-1]), strict=True
    ):
        spoil(path)
        spoiled[path.stem] = said
    refused(capsys, root)
    assert run(root, data__on_error="skip", rounds=0) == 0
    found = dict(skipped(root))
    assert found.keys() == spoiled.keys() and all(said in found[name].lower() for name, said in spoiled.items())


def test_a_run_with_a_mended_file_resumes_in_its_folder(root, splits, capsys):
    (path,) = masks_in(root, splits, "labeled")
    whole = path.read_bytes()
    truncated(path)
    refused(capsys, root)
    path.write_bytes(whole)
    assert run(root, rounds=0) == 0


def test_masks_of_unlabeled_and_test_images_are_never_opened(root, splits):
    for path in masks_in(root, splits, "unlabeled", "test"):
        zero_bytes(path)
    assert run(root, rounds=0) == 0
    assert skipped(root) == []


def test_an_image_without_a_mask_is_unlabeled(root):
    (root / "masks" / "p03.jpg").unlink()
    assert run(root, rounds=0) == 0
    assert "p03,p03,unlabeled" in (root.parent / "run" / "splits.csv").read_text()


def test_no_validation_mask_that_can_be_read(root, splits, capsys):
    for name in splits["val"]:
        (root / "masks" / f"{name}.jpg").write_bytes(b"nonsense")
    line = refused(capsys, root, data__on_error="skip")
    assert "no readable validation image remains; mend the files listed in run.json" in line


# -- settings that leave nothing


def test_a_fraction_that_leaves_no_labeled_image_names_one_that_works(root, capsys):
    line = refused(capsys, root, data__label_fraction=0.001)
    assert "data.label_fraction: expected at least one labeled image, got 0.001" in line
    works = line.rpartition("the smallest that works is ")[2]
    assert run(root, data__label_fraction=works, rounds=0) == 0, "in the same run folder: nothing was computed in it"


def test_a_fraction_that_leaves_no_validation_image_names_one_that_works(root, capsys):
    line = refused(capsys, root, data__val_fraction=0)
    assert "data.val_fraction: expected at least one of 12 images with masks, got 0.0" in line
    assert run(root, data__val_fraction=line.rpartition(" ")[2], rounds=0) == 0


def test_nothing_left_to_mine(root, capsys):
    line = refused(capsys, root, data__label_fraction=1)
    assert "nothing to mine: data.label_fraction 1.0 leaves no unlabeled image; lower it" in line
    assert run(root, data__label_fraction=1, rounds=0) == 0


# -- names


@pytest.mark.parametrize(
    ("name", "value", "near"),
    [
        ("data.name", "kvasir_sge", "kvasir_seg"),
        ("model.name", "unetp", "unetpp"),
        ("model.encoder", "mobilenetv2", "mobilenet_v2"),
        ("segmenter.name", "elipse", "ellipse"),
    ],
)
def test_an_unknown_name_suggests_the_nearest(root, capsys, name, value, near):
    said = refused(capsys, root, **{name: value})
    assert said.startswith(f"{name}: unknown name {value!r}; did you mean {near}?")


def test_an_unknown_key_suggests_the_nearest(root, capsys):
    assert refused(capsys, root, **{"data.lable_fraction": 1}).endswith("did you mean data.label_fraction?")


@pytest.mark.parametrize("device", ["gpu", "cpu:1", "cuda:x", "cuda:", ""])
def test_an_unknown_device(root, capsys, device):
    assert "device: expected auto, cpu, cuda or cuda:N, got" in refused(capsys, root, device=device)


def test_a_gpu_that_is_not_there(root, capsys):
    assert "device: expected " in refused(capsys, root, device=f"cuda:{torch.cuda.device_count()}")


# -- checkpoints


def test_encoder_weights_of_another_architecture(root, capsys):
    path = root.parent / "weights.safetensors"
    save_file({"conv1.weight": torch.zeros(3, 3)}, path)
    line = refused(capsys, root, model__encoder_weights=path)
    assert f"{path} is not a checkpoint of encoder tu-resnet10t" in line
    assert "Choose the encoder that the file was made for" in line
    path.write_bytes(b"nonsense")
    assert f"{path}: expected model.encoder_weights (safetensors, or of torch.save), got text" in refused(
        capsys, root, model__encoder_weights=path
    )
    assert "no file" in refused(capsys, root, model__encoder_weights=root / "none.safetensors")
    assert run(root, rounds=0) == 0, "in the same run folder"


def test_segmenter_weights_of_another_architecture(root, capsys):
    path = root.parent / "sam.pth"
    torch.save({"image_encoder.patch_embed.proj.weight": torch.zeros(1024, 3, 16, 16)}, path)
    line = refused(capsys, root, segmenter__name="sam_vit_b", segmenter__checkpoint=path)
    assert line == (
        f"{path}: expected sam_vit_b with 768 channels, got 1024; it looks like sam_vit_l: "
        "use --segmenter.name sam_vit_l"
    )
    torch.save({"conv1.weight": torch.zeros(3)}, path)
    line = refused(capsys, root, segmenter__name="sam_vit_b", segmenter__checkpoint=path)
    assert "not a SAM image encoder" in line
    path.write_bytes(b"nonsense")
    assert f"{path}: expected the weights of a segmenter (safetensors, or of torch.save), got text" in refused(
        capsys, root, segmenter__name="sam_vit_b", segmenter__checkpoint=path
    )
    line = refused(capsys, root, segmenter__name="sam_vit_b", segmenter__checkpoint=root / "none.pth")
    assert "no such file; expected the weights of a segmenter" in line
    assert "has no weights" in refused(capsys, root, segmenter__checkpoint=path)


def test_offline_forbids_downloads(root, capsys, monkeypatch):
    monkeypatch.setenv("KMINE_CACHE", str(root.parent / "cache"))
    assert "--offline forbids" in refused(capsys, root, offline="true", segmenter__name="sam_vit_b")
    assert "--offline forbids" in refused(capsys, root, offline="true", model__encoder_weights="hub")


# -- the disk


def test_a_run_folder_that_cannot_be_written(root, capsys):
    (root.parent / "taken").write_text("mine")
    for out in ("taken", "taken/below"):
        assert "a file stands where a folder is needed; choose another --out" in refused(
            capsys, root, out=root.parent / out
        )
    if os.geteuid():
        (root.parent / "locked").mkdir(mode=0o500)
        assert "no permission to write there" in refused(capsys, root, out=root.parent / "locked" / "run")
    assert (root.parent / "taken").read_text() == "mine"


def test_a_cache_folder_that_cannot_be_written(root, capsys):
    (root.parent / "taken").write_text("mine")
    line = refused(capsys, root, data__cache_dir=root.parent / "taken" / "below")
    assert "a file stands where a folder is needed; name another folder: --data.cache_dir of loop" in line


def write_fails(root: Path, capsys: pytest.CaptureFixture[str], number: int) -> None:
    """A run whose writes fail from its first checkpoint on."""
    out = root.parent / "run"
    with pytest.MonkeyPatch.context() as patch:
        real, checkpoint = os.fsync, out / "round_00" / "fit_state.safetensors"

        def failing(descriptor: int) -> None:
            if checkpoint.exists():
                raise OSError(number, os.strerror(number))
            real(descriptor)

        patch.setattr(os, "fsync", failing)
        line = refused(capsys, root, rounds=0, fit__steps=20)
    assert line.startswith(f"{out}/") and checkpoint.exists()
    assert "free some space" in line or "choose another --out" in line


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS], ids=errno.errorcode.get)
def test_a_failed_write_is_one_line_with_its_cure(root, capsys, number):
    write_fails(root, capsys, number)


def test_a_run_resumes_after_a_full_disk_without_loss(root, capsys):
    from kmine.training import train_steps as training

    write_fails(root, capsys, errno.ENOSPC)
    out = root.parent / "run"
    with pytest.MonkeyPatch.context() as patch:
        taken, real = [], training.set_rate
        patch.setattr(training, "set_rate", lambda *a: taken.append(1) or real(*a))
        assert run(root, rounds=0, fit__steps=20) == 0
    assert len(taken) < 20, "the training went on from its last checkpoint"
    assert run(root, rounds=0, fit__steps=20, out=root.parent / "whole") == 0
    for name in ("model", "model_final"):
        one, other = (
            RunFolder(folder).load_tensors(folder / "round_00" / f"{name}.safetensors", None)[0]
            for folder in (out, root.parent / "whole")
        )
        assert all(torch.equal(one[key], other[key]) for key in other)


# -- a run folder of other settings or data


def test_other_settings_in_the_same_folder_are_refused_and_change_nothing(root, capsys):
    assert run(root, rounds=0) == 0
    out = root.parent / "run"
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    line = refused(capsys, root, rounds=0, seed=1)
    assert f"{out}/config.yaml: holds a run with seed = 0, this command has 1; choose another --out" in line
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_data_that_changed_under_a_run_are_refused(root, capsys):
    assert run(root, rounds=0) == 0
    (root / "images" / "p00.jpg").unlink()
    (root / "masks" / "p00.jpg").unlink()
    assert "samples of the data set, 1 of 9 are missing there, such as p00;" in refused(capsys, root, rounds=0)


# -- a training that diverges


def test_a_diverged_training_is_one_line_with_a_cure(root, capsys):
    assert "lower fit.lr" in refused(capsys, root, fit__lr=1e30, fit__warmup=0, fit__steps=6)
    told = json.loads((root.parent / "run" / "run.json").read_text())
    assert told["stopped_by"] == "interrupted"

"""`kmine loop` on a phantom small enough for a test: settings that tests share, and settings as command-line words."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
from PIL import Image

from kmine.data.datasets.phantom.dataset import PhantomSource
from kmine.loop import __main__ as loop
from kmine.training import evaluation

Settings = dict[str, object]

SMALL: Settings = {
    "segmenter.name": "ellipse",
    "rounds": 1,
    "baseline": "false",
    "retrain": "false",
    "data.num_samples": 24,
    "data.size": 32,
    "data.label_fraction": 0.3,
    "data.val_fraction": 0.2,
    "model.encoder": "tu-mobilenetv3_small_050",
    "model.encoder_weights": "none",
    "model.encoder_depth": 3,
    "model.decoder_channels": 8,
    "fit.batch_size": 2,
    "infer.tta": "none",
    "device": "cpu",
}
UNET: Settings = {"model.name": "unet", "model.encoder": "tu-resnet10t"}
FEW_STEPS: Settings = {"fit.steps": 4, "fit.round_steps": 3, "fit.val_every": 2}
OPEN_GATE: Settings = {"gate.keep": 1}
"""A few steps make a poor model; this gate lets its masks through."""


def words(settings: Mapping[str, object], out: Path, cache: Path | None = None, **changes: object) -> list[str]:
    """The flags of a run into `out`, without a plan; the cache lies beside it unless given.

    In `changes` two underscores are a dot.
    """
    places = {"out": out, "data.cache_dir": cache or out.parent / "cache"}
    given = {"plan": "false"} | settings | places | {name.replace("__", "."): value for name, value in changes.items()}
    return [f"--{name}={value}" for name, value in given.items()]


def run_loop(
    settings: Mapping[str, object],
    out: Path,
    cache: Path | None = None,
    *,
    with_pictures: bool = False,
    **changes: object,
) -> int:
    """Run the command; returns its exit code. Charts and gallery, if asked for, take half the time of a run."""
    with pytest.MonkeyPatch.context() as patch:
        if not with_pictures:
            leave_out_pictures(patch)
        return loop.main(words(settings, out, cache, **changes))


def leave_out_pictures(patch: pytest.MonkeyPatch) -> None:
    """Reports without charts and gallery."""
    from kmine.loop import engine
    from kmine.report import html

    patch.setattr(html, "_charts", lambda report: [])
    patch.setattr(html, "panels", lambda *_: [])
    patch.setattr(engine, "curves_picture", lambda *_: "")


def adopt_all(patch: pytest.MonkeyPatch) -> None:
    """Few validation images have an interval, too, so that `adopt_tolerance` 1 adopts every round."""
    patch.setattr(evaluation, "SMALL_SPLIT", 0)


def write_pictures(folder: Path, num_samples: int) -> None:
    """`images` and `masks` of a phantom, as files."""
    source = PhantomSource("polyp", num_samples, 32)
    for ref in source.refs():
        for name, pixels in (("images", source.image(ref.sample_id)), ("masks", source.mask(ref.sample_id) * 255)):
            (folder / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / name / f"{ref.sample_id}.png")


def move_pictures(folder: Path, target: Path) -> None:
    """The same content in files of another time."""
    shutil.copytree(folder, target, copy_function=shutil.copyfile)
    shutil.rmtree(folder)

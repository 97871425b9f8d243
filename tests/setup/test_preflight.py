"""Early checks of names and paths: what each command needs, before any pixel is read."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest

from kmine.config import DataConfig, LoopConfig, ModelConfig, PromptsConfig, SegmenterConfig
from kmine.data.datasets.phantom.dataset import PhantomSource
from kmine.errors import UserError
from kmine.setup.preflight import preflight

CFG = LoopConfig(data=DataConfig(num_samples=8, size=32), segmenter=SegmenterConfig("ellipse"), device="cpu")
UNKNOWN_SEGMENTER = replace(CFG, segmenter=SegmenterConfig("elipse"))
POINTS_FOR_A_BOX = replace(CFG, segmenter=SegmenterConfig("tiny"), prompts=PromptsConfig(box=False, points=True))


def test_the_data_set_is_opened_and_no_pixel_is_read(monkeypatch):
    for name in ("image", "mask"):
        monkeypatch.setattr(PhantomSource, name, None)
    assert len(preflight(CFG).refs()) == 8


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (replace(CFG, model=ModelConfig(name="unett")), "model.name: unknown name 'unett'; did you mean unet?"),
        (replace(CFG, device="gpu"), "device: expected auto, cpu"),
        (replace(CFG, data=replace(CFG.data, name="kvasir_seg")), "data.root: expected the folder"),
        (replace(CFG, data=replace(CFG.data, name="phantm")), "data.name: unknown name 'phantm'"),
        (UNKNOWN_SEGMENTER, "segmenter.name: unknown name 'elipse'; did you mean ellipse?"),
        (POINTS_FOR_A_BOX, "prompts.box: the segmenter `tiny` expects a box"),
    ],
)
def test_a_wrong_name_is_refused_by_its_setting(cfg, message):
    with pytest.raises(UserError) as error:
        preflight(cfg)
    assert str(error.value).startswith(message)


def test_a_command_that_mines_nothing_needs_no_segmenter():
    for cfg in (UNKNOWN_SEGMENTER, POINTS_FOR_A_BOX):
        assert preflight(cfg, mines=False).name == "phantom"
    assert preflight(replace(POINTS_FOR_A_BOX, rounds=0)).name == "phantom", "no round, so no prompt"


def test_trackers_are_asked_for_where_something_is_trained_alone(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    tracked = replace(CFG, log=["wandb"])
    with pytest.raises(UserError, match="log: expected the package wandb"):
        preflight(tracked)
    assert preflight(tracked, mines=False)

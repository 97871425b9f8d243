"""Data that changed behind a run's back are refused by name; copies are not."""

from __future__ import annotations

import os
import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.loop_command import write_pictures
from helpers.small import CFG, Silent

from kmine.config import SegmenterConfig
from kmine.data import open_source
from kmine.errors import UserError
from kmine.setup.contents import CONTENTS
from kmine.setup.open import begin_run, open_for_audit, open_for_test
from kmine.store.run_folder import RunFolder


@pytest.fixture
def begun(tmp_path):
    """Settings of a run that has begun on files, and its folder."""
    write_pictures(tmp_path / "data", 16)
    own = {"name": "folder", "images": str(tmp_path / "data/images"), "masks": str(tmp_path / "data/masks")}
    data = replace(CFG.data, **own, test_fraction=0.3, cache_dir=str(tmp_path / "cache"))
    cfg = replace(CFG, rounds=0, device="cpu", segmenter=SegmenterConfig("ellipse"), data=data)
    with closing(RunFolder(tmp_path / "run")) as run:
        begin_run(cfg, open_source(cfg.data), run, Silent())
        yield cfg, run


def ids(run: RunFolder, split: str) -> list[str]:
    return [row["sample_id"] for row in run.read_csv("splits.csv") if row["split"] == split]


def exchange(cfg, kind: str, target: str, source: str) -> None:
    """Put the file of one sample in the place of another's."""
    folder = cfg.data.images if kind == "images" else cfg.data.masks
    shutil.copyfile(f"{folder}/{source}.png", f"{folder}/{target}.png")


def open_as(command: str, cfg, run: RunFolder) -> None:
    source = open_source(cfg.data)
    open_for_test(cfg, source, run) if command == "compare" else open_for_audit(cfg, source, run, Silent())


@pytest.mark.parametrize("command", ["compare", "audit"])
@pytest.mark.parametrize(("kind", "split"), [("images", "test"), ("images", "unlabeled"), ("masks", "labeled")])
def test_an_exchanged_file_is_named(begun, command, kind, split):
    cfg, run = begun
    open_as(command, cfg, run)
    target = ids(run, split)[0]
    exchange(cfg, kind, target, ids(run, "val")[0])
    with pytest.raises(UserError, match=f"1 of 16 samples have another content: {target};"):
        open_as(command, cfg, run)


def test_masks_of_test_images_are_recorded_when_they_are_first_opened(begun):
    cfg, run = begun
    test = ids(run, "test")
    before = {row["sample_id"]: row["mask_crc32"] for row in run.read_csv(CONTENTS)}
    assert {before[i] for i in (*test, *ids(run, "unlabeled"))} == {""} and all(before[i] for i in ids(run, "labeled"))
    open_as("compare", cfg, run)
    exchange(cfg, "masks", test[0], test[1])
    open_as("audit", cfg, run)
    with pytest.raises(UserError, match=f"another content: {test[0]};"):
        open_as("compare", cfg, run)


def test_files_of_another_time_and_equal_content_are_the_same_data(begun):
    cfg, run = begun
    for path in Path(cfg.data.images).iterdir():
        os.utime(path, (1, 1))
    for command in ("compare", "audit"):
        open_as(command, cfg, run)


def test_a_missing_sample_is_named(begun):
    cfg, run = begun
    gone = ids(run, "unlabeled")[0]
    for folder in (cfg.data.images, cfg.data.masks):
        Path(folder, f"{gone}.png").unlink()
    with pytest.raises(UserError, match=f"1 of .* are missing there, such as {gone};"):
        open_as("compare", cfg, run)


def test_a_run_of_an_older_version_is_opened_unchecked(begun):
    cfg, run = begun
    (run.root / CONTENTS).unlink()
    exchange(cfg, "images", ids(run, "test")[0], ids(run, "val")[0])
    open_as("compare", cfg, run)

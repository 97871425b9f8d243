"""The documentation: its site builds without a warning, its examples run, its command lines parse."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from helpers.browser import CHROMIUM
from PIL import Image

from kmine import cli
from kmine.__main__ import COMMANDS
from kmine.io.presets import preset_files

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if not {"_build", "_generated"} & {*page.parts}]
STEPS = "fit__steps=60, fit__round_steps=30"
FEW = "baseline=False, fit__steps=4, fit__round_steps=2, fit__val_every=2, crossfit=1, adapt__enabled=False, "
FEW += "gate__mode='ranked', gate__keep=1.0, model__name='unet', model__encoder='tu-resnet10t', "
FEW += "model__encoder_weights=None, model__encoder_depth=3, model__decoder_channels=8"
"""In the place of `STEPS`: a poor model, and a gate that lets its masks through."""
NOTEBOOK = ROOT / "docs" / "notebooks" / "first_run.ipynb"


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)


def command_lines() -> list[tuple[str, str]]:
    """(page, line) of every `kmine COMMAND ...` in a block of the pages."""
    text = {page.name: "\n".join(blocks(page, "")).replace("\\\n", " ") for page in PAGES}
    lines = [(page, line.split("   #")[0].strip()) for page, block in text.items() for line in block.splitlines()]
    return sorted({(page, line) for page, line in lines if re.match(r"kmine [a-z]+\b", line)})


@pytest.mark.parametrize(("page", "line"), command_lines())
def test_the_flags_of_every_command_line_exist(page, line, capsys, monkeypatch):
    """Values may be placeholders, so only names and presets are checked."""
    _, command, *words = shlex.split(line.replace("...", ""))
    assert command in COMMANDS
    module = import_module(f"kmine.{command}")
    module = import_module(f"kmine.{command}.__main__") if hasattr(module, "__path__") else module
    parsed = {}

    def keep(config_class, argv, **options):
        parsed["kinds"] = cli._kinds(config_class)
        raise SystemExit(0)

    monkeypatch.setattr(cli, "parse", keep)
    with pytest.raises(SystemExit):
        module.main(words)
    names = {word.removeprefix("--").partition("=")[0] for word in words if word.startswith("--")}
    assert names - {"config", "help"} <= parsed["kinds"].keys()
    presets = [value for flag, value in itertools.pairwise([*words, ""]) if flag == "--config" and value]
    assert all(name in preset_files() or "." in name for name in presets)


def test_the_notebook_runs_on_a_smaller_model_and_yields_what_its_comments_state(tmp_path, monkeypatch, capsys):
    cells = ["".join(c["source"]) for c in json.loads(NOTEBOOK.read_text("utf-8"))["cells"] if c["cell_type"] == "code"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KMINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MPLBACKEND", "agg")
    assert STEPS in cells[0]
    names: dict = {}
    for cell in cells:
        exec(compile(cell.replace(STEPS, FEW), NOTEBOOK.name, "exec"), names)
    assert names["mask"].shape == (64, 64) and set(names["mask"].ravel()) <= {0, 1}
    table = names["table"]
    assert set(table["kind"]) == {"pseudo", "labeled"} and len(table) == len(set(table["sample_id"])) > 11
    for _, group in table.groupby("kind"):
        assert group["suspicion"].is_monotonic_decreasing
    assert (tmp_path / "runs" / "arrays" / "report.html").is_file()
    assert re.search(r"round 1: validation Dice 0\.\d+, \d+ pseudo masks, ", capsys.readouterr().out)
    # README and the first page of the site show the first cell.
    assert [blocks(page, "python") for page in (PAGES[0], ROOT / "docs" / "start.md")] == [[f"{cells[0]}\n"]] * 2


@pytest.mark.skipif(importlib.util.find_spec("sphinx") is None, reason="needs the extra docs")
def test_the_site_builds_without_a_warning(tmp_path):
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "-q",
        "-d",
        str(tmp_path / "trees"),
        "docs",
        str(tmp_path / "site"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    settings = (tmp_path / "site" / "_generated" / "settings.html").read_text("utf-8")
    assert "--gate.target_dice" in settings


def screenshots(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "docs" / "screenshots.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)


def test_screenshots_without_chromium_or_a_run_are_one_line(tmp_path):
    done = screenshots(PATH=str(tmp_path))
    assert (done.returncode, done.stdout.count("\n"), done.stderr) == (2, 1, "") and "install it" in done.stdout
    if CHROMIUM:
        done = screenshots(tmp_path)
        assert (done.returncode, done.stdout.count("\n")) == (2, 1) and "found no report.html" in done.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_screenshots_show_each_page_in_both_widths_and_colours(tmp_path):
    style = "body{background:#fff}@media(prefers-color-scheme:dark){body{background:#000}}"
    (tmp_path / "report.html").write_text(f"<!doctype html><style>{style}</style>a")
    assert screenshots(tmp_path, "--out", tmp_path / "out").returncode == 0
    corners = {}
    for path in (tmp_path / "out").iterdir():
        with Image.open(path) as picture:
            corners[path.stem] = (picture.width, picture.convert("L").getpixel((9, 500)))
    assert corners == {f"report-{w}-{s}": (w, c) for w in (1280, 500) for s, c in (("light", 255), ("dark", 0))}

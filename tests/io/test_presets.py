"""Presets: the files of configs/ by name, wherever kmine is installed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kmine import cli
from kmine.config import LoopConfig
from kmine.errors import UserError
from kmine.io import presets
from kmine.io.presets import preset_files, settings_file

CONFIGS = Path(__file__).parents[2] / "configs"


def parsed(*argv: str) -> LoopConfig:
    return cli.parse(LoopConfig, argv, prog="kmine loop", description="words")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_preset_is_its_file_and_opens_with_its_command(path):
    assert parsed("--config", path.stem) == parsed("--config", str(path)) == parsed(f"--config={path.stem}")
    assert preset_files()[path.stem].read_bytes() == path.read_bytes()
    first = path.read_text().splitlines()[0]
    assert re.match(rf"# kmine loop --config {path.stem}( --data\.(root|images) |$)", first)
    assert parsed("--config", path.stem).out == f"runs/{path.stem}"


@pytest.mark.parametrize("name", ["kvasir_seg", "lits", "covid_qu_ex", "folder"])
def test_gpu_presets_differ_from_their_twin_in_size_not_in_data(name):
    small, large = parsed("--config", name), parsed("--config", f"{name}_gpu")
    same = ("name", "task", "slices", "label_fraction", "fine_groups", "val_fraction", "test_fraction")
    assert [getattr(small.data, key) for key in same] == [getattr(large.data, key) for key in same]
    assert large.data.size >= 256 and large.fit.batch_size == 16 and large.segmenter.name == "sam_vit_b"


def test_a_file_of_that_name_wins_over_the_preset_and_a_folder_does_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    assert settings_file("folder") == preset_files()["folder"]
    (tmp_path / "lits").write_text("rounds: 7\n")
    assert parsed("--config", "lits").rounds == 7
    assert parsed("--config", "./lits").rounds == 7


@pytest.mark.parametrize("word", ["a/folder", "./folder", "folder.yaml", "folder.yml", "/folder", "~/folder"])
def test_words_with_a_slash_or_suffix_are_paths(word):
    assert settings_file(word) == Path(word).expanduser()


def test_an_unknown_preset_suggests_the_nearest_and_lists_all(capsys):
    with pytest.raises(
        UserError, match=r"--config: unknown name 'kvasir'; did you mean kvasir_seg\? Known: covid_qu_ex"
    ):
        settings_file("kvasir")
    with pytest.raises(SystemExit):
        parsed("--config", "kvasir")
    assert capsys.readouterr().err.count("\n") == 1


def test_help_lists_the_presets(capsys):
    with pytest.raises(SystemExit):
        parsed("--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert f"or a preset: {', '.join(preset_files())} --rounds" in shown


def test_a_wheel_has_them_in_the_package(tmp_path, monkeypatch):
    package = tmp_path / "kmine"
    (package / "presets").mkdir(parents=True)
    (package / "presets" / "mine.yaml").write_text("rounds: 1\n")
    monkeypatch.setattr(presets, "PACKAGE", package)
    assert preset_files() == {"mine": package / "presets" / "mine.yaml"}


def test_pyproject_lists_every_package_and_maps_configs():
    root = CONFIGS.parent
    text = (root / "pyproject.toml").read_text()
    listed = re.search(r"^packages = \[(.*?)^\]", text, re.DOTALL | re.MULTILINE)[1]
    found = {".".join(path.parent.relative_to(root).parts) for path in (root / "kmine").rglob("__init__.py")}
    assert {*re.findall(r'"([\w.]+)"', listed)} == found | {"kmine.presets"}
    assert 'package-dir = { "kmine.presets" = "configs" }' in text and '"kmine.presets" = ["*.yaml"]' in text

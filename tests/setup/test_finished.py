"""Settings of a finished run, with its data elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from kmine.cli import to_dict
from kmine.config import DataConfig, LoopConfig
from kmine.errors import UserError
from kmine.setup.finished import FOLDS, final_run, fold_runs, load_settings


def settings(folder: Path, data: DataConfig, data_root: str | None) -> LoopConfig:
    (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(LoopConfig(data=data, device="cuda", seed=3))))
    return load_settings(folder, device="cpu", data_root=data_root)


def test_all_settings_but_the_device_are_those_of_the_run(tmp_path):
    data = DataConfig(name="kvasir_seg", root="/far/kvasir", size=64)
    found = settings(tmp_path, data, None)
    assert (found.data, found.device, found.seed) == (data, "cpu", 3)


def test_data_root_replaces_the_folder_of_a_data_set(tmp_path):
    found = settings(tmp_path, DataConfig(name="kvasir_seg", root="/far/kvasir"), "/near")
    assert found.data.root == "/near"


@pytest.mark.parametrize(
    ("given", "now"),
    [
        ({"images": "/far/x/images", "masks": "/far/x/masks"}, {"images": "/near/images", "masks": "/near/masks"}),
        ({"images": "/far/x/ct/in", "masks": "/far/y"}, {"images": "/near/x/ct/in", "masks": "/near/y"}),
        ({"images": "/far/x/images"}, {"images": "/near/images"}),
        ({"csv": "/far/x/table.csv"}, {"csv": "/near/table.csv"}),
    ],
)
def test_data_root_replaces_the_common_parent_of_own_files(tmp_path, given, now):
    found = settings(tmp_path, DataConfig(name="folder", **given), "/near").data
    assert {name: getattr(found, name) for name in given} == now and found.root is None


def test_the_cache_of_the_environment_wins_over_that_of_the_run(tmp_path, monkeypatch):
    data = DataConfig(cache_dir="/far/cache")
    monkeypatch.delenv("KMINE_CACHE", raising=False)
    assert settings(tmp_path, data, None).data.cache_dir == "/far/cache"
    monkeypatch.setenv("KMINE_CACHE", str(tmp_path))
    assert settings(tmp_path, data, None).data.cache_dir is None


def test_a_folder_of_folds_names_its_runs_and_any_other_folder_itself(tmp_path):
    assert fold_runs(tmp_path) == [] and final_run(tmp_path) == tmp_path
    (tmp_path / FOLDS).write_text('{"runs": ["fold-0", "fold-1", "all"]}')
    assert fold_runs(tmp_path) == [tmp_path / "fold-0", tmp_path / "fold-1"] and final_run(tmp_path) == tmp_path / "all"


@pytest.mark.parametrize("content", ["[]", '{"runs": 3}', '{"runs": ["../elsewhere"]}', '{"runs": [3]}', "{"])
def test_a_damaged_list_of_folds_is_one_error(tmp_path, content):
    (tmp_path / FOLDS).write_text(content)
    with pytest.raises(UserError, match=f"{FOLDS}: expected .*; run the same kmine.loop again"):
        fold_runs(tmp_path)

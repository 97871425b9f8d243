"""Settings of a finished run, with its data elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from kmine.cli import to_dict
from kmine.config import DataConfig, LoopConfig
from kmine.setup.finished import load_settings


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

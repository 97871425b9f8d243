"""Building a cache: once, complete or absent, rebuilt when damaged."""

from __future__ import annotations

import errno
import multiprocessing
from pathlib import Path

import pytest
from helpers.memory_source import noise_source

from kmine.data.cache import files
from kmine.data.cache.sample_cache import SampleCache
from kmine.errors import UserError


def truncate(folder: Path) -> None:
    with (folder / "images.u8").open("r+b") as file:
        file.truncate(100)


def flip_index(folder: Path) -> None:
    content = bytearray((folder / "index.json").read_bytes())
    content[-5] ^= 1
    (folder / "index.json").write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (truncate, "images.u8 has 100 bytes instead of 15360"),
        (flip_index, "index.json is damaged"),
        (lambda folder: (folder / "masks.u8").unlink(), "masks.u8 is missing"),
        (lambda folder: (folder / "index.json").write_bytes(b""), "index.json is damaged"),
    ],
)
def test_a_damaged_cache_is_rebuilt_with_a_warning(tmp_path, caplog, damage, problem):
    damage(SampleCache(noise_source(), 32, tmp_path, "stop").folder)
    source = noise_source()
    cache = SampleCache(source, 32, tmp_path, "stop")
    assert len(source.reads) == 5
    assert len(caplog.records) == 1 and problem in caplog.text
    assert cache.mask_resized("s0").shape == (32, 32)


def test_a_cache_of_another_format_is_rebuilt(tmp_path, caplog, monkeypatch):
    SampleCache(noise_source(), 32, tmp_path, "stop")
    monkeypatch.setattr(files, "FORMAT", files.FORMAT + 1)
    SampleCache(noise_source(), 32, tmp_path, "stop")
    assert "another version" in caplog.text


def test_images_that_became_readable_are_added(tmp_path, caplog):
    assert len(SampleCache(noise_source(broken=("s1", "s4")), 32, tmp_path, "skip").refs) == 3
    assert len(SampleCache(noise_source(broken=("s4",)), 32, tmp_path, "skip").refs) == 4
    assert "s1.jpg can be read now" in caplog.text
    assert len(SampleCache(noise_source(), 32, tmp_path, "stop").refs) == 5


def test_an_unwritable_cache_folder_is_one_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        UserError, match=r"file stands where a folder is needed; name another folder: --data.cache_dir of loop"
    ):
        SampleCache(noise_source(), 32, tmp_path / "file", "stop")


def test_a_full_disk_leaves_no_cache(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("kmine.data.cache.build.write_record", full)
    with pytest.raises(UserError, match="the disk is full; free some space"):
        SampleCache(noise_source(), 32, tmp_path, "stop")
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    monkeypatch.undo()
    assert len(SampleCache(noise_source(), 32, tmp_path, "stop").refs) == 5


def test_folders_of_killed_builds_are_removed(tmp_path):
    folder = SampleCache(noise_source(), 32, tmp_path, "stop").folder
    folder.rename(folder.with_name(f"{folder.name}.tmp-1"))
    SampleCache(noise_source(), 32, tmp_path, "stop")
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [folder]


def build_and_count(cache_dir, barrier, results):
    source = noise_source(40)
    barrier.wait()
    cache = SampleCache(source, 32, cache_dir, "stop")
    results.put((len(source.reads), cache.image_resized("s7").sum()))


def test_two_processes_build_one_cache(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    workers = [context.Process(target=build_and_count, args=(tmp_path, barrier, results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert sorted(reads for reads, _ in found) == [0, 40]
    assert found[0][1] == found[1][1]

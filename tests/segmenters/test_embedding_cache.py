"""Embeddings on disk: equal after a round trip, whatever happens to the files."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from kmine.segmenters.embedding_cache import FREE_SHARE, EmbeddingCache, KeyIndex, default_folder, packed, unpacked

KEYS = [f"{n:02x}" * 32 for n in range(40)]


SIZE = len(packed(KEYS[0], np.zeros(1000, np.float16)))


def numbers(seed: int = 0, count: int = 1000, dtype: str = "float16") -> np.ndarray:
    return np.random.default_rng(seed).normal(size=count).astype(dtype)


@pytest.fixture
def logged() -> list[str]:
    return []


@pytest.fixture
def cache(tmp_path, logged) -> EmbeddingCache:
    return EmbeddingCache(tmp_path / "e", 10**9, logged.append)


def files(cache: EmbeddingCache) -> list[Path]:
    return sorted(path for path in cache.folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_round_trip_changes_nothing(cache, logged, dtype) -> None:
    features = numbers(dtype=dtype).reshape(10, 4, 25)
    assert cache.get(KEYS[1]) is None
    cache.put(KEYS[1], features)
    read = cache.get(KEYS[1])
    assert read.dtype == dtype
    np.testing.assert_array_equal(read, features)
    assert cache.get(KEYS[2]) is None
    assert [path.relative_to(cache.folder).as_posix() for path in files(cache)] == [f"01/{KEYS[1]}.emb"]
    assert not logged


def test_the_folder_is_created_by_the_first_put(cache) -> None:
    cache.get(KEYS[0])
    assert not cache.folder.exists()


def test_the_default_folder(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("KMINE_CACHE", str(tmp_path))
    assert default_folder() == tmp_path / "embeddings"
    monkeypatch.delenv("KMINE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_folder() == tmp_path / ".cache/kmine/embeddings"


def damaged(content: bytes) -> dict[str, bytes]:
    def flipped(at: int) -> bytes:
        return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]

    second_line = content.index(b"\n") + 1
    return {
        "empty": b"",
        "half": content[: len(content) // 2],
        "one byte short": content[:-1],
        "one byte more": content + b"\0",
        "a bit of the checksum": flipped(3),
        "a bit of the header": flipped(second_line + 20),
        "a bit of the numbers": flipped(len(content) - 100),
        "zeros of the same length": bytes(len(content)),
        "no kmine file": b"\x93NUMPY" + content,
        "of another key": packed(KEYS[1], numbers()),
        "of objects": packed(KEYS[0], np.zeros(3, np.int64)),
        "no header": b"e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855\n",  # SHA-256 of nothing
    }


@pytest.mark.parametrize("kind", damaged(packed(KEYS[0], numbers())))
def test_a_damaged_file_is_reported_once_and_replaced(cache, logged, kind) -> None:
    cache.put(KEYS[0], numbers())
    (path,) = files(cache)
    path.write_bytes(damaged(path.read_bytes())[kind])
    assert cache.get(KEYS[0]) is None
    assert cache.get(KEYS[0]) is None
    assert len(logged) == 1 and "damaged" in logged[0] and KEYS[0] in logged[0] and "\n" not in logged[0]
    cache.put(KEYS[0], numbers())
    np.testing.assert_array_equal(cache.get(KEYS[0]), numbers())


def test_every_flipped_bit_is_detected() -> None:
    content = packed(KEYS[0], numbers(count=4))
    for at in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[at // 8] ^= 1 << at % 8
        assert unpacked(KEYS[0], bytes(flipped)) is None


def test_the_least_recently_used_are_removed_first(cache) -> None:
    cache._max_bytes = 10 * SIZE
    for n in range(10):
        cache.put(KEYS[n], numbers(n))
        os.utime(cache._path(KEYS[n]), (n, n))
    cache.get(KEYS[0])  # now the last used
    assert len(files(cache)) == 10
    cache.put(KEYS[10], numbers(10))
    left = [n for n in range(11) if cache.get(KEYS[n]) is not None]
    assert left == [0, *range(3, 11)]  # the new one and eight of the ten: nine tenths of the budget


def scan(cache: EmbeddingCache, order: list[int]) -> int:
    """Hits of a round over images, each of which is stored if it was not there."""
    hits = 0
    for n in order:
        found = cache.get(KEYS[n])
        hits += found is not None
        if found is None:
            cache.put(KEYS[n], numbers(n))
    return hits


def test_a_scan_larger_than_the_budget_finds_what_fits_in_every_round(tmp_path, logged) -> None:
    def opened() -> EmbeddingCache:
        return EmbeddingCache(tmp_path, 10 * SIZE, logged.append)

    cache = opened()
    assert [scan(cache, list(range(13))) for _ in range(3)] == [0, 10, 10]
    for n in range(10):
        os.utime(cache._path(KEYS[n]), (n, n))  # of a process that ended long ago
    later = opened()
    assert later.reserve(KEYS[:13]) == [SIZE] * 10
    assert [scan(later, [12, 11, 10, *range(10)]) for _ in range(2)] == [10, 10]
    other = opened()
    for n in range(10):
        os.utime(cache._path(KEYS[n]), (n, n))
    assert scan(other, [30, 31]) == 0 and scan(other, [30, 31]) == 2, "those of other data are removed"


def test_the_default_budget_is_a_share_of_the_free_space_and_of_what_is_there(tmp_path, logged, monkeypatch) -> None:
    EmbeddingCache(tmp_path / "e", 10**6, logged.append).put(KEYS[0], numbers())
    free = SimpleNamespace(free=10 * SIZE)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: free)
    assert EmbeddingCache(tmp_path / "e", None, logged.append).budget == int(FREE_SHARE * 11 * SIZE)
    assert EmbeddingCache(tmp_path / "none/e", None, logged.append).budget == int(FREE_SHARE * 10 * SIZE)


def test_keys_are_remembered_across_processes_and_torn_lines_are_missing(tmp_path) -> None:
    path = tmp_path / "keys" / "a.jsonl"
    index = KeyIndex(path)
    assert index.get("a\nb") is None
    index.add("a\nb", KEYS[0])
    with path.open("ab") as file:
        file.write(b'\n["c", "dd')  # a kill
    KeyIndex(path).add("ü", KEYS[2])
    again = KeyIndex(path)
    assert [again.get(name) for name in ("a\nb", "c", "ü")] == [KEYS[0], None, KEYS[2]]


def test_the_budget_holds_for_two_caches_on_one_folder(tmp_path, logged) -> None:
    first, second = (EmbeddingCache(tmp_path, 20 * SIZE, logged.append) for _ in range(2))
    for n in range(40):
        (first, second)[n % 2].put(KEYS[n], numbers(n))
        assert sum(path.stat().st_size for path in files(first)) <= 22 * SIZE
    assert first.get(KEYS[0]) is not None and first.get(KEYS[39]) is None, "what is in use is kept"
    assert not logged


def test_an_array_above_the_budget_is_not_stored(cache, logged) -> None:
    cache._max_bytes = SIZE
    cache.put(KEYS[0], numbers())
    cache.put(KEYS[1], numbers(count=1001))
    assert cache.get(KEYS[0]) is not None and cache.get(KEYS[1]) is None
    assert not logged


def test_files_may_vanish_while_the_cache_is_cleared(cache, logged, monkeypatch) -> None:
    cache._max_bytes = 3 * SIZE
    for n in range(3):
        cache.put(KEYS[n], numbers(n))
        os.utime(cache._path(KEYS[n]), (n, n))
    unlink = Path.unlink

    def removed_before(path: Path, missing_ok: bool = False) -> None:
        if path.suffix == ".emb":
            unlink(path)  # by another process
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", removed_before)
    cache.put(KEYS[3], numbers(3))
    assert cache.get(KEYS[3]) is not None
    assert not logged


def test_old_unfinished_files_are_removed_and_new_ones_kept(cache) -> None:
    cache.put(KEYS[0], numbers())
    folder = cache._path(KEYS[0]).parent
    old, fresh = folder / ".a.1.tmp", folder / ".b.2.tmp"
    for path in (old, fresh):
        path.write_bytes(b"x")
    os.utime(old, (time.time() - 4000,) * 2)
    cache._used = None  # as at the start of a process
    cache.put(KEYS[1], numbers())
    assert not old.exists() and fresh.exists()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_full_disk_is_reported_once_and_leaves_no_partial_file(cache, logged, monkeypatch, code) -> None:
    cache.put(KEYS[0], numbers())
    writes = []

    def full(path: Path, data: bytes) -> None:
        writes.append(path)
        with path.open("wb") as file:
            file.write(data[:10])
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "write_bytes", full)
    cache.put(KEYS[1], numbers(1))
    cache.put(KEYS[2], numbers(2))
    assert len(writes) == 1, "no second attempt"
    assert len(logged) == 1 and os.strerror(code) in logged[0] and "--segmenter.cache_dir" in logged[0]
    assert [path.name for path in files(cache)] == [f"{KEYS[0]}.emb"]
    np.testing.assert_array_equal(cache.get(KEYS[0]), numbers())


def test_a_file_in_place_of_the_folder_is_reported_once(tmp_path, logged) -> None:
    (tmp_path / "e").write_text("no folder")
    cache = EmbeddingCache(tmp_path / "e", 10**9, logged.append)
    for key in KEYS[:3]:
        assert cache.get(key) is None
        cache.put(key, numbers())
    assert len(logged) == 2  # neither read nor written
    assert (tmp_path / "e").read_text() == "no folder"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_cache_is_read(cache, logged) -> None:
    cache.put(KEYS[0], numbers())
    folder = cache._path(KEYS[0]).parent
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    assert cache.get(KEYS[0]) is not None
    folder.chmod(stat.S_IRWXU)
    assert not logged


def write_and_read(folder: str, start: int) -> int:
    logged: list[str] = []
    cache = EmbeddingCache(Path(folder), 12 * SIZE, logged.append)
    wrong = 0
    for n in range(60):
        number = (start + n) % 20
        read = cache.get(KEYS[number])
        wrong += read is not None and not np.array_equal(read, numbers(number))
        cache.put(KEYS[number], numbers(number))
    return wrong + len(logged)


def test_two_processes_share_a_cache(tmp_path) -> None:
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        assert list(pool.map(write_and_read, [str(tmp_path)] * 2, [0, 7])) == [0, 0]
    left = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert 8 <= len(left) <= 14
    assert all(name.endswith(".emb") for name in left)

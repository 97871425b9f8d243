"""Embeddings on disk: what comes back is what went in, whatever happens to the files; the segmenter encodes once."""

from __future__ import annotations

import errno
import os
import stat
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.segmenter_suite import SMALL, images, random_sam
from safetensors.torch import save_file

from kmine.config import AdaptConfig, SegmenterConfig
from kmine.errors import UserError
from kmine.mining.adaptation.finetune import adapt
from kmine.segmenters import open_segmenter
from kmine.segmenters.embedding_cache import (
    EmbeddingCache,
    default_folder,
    packed,
    unpacked,
)
from kmine.segmenters.sam.build import ARCHITECTURES
from kmine.segmenters.sam.segmenter import SamSegmenter
from kmine.types import Prompts, Sample

KEYS = [f"{n:02x}" * 32 for n in range(40)]
SIZE = len(packed(KEYS[0], np.zeros(1000, np.float16)))


def numbers(seed: int = 0, count: int = 1000, dtype: str = "float16") -> np.ndarray:
    return np.random.default_rng(seed).normal(size=count).astype(dtype)


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def cache(tmp_path, said) -> EmbeddingCache:
    return EmbeddingCache(tmp_path / "e", 10**9, said.append)


def files(cache: EmbeddingCache) -> list[Path]:
    return sorted(path for path in cache.folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_what_went_in_comes_back(cache, said, dtype) -> None:
    features = numbers(dtype=dtype).reshape(10, 4, 25)
    assert cache.get(KEYS[1]) is None
    cache.put(KEYS[1], features)
    back = cache.get(KEYS[1])
    assert back.dtype == dtype
    np.testing.assert_array_equal(back, features)
    assert cache.get(KEYS[2]) is None
    assert [path.relative_to(cache.folder).as_posix() for path in files(cache)] == [f"01/{KEYS[1]}.emb"]
    assert not said


def test_nothing_is_made_on_disk_before_something_is_kept(cache) -> None:
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
def test_a_damaged_file_is_told_once_and_replaced(cache, said, kind) -> None:
    cache.put(KEYS[0], numbers())
    (path,) = files(cache)
    path.write_bytes(damaged(path.read_bytes())[kind])
    assert cache.get(KEYS[0]) is None
    assert cache.get(KEYS[0]) is None
    assert len(said) == 1 and "damaged" in said[0] and KEYS[0] in said[0] and "\n" not in said[0]
    cache.put(KEYS[0], numbers())
    np.testing.assert_array_equal(cache.get(KEYS[0]), numbers())


def test_every_flipped_bit_is_seen() -> None:
    content = packed(KEYS[0], numbers(count=4))
    for at in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[at // 8] ^= 1 << at % 8
        assert unpacked(KEYS[0], bytes(flipped)) is None


def test_the_least_recently_used_go_first(cache) -> None:
    cache._max_bytes = 10 * SIZE
    for n in range(10):
        cache.put(KEYS[n], numbers(n))
        os.utime(cache._path(KEYS[n]), (n, n))
    cache.get(KEYS[0])  # used just now
    assert len(files(cache)) == 10
    cache.put(KEYS[10], numbers(10))
    left = [n for n in range(11) if cache.get(KEYS[n]) is not None]
    assert left == [0, *range(3, 11)]  # the eleventh with eight of the ten: nine tenths of the budget


def test_the_budget_holds_and_counts_what_others_wrote(tmp_path, said) -> None:
    one, other = (EmbeddingCache(tmp_path, 20 * SIZE, said.append) for _ in range(2))
    for n in range(40):
        (one, other)[n % 2].put(KEYS[n], numbers(n))
        assert sum(path.stat().st_size for path in files(one)) <= 22 * SIZE
    assert one.get(KEYS[39]) is not None and one.get(KEYS[0]) is None
    assert not said


def test_what_exceeds_the_budget_alone_is_not_kept(cache, said) -> None:
    cache._max_bytes = SIZE
    cache.put(KEYS[0], numbers())
    cache.put(KEYS[1], numbers(count=1001))
    assert cache.get(KEYS[0]) is not None and cache.get(KEYS[1]) is None
    assert not said


def test_files_that_vanish_while_it_clears_do_not_matter(cache, said, monkeypatch) -> None:
    cache._max_bytes = 3 * SIZE
    for n in range(3):
        cache.put(KEYS[n], numbers(n))
    unlink = Path.unlink

    def faster(path: Path, missing_ok: bool = False) -> None:
        if path.suffix == ".emb":
            unlink(path)  # another process was first
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", faster)
    cache.put(KEYS[3], numbers(3))
    assert cache.get(KEYS[3]) is not None
    assert not said


def test_leftovers_of_killed_processes_are_removed_and_fresh_ones_left(cache) -> None:
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
def test_a_full_disk_is_told_once_and_nothing_half_written_stays(cache, said, monkeypatch, code) -> None:
    cache.put(KEYS[0], numbers())
    tried = []

    def full(path: Path, data: bytes) -> None:
        tried.append(path)
        with path.open("wb") as file:
            file.write(data[:10])
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "write_bytes", full)
    cache.put(KEYS[1], numbers(1))
    cache.put(KEYS[2], numbers(2))
    assert len(tried) == 1, "no second try"
    assert len(said) == 1 and os.strerror(code) in said[0] and "--segmenter.cache_dir" in said[0]
    assert [path.name for path in files(cache)] == [f"{KEYS[0]}.emb"]
    np.testing.assert_array_equal(cache.get(KEYS[0]), numbers())


def test_a_file_in_the_place_of_the_folder_is_told_once(tmp_path, said) -> None:
    (tmp_path / "e").write_text("no folder")
    cache = EmbeddingCache(tmp_path / "e", 10**9, said.append)
    for key in KEYS[:3]:
        assert cache.get(key) is None
        cache.put(key, numbers())
    assert len(said) == 2  # neither read nor written
    assert (tmp_path / "e").read_text() == "no folder"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_cache_is_read(cache, said) -> None:
    cache.put(KEYS[0], numbers())
    folder = cache._path(KEYS[0]).parent
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    assert cache.get(KEYS[0]) is not None
    folder.chmod(stat.S_IRWXU)
    assert not said


def write_and_read(folder: str, start: int) -> int:
    said: list[str] = []
    cache = EmbeddingCache(Path(folder), 12 * SIZE, said.append)
    wrong = 0
    for n in range(60):
        number = (start + n) % 20
        found = cache.get(KEYS[number])
        wrong += found is not None and not np.array_equal(found, numbers(number))
        cache.put(KEYS[number], numbers(number))
    return wrong + len(said)


def test_two_processes_at_once(tmp_path) -> None:
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        assert list(pool.map(write_and_read, [str(tmp_path)] * 2, [0, 7])) == [0, 0]
    left = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert 8 <= len(left) <= 14
    assert all(name.endswith(".emb") for name in left)


# -- in the segmenter


def count_encoded(sam, monkeypatch) -> list[int]:
    counts, forward = [], sam.image_encoder.forward

    def counting(pixels):
        counts.append(len(pixels))
        return forward(pixels)

    monkeypatch.setattr(sam.image_encoder, "forward", counting)
    return counts


def test_an_image_is_encoded_once_whoever_asks(cache, monkeypatch) -> None:
    sam, pictures = random_sam(), images()
    counts = count_encoded(sam, monkeypatch)
    segmenter = SamSegmenter(sam, name="s", cache=cache)
    first = segmenter.encode(pictures)
    again = segmenter.encode(pictures[::-1])[::-1]
    twin = segmenter.with_weights(segmenter.fine_tuner().state()).encode(pictures[:1])
    assert counts == [3]
    for a, b in zip(first, again, strict=True):
        assert a.size == b.size
        np.testing.assert_array_equal(a.features, b.features)
        assert b.features.dtype == np.float32
    np.testing.assert_array_equal(twin[0].features, first[0].features)
    # Another process, and one new image among known ones.
    anew = random_sam()
    counts = count_encoded(anew, monkeypatch)
    mixed = [pictures[0], images(seed=1)[0], pictures[1]]
    SamSegmenter(anew, name="s", cache=cache).encode(mixed)
    assert counts == [1]


@pytest.mark.parametrize("part", ["mask_decoder", "prompt_encoder", "image_encoder", "pixel_mean"])
def test_only_what_shapes_an_embedding_makes_it_anew(cache, monkeypatch, part) -> None:
    SamSegmenter(random_sam(), name="s", cache=cache).encode(images())
    changed = random_sam()
    with torch.no_grad():
        # The means of the pixels are no part of the state dict.
        one = changed.pixel_mean if part == "pixel_mean" else next(getattr(changed, part).parameters())
        one.view(-1)[0] += 1e-3
    counts = count_encoded(changed, monkeypatch)
    SamSegmenter(changed, name="s", cache=cache).encode(images())
    assert sum(counts) == (3 if part in ("image_encoder", "pixel_mean") else 0)


def test_precision_image_size_and_code_are_part_of_the_key(cache, monkeypatch) -> None:
    def keys(dtype: str = "float32", image_size: int = 256) -> str:
        return SamSegmenter(random_sam(image_size=image_size), name="s", dtype=dtype)._embedder.signature

    signatures = {keys(), keys("float16"), keys(image_size=512)}
    monkeypatch.setattr("kmine.segmenters.sam.embedder.VERSION", 99)
    signatures.add(keys())
    assert len(signatures) == 4


def test_the_shape_of_an_image_is_part_of_the_key(cache, monkeypatch) -> None:
    sam = random_sam()
    counts = count_encoded(sam, monkeypatch)
    (picture,) = images(sizes=[(40, 60)])
    SamSegmenter(sam, name="s", cache=cache).encode([picture, picture.reshape(60, 40, 3), picture[:, ::-1]])
    assert sum(counts) == 3


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_result_does_not_hang_on_what_was_cached(cache, dtype) -> None:
    pictures = images()[:1]
    with_cache, without = (SamSegmenter(random_sam(), name="s", cache=c, dtype=dtype) for c in (cache, None))
    made, read, plain = (s.encode(pictures)[0].features for s in (with_cache, with_cache, without))
    np.testing.assert_array_equal(made, read)
    np.testing.assert_array_equal(made, plain)
    assert (made == made.astype(np.float16)).all() == (dtype == "float16")


def test_a_damaged_embedding_is_encoded_again(cache, said, monkeypatch) -> None:
    sam = random_sam()
    counts = count_encoded(sam, monkeypatch)
    segmenter = SamSegmenter(sam, name="s", cache=cache)
    (good,) = segmenter.encode(images()[:1])
    (path,) = files(cache)
    path.write_bytes(path.read_bytes()[:-5])
    for _ in range(2):
        np.testing.assert_array_equal(segmenter.encode(images()[:1])[0].features, good.features)
    assert counts == [1, 1]
    assert len(said) == 1


def test_what_was_encoded_before_an_interruption_is_kept(cache, monkeypatch) -> None:
    sam = random_sam()
    forward, calls = sam.image_encoder.forward, []

    def interrupted(pixels):
        calls.append(len(pixels))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forward(pixels)

    monkeypatch.setattr(sam.image_encoder, "forward", interrupted)
    segmenter = SamSegmenter(sam, name="s", batch_size=1, cache=cache)
    with pytest.raises(KeyboardInterrupt):
        segmenter.encode(images())
    segmenter.encode(images())
    assert calls == [1, 1, 1, 1]


def test_a_batch_too_large_for_the_gpu_is_halved_for_good(cache, said, monkeypatch) -> None:
    sam = random_sam()
    forward, tried = sam.image_encoder.forward, []

    def small_gpu(pixels):
        tried.append(len(pixels))
        if len(pixels) > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return forward(pixels)

    plain = SamSegmenter(random_sam(), name="s").encode([*images(), *images(1)])
    monkeypatch.setattr(sam.image_encoder, "forward", small_gpu)
    segmenter = SamSegmenter(sam, name="s", batch_size=16, log=said.append)
    found = segmenter.encode([*images(), *images(1)])
    assert tried == [6, 3, 1, 1, 1, 1, 1, 1]
    segmenter.with_weights(segmenter.fine_tuner().state()).encode(images()[:2])
    assert tried[8:] == [1, 1], "twins know it, too"
    assert len(said) == 2 and "6 images" in said[0] and "going on with 1" in said[1]
    for a, b in zip(found, plain, strict=True):
        np.testing.assert_allclose(a.features, b.features, atol=1e-4)


def test_a_gpu_too_small_for_one_image_is_an_error_in_one_line(monkeypatch) -> None:
    sam = random_sam()

    def never(pixels):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(sam.image_encoder, "forward", never)
    with pytest.raises(UserError, match=r"memory for at least one image.*--device cpu"):
        SamSegmenter(sam, name="s").encode(images()[:1])


def disc(number: int) -> tuple[Sample, list[Prompts]]:
    rng = np.random.default_rng(number)
    rows, columns = np.mgrid[:64, :96]
    centre, radius = rng.uniform(24, 40, 2), rng.uniform(9, 18)
    mask = np.hypot(rows - centre[0], columns - centre[1]) <= radius
    image = rng.integers(0, 80, (64, 96, 3), dtype=np.uint8)
    image[mask] += 150
    box = (*(centre[::-1] - radius).clip(0), *(centre[::-1] + radius))
    return Sample(f"s{number}", f"s{number}", image, mask.astype(np.uint8)), [
        Prompts(1, np.array(box, np.float32), component=mask)
    ]


def test_masks_of_rounded_embeddings_agree() -> None:
    """Random decoders answer with noise; one taught discs answers with stable masks, as a real one does."""
    cfg = AdaptConfig(steps=24, batch_size=2, lr=1e-3, val_every=8, min_gain=0.0)
    exact = SamSegmenter(random_sam(), name="s")
    learnt = adapt(exact, [disc(0), disc(1)], [disc(2)], cfg, seed=0)
    assert learnt.iou_after > 0.5
    rounded = SamSegmenter(random_sam(), name="s", dtype="float16").with_weights(learnt.state)
    pictures, asked = [disc(n)[0].image for n in range(6)], [disc(n)[1] for n in range(6)]
    for (a,), (b,) in zip(*(s.decode(s.encode(pictures), asked) for s in (learnt.segmenter, rounded)), strict=True):
        assert not np.array_equal(a.low_res_logits, b.low_res_logits)
        assert (a.masks & b.masks).sum() >= 0.995 * (a.masks | b.masks).sum() > 0
        np.testing.assert_allclose(a.predicted_iou, b.predicted_iou, atol=5e-3)


def test_adaptation_and_mining_share_the_cache(cache, monkeypatch) -> None:
    sam = random_sam()
    counts = count_encoded(sam, monkeypatch)
    segmenter = SamSegmenter(sam, name="s", cache=cache)
    cfg = AdaptConfig(steps=2, batch_size=2, lr=1e-3, val_every=1, min_gain=0.0)
    for seed in (0, 1):
        found = adapt(segmenter, [disc(0), disc(1)], [disc(2)], cfg, seed=seed)
        found.segmenter.encode([disc(n)[0].image for n in range(3)])
    assert sum(counts) == 3


# -- settings


def test_the_settings_reach_the_segmenter(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, "sam_vit_b", SMALL)
    monkeypatch.setenv("KMINE_CACHE", str(tmp_path / "root"))
    save_file(random_sam(image_size=1024).state_dict(), tmp_path / "w.safetensors")

    def opened(**more) -> SamSegmenter:
        cfg = SegmenterConfig("sam_vit_b", str(tmp_path / "w.safetensors"), **more)
        return open_segmenter(cfg, device="cpu", offline=True)

    default = opened()._embedder
    assert default._cache.folder == tmp_path / "root/embeddings"
    assert default._cache._max_bytes == 20 * 10**9
    assert default._dtype == np.float16
    own = opened(cache_dir=str(tmp_path / "own"), cache_gb=0.5, cache_dtype="float32")._embedder
    assert (own._cache.folder, own._cache._max_bytes) == (tmp_path / "own", 5 * 10**8)
    assert own._dtype == np.float32
    assert opened(cache_gb=0)._embedder._cache is None
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [("cache_gb", -1), ("cache_gb", float("nan")), ("cache_gb", 1e9), ("cache_dir", ""), ("cache_dtype", "bfloat16")],
)
def test_unfit_settings_are_refused(name, value) -> None:
    with pytest.raises(UserError, match=f"segmenter.{name}: expected"):
        SegmenterConfig(**{name: value})

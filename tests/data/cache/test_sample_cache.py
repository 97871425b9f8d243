"""The cache: decoded once, shared, whole or absent, blind to masks that nobody asks for."""

import errno
import hashlib
import multiprocessing
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kmine.data.cache import files as cache_files
from kmine.data.cache.sample_cache import SampleCache
from kmine.data.datasets.kvasir_seg import KvasirSeg
from kmine.data.resize import resize_image, resize_mask
from kmine.errors import SampleError, UserError
from kmine.types import SampleRef


class FakeSource:
    """Images of (20 + i, 30) pixels; counts what is read, fails where told, never gives a forbidden mask."""

    name = "fake"
    class_names = ("background", "thing")
    skipped = ()

    def __init__(self, count=5, broken=(), broken_masks=(), height=20):
        self.count, self.broken, self.broken_masks, self.height = count, broken, broken_masks, height
        self.reads: list[str] = []

    def refs(self):
        return tuple(SampleRef(f"s{i}", f"s{i}") for i in range(self.count))

    def image(self, sample_id):
        self.reads.append(f"image {sample_id}")
        if sample_id in self.broken:
            raise SampleError(f"{sample_id}.jpg", "broken")
        i = int(sample_id[1:])
        return np.random.default_rng(i).integers(0, 256, (self.height + i, 30, 3), dtype=np.uint8)

    def mask(self, sample_id):
        self.reads.append(f"mask {sample_id}")
        if sample_id in self.broken_masks:
            raise SampleError(f"{sample_id}.png", "broken mask")
        i = int(sample_id[1:])
        return np.random.default_rng(100 + i).integers(0, 2, (self.height + i, 30), dtype=np.uint8)

    def fingerprint(self):
        return hashlib.sha256(f"{self.count} {self.height}".encode()).hexdigest()


def test_second_cache_decodes_nothing(tmp_path):
    first, second = FakeSource(), FakeSource()
    built = SampleCache(first, 32, tmp_path, "stop")
    found = SampleCache(second, 32, tmp_path, "stop")
    assert len(first.reads) == 5 and second.reads == []
    assert found.refs == built.refs == first.refs()
    assert found.hashes == built.hashes and found.skipped == ()
    assert found.native_shape("s3") == (23, 30)
    np.testing.assert_array_equal(found.image_resized("s3"), resize_image(first.image("s3"), 32))
    assert found.image_resized("s3").flags.writeable
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [found.folder.name]


def test_masks_are_decoded_at_the_first_request_only(tmp_path):
    source = FakeSource(broken_masks=("s0", "s1", "s2", "s4"))
    cache = SampleCache(source, 32, tmp_path, "stop")
    assert not any(read.startswith("mask") for read in source.reads)
    first = cache.mask_resized("s3")
    assert source.reads.count("mask s3") == 1
    np.testing.assert_array_equal(first, resize_mask(source.mask("s3"), 32))
    source.reads.clear()
    np.testing.assert_array_equal(cache.mask_resized("s3"), first)
    np.testing.assert_array_equal(SampleCache(source, 32, tmp_path, "stop").mask_resized("s3"), first)
    assert source.reads == []
    with pytest.raises(SampleError, match="broken mask"):
        cache.mask_resized("s4")


def test_garbage_in_withheld_masks_goes_unnoticed(tmp_path):
    rng = np.random.default_rng(0)
    for stem in "ab":
        for folder in ("images", "masks"):
            (tmp_path / folder).mkdir(exist_ok=True)
            pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / folder / f"{stem}.png")
    (tmp_path / "masks/b.png").write_bytes(b"garbage")
    cache = SampleCache(KvasirSeg(tmp_path), 32, tmp_path / "cache", "stop")
    assert cache.image_resized("b").shape == (32, 32, 3)
    assert cache.image_native("b").shape == (40, 40, 3)
    assert cache.mask_resized("a").shape == (32, 32)
    with pytest.raises(SampleError):
        cache.mask_resized("b")


class Changed(FakeSource):
    """One pixel of an image or mask is another, or what is known of a sample."""

    def __init__(self, image="", mask="", label=""):
        super().__init__()
        self.other_image, self.other_mask, self.other_label = image, mask, label

    def refs(self):
        return tuple(replace(ref, image_label=int(ref.sample_id == self.other_label)) for ref in super().refs())

    def image(self, sample_id):
        pixels = super().image(sample_id)
        pixels[0, 0] += sample_id == self.other_image
        return pixels

    def mask(self, sample_id):
        mask = super().mask(sample_id)
        mask[:4, :4] ^= sample_id == self.other_mask
        return mask


def test_contents_are_of_the_pixels_wherever_the_files_lie(tmp_path):
    def contents(number, **changes):
        return SampleCache(Changed(**changes), 20, tmp_path / str(number), "stop").content_fingerprints(["s1", "s0"])

    first = contents(0)
    assert contents(1) == first and contents(2, mask="s3") == first, "a mask that nobody was granted says nothing"
    image, label, mask = contents(3, image="s3"), contents(4, label="s3"), contents(5, mask="s1")
    assert image["masks"] == label["masks"] == first["masks"] and mask["images"] == first["images"]
    assert len({image["images"], label["images"], first["images"]}) == 3 and mask["masks"] != first["masks"]


def test_contents_ask_for_no_other_masks_and_bear_damaged_ones(tmp_path):
    source = FakeSource(broken_masks=("s1", "s2"))
    found = SampleCache(source, 20, tmp_path, "skip").content_fingerprints(["s0", "s1", "gone"])
    assert [read for read in source.reads if read.startswith("mask")] == ["mask s0", "mask s1"]
    whole = SampleCache(FakeSource(), 20, tmp_path / "whole", "skip").content_fingerprints(["s0", "s1", "gone"])
    assert found["images"] == whole["images"] and found["masks"] != whole["masks"]


def test_sizes_and_contents_have_caches_of_their_own(tmp_path):
    caches = [SampleCache(FakeSource(height=h), s, tmp_path, "stop") for h, s in ((20, 32), (20, 48), (21, 32))]
    assert len({cache.folder for cache in caches}) == 3
    assert caches[1].image_resized("s0").shape == (48, 48, 3)


def test_native_of_the_right_size_is_not_read_twice(tmp_path):
    source = FakeSource(count=12)
    cache = SampleCache(source, 30, tmp_path, "stop")
    cache.mask_resized("s10")
    source.reads.clear()
    assert cache.native_shape("s10") == (30, 30)
    assert cache.image_native("s10").shape == (30, 30, 3) and cache.mask_native("s10").shape == (30, 30)
    assert source.reads == []
    np.testing.assert_array_equal(cache.image_native("s10"), source.image("s10"))
    assert cache.image_native("s3").shape == (23, 30, 3) and cache.mask_native("s3").shape == (23, 30)


def test_damaged_images_stop_or_are_listed(tmp_path):
    with pytest.raises(SampleError, match=r"s1.jpg: broken \(1 more files are damaged\); or pass --data.on_error skip"):
        SampleCache(FakeSource(broken=("s1", "s4")), 32, tmp_path, "stop")
    source = FakeSource(broken=("s1", "s4"))
    cache = SampleCache(source, 32, tmp_path, "skip")
    assert source.reads == ["image s1", "image s4"]
    assert [ref.sample_id for ref in cache.refs] == ["s0", "s2", "s3"] == list(cache.hashes)
    assert [(skipped.sample_id, skipped.path) for skipped in cache.skipped] == [("s1", "s1.jpg"), ("s4", "s4.jpg")]
    np.testing.assert_array_equal(cache.image_resized("s3"), resize_image(source.image("s3"), 32))
    with pytest.raises(UserError, match=r"none that can be read \(2 are damaged\)"):
        SampleCache(FakeSource(2, broken=("s0", "s1")), 32, tmp_path, "skip")


def test_mended_images_come_back(tmp_path, caplog):
    assert len(SampleCache(FakeSource(broken=("s1", "s4")), 32, tmp_path, "skip").refs) == 3
    assert len(SampleCache(FakeSource(broken=("s4",)), 32, tmp_path, "skip").refs) == 4
    assert "s1.jpg can be read now" in caplog.text
    assert len(SampleCache(FakeSource(), 32, tmp_path, "stop").refs) == 5


def test_damaged_masks_stop_or_are_listed(tmp_path):
    source = FakeSource(broken_masks=("s1", "s4"))
    damaged = SampleCache(source, 32, tmp_path, "skip").decode_masks(["s0", "s1"])
    assert [skipped.sample_id for skipped in damaged] == ["s1"]
    assert "mask s4" not in source.reads
    with pytest.raises(SampleError, match=r"broken mask; or pass --data.on_error skip"):
        SampleCache(source, 32, tmp_path, "stop").decode_masks(["s0", "s1"])


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
def test_corrupt_cache_is_rebuilt_with_a_notice(tmp_path, caplog, damage, problem):
    damage(SampleCache(FakeSource(), 32, tmp_path, "stop").folder)
    source = FakeSource()
    cache = SampleCache(source, 32, tmp_path, "stop")
    assert len(source.reads) == 5
    assert len(caplog.records) == 1 and problem in caplog.text
    assert cache.mask_resized("s0").shape == (32, 32)


def test_other_format_is_rebuilt(tmp_path, caplog, monkeypatch):
    SampleCache(FakeSource(), 32, tmp_path, "stop")
    monkeypatch.setattr(cache_files, "FORMAT", cache_files.FORMAT + 1)
    SampleCache(FakeSource(), 32, tmp_path, "stop")
    assert "another version" in caplog.text


def test_flipped_record_heals(tmp_path):
    source = FakeSource()
    cache = SampleCache(source, 32, tmp_path, "stop")
    image, mask = cache.image_resized("s2"), cache.mask_resized("s2")
    for name in ("images.u8", "masks.u8"):
        path = cache.folder / name
        path.write_bytes(bytes(255 - byte for byte in path.read_bytes()))
    np.testing.assert_array_equal(cache.image_resized("s2"), image)
    np.testing.assert_array_equal(cache.mask_resized("s2"), mask)
    source.reads.clear()
    cache.image_resized("s2"), cache.mask_resized("s2")
    assert source.reads == []


def test_unwritable_cache_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file stands where a folder is needed; pass --data.cache_dir FOLDER"):
        SampleCache(FakeSource(), 32, tmp_path / "file", "stop")


def test_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("kmine.data.cache.build.write_record", full)
    with pytest.raises(UserError, match=r"No space left on device.*--data.cache_dir FOLDER"):
        SampleCache(FakeSource(), 32, tmp_path, "stop")
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    monkeypatch.undo()
    cache = SampleCache(FakeSource(), 32, tmp_path, "stop")
    monkeypatch.setattr("kmine.data.cache.sample_cache.write_record", full)
    with pytest.raises(UserError, match="No space left"):
        cache.mask_resized("s0")


def test_killed_build_is_swept_up(tmp_path):
    folder = SampleCache(FakeSource(), 32, tmp_path, "stop").folder
    folder.rename(folder.with_name(f"{folder.name}.tmp-1"))
    SampleCache(FakeSource(), 32, tmp_path, "stop")
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [folder]


def test_cache_dir_by_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("KMINE_CACHE", str(tmp_path / "here"))
    assert SampleCache(FakeSource(), 32, None, "stop").folder.parent == tmp_path / "here"
    monkeypatch.delenv("KMINE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert SampleCache(FakeSource(), 32, None, "stop").folder.parent == tmp_path / ".cache/kmine"


def build_and_count(cache_dir, barrier, results):
    source = FakeSource(40)
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


def test_pickled_and_threaded_readers_agree(tmp_path):
    cache = SampleCache(FakeSource(30), 32, tmp_path, "stop")
    copy = pickle.loads(pickle.dumps(cache))
    ids = [ref.sample_id for ref in cache.refs] * 4
    with ThreadPoolExecutor(8) as threads:
        masks = list(threads.map(cache.mask_resized, ids))
    for sample_id, mask in zip(ids, masks, strict=True):
        np.testing.assert_array_equal(mask, copy.mask_resized(sample_id))


def test_vanished_cache_heals_or_explains(tmp_path):
    cache = SampleCache(FakeSource(), 32, tmp_path, "stop")
    shutil.rmtree(cache.folder)
    with pytest.raises(UserError, match="cannot store"):
        cache.image_resized("s0")


def test_resizing_by_hand():
    image = np.zeros((4, 4, 3), np.uint8)
    image[:2, :2] = 200
    np.testing.assert_array_equal(resize_image(image, 2)[..., 0], [[200, 0], [0, 0]])
    assert resize_image(image, 8).max() == 200 and resize_image(image[:2], 3).shape == (3, 3, 3)
    mask = np.array([[0, 0, 255, 255], [0, 0, 255, 255], [1, 1, 2, 2], [1, 1, 2, 2]], np.uint8)
    np.testing.assert_array_equal(resize_mask(mask, 2), [[0, 255], [1, 2]])
    assert set(np.unique(resize_mask(mask, 7))) == {0, 1, 2, 255}

"""The sample cache: decoded once, shared, complete or absent; masks are not opened before they are requested."""

from __future__ import annotations

import errno
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from helpers.image_files import save_image
from helpers.memory_source import MemorySource, noise_source

from kmine.data.cache import sample_cache
from kmine.data.cache.sample_cache import SampleCache
from kmine.data.datasets.kvasir_seg import KvasirSeg
from kmine.data.perceptual_hash import perceptual_hash
from kmine.data.resize import Resizer
from kmine.errors import SampleError, UserError


def test_a_second_cache_decodes_nothing(tmp_path):
    first, second = noise_source(), noise_source()
    built = SampleCache(first, 32, tmp_path, "stop")
    found = SampleCache(second, 32, tmp_path, "stop")
    assert len(first.reads) == 5 and second.reads == []
    assert found.refs == built.refs == first.refs()
    assert found.hashes == built.hashes and found.skipped == ()
    assert found.native_shape("s3") == (23, 30)
    np.testing.assert_array_equal(found.image_resized("s3"), Resizer(32).image(first.image("s3")))
    assert found.image_resized("s3").flags.writeable
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [found.folder.name]


@pytest.mark.parametrize("letterbox", [False, True])
def test_blank_images_have_no_hash_and_dark_ones_with_a_mark_do(tmp_path, letterbox):
    """Of a mark outside the hashed part the hash knows nothing, but the image is not blank."""
    images = {name: np.full((40, 60, 3), value, np.uint8) for name, value in (("black", 0), ("grey", 90), ("mark", 0))}
    images["mark"][30:36, 4:10] = 255
    images["noise"] = noise_source(1).images["s0"]
    cache = SampleCache(MemorySource(images, {}), Resizer(32, letterbox), tmp_path, "stop")
    assert cache.hashes == {i: perceptual_hash(images[i]) for i in ("mark", "noise")}
    assert {perceptual_hash(images[i]) for i in ("black", "mark")} == {0} and cache.native_shape("grey") == (40, 60)


def test_masks_are_decoded_at_the_first_request_only(tmp_path):
    source = noise_source(broken_masks=("s0", "s1", "s2", "s4"))
    cache = SampleCache(source, 32, tmp_path, "stop")
    assert not any(read.startswith("mask") for read in source.reads)
    first = cache.mask_resized("s3")
    assert source.reads.count("mask s3") == 1
    np.testing.assert_array_equal(first, Resizer(32).mask(source.mask("s3")))
    source.reads.clear()
    np.testing.assert_array_equal(cache.mask_resized("s3"), first)
    np.testing.assert_array_equal(SampleCache(source, 32, tmp_path, "stop").mask_resized("s3"), first)
    assert source.reads == []
    with pytest.raises(SampleError, match="broken mask"):
        cache.mask_resized("s4")


def test_a_damaged_mask_is_not_opened_before_it_is_requested(tmp_path):
    rng = np.random.default_rng(0)
    for stem in "ab":
        for folder in ("images", "masks"):
            save_image(tmp_path / folder / f"{stem}.png", rng.integers(0, 256, (40, 40, 3), dtype=np.uint8))
    (tmp_path / "masks/b.png").write_bytes(b"garbage")
    cache = SampleCache(KvasirSeg(tmp_path), 32, tmp_path / "cache", "stop")
    assert cache.image_resized("b").shape == (32, 32, 3)
    assert cache.image_native("b").shape == (40, 40, 3)
    assert cache.mask_resized("a").shape == (32, 32)
    with pytest.raises(SampleError):
        cache.mask_resized("b")


def test_content_fingerprints_follow_images_labels_and_given_masks(tmp_path):
    def fingerprints(number, image="", mask="", label=""):
        source = noise_source(image_labels={f"s{n}": int(f"s{n}" == label) for n in range(5)})
        if image:
            source.images[image][0, 0] += 1
        if mask:
            source.masks[mask][:4, :4] ^= 1
        return SampleCache(source, 20, tmp_path / str(number), "stop").content_fingerprints(["s1", "s0"])

    first = fingerprints(0)
    assert fingerprints(1) == first, "another folder"
    assert fingerprints(2, mask="s3") == first, "a mask that is not given"
    image, label, mask = fingerprints(3, image="s3"), fingerprints(4, label="s3"), fingerprints(5, mask="s1")
    assert image["masks"] == label["masks"] == first["masks"] and mask["images"] == first["images"]
    assert len({image["images"], label["images"], first["images"]}) == 3 and mask["masks"] != first["masks"]


def test_content_fingerprints_read_the_given_masks_only(tmp_path):
    source = noise_source(broken_masks=("s1", "s2"))
    found = SampleCache(source, 20, tmp_path, "skip").content_fingerprints(["s0", "s1", "gone"])
    assert [read for read in source.reads if read.startswith("mask")] == ["mask s0", "mask s1"]
    whole = SampleCache(noise_source(), 20, tmp_path / "whole", "skip").content_fingerprints(["s0", "s1", "gone"])
    assert found["images"] == whole["images"] and found["masks"] != whole["masks"]


def test_every_size_and_content_has_its_own_cache(tmp_path):
    caches = [SampleCache(noise_source(height=h), s, tmp_path, "stop") for h, s in ((20, 32), (20, 48), (21, 32))]
    assert len({cache.folder for cache in caches}) == 3
    assert caches[1].image_resized("s0").shape == (48, 48, 3)


def test_a_native_image_of_size_s_comes_from_the_cache(tmp_path):
    source = noise_source(count=12)
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
        SampleCache(noise_source(broken=("s1", "s4")), 32, tmp_path, "stop")
    source = noise_source(broken=("s1", "s4"))
    cache = SampleCache(source, 32, tmp_path, "skip")
    assert source.reads == ["image s1", "image s4"]
    assert [ref.sample_id for ref in cache.refs] == ["s0", "s2", "s3"] == list(cache.hashes)
    assert [(skipped.sample_id, skipped.path) for skipped in cache.skipped] == [("s1", "s1.jpg"), ("s4", "s4.jpg")]
    np.testing.assert_array_equal(cache.image_resized("s3"), Resizer(32).image(source.image("s3")))
    with pytest.raises(UserError, match=r"none that can be read \(2 are damaged\)"):
        SampleCache(noise_source(2, broken=("s0", "s1")), 32, tmp_path, "skip")


def test_damaged_masks_stop_or_are_listed(tmp_path):
    source = noise_source(broken_masks=("s1", "s4"))
    damaged = SampleCache(source, 32, tmp_path, "skip").decode_masks(["s0", "s1"])
    assert [skipped.sample_id for skipped in damaged] == ["s1"]
    assert "mask s4" not in source.reads
    with pytest.raises(SampleError, match=r"broken mask; or pass --data.on_error skip"):
        SampleCache(source, 32, tmp_path, "stop").decode_masks(["s0", "s1"])


def test_damaged_records_are_decoded_again(tmp_path):
    source = noise_source()
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


def test_a_full_disk_at_the_first_mask_is_one_error(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    cache = SampleCache(noise_source(), 32, tmp_path, "stop")
    monkeypatch.setattr("kmine.data.cache.sample_cache.write_record", full)
    with pytest.raises(UserError, match="the disk is full; free some space"):
        cache.mask_resized("s0")


def test_a_removed_cache_is_one_error(tmp_path):
    cache = SampleCache(noise_source(), 32, tmp_path, "stop")
    shutil.rmtree(cache.folder)
    with pytest.raises(
        UserError, match=r"cannot store decoded images .*; name another folder: --data.cache_dir of loop"
    ):
        cache.image_resized("s0")


def test_the_folder_of_caches_comes_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("KMINE_CACHE", str(tmp_path / "here"))
    assert SampleCache(noise_source(), 32, None, "stop").folder.parent == tmp_path / "here"
    monkeypatch.delenv("KMINE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert SampleCache(noise_source(), 32, None, "stop").folder.parent == tmp_path / ".cache/kmine"


def test_pickled_and_threaded_readers_agree(tmp_path):
    cache = SampleCache(noise_source(30), 32, tmp_path, "stop")
    copy = pickle.loads(pickle.dumps(cache))
    ids = [ref.sample_id for ref in cache.refs] * 4
    with ThreadPoolExecutor(8) as threads:
        masks = list(threads.map(cache.mask_resized, ids))
    for sample_id, mask in zip(ids, masks, strict=True):
        np.testing.assert_array_equal(mask, copy.mask_resized(sample_id))


def test_masks_that_an_older_reader_stored_are_decoded_once_again(tmp_path, monkeypatch):
    source = noise_source()
    with monkeypatch.context() as older:
        older.setattr(sample_cache, "MASK_READER", sample_cache.MASK_READER - 1)
        SampleCache(source, 32, tmp_path, "stop").mask_resized("s3")
    source.reads.clear()
    for _ in range(2):
        SampleCache(source, 32, tmp_path, "stop").mask_resized("s3")
    assert source.reads == ["mask s3"]

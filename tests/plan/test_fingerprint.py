"""Fingerprints: counts and sizes of small folders, and which masks are opened."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.loop_command import write_pictures
from PIL import Image

from kmine.config import DataConfig
from kmine.data import open_source
from kmine.errors import UserError
from kmine.plan.fingerprint import SAMPLE, take_fingerprint


def picture(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def folder(root: Path, count: int = 12, with_mask: int = 12) -> DataConfig:
    """Grey pictures of 40 x 60 px with one object of 8 x 8 and one of 2 x 8 px."""
    rng = np.random.default_rng(0)
    for number in range(count):
        picture(root / "images" / f"p{number:02}.png", rng.integers(0, 255, (40, 60), np.uint8))
        mask = np.zeros((40, 60), np.uint8)
        mask[4:12, 4:12], mask[20:22, 30:38] = 255, 255
        if number < with_mask:
            picture(root / "masks" / f"p{number:02}.png", mask)
    where = {"images": str(root / "images"), "masks": str(root / "masks")}
    return DataConfig(name="folder", label_fraction=0.5, val_fraction=0.2, **where)


def test_counts_sizes_and_objects(tmp_path):
    cfg = folder(tmp_path, with_mask=10)
    data = take_fingerprint(cfg, 0, open_source(cfg)).fingerprint
    assert (data.num_images, data.num_masks, data.num_image_labels) == (12, 10, 0)
    assert (data.height, data.width, data.side, data.is_grey) == (40, 60, 60, True)
    assert (data.aspect_low, data.aspect_high) == (1.5, 1.5)
    assert (data.num_objects, data.num_classes) == (2.0, 2)
    assert data.small_object_px == pytest.approx(4.0) and data.object_px == pytest.approx(6.0)
    assert data.num_labeled + data.num_unlabeled + data.num_val < 12, "the rest is the test split"


class Watched:
    """A source that notes which masks are opened."""

    def __init__(self, source):
        self._source, self.opened = source, set()

    def __getattr__(self, name):
        return getattr(self._source, name)

    def mask(self, sample_id):
        self.opened.add(sample_id)
        return self._source.mask(sample_id)


def test_masks_of_the_run_s_own_labels_only_are_opened(tmp_path):
    from kmine.data.cache.sample_cache import SampleCache
    from kmine.data.split_file import resolve_splits

    write_pictures(tmp_path, 24)
    where = {"images": str(tmp_path / "images"), "masks": str(tmp_path / "masks")}
    cfg = DataConfig(name="folder", label_fraction=0.5, **where)
    source = Watched(open_source(cfg))
    sampled = take_fingerprint(cfg, 3, source)
    cache = SampleCache(source, 32, tmp_path / "cache")
    splits = resolve_splits(cfg, 3, cache.refs, cache.hashes, None)
    counts = sampled.fingerprint
    assert (counts.num_labeled, counts.num_val) == (len(splits.labeled), len(splits.val))
    assert source.opened <= {*splits.labeled, *splits.val}
    assert set(sampled.labeled) <= set(splits.labeled) and len(sampled.labeled) <= SAMPLE


def test_a_damaged_image_is_the_loop_s_error(tmp_path):
    cfg = folder(tmp_path)
    source = open_source(cfg)
    (tmp_path / "images" / "p03.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"p03\.png: .*--data.on_error skip"):
        take_fingerprint(cfg, 0, source)


def test_damaged_files_that_are_skipped_are_not_sampled(tmp_path):
    cfg = replace(folder(tmp_path), on_error="skip", label_fraction=1.0, test_fraction=0.0, val_fraction=0.1)
    source = open_source(cfg)
    (tmp_path / "images" / "p03.png").write_bytes(b"nothing")
    labeled = take_fingerprint(cfg, 0, source).labeled
    (tmp_path / "masks" / f"{labeled[0]}.png").write_bytes(b"nothing")
    found = take_fingerprint(cfg, 0, source)
    assert (found.fingerprint.num_labeled, found.labeled) == (len(labeled), labeled[1:])


def test_no_mask_is_the_loop_s_error(tmp_path):
    cfg = folder(tmp_path, with_mask=0)
    (tmp_path / "masks").mkdir()
    with pytest.raises(UserError, match="mask"):
        take_fingerprint(cfg, 0, open_source(cfg))

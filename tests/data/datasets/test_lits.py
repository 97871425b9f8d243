"""LiTS as a data set: tasks, image-level labels, masks that stay closed, one decoded volume at a time."""

from __future__ import annotations

import json
import os
import pickle
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.lits_files import SHAPE, grey, labels, record_decoded, rewrite, save_nifti, save_pair, scan

from kmine.config import DataConfig
from kmine.data import open_source
from kmine.data.cache.sample_cache import SampleCache
from kmine.data.datasets.lits import Lits
from kmine.data.io import nifti, nifti_header
from kmine.data.resize import Resizer
from kmine.data.source import SliceLocation
from kmine.errors import SampleError, UserError
from kmine.io.files import safe_name

DATA = os.environ.get("KMINE_TEST_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="KMINE_TEST_DATA is not set to the folder that holds lits/")


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "lits"


@pytest.fixture
def opened(root, tmp_path):
    """Open the data set below `root` with settings."""

    def build(**settings) -> Lits:
        return open_source(DataConfig(name="lits", root=str(root), cache_dir=str(tmp_path / "cache"), **settings))

    return build


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """Names of the files that are read beyond their header, in order."""
    return record_decoded(monkeypatch)


def all_images(source: Lits) -> np.ndarray:
    return np.stack([source.image(ref.sample_id)[..., 0] for ref in source.refs()])


def all_masks(source: Lits) -> np.ndarray:
    return np.stack([source.mask(ref.sample_id) for ref in source.refs()])


# -- slices


def test_slices_of_a_volume_are_one_group_in_order(root, opened):
    save_pair(root, 3, "PIR")
    source = opened(task="both")
    np.testing.assert_array_equal(all_images(source), grey(scan(seed=3)))
    np.testing.assert_array_equal(all_masks(source), labels())
    assert [ref.sample_id for ref in source.refs()] == [f"volume-003/slice-{n:04}" for n in range(5)]
    assert {ref.group_id for ref in source.refs()} == {"volume-003"}
    assert source.refs()[0].spacing == pytest.approx((0.8, 0.7))


def test_arrays_have_three_equal_channels_and_are_copies(root, opened):
    save_pair(root, 0)
    source = opened()
    image = source.image("volume-000/slice-0002")
    assert image.shape == (6, 7, 3) and image.dtype == np.uint8
    assert (image == image[..., :1]).all()
    image[:] = 0
    source.mask("volume-000/slice-0002")[:] = 7
    assert source.image("volume-000/slice-0002").any() and source.mask("volume-000/slice-0002").max() == 1


def test_the_window_is_that_of_the_liver_unless_set(root, opened):
    save_nifti(root / "volume-0.nii", scan())
    np.testing.assert_array_equal(all_images(opened()), grey(scan(), -160, 240))
    np.testing.assert_array_equal(all_images(opened(window=(-1000.0, 1000.0))), grey(scan(), -1000, 1000))


def test_refs_are_sorted_and_ids_make_file_names(root, opened):
    for number in (9, 10, 999, 1000):
        save_nifti(root / f"volume-{number}.nii", scan())
    ids = [ref.sample_id for ref in opened().refs()]
    assert ids == sorted(ids)
    assert list(dict.fromkeys(i.split("/")[0] for i in ids)) == [
        "volume-009",
        "volume-010",
        "volume-1000",
        "volume-999",
    ]
    assert safe_name("volume-009/slice-0042") == "volume-009%2Fslice-0042"
    assert len({safe_name(i) for i in ids}) == len(ids)


def test_a_slice_has_a_location_and_an_unknown_id_has_none(root, opened):
    save_pair(root, 0)
    source = opened()
    location = SliceLocation("volume-000", root / "volume-0.nii.gz", 4)
    assert source.slice_location("volume-000/slice-0004") == location
    for sample_id in ("volume-000/slice-0005", "volume-001/slice-0000", "volume-000", "other"):
        assert source.slice_location(sample_id) is None
        with pytest.raises(KeyError):
            source.image(sample_id)


# -- masks


@pytest.mark.parametrize(
    ("task", "names", "expected"),
    [
        ("tumour", ("background", "tumour"), [0, 0, 1]),
        ("liver", ("background", "liver"), [0, 1, 1]),
        ("both", ("background", "liver", "tumour"), [0, 1, 2]),
    ],
)
def test_tasks_map_the_labels_to_classes(root, opened, task, names, expected):
    save_pair(root, 0)
    source = opened(task=task)
    assert source.class_names == names
    np.testing.assert_array_equal(all_masks(source), np.array(expected, np.uint8)[labels()])


def test_the_default_task_is_tumour_and_tasks_of_others_are_refused(root, opened):
    save_pair(root, 0)
    assert opened().class_names == ("background", "tumour")
    assert opened().fingerprint() == opened(task="tumour").fingerprint()
    with pytest.raises(UserError, match=r"data.task: expected auto or one of tumour, liver, both for lits, got 'lung'"):
        opened(task="lung")
    with pytest.raises(UserError, match=r"data.root: expected the folder that holds the volumes of LiTS, got nothing"):
        open_source(DataConfig(name="lits"))


def test_a_volume_without_a_mask_is_unlabeled(root, opened):
    save_pair(root, 0)
    save_nifti(root / "volume-1.nii", scan())
    source = opened()
    found = {ref.group_id: (ref.has_mask, ref.image_label) for ref in source.refs() if ref.sample_id.endswith("2")}
    assert found == {"volume-000": (True, 1), "volume-001": (False, None)}
    with pytest.raises(SampleError, match=r"volume-1.nii: expected segmentation-1.nii"):
        source.mask("volume-001/slice-0000")
    with pytest.raises(UserError, match=r"found neither for volume-1.nii; .*or take all slices"):
        opened(slices="liver")


def test_a_damaged_mask_stops_or_its_volume_is_unlabeled(root, opened):
    for number in range(2):
        save_pair(root, number)
    rewrite(root / "segmentation-1.nii.gz", lambda b: b[:-20])
    with pytest.raises(SampleError, match=r"segmentation-1.nii.gz: .*; or pass --data.on_error skip"):
        opened().refs()
    source = opened(on_error="skip")
    assert [s.sample_id for s in source.skipped] == ["volume-001"]
    found = {(ref.group_id, ref.has_mask, ref.image_label is None) for ref in source.refs()}
    assert found == {("volume-000", True, False), ("volume-001", False, True)}
    assert {ref.group_id for ref in opened(on_error="skip", slices="liver").refs()} == {"volume-000"}


# -- one volume at a time


def test_each_volume_is_decoded_once_and_one_is_held(root, opened, decoded):
    for number in range(3):
        save_pair(root, number)
    source = opened()
    refs = source.refs()
    decoded.clear()
    for ref in refs:
        source.image(ref.sample_id), source.mask(ref.sample_id)
    assert sorted(decoded) == sorted(path.name for path in root.iterdir())
    assert source._images._volume.shape == SHAPE and source._images._volume.dtype == np.uint8
    source.image(refs[-1].sample_id)
    assert len(decoded) == 6
    source.image(refs[0].sample_id)
    assert decoded[6:] == ["volume-0.nii.gz"]


def test_a_pickled_source_reads_the_same_and_holds_no_volume(root, opened):
    for number in range(2):
        save_nifti(root / f"volume-{number}.nii", scan((40, 64, 64), seed=number))
    source = opened()
    first = source.image("volume-001/slice-0003")
    content = pickle.dumps(source)
    assert len(content) < 20_000
    copy = pickle.loads(content)
    assert copy.refs() == source.refs() and copy.fingerprint() == source.fingerprint()
    np.testing.assert_array_equal(copy.image("volume-001/slice-0003"), first)


def test_the_cache_decodes_each_file_once_with_all_its_threads(root, opened, decoded, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    for number in range(6):
        save_pair(root, number)
    source, active, concurrent = opened(), [0], []
    source.refs()
    decoded.clear()
    original = nifti._stored

    def watched(*args):
        active[0] += 1
        concurrent.append(active[0])
        time.sleep(0.01)
        active[0] -= 1
        return original(*args)

    monkeypatch.setattr(nifti, "_stored", watched)
    cache = SampleCache(source, 32, tmp_path / "small")
    assert {path for path in decoded if path.startswith("segmentation")} == set()
    assert len(set(decoded)) == 6 and len(decoded) <= 12, "on a busy machine a volume may be decoded again, not a slice"
    decoded.clear()
    assert cache.decode_masks([ref.sample_id for ref in cache.refs]) == ()
    assert len(set(decoded)) == 6 and len(decoded) <= 12
    assert set(concurrent) == {1}, "volumes are decoded one at a time"
    for ref in cache.refs[::4]:
        np.testing.assert_array_equal(cache.image_native(ref.sample_id), source.image(ref.sample_id))
        np.testing.assert_array_equal(
            cache.image_resized(ref.sample_id), Resizer(32).image(source.image(ref.sample_id))
        )
        np.testing.assert_array_equal(cache.mask_resized(ref.sample_id), Resizer(32).mask(source.mask(ref.sample_id)))
    decoded.clear()
    assert SampleCache(opened(), 32, tmp_path / "small").refs == cache.refs and decoded == []


# -- image-level labels


def test_labels_of_masks_depend_on_the_task(root, opened):
    save_pair(root, 0)
    assert [ref.image_label for ref in opened().refs()] == [0, 0, 1, 1, 0]
    assert [ref.image_label for ref in opened(task="both").refs()] == [0, 0, 1, 1, 0]
    assert [ref.image_label for ref in opened(task="liver").refs()] == [0, 1, 1, 1, 1]
    shown = opened(slices="liver").refs()
    assert [(ref.sample_id[-1], ref.image_label) for ref in shown] == [("1", 0), ("2", 1), ("3", 1), ("4", 0)]
    assert [ref.sample_id[-1] for ref in opened(every_nth=2).refs()] == ["0", "2", "4"]
    assert [ref.sample_id[-1] for ref in opened(every_nth=2, slices="liver").refs()] == ["2", "4"]


def test_slices_with_liver_are_required_for_slices_liver(root, opened):
    save_nifti(root / "volume-0.nii", scan())
    save_nifti(root / "segmentation-0.nii", np.zeros(SHAPE, np.uint8))
    assert not any(ref.image_label for ref in opened().refs())
    with pytest.raises(UserError, match=r"expected slices that show liver, found none; pass --data.slices all"):
        opened(slices="liver").refs()


def test_masks_are_read_once_for_all_settings(root, opened, decoded, tmp_path):
    for number in range(2):
        save_pair(root, number, codes="SPL")
    first = opened()
    assert decoded == [], "opening reads headers only"
    before = first.refs()
    assert decoded == ["segmentation-0.nii.gz", "segmentation-1.nii.gz"]
    assert opened().refs() == before
    opened(task="liver", slices="liver", every_nth=3).refs()
    assert len(decoded) == 2
    files = sorted((tmp_path / "cache/lits-facts").iterdir())
    assert [file.name.rsplit("-", 1)[0] for file in files] == ["segmentation-0", "segmentation-1"]
    assert json.loads(files[0].read_text()) == {"liver": [1, 2, 3, 4], "tumour": [2, 3]}
    files[0].write_text('{"liver": 3}')
    files[1].write_text("")
    assert opened().refs() == before and len(decoded) == 4
    os.utime(root / "segmentation-1.nii.gz", ns=(1, 1))
    assert opened().refs() == before and decoded[4:] == ["segmentation-1.nii.gz"]


def test_the_fingerprint_follows_files_settings_and_labels(root, opened, tmp_path):
    save_pair(root, 0)
    table = tmp_path / "labels.csv"
    table.write_text("sample_id,label\nvolume-000/slice-0001,1\n")
    equal = tmp_path / "equal.csv"
    equal.write_text("\ufeffsample_id,label\r\nvolume-0/slice-1,1\r\n")
    seen = {
        opened(**settings).fingerprint()
        for settings in (
            {},
            {"task": "both"},
            {"slices": "liver"},
            {"every_nth": 2},
            {"window": (-100.0, 240.0)},
            {"image_labels": str(table)},
        )
    }
    assert len(seen) == 6
    assert opened(size=64, label_fraction=0.5).fingerprint() == opened().fingerprint()
    assert opened(image_labels=str(table)).fingerprint() == opened(image_labels=str(equal)).fingerprint()
    os.utime(root / "segmentation-0.nii.gz", ns=(1, 1))
    seen.add(opened().fingerprint())
    table.write_text("sample_id,label\nvolume-000/slice-0001,0\n")
    seen.add(opened(image_labels=str(table)).fingerprint())
    assert len(seen) == 8


@pytest.fixture
def table(tmp_path):
    """Write a table of image-level labels."""

    def write(*rows: str) -> str:
        path = tmp_path / "labels.csv"
        path.write_text("\n".join(("sample_id,label", *rows)) + "\n")
        return str(path)

    return write


def test_masks_of_listed_volumes_stay_closed(root, opened, table, decoded, monkeypatch):
    for number in range(2):
        save_pair(root, number)
    rewrite(root / "segmentation-1.nii.gz", lambda b: b"garbage")
    touched: list[str] = []
    original = nifti_header.open_nifti
    monkeypatch.setattr(nifti_header, "open_nifti", lambda path: touched.append(path.name) or original(path))
    rows = table("volume-001/slice-0002,0", "volume-001/slice-0003,1", "volume-1/slice-4, 1")
    source = opened(image_labels=rows, on_error="stop")
    refs = source.refs()
    assert [ref.image_label for ref in refs] == [0, 0, 1, 1, 0, None, None, 0, 1, 1]
    assert all(ref.has_mask for ref in refs) and source.skipped == ()
    assert "segmentation-1.nii.gz" not in touched and decoded == ["segmentation-0.nii.gz"]
    chosen = opened(image_labels=rows, slices="liver").refs()
    assert [ref.sample_id for ref in chosen if ref.group_id == "volume-001"] == [ref.sample_id for ref in refs[7:]]
    assert "segmentation-1.nii.gz" not in touched
    with pytest.raises(SampleError, match=r"segmentation-1.nii.gz"):
        source.mask("volume-001/slice-0002")


def test_with_every_volume_listed_no_mask_is_opened(root, opened, table, decoded):
    for number in range(2):
        save_pair(root, number)
    opened(image_labels=table("volume-000/slice-0000,0", "volume-001/slice-0000,0")).refs()
    assert decoded == []


def test_a_volume_needs_a_mask_or_a_row(root, opened, table):
    save_pair(root, 0)
    for number in (1, 2):
        save_nifti(root / f"volume-{number}.nii", scan())
    with pytest.raises(UserError, match=r"rows in data.image_labels, .*neither for volume-2.nii; add rows"):
        opened(image_labels=table("volume-001/slice-0000,0"))
    refs = opened(image_labels=table("volume-001/slice-0000,0", "volume-002/slice-0000,1")).refs()
    assert [(ref.has_mask, ref.image_label) for ref in refs[::5]] == [(True, 0), (False, 0), (False, 1)]


def test_rows_of_a_skipped_volume_are_ignored(root, opened, table):
    for number in range(2):
        save_pair(root, number)
    rewrite(root / "volume-1.nii.gz", lambda b: b[:50])
    rows = table("volume-000/slice-0000,0", "volume-001/slice-0000,0")
    assert {ref.group_id for ref in opened(image_labels=rows, on_error="skip").refs()} == {"volume-000"}


# -- real volumes

LIVER_SLICES = {22: 23, 29: 36, 30: 36, 33: 36, 35: 37, 36: 35, 37: 37, 40: 35, 42: 37, 46: 21}
TUMOUR_SLICES = {22: 6, 29: 7, 30: 5, 33: 29, 35: 9, 36: 12, 37: 18, 40: 21, 42: 2, 46: 16}


@needs_data
def test_real_volumes(tmp_path, decoded):
    cfg = DataConfig(name="lits", root=str(Path(DATA) / "lits"), cache_dir=str(tmp_path), slices="liver", task="both")
    source = open_source(cfg)
    refs = source.refs()
    assert not source.skipped and all(ref.has_mask for ref in refs)
    for number, count in LIVER_SLICES.items():
        own = [ref for ref in refs if ref.group_id == f"volume-{number:03}"]
        assert (len(own), sum(ref.image_label for ref in own)) == (count, TUMOUR_SLICES[number])
        assert {ref.spacing for ref in own} == {None if number >= 28 else (1.5, 1.5)}
    assert len(open_source(replace(cfg, slices="all")).refs()) == 29 + 8 * 40 + 27
    assert len(decoded) == 10
    for ref in refs[::60]:
        image, mask = source.image(ref.sample_id), source.mask(ref.sample_id)
        assert image.shape == (256, 256, 3) and mask.shape == (256, 256)
        assert {1} <= set(np.unique(mask)) - {0} <= {1, 2}
        # contrast-enhanced liver is grey in this window, neither black nor white
        assert 100 < np.median(image[mask == 1]) < 230


@needs_data
def test_real_masks_belong_to_their_volumes_in_the_same_orientation():
    """Liver is homogeneous: under a rotated mask, or that of another volume, pixels would vary as in the body."""
    source = open_source(DataConfig(name="lits", root=str(Path(DATA) / "lits"), task="liver"))
    for number in (22, 33, 46):
        sample_id = f"volume-{number:03}/slice-{source._volumes[number].num_slices // 2:04}"
        grey_values, mask = source.image(sample_id)[..., 0].astype(float), source.mask(sample_id)
        inside, rotated = grey_values[mask == 1], grey_values[mask[::-1, ::-1] == 1]
        assert inside.std() < 0.7 * rotated.std(), sample_id

"""Layouts: samples depend on names only, not on folders, suffixes or the order of creation."""

from __future__ import annotations

import gzip
import itertools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nibabel
import numpy as np
from helpers.image_files import save_dicom
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform
from PIL import Image

from kmine.config.data import COVID_CLASSES, DataConfig
from kmine.data import open_source
from kmine.data.cache.sample_cache import SampleCache
from kmine.data.splits import Splits, make_splits

few = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])

# Letters that file systems or readers may mistake; no control characters, lone surrogates or leading dots.
LETTERS = st.sampled_from([*"aZ09 ._-()[]'&%$#@!+,;=~^{}", "ü", "ß", "日", "é", "😀"])
STEMS = st.text(LETTERS, min_size=1, max_size=8).filter(lambda name: name[0] != "." and name.strip(" ."))
ZEROS = st.sampled_from(["1", "01", "001", "10", "1.0", "1 "])
FOLDERS = st.sampled_from(["", "p1/", "P 2/", "p1/deep/", "scan.png/"])
SUFFIXES = st.sampled_from([".png", ".PNG", ".jpg", ".JPEG", ".tif", ".TIFF"])
SIZES = st.tuples(st.integers(1, 9), st.integers(1, 9))


@contextmanager
def root() -> Iterator[Path]:
    """A new folder for each example."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def content(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Different pixels for each key."""
    return np.random.default_rng(list(key.encode())).integers(0, 256, shape, dtype=np.uint8)


def mask_of(key: str, shape: tuple[int, int]) -> np.ndarray:
    mask = (content(f"mask {key}", shape) > 127).astype(np.uint8) * 255
    mask[0, 0] = 255  # a mask of Kvasir-SEG is not empty
    return mask


def save(path: Path, pixels: np.ndarray) -> None:
    """As PNG with any suffix: lossless."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        Image.fromarray(pixels).save(file, "PNG")


@st.composite
def layouts(draw: st.DrawFn, folders=FOLDERS, suffixes=SUFFIXES) -> dict[str, tuple[str, str, tuple[int, int], bool]]:
    """Sample id -> (suffix of the image, of the mask, size, whether there is a mask); at least one has a mask."""
    stems = draw(st.lists(st.tuples(folders, st.one_of(STEMS, ZEROS)), min_size=1, max_size=6, unique=True))
    names = [f"{folder}{stem}" for folder, stem in stems]
    endings = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".nii", ".dcm")
    assume(not any(name.lower().endswith(endings) for name in names))
    rows = {}
    for number, name in enumerate(names):
        rows[name] = draw(suffixes), draw(suffixes), draw(SIZES), number == 0 or draw(st.booleans())
    return rows


def built(place: Path, layout, order: list[int], mask_suffix=None) -> None:
    """Write images and masks one by one in the given order."""
    jobs = [(name, kind) for name in layout for kind in ("images", "masks") if kind == "images" or layout[name][3]]
    for job in order:
        name, kind = jobs[job % len(jobs)]
        write(place, layout, name, kind)
    for name, kind in jobs:
        write(place, layout, name, kind)


def write(place: Path, layout, name: str, kind: str) -> None:
    image_suffix, mask_suffix, shape, _ = layout[name]
    if kind == "images":
        save(place / "images" / f"{name}{image_suffix}", content(name, (*shape, 3)))
    else:
        # A mask with the suffix of a JPEG is thresholded, which keeps 0 and 255.
        save(place / "masks" / f"{name}{mask_suffix}", mask_of(name, shape))


def splits_of(source) -> Splits:
    chosen = {"label_fraction": 0.5, "val_fraction": 0.2, "test_fraction": 0.2, "split_seed": 0, "seed": 0}
    return make_splits(source.refs(), **chosen)


def check_pixels(source, layout) -> None:
    """Check that ids are the names, each with its own image and mask, bit for bit."""
    found = [ref.sample_id for ref in source.refs()]
    assert found == sorted(found) and len(found) == len(set(found)) and set(found) == set(layout)
    for ref in source.refs():
        shape, has_mask = layout[ref.sample_id][2:]
        image = source.image(ref.sample_id)
        assert image.dtype == np.uint8 and ref.has_mask == has_mask
        np.testing.assert_array_equal(image, content(ref.sample_id, (*shape, 3)))
        if has_mask:
            mask = source.mask(ref.sample_id)
            assert mask.dtype == np.uint8
            np.testing.assert_array_equal(mask, mask_of(ref.sample_id, shape) // 255)


ORDER = st.lists(st.integers(0, 50), max_size=12)


@few
@given(layouts(), ORDER, ORDER)
def test_samples_of_a_folder_depend_on_names_only(layout, order, other):
    with root() as one, root() as two:
        sources = []
        for place, jobs in ((one, order), (two, other)):
            built(place, layout, jobs)
            cfg = DataConfig(name="folder", images=f"{place}/images", masks=f"{place}/masks")
            sources.append(open_source(cfg))
        check_pixels(sources[0], layout)
        assert sources[0].refs() == sources[1].refs() and sources[0].skipped == sources[1].skipped == ()


@few
@given(layouts(st.just(""), st.sampled_from([".png", ".PNG", ".jpg", ".JPEG"])), ORDER, ORDER)
def test_samples_of_kvasir_depend_on_names_only(layout, order, other):
    with root() as one, root() as two:
        built(one, layout, order)
        built(two / "Kvasir-SEG", layout, other)
        first, second = (open_source(DataConfig(name="kvasir_seg", root=str(place))) for place in (one, two))
        check_pixels(first, layout)
        assert first.refs() == second.refs()


@few
@given(
    st.sampled_from(
        ["", "top/", "Infection Segmentation Data/Infection Segmentation Data/", "A/infection_segmentation_data/"]
    ),
    st.dictionaries(
        st.tuples(st.sampled_from(["Train", "Val", "Test"]), st.sampled_from(COVID_CLASSES)), STEMS, min_size=1
    ),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_covid_is_found_in_any_folder(above, stems, upper, shuffler):
    rows = [(split, kind, stem) for (split, kind), stem in stems.items()]
    assume(not any(stem.lower().endswith((".png", ".jpg", ".jpeg")) for *_, stem in rows))
    with root() as place:
        written = list(itertools.product(rows, ("images", "infection masks")))
        shuffler.shuffle(written)
        for (split, kind, stem), leaf in written:
            key = f"{split}/{kind}/{stem}"
            leaf_name = leaf.upper().replace(" ", "_") if upper else leaf
            folder = place / above / (split.lower() if upper else split) / kind / leaf_name
            pixels = content(key, (6, 7)) if leaf == "images" else mask_of(key, (6, 7))
            save(folder / f"{stem}{'.PNG' if upper else '.png'}", pixels)
        classes = tuple(name for name in COVID_CLASSES if any(kind == name for _, kind, _ in rows))
        source = open_source(DataConfig(name="covid_qu_ex", root=str(place), classes=classes))
        assert [ref.sample_id for ref in source.refs()] == sorted("/".join(row) for row in rows)
        for ref in source.refs():
            expected = np.repeat(content(ref.sample_id, (6, 7))[..., None], 3, axis=2)
            np.testing.assert_array_equal(source.image(ref.sample_id), expected)
            np.testing.assert_array_equal(source.mask(ref.sample_id), mask_of(ref.sample_id, (6, 7)) // 255)
            assert ref.split == ref.sample_id.split("/")[0].lower()


@few
@given(st.integers(4, 12), st.randoms(use_true_random=False))
def test_splits_do_not_depend_on_the_order_of_files(count, shuffler):
    names = [f"{number:02}" for number in range(count)]
    layout = dict.fromkeys(names, (".png", ".png", (4, 4), True))
    with root() as one, root() as two:
        found = []
        for place in (one, two):
            shuffler.shuffle(names)
            for name in names:
                write(place, layout, name, "masks")
                write(place, layout, name, "images")
            found.append(splits_of(open_source(DataConfig(name="kvasir_seg", root=str(place)))))
        assert found[0] == found[1]


@few
@given(
    st.lists(st.sampled_from(["good", "empty", "text", "cut", "link", "no image", "foreign"]), min_size=1, max_size=9)
)
def test_every_file_is_read_or_skipped(kinds):
    with root() as place:
        for number, kind in enumerate(["good", *kinds]):
            image, mask = (place / part / f"{number}.png" for part in ("images", "masks"))
            save(image, content(str(number), (5, 6, 3)))
            save(mask, mask_of(str(number), (5, 6)))
            whole = image.read_bytes()
            if kind == "empty":
                image.write_bytes(b"")
            elif kind == "text":
                image.write_bytes(b"no image")
            elif kind == "cut":
                image.write_bytes(whole[:-20])
            elif kind == "link":
                image.unlink()
                image.symlink_to(place / "gone")
            elif kind == "no image":
                image.unlink()
            elif kind == "foreign":
                image.rename(image.with_suffix(".webp"))
                mask.unlink()
        for cfg in (
            DataConfig(name="folder", images=f"{place}/images", masks=f"{place}/masks", on_error="skip"),
            DataConfig(name="kvasir_seg", root=str(place), on_error="skip"),
        ):
            source = open_source(cfg)
            cache = SampleCache(source, 32, place / "cache", "skip")
            assert len(cache.refs) == 1 + kinds.count("good")
            assert len(cache.refs) + len(cache.skipped) + len(source.skipped) == len(kinds) + 1


CODES = st.permutations("LPS").flatmap(
    lambda axes: st.tuples(*(st.sampled_from({"L": "LR", "P": "PA", "S": "SI"}[axis]) for axis in axes))
)
TYPES = st.sampled_from([np.uint8, np.int8, np.int16, np.uint16, np.int32, np.float32, np.float64])


@few
@given(CODES, st.tuples(*[st.integers(1, 5)] * 3), TYPES, st.booleans(), st.integers(0, 99))
def test_slices_do_not_depend_on_the_stored_orientation(codes, shape, dtype, zipped, number):
    values = content("scan", shape).astype(np.int16) % 100
    labels = content("labels", shape) % 3
    turn = ornt_transform(axcodes2ornt("LPS"), axcodes2ornt(codes))
    affine = np.diag([-0.7, -0.8, 2.5, 1.0]) @ inv_ornt_aff(turn, shape)
    with root() as place:
        for kind, voxels in (("volume", values.astype(dtype)), ("segmentation", labels)):
            path = place / f"{kind}-{number:02}.nii"
            nibabel.save(nibabel.Nifti1Image(apply_orientation(voxels, turn), affine), path)
            if zipped:
                path.with_suffix(".nii.gz").write_bytes(gzip.compress(path.read_bytes()))
                path.unlink()
        cfg = DataConfig(name="lits", root=str(place), task="both", window=(0.0, 255.0), cache_dir=f"{place}/cache")
        source = open_source(cfg)
        expected = [f"volume-{number:03}/slice-{n:04}" for n in range(shape[2])]
        assert [ref.sample_id for ref in source.refs()] == expected
        for n, ref in enumerate(source.refs()):
            np.testing.assert_array_equal(source.image(ref.sample_id)[..., 0], values[:, :, n].T)
            np.testing.assert_array_equal(source.mask(ref.sample_id), labels[:, :, n].T)
            assert ref.image_label == int((labels[:, :, n] == 2).any())


@few
@given(st.lists(st.tuples(STEMS, SIZES, st.booleans()), min_size=1, max_size=4, unique_by=lambda row: row[0]))
def test_dicom_files_are_read_back_bit_for_bit(rows):
    with root() as place:
        for stem, shape, deep in rows:
            assume(not stem.lower().endswith((".dcm", ".png", ".jpg", ".tif", ".nii")))
            pixels = content(stem, shape).astype(np.uint16 if deep else np.uint8)
            save_dicom(place / f"{stem}.dcm", pixels)
        source = open_source(DataConfig(name="folder", images=str(place), window=(0.0, 255.0)))
        assert [ref.sample_id for ref in source.refs()] == sorted(stem for stem, *_ in rows)
        for stem, shape, _ in rows:
            np.testing.assert_array_equal(source.image(stem)[..., 2], content(stem, shape))

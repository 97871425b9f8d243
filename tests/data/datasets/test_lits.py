"""LiTS by hand: orientations, windows, labels and layouts that work, and one clear error for what does not."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import threading
import time
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest

from kmine.config import DataConfig
from kmine.data import open_source
from kmine.data.cache.sample_cache import SampleCache
from kmine.data.datasets.lits import Lits
from kmine.data.io import nifti as volumes
from kmine.data.io.nifti import VolumeCache
from kmine.data.resize import resize_image, resize_mask
from kmine.errors import SampleError, UserError
from kmine.io.files import safe_name

DATA = os.environ.get("KMINE_TEST_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="KMINE_TEST_DATA is not set to the folder that holds lits/")

SIZES = {"x": 0.7, "y": 0.8, "z": 2.5}
"""Millimetres along the patient's left-right, front-back and up-down axis."""
LETTERS = {"L": (0, 1), "R": (0, -1), "P": (1, 1), "A": (1, -1), "S": (2, 1), "I": (2, -1)}
"""Axis in (column, row, number) of the slices, and whether it grows the same way."""
TOWARDS = {"L": (-1, 0, 0), "R": (1, 0, 0), "P": (0, -1, 0), "A": (0, 1, 0), "S": (0, 0, 1), "I": (0, 0, -1)}
"""The letters as directions of NIfTI's world: right, front, up."""
SHAPE = (5, 6, 7)
"""Number, height and width of the slices of most volumes here."""


def scan(shape=SHAPE, seed=0) -> np.ndarray:
    """(D, H, W) HU, no symmetry whatever."""
    return np.random.default_rng(seed).integers(-400, 400, shape).astype(np.int16)


def labels(shape=SHAPE) -> np.ndarray:
    """(D, H, W): nothing in slice 0, liver from slice 1 on, a tumour in slices 2 and 3."""
    out = np.zeros(shape, np.uint8)
    out[1:, 1:4, 2:5] = 1
    out[2:4, 2, 3] = 2
    return out


def affine_of(codes: str, sizes=SIZES) -> np.ndarray:
    affine = np.eye(4)
    for axis, letter in enumerate(codes):
        affine[:3, axis] = np.array(TOWARDS[letter]) * sizes["xyz"[LETTERS[letter][0]]]
    return affine


def stored(slices: np.ndarray, codes: str) -> np.ndarray:
    """(D, H, W) as an array whose axes grow towards `codes`."""
    by_axis = slices.transpose(2, 1, 0).transpose([LETTERS[letter][0] for letter in codes])
    return by_axis[tuple(slice(None, None, LETTERS[letter][1]) for letter in codes)]


def save(path: Path, slices: np.ndarray, codes="LPS", affine=None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(stored(slices, codes), affine_of(codes) if affine is None else affine), path)
    return path


def pair(root: Path, number: int, codes="LPS", suffix=".nii.gz", seed=None) -> None:
    save(root / f"volume-{number}{suffix}", scan(seed=number if seed is None else seed), codes)
    save(root / f"segmentation-{number}{suffix}", labels(), codes)


def grey(slices: np.ndarray, low=-160.0, high=240.0) -> np.ndarray:
    return np.rint((np.clip(slices.astype(float), low, high) - low) * 255 / (high - low)).astype(np.uint8)


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
    """Names of the files that are opened for more than their header, in order."""
    names: list[str] = []
    original = volumes._stored

    def counting(path, *rest):
        names.append(path.name)
        return original(path, *rest)

    monkeypatch.setattr(volumes, "_stored", counting)
    return names


def all_images(source: Lits) -> np.ndarray:
    return np.stack([source.image(ref.sample_id)[..., 0] for ref in source.refs()])


def all_masks(source: Lits) -> np.ndarray:
    return np.stack([source.mask(ref.sample_id) for ref in source.refs()])


# -- slices


@pytest.mark.parametrize("codes", ["LPS", "RAS", "LAS", "RPI", "SPL", "PIR", "ASL"])
def test_slices_come_out_the_same_however_they_are_stored(root, opened, codes):
    pair(root, 3, codes)
    source = opened(task="both")
    np.testing.assert_array_equal(all_images(source), grey(scan(seed=3)))
    np.testing.assert_array_equal(all_masks(source), labels())
    assert [ref.sample_id for ref in source.refs()] == [f"volume-003/slice-{n:04}" for n in range(5)]
    assert {ref.group_id for ref in source.refs()} == {"volume-003"}
    assert source.refs()[0].spacing == pytest.approx((0.8, 0.7))


def test_an_oblique_volume_is_cut_along_its_nearest_axes(root, opened):
    turn = np.eye(4)
    turn[:3, :3] = [[0.96, -0.28, 0], [0.28, 0.96, 0], [0, 0, 1]]
    save(root / "volume-0.nii", scan(), "RAS", turn @ affine_of("RAS"))
    source = opened()
    np.testing.assert_array_equal(all_images(source), grey(scan()))
    assert source.refs()[0].spacing == pytest.approx((0.8, 0.7))


def test_image_is_three_times_the_grey_and_of_nobody_else(root, opened):
    pair(root, 0)
    source = opened()
    image = source.image("volume-000/slice-0002")
    assert image.shape == (6, 7, 3) and image.dtype == np.uint8
    assert (image == image[..., :1]).all()
    image[:] = 0
    source.mask("volume-000/slice-0002")[:] = 7
    assert source.image("volume-000/slice-0002").any() and source.mask("volume-000/slice-0002").max() == 1


def test_window_by_hand(root, opened):
    values = np.full(SHAPE, -1000, np.float32)
    values[0, 0] = [-161, -160, -158, 40, 239.5, 240, 3000]
    save(root / "volume-0.nii", values)
    save(root / "segmentation-0.nii", labels())
    shown = opened().image("volume-000/slice-0000")[..., 0]
    # 2 HU above black are 1.275 steps of 255 / 400 each; the middle, 127.5, rounds to even; 399.5 HU are 254.7 steps
    assert shown[0].tolist() == [0, 0, 1, 128, 255, 255, 255] and not shown[1:].any()
    wide = opened(window=(-1000.0, 1000.0)).image("volume-000/slice-0000")[..., 0]
    assert wide[0].tolist() == [107, 107, 107, 133, 158, 158, 255] and not wide[1:].any()


def test_scaled_and_strange_values(root, opened):
    raw = np.zeros(SHAPE, np.uint8)
    raw[0, 0, :3] = [0, 100, 255]
    image = nibabel.Nifti1Image(stored(raw, "RAS"), affine_of("RAS"))
    image.header.set_slope_inter(2.0, -160.0)
    (root / "a").mkdir(parents=True)
    nibabel.save(image, root / "a/volume-0.nii")
    odd = np.zeros(SHAPE, np.float64)
    odd[0, 0, :3] = [np.nan, -np.inf, np.inf]
    save(root / "volume-1.nii.gz", odd)
    source = opened()
    # 2 * 100 - 160 = 40 HU; 2 * 255 - 160 = 350 HU
    assert source.image("volume-000/slice-0000")[0, :3, 0].tolist() == [0, 128, 255]
    assert source.image("volume-001/slice-0000")[0, :3, 0].tolist() == [0, 0, 255]


def test_unit_spacing_is_no_spacing(root, opened):
    """Volumes 28 to 47 of LiTS carry the identity."""
    save(root / "volume-28.nii", scan(), "RAS", np.eye(4))
    save(root / "volume-29.nii", scan(), "LPS", np.diag([-1, -1, 1, 1]))
    save(root / "volume-30.nii", scan(), "RAS", np.diag([1, 1, 2.5, 1]))
    spacing = {ref.group_id: ref.spacing for ref in opened().refs()}
    assert spacing == {"volume-028": None, "volume-029": None, "volume-030": (1.0, 1.0)}


def test_four_axes_of_which_the_last_has_length_one(root, opened):
    for name, slices in (("volume", scan()), ("segmentation", labels())):
        array = stored(slices, "LPS")[..., None]
        root.mkdir(exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(array, affine_of("LPS")), root / f"{name}-0.nii.gz")
    source = opened(task="both")
    np.testing.assert_array_equal(all_images(source), grey(scan()))
    np.testing.assert_array_equal(all_masks(source), labels())


# -- masks


def test_the_orientation_of_the_volume_holds_for_a_mask_whose_header_disagrees(root, opened):
    save(root / "volume-0.nii", scan(), "RAS")
    save(root / "segmentation-0.nii", labels(), "RAS", affine=np.diag([-9, 9, -9, 1]))
    np.testing.assert_array_equal(all_masks(opened(task="both")), labels())


@pytest.mark.parametrize(
    ("task", "names", "expected"),
    [
        ("tumour", ("background", "tumour"), [0, 0, 1]),
        ("liver", ("background", "liver"), [0, 1, 1]),
        ("both", ("background", "liver", "tumour"), [0, 1, 2]),
    ],
)
def test_tasks(root, opened, task, names, expected):
    pair(root, 0)
    source = opened(task=task)
    assert source.class_names == names
    np.testing.assert_array_equal(all_masks(source), np.array(expected, np.uint8)[labels()])


def test_auto_is_tumour_and_tasks_of_others_are_refused(root, opened):
    pair(root, 0)
    assert opened().class_names == ("background", "tumour")
    assert opened().fingerprint() == opened(task="tumour").fingerprint()
    with pytest.raises(UserError, match=r"data.task: expected auto or one of tumour, liver, both for lits, got 'lung'"):
        opened(task="lung")


def test_labels_stored_as_floats_are_rounded(root, opened):
    save(root / "volume-0.nii", scan())
    wobble = np.random.default_rng(0).uniform(-0.4, 0.4, SHAPE)
    save(root / "segmentation-0.nii", (labels() + wobble).astype(np.float32))
    np.testing.assert_array_equal(all_masks(opened(task="both")), labels())


@pytest.mark.parametrize(("wrong", "said"), [(3, "3"), (-1, "-1"), (1.6e6, "1.6e+06"), (np.nan, "nan")])
def test_other_labels_are_named(root, opened, wrong, said):
    save(root / "volume-0.nii", scan())
    values = labels().astype(np.float64)
    values[2, 0, 0] = wrong
    save(root / "segmentation-0.nii", values)
    with pytest.raises(
        SampleError, match=rf"segmentation-0.nii: .*0 .*1 .*2 .*, got {said.replace('+', '.')} in slice 2"
    ):
        opened().refs()


def test_another_shape_than_the_volumes_names_both(root, opened):
    save(root / "volume-0.nii", scan())
    save(root / "segmentation-0.nii", labels((5, 6, 8)))
    with pytest.raises(SampleError, match=r"segmentation-0.nii: expected the volume's shape 7 x 6 x 5, got 8 x 6 x 5"):
        opened().refs()


def test_a_volume_without_a_mask_is_unlabeled(root, opened):
    pair(root, 0)
    save(root / "volume-1.nii", scan())
    source = opened()
    found = {ref.group_id: (ref.has_mask, ref.image_label) for ref in source.refs() if ref.sample_id.endswith("2")}
    assert found == {"volume-000": (True, 1), "volume-001": (False, None)}
    with pytest.raises(SampleError, match=r"volume-1.nii: expected segmentation-1.nii"):
        source.mask("volume-001/slice-0000")
    with pytest.raises(UserError, match=r"found neither for volume-1.nii; .*or take all slices"):
        opened(slices="liver")


# -- layouts


def test_files_are_found_and_paired_wherever_they_lie(root, opened):
    save(root / "Training_Batch1/media/volume-2.nii", scan(seed=2))
    save(root / "Training Batch 2/Training Batch 2/volume-10.nii.gz", scan(seed=10))
    save(root / "segmentations/segmentation-10.nii", labels())
    save(root / "volume-002.nii/Segmentation-002.NII.GZ", labels())  # Kaggle unpacks into folders named like files
    (root / ".hidden").mkdir()
    for name in ("._volume-2.nii", ".hidden/volume-2.nii", "readme.txt"):
        (root / name).write_bytes(b"x")
    save(root / "test-volume-3.nii", scan())
    source = opened()
    assert [ref.group_id for ref in source.refs()] == ["volume-002"] * 5 + ["volume-010"] * 5
    assert all(ref.has_mask for ref in source.refs())
    np.testing.assert_array_equal(all_images(source)[:5], grey(scan(seed=2)))
    assert [(s.sample_id, s.problem) for s in source.skipped] == [
        ("test-volume-3.nii", "not named volume-N.nii or segmentation-N.nii")
    ]


def test_refs_are_sorted_and_ids_make_file_names(root, opened):
    for number in (9, 10, 999, 1000):
        save(root / f"volume-{number}.nii", scan())
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


@pytest.mark.parametrize("kind", ["volume", "segmentation"])
def test_two_files_of_one_number_are_both_named(root, opened, kind):
    pair(root, 3)
    save(root / f"again/{kind}-03.nii", labels())
    with pytest.raises(
        UserError, match=rf"one {kind} of number 3, found again/{kind}-03.nii and {kind}-3.nii.gz; keep"
    ):
        opened()


def test_segmentations_without_volumes_are_named_or_listed(root, opened):
    pair(root, 0)
    for number in range(1, 8):
        save(root / f"segmentation-{number}.nii", labels())
    with pytest.raises(
        UserError, match=r"found none for .*segmentation-1.nii, .*segmentation-5.nii and 2 more; .*skip"
    ):
        opened()
    source = opened(on_error="skip")
    assert [s.sample_id for s in source.skipped] == [f"volume-{n:03}" for n in range(1, 8)]
    assert {ref.group_id for ref in source.refs()} == {"volume-000"}


def test_folders_that_hold_nothing(root, opened, tmp_path):
    with pytest.raises(UserError, match=r"expected the LiTS folder, found nothing; pass --data.root"):
        opened()
    root.mkdir()
    with pytest.raises(UserError, match=r"expected volume-N.nii or volume-N.nii.gz in it or below, found none"):
        opened()
    (root / "file").write_text("")
    with pytest.raises(UserError, match="found a file; unpack it"):
        Lits(root / "file", DataConfig())
    with pytest.raises(UserError, match=r"data.root: expected the folder that holds the volumes of LiTS, got nothing"):
        open_source(DataConfig(name="lits"))


def test_unknown_slices_are_a_mistake_of_ours(root, opened):
    pair(root, 0)
    source = opened()
    for sample_id in ("volume-000/slice-0005", "volume-001/slice-0000", "nobody"):
        with pytest.raises(KeyError):
            source.image(sample_id)


# -- damage


def header_says(shape, code=16) -> bytes:
    header = nibabel.Nifti1Header()
    header.set_data_dtype(code)
    header.set_data_shape(shape)
    header.set_sform(affine_of("LPS"), code=1)
    header.set_data_offset(352)
    return header.binaryblock + bytes(4)


def rewritten(path: Path, change) -> None:
    path.write_bytes(change(path.read_bytes()))


HEADERS = {
    "empty": (lambda b: b"", "an empty file (0 bytes)"),
    "foreign": (lambda b: b"garbage" * 100, "no NIfTI header"),
    "cut": (lambda b: b[:200], "truncated or damaged"),
    "two axes": (lambda b: header_says((7, 6)), "expected a volume of three axes, got 7 x 6"),
    "a film": (lambda b: header_says((7, 6, 5, 2)), "got 7 x 6 x 5 x 2; store one scan a file"),
    "a bomb": (lambda b: header_says((2048, 2048, 513)), "sane size, got 2048 x 2048 x 513 voxels"),
    "colours": (lambda b: header_says((7, 6, 5), 128), "expected plain numbers, got values of type"),
    "complex": (lambda b: header_says((7, 6, 5), 32), "expected plain numbers, got values of type complex64"),
}


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("kind", HEADERS)
def test_a_damaged_header_stops_or_is_listed(root, opened, kind, suffix):
    change, said = HEADERS[kind]
    pair(root, 0)
    pair(root, 1, suffix=suffix)
    pack = gzip.compress if suffix == ".nii.gz" and kind not in ("empty", "foreign", "cut") else bytes
    rewritten(root / f"volume-1{suffix}", lambda b: pack(change(b)))
    with pytest.raises(SampleError, match=rf"volume-1{suffix}: .*; or pass --data.on_error skip") as error:
        opened()
    assert said in str(error.value) or (suffix, kind) in ((".nii.gz", "foreign"), (".nii.gz", "cut"))
    source = opened(on_error="skip")
    assert [(s.sample_id, Path(s.path).name) for s in source.skipped] == [("volume-001", f"volume-1{suffix}")]
    assert {ref.group_id for ref in source.refs()} == {"volume-000"}


def flip(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :]


BODIES = [
    (".nii.gz", lambda b: b[:-20]),
    (".nii.gz", lambda b: flip(b, -6)),  # its checksum
    (".nii", lambda b: b[:-1]),
    (".nii", lambda b: header_says((1000, 1000, 1000)) + bytes(100)),  # 2 GB, it says
    (".nii.gz", lambda b: gzip.compress(header_says((1000, 1000, 1000)) + bytes(1000))),
]


@pytest.mark.parametrize(("suffix", "change"), BODIES)
def test_a_damaged_body_is_one_error_of_its_slices(root, opened, decoded, suffix, change):
    pair(root, 0)
    save(root / f"volume-1{suffix}", scan((40, 30, 30)))
    rewritten(root / f"volume-1{suffix}", change)
    source = opened()
    for number in range(3):
        with pytest.raises(SampleError, match=rf"volume-1{suffix}: expected a whole NIfTI file, got a truncated"):
            source.image(f"volume-001/slice-{number:04}")
    assert decoded.count(f"volume-1{suffix}") == 1, "that it is damaged is remembered"
    assert source.image("volume-000/slice-0000").any()


def test_an_affine_that_tells_no_axes(root, opened):
    path = save(root / "volume-0.nii", scan())
    rewritten(path, lambda b: b[:280] + bytes(48) + b[328:])  # the three rows of the sform
    with pytest.raises(SampleError, match="got a singular one"):
        opened()


def test_a_damaged_mask_stops_or_costs_the_mask_alone(root, opened):
    for number in range(2):
        pair(root, number)
    rewritten(root / "segmentation-1.nii.gz", lambda b: b[:-20])
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
        pair(root, number)
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


def test_pickled_it_reads_on_and_takes_no_volume_along(root, opened):
    for number in range(2):
        save(root / f"volume-{number}.nii", scan((40, 64, 64), seed=number))
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
        pair(root, number)
    source, at_work, together = opened(), [0], []
    source.refs()
    decoded.clear()
    original = volumes._stored

    def watched(*args):
        at_work[0] += 1
        together.append(at_work[0])
        time.sleep(0.01)
        at_work[0] -= 1
        return original(*args)

    monkeypatch.setattr(volumes, "_stored", watched)
    cache = SampleCache(source, 32, tmp_path / "small")
    assert {path for path in decoded if path.startswith("segmentation")} == set()
    assert len(set(decoded)) == 6 and len(decoded) <= 8, "a busy machine may cost a second look or two"
    decoded.clear()
    assert cache.decode_masks([ref.sample_id for ref in cache.refs]) == ()
    assert len(set(decoded)) == 6 and len(decoded) <= 8
    assert set(together) == {1}, "no two volumes are decoded at a time"
    for ref in cache.refs[::4]:
        np.testing.assert_array_equal(cache.image_native(ref.sample_id), source.image(ref.sample_id))
        np.testing.assert_array_equal(cache.image_resized(ref.sample_id), resize_image(source.image(ref.sample_id), 32))
        np.testing.assert_array_equal(cache.mask_resized(ref.sample_id), resize_mask(source.mask(ref.sample_id), 32))
    decoded.clear()
    assert SampleCache(opened(), 32, tmp_path / "small").refs == cache.refs and decoded == []


def test_who_waits_for_the_volume_in_memory_goes_before_another_volume():
    last, order, began, go_on = VolumeCache(), [], threading.Event(), threading.Event()

    def read(name: str) -> None:
        def decode():
            order.append(f"decode {name}")
            began.set()
            assert go_on.wait(10)
            return np.zeros((1, 1, 1), np.uint8)

        last.read(Path(name), decode, lambda _: order.append(name))

    threads = [threading.Thread(target=read, args=(name,)) for name in "abaaba"]
    threads[0].start()
    assert began.wait(10)
    for thread in threads[1:]:
        thread.start()
    while sum(last._requests.values()) < 6:
        time.sleep(0.001)
    go_on.set()
    for thread in threads:
        thread.join(10)
    assert order == ["decode a", *"aaaa", "decode b", *"bb"]


def test_a_failure_of_our_own_leaves_others_working():
    last = VolumeCache()
    with pytest.raises(ZeroDivisionError):
        last.read(Path("a"), lambda: 1 // 0, lambda _: 1)
    assert last.read(Path("a"), lambda: np.zeros((1, 1, 1), np.uint8), lambda volume: volume.shape) == (1, 1, 1)


# -- facts of masks


def test_facts_by_hand(root, opened):
    pair(root, 0)
    assert [ref.image_label for ref in opened().refs()] == [0, 0, 1, 1, 0]
    assert [ref.image_label for ref in opened(task="both").refs()] == [0, 0, 1, 1, 0]
    assert [ref.image_label for ref in opened(task="liver").refs()] == [0, 1, 1, 1, 1]
    shown = opened(slices="liver").refs()
    assert [(ref.sample_id[-1], ref.image_label) for ref in shown] == [("1", 0), ("2", 1), ("3", 1), ("4", 0)]
    assert [ref.sample_id[-1] for ref in opened(every_nth=2).refs()] == ["0", "2", "4"]
    assert [ref.sample_id[-1] for ref in opened(every_nth=2, slices="liver").refs()] == ["2", "4"]


def test_no_slice_with_liver(root, opened):
    save(root / "volume-0.nii", scan())
    save(root / "segmentation-0.nii", np.zeros(SHAPE, np.uint8))
    assert not any(ref.image_label for ref in opened().refs())
    with pytest.raises(UserError, match=r"expected slices that show liver, found none; pass --data.slices all"):
        opened(slices="liver").refs()


def test_facts_are_read_once_for_all_settings(root, opened, decoded, tmp_path):
    for number in range(2):
        pair(root, number, codes="SPL")
    first = opened()
    assert decoded == [], "opening reads headers alone"
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


def test_fingerprint_follows_files_and_what_decides_pixels_and_labels(root, opened, tmp_path):
    pair(root, 0)
    table = tmp_path / "labels.csv"
    table.write_text("sample_id,label\nvolume-000/slice-0001,1\n")
    moved = tmp_path / "moved.csv"
    moved.write_text("\ufeffsample_id,label\r\nvolume-0/slice-1,1\r\n")
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
    assert opened(image_labels=str(table)).fingerprint() == opened(image_labels=str(moved)).fingerprint()
    os.utime(root / "segmentation-0.nii.gz", ns=(1, 1))
    seen.add(opened().fingerprint())
    table.write_text("sample_id,label\nvolume-000/slice-0001,0\n")
    seen.add(opened(image_labels=str(table)).fingerprint())
    assert len(seen) == 8


# -- the user's image-level labels


@pytest.fixture
def table(tmp_path):
    def write(*rows: str, header="sample_id,label") -> str:
        path = tmp_path / "labels.csv"
        path.write_text("\n".join((header, *rows)) + "\n")
        return str(path)

    return write


def test_masks_of_listed_volumes_stay_closed(root, opened, table, decoded, monkeypatch):
    for number in range(2):
        pair(root, number)
    rewritten(root / "segmentation-1.nii.gz", lambda b: b"garbage")
    touched: list[str] = []
    original = volumes._open
    monkeypatch.setattr(volumes, "_open", lambda path: touched.append(path.name) or original(path))
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
        pair(root, number)
    opened(image_labels=table("volume-000/slice-0000,0", "volume-001/slice-0000,0")).refs()
    assert decoded == []


def test_a_volume_needs_a_mask_or_a_row(root, opened, table):
    pair(root, 0)
    for number in (1, 2):
        save(root / f"volume-{number}.nii", scan())
    one = table("volume-001/slice-0000,0")
    with pytest.raises(UserError, match=r"rows in data.image_labels, .*neither for volume-2.nii; add rows"):
        opened(image_labels=one)
    both = table("volume-001/slice-0000,0", "volume-002/slice-0000,1")
    refs = opened(image_labels=both).refs()
    assert [(ref.has_mask, ref.image_label) for ref in refs[::5]] == [(True, 0), (False, 0), (False, 1)]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("volume-000/slice-0005,1", "unknown sample_id 'volume-000/slice-0005' (volume 0 has slices 0 to 4)"),
        ("volume-009/slice-0000,1", "unknown sample_id 'volume-009/slice-0000' (no such volume)"),
        ("volume-000,1", "expected a sample_id like volume-003/slice-0042, got 'volume-000'"),
        ("volume-000/slice-0001,2", "expected the label 0 (no lesion) or 1 (lesion), got '2'"),
        ("volume-000/slice-0001,", "got ''"),
        ("volume-000/slice-0001,yes", "got 'yes'"),
        ("volume-000/slice-0001", "expected sample_id,label, got 1 values"),
        ("volume-000/slice-0001,1,1", "expected sample_id,label, got 3 values"),
        ("volume-0/slice-0,1", "expected each slice once, got volume-0/slice-0 again"),
    ],
)
def test_a_wrong_row_is_named_with_its_line(root, opened, table, row, said):
    pair(root, 0)
    path = table("volume-000/slice-0000,0", "", row)
    with pytest.raises(UserError) as error:
        opened(image_labels=path)
    assert str(error.value).startswith(f"{path}, line 4: ") and said in str(error.value)


def test_a_wrong_table_is_one_error(root, opened, table, tmp_path):
    pair(root, 0)
    with pytest.raises(UserError, match=r"line 1: expected the header sample_id,label, got 'id,label'"):
        opened(image_labels=table("volume-000/slice-0000,0", header="id,label"))
    with pytest.raises(UserError, match="expected rows sample_id,label, got none"):
        opened(image_labels=table())
    with pytest.raises(UserError, match=r"data.image_labels: .*none.csv: expected a CSV file, found no such file"):
        opened(image_labels=str(tmp_path / "none.csv"))
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"expected a CSV file of sample_id,label, got something else"):
        opened(image_labels=str(tmp_path / "binary.csv"))


def test_rows_of_a_volume_that_is_skipped_are_passed_over(root, opened, table):
    for number in range(2):
        pair(root, number)
    rewritten(root / "volume-1.nii.gz", lambda b: b[:50])
    rows = table("volume-000/slice-0000,0", "volume-001/slice-0000,0")
    assert {ref.group_id for ref in opened(image_labels=rows, on_error="skip").refs()} == {"volume-000"}


# -- genuine volumes


LIVER_SLICES = {22: 23, 29: 36, 30: 36, 33: 36, 35: 37, 36: 35, 37: 37, 40: 35, 42: 37, 46: 21}
TUMOUR_SLICES = {22: 6, 29: 7, 30: 5, 33: 29, 35: 9, 36: 12, 37: 18, 40: 21, 42: 2, 46: 16}


@needs_data
def test_genuine_volumes(tmp_path, decoded):
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
def test_genuine_files_are_paired_by_number_and_not_turned_apart():
    """Liver is homogeneous: with a mask turned or of another volume, its pixels would vary as much as the body's."""
    source = open_source(DataConfig(name="lits", root=str(Path(DATA) / "lits"), task="liver"))
    for number in (22, 33, 46):
        sample_id = f"volume-{number:03}/slice-{source._volumes[number].num_slices // 2:04}"
        grey_values, mask = source.image(sample_id)[..., 0].astype(float), source.mask(sample_id)
        inside, turned = grey_values[mask == 1], grey_values[mask[::-1, ::-1] == 1]
        assert inside.std() < 0.7 * turned.std(), sample_id

"""NIfTI volumes: orientations, values and damage by hand; the cache of one decoded volume."""

from __future__ import annotations

import gzip
import threading
import time
from pathlib import Path

import nibabel
import numpy as np
import pytest
from helpers.lits_files import SHAPE, affine_of, grey, header_bytes, labels, rewrite, save_nifti, scan, stored

from kmine.data.io.nifti import (
    VolumeCache,
    read_geometry,
    read_integers,
    read_labels,
    read_windowed,
    to_slice_axes,
    to_stored_axes,
)
from kmine.errors import SampleError

WINDOW = (-160.0, 240.0)


def read_scan(path: Path) -> np.ndarray:
    return read_windowed(path, read_geometry(path), WINDOW)


# -- geometry


@pytest.mark.parametrize("codes", ["LPS", "RAS", "LAS", "RPI", "SPL", "PIR", "ASL"])
def test_slices_do_not_depend_on_the_stored_orientation(tmp_path, codes):
    path = save_nifti(tmp_path / "a.nii.gz", scan(), codes)
    mask = save_nifti(tmp_path / "mask.nii", labels(), codes)
    geometry = read_geometry(path)
    assert geometry.stack_shape == SHAPE and geometry.spacing == pytest.approx((0.8, 0.7))
    np.testing.assert_array_equal(read_scan(path), grey(scan()))
    np.testing.assert_array_equal(read_labels(mask, geometry), labels())
    np.testing.assert_array_equal(to_stored_axes(scan(), geometry.orientation), stored(scan(), codes))
    np.testing.assert_array_equal(to_slice_axes(stored(scan(), codes), geometry.orientation), scan())


def test_an_oblique_volume_is_cut_along_its_nearest_axes(tmp_path):
    rotation = np.eye(4)
    rotation[:3, :3] = [[0.96, -0.28, 0], [0.28, 0.96, 0], [0, 0, 1]]
    path = save_nifti(tmp_path / "a.nii", scan(), "RAS", rotation @ affine_of("RAS"))
    np.testing.assert_array_equal(read_scan(path), grey(scan()))
    assert read_geometry(path).spacing == pytest.approx((0.8, 0.7))


@pytest.mark.parametrize(
    ("diagonal", "spacing"), [((1, 1, 1, 1), None), ((-1, -1, 1, 1), None), ((1, 1, 2.5, 1), (1.0, 1.0))]
)
def test_unit_spacing_means_unknown(tmp_path, diagonal, spacing):
    """Volumes 28 to 47 of LiTS have identity affines."""
    assert read_geometry(save_nifti(tmp_path / "a.nii", scan(), "RAS", np.diag(diagonal))).spacing == spacing


def test_a_fourth_axis_of_length_1_is_ignored(tmp_path):
    path = tmp_path / "a.nii.gz"
    nibabel.save(nibabel.Nifti1Image(stored(scan(), "LPS")[..., None], affine_of("LPS")), path)
    np.testing.assert_array_equal(read_scan(path), grey(scan()))


# -- values


def test_values_are_scaled_and_not_finite_ones_clipped(tmp_path):
    raw = np.zeros(SHAPE, np.uint8)
    raw[0, 0, :3] = [0, 100, 255]
    image = nibabel.Nifti1Image(stored(raw, "RAS"), affine_of("RAS"))
    image.header.set_slope_inter(2.0, -160.0)
    nibabel.save(image, tmp_path / "scaled.nii")
    odd = np.zeros(SHAPE, np.float64)
    odd[0, 0, :3] = [np.nan, -np.inf, np.inf]
    # 2 * 100 - 160 = 40 HU; 2 * 255 - 160 = 350 HU
    assert read_scan(tmp_path / "scaled.nii")[0, 0, :3].tolist() == [0, 128, 255]
    assert read_scan(save_nifti(tmp_path / "odd.nii.gz", odd))[0, 0, :3].tolist() == [0, 0, 255]


def test_labels_are_cut_by_the_geometry_of_the_volume(tmp_path):
    geometry = read_geometry(save_nifti(tmp_path / "a.nii", scan(), "RAS"))
    mask = save_nifti(tmp_path / "mask.nii", labels(), "RAS", affine=np.diag([-9, 9, -9, 1]))
    np.testing.assert_array_equal(read_labels(mask, geometry), labels())
    with pytest.raises(SampleError, match="save it with the image's affine"):
        read_integers(mask, geometry)


def test_float_labels_are_rounded(tmp_path):
    geometry = read_geometry(save_nifti(tmp_path / "a.nii", scan()))
    noise = np.random.default_rng(0).uniform(-0.4, 0.4, SHAPE)
    mask = save_nifti(tmp_path / "mask.nii", (labels() + noise).astype(np.float32))
    np.testing.assert_array_equal(read_labels(mask, geometry), labels())


@pytest.mark.parametrize(("wrong", "text"), [(3, "3"), (-1, "-1"), (1.6e6, "1.6e+06"), (np.nan, "nan")])
def test_another_label_is_refused_with_its_slice(tmp_path, wrong, text):
    geometry = read_geometry(save_nifti(tmp_path / "a.nii", scan()))
    values = labels().astype(np.float64)
    values[2, 0, 0] = wrong
    mask = save_nifti(tmp_path / "mask.nii", values)
    with pytest.raises(SampleError, match=rf"mask.nii: .*0 .*1 .*2 .*, got {text.replace('+', '.')} in slice 2"):
        read_labels(mask, geometry)


def test_another_shape_is_refused_with_both_shapes(tmp_path):
    geometry = read_geometry(save_nifti(tmp_path / "a.nii", scan()))
    mask = save_nifti(tmp_path / "mask.nii", labels((5, 6, 8)))
    with pytest.raises(SampleError, match=r"mask.nii: expected the volume's shape 7 x 6 x 5, got 8 x 6 x 5"):
        read_labels(mask, geometry)


# -- damage

HEADERS = {
    "empty": (lambda b: b"", "an empty file (0 bytes)"),
    "foreign": (lambda b: b"garbage" * 100, "no NIfTI header"),
    "cut": (lambda b: b[:200], "truncated or damaged"),
    "one axis": (lambda _: header_bytes((7,)), "expected a volume of three axes, got 7;"),
    "four axes": (lambda b: header_bytes((7, 6, 5, 2)), "got 7 x 6 x 5 x 2; store one scan a file"),
    "too large": (lambda b: header_bytes((2048, 2048, 513)), "sane size, got 2048 x 2048 x 513 voxels"),
    "colours": (lambda b: header_bytes((7, 6, 5), 128), "expected plain numbers, got values of type"),
    "complex": (lambda b: header_bytes((7, 6, 5), 32), "expected plain numbers, got values of type complex64"),
    "singular": (lambda b: b[:280] + bytes(48) + b[328:], "got a singular one"),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_damaged_header_is_one_error(tmp_path, kind):
    change, problem = HEADERS[kind]
    path = save_nifti(tmp_path / "a.nii", scan())
    rewrite(path, change)
    with pytest.raises(SampleError) as error:
        read_geometry(path)
    assert str(error.value).startswith(f"{path}: ") and problem in str(error.value)


def flip(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :]


@pytest.mark.parametrize(
    ("suffix", "change"),
    [
        (".nii.gz", lambda b: b[:-20]),
        (".nii.gz", lambda b: flip(b, -6)),  # its checksum
        (".nii", lambda b: b[:-1]),
        (".nii", lambda b: header_bytes((1000, 1000, 1000)) + bytes(100)),  # claims 2 GB
        (".nii.gz", lambda b: gzip.compress(header_bytes((1000, 1000, 1000)) + bytes(1000))),
    ],
)
def test_a_damaged_body_is_one_error(tmp_path, suffix, change):
    path = save_nifti(tmp_path / f"a{suffix}", scan((40, 30, 30)))
    rewrite(path, change)
    with pytest.raises(SampleError, match=rf"a{suffix}: expected a whole NIfTI file, got a truncated"):
        read_scan(path)


# -- cache of one volume


def test_readers_of_the_cached_volume_precede_another_volume():
    cache, order, began, go_on = VolumeCache(), [], threading.Event(), threading.Event()

    def read(name: str) -> None:
        def decode():
            order.append(f"decode {name}")
            began.set()
            assert go_on.wait(10)
            return np.zeros((1, 1, 1), np.uint8)

        cache.read(Path(name), decode, lambda _: order.append(name))

    threads = [threading.Thread(target=read, args=(name,)) for name in "abaaba"]
    threads[0].start()
    assert began.wait(10)
    for thread in threads[1:]:
        thread.start()
    while sum(cache._requests.values()) < 6:
        time.sleep(0.001)
    go_on.set()
    for thread in threads:
        thread.join(10)
    assert order == ["decode a", *"aaaa", "decode b", *"bb"]


def test_a_damaged_volume_is_decoded_once():
    cache, calls = VolumeCache(), []

    def decode():
        calls.append(1)
        raise SampleError("a", "damaged")

    for _ in range(3):
        with pytest.raises(SampleError, match="damaged"):
            cache.read_slice(Path("a"), decode, 0)
    assert len(calls) == 1


def test_an_unexpected_error_leaves_the_cache_usable():
    cache = VolumeCache()
    with pytest.raises(ZeroDivisionError):
        cache.read(Path("a"), lambda: 1 // 0, lambda _: 1)
    assert cache.read(Path("a"), lambda: np.zeros((1, 1, 1), np.uint8), lambda volume: volume.shape) == (1, 1, 1)


def test_slices_are_copies():
    cache, volume = VolumeCache(), np.zeros((2, 3, 3), np.uint8)
    cache.read_slice(Path("a"), lambda: volume, 1)[:] = 7
    assert not volume.any()

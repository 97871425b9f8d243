"""What a user names, as inputs: names, kinds, collisions, series; and series as volumes."""

from __future__ import annotations

import os

import numpy as np
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from kmine.data.io.dicom_series import open_series
from kmine.data.io.nifti_write import ProbabilityFile, encode_mask, frame_of_series
from kmine.data.resize import Resizer
from kmine.errors import SampleError, UserError
from kmine.predict.inputs import find_inputs
from kmine.predict.reader import load

SERIES = generate_uid(entropy_srcs=["series"])


def save_png(path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((6, 8), value, np.uint8)).save(path)


def save_slice(path, values, *, position=None, series=SERIES, orientation=(1, 0, 0, 0, 1, 0), spacing=(0.5, 0.25)):
    """A CT slice of 16-bit values."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    data = FileDataset(str(path), Dataset(), file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
    data.SeriesInstanceUID = series
    data.Rows, data.Columns = values.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 1
    data.PixelSpacing = list(spacing)
    if position is not None:
        data.ImagePositionPatient, data.ImageOrientationPatient = list(position), list(orientation)
    data.PixelData = values.astype("<i2").tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)


def names(found) -> list[tuple[str, str]]:
    return [(one.name, one.kind) for one in found.readable]


def test_folders_are_searched_to_the_bottom_and_the_output_is_not(tmp_path):
    for name in ("a.png", "deep/er/b.jpg", "out/masks/a.png", ".hidden.png"):
        save_png(tmp_path / name)
    (tmp_path / "notes.txt").write_text("x")
    found = find_inputs([str(tmp_path)], tmp_path / "out")
    assert names(found) == [("a", "picture"), ("deep/er/b", "picture")] and found.num_others == 1


@pytest.mark.parametrize("other", ["x.jpg", "X.png", "x.nii.gz"])
def test_two_of_one_name_are_refused(tmp_path, other):
    save_png(tmp_path / "in" / "x.png")
    (tmp_path / "in" / other).write_bytes(b"x")
    with pytest.raises(UserError, match="one image per name"):
        find_inputs([str(tmp_path / "in")], tmp_path / "out")


def test_two_folders_with_files_of_one_name_are_refused(tmp_path):
    save_png(tmp_path / "one" / "x.png")
    save_png(tmp_path / "two" / "x.png")
    with pytest.raises(UserError, match="predict them into two folders"):
        find_inputs([str(tmp_path / "one"), str(tmp_path / "two")], tmp_path / "out")


def test_a_file_of_no_known_kind_is_refused(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros(3))
    with pytest.raises(UserError, match=r"expected PNG, JPEG.*got a NumPy array; convert"):
        find_inputs([str(tmp_path / "x.npy")], tmp_path / "out")


def test_dicom_files_without_a_suffix_are_known_by_their_first_bytes(tmp_path):
    values = np.zeros((4, 5), np.int16)
    for number in range(3):
        save_slice(tmp_path / "scan" / f"IM{number:04}", values, position=(0, 0, number))
    save_slice(tmp_path / "1.2.840.1", values)
    save_slice(tmp_path / "DICOMDIR", values)
    (tmp_path / "LICENSE").write_bytes(b"\0" * 128 + b"DIC")
    os.mkfifo(tmp_path / "pipe")
    found = find_inputs([str(tmp_path)], tmp_path / "out")
    assert names(found) == [("1.2.840.1", "dicom"), ("scan", "series")] and found.num_others == 3
    assert names(find_inputs([str(tmp_path / "scan" / "IM0000")], tmp_path / "out")) == [("IM0000", "dicom")]


def test_names_that_no_table_could_hold_are_listed(tmp_path):
    bad = tmp_path / "in" / os.fsdecode(b"\xff.png")
    save_png(tmp_path / "in" / "good.png")
    bad.write_bytes(b"x")
    for words in ([str(tmp_path / "in")], [str(bad), str(tmp_path / "in" / "good.png")]):
        found = find_inputs(words, tmp_path / "out")
        assert names(found) == [("good", "picture")] and [s.sample_id for s in found.unreadable] == [r"\xff"]


def test_slices_of_a_series_are_one_input_and_files_without_a_place_each_their_own(tmp_path):
    for n in range(3):
        save_slice(tmp_path / "ct" / f"{n}.dcm", np.zeros((4, 5)), position=(0, 0, n))
        save_slice(tmp_path / "xray" / f"{n}.dcm", np.zeros((4, 5)))
    save_slice(tmp_path / "ct" / "alone.dcm", np.zeros((4, 5)), position=(0, 0, 0), series=generate_uid())
    found = find_inputs([str(tmp_path)], tmp_path / "out")
    assert names(found) == [
        ("ct/alone", "dicom"),
        *((f"xray/{n}", "dicom") for n in range(3)),
        ("ct", "series"),
    ]
    assert names(find_inputs([str(tmp_path / "ct")], tmp_path / "out"))[-1] == ("ct", "series")


def test_two_series_in_a_folder_are_told_apart(tmp_path):
    for n in range(4):
        place = {"position": (0, 0, n), "series": f"1.2.{n % 2}"}
        save_slice(tmp_path / "ct" / f"{n}.dcm", np.zeros((4, 5)), **place)
    found = find_inputs([str(tmp_path)], tmp_path / "out")
    assert [(one.name, len(one.files)) for one in found.readable] == [("ct/series-1", 2), ("ct/series-2", 2)]


def test_a_series_is_sorted_by_place_and_its_affine_is_the_patients(tmp_path):
    # Names run against places. Millimetres: 0.5 down a column, 0.25 along a row, 2 from slice to slice.
    values = np.arange(3)[:, None, None] * 100 + np.arange(20).reshape(4, 5)
    files = [tmp_path / f"{9 - n}.dcm" for n in range(3)]
    for n, path in enumerate(files):
        save_slice(path, values[n], position=(10, 20, 30 + 2 * n))
    series = open_series(sorted(files))
    assert series.files == tuple(files) and series.thickness == 2 and series.warning == ""
    # Voxel (column 4, row 3, slice 2) lies at 10 + 4 * .25 to the left, 20 + 3 * .5 to the back, 34 up.
    assert np.allclose(series.affine @ [4, 3, 2, 1], [-11, -21.5, 34, 1])
    (one,) = find_inputs([str(tmp_path)], tmp_path / "out").readable
    loaded = load(one, Resizer(8), (0, 255), keep=True)
    assert loaded.shape == (4, 5) and loaded.spacing == (0.5, 0.25)
    assert np.array_equal(loaded.native, np.minimum(values, 255))


def test_missing_and_doubled_slices_are_told(tmp_path):
    heights = (0, 2, 4, 8, 10)
    for n, height in enumerate(heights):
        save_slice(tmp_path / f"{n}.dcm", np.zeros((4, 5)), position=(0, 0, height))
    files = sorted(tmp_path.glob("*.dcm"))
    assert "1 of 4 distances between slices differ from the usual 2 mm" in open_series(files).warning
    save_slice(tmp_path / "9.dcm", np.zeros((4, 5)), position=(0, 0, 4))
    with pytest.raises(SampleError, match="two in one"):
        open_series([*files, tmp_path / "9.dcm"])
    save_slice(tmp_path / "9.dcm", np.zeros((4, 6)), position=(0, 0, 12))
    with pytest.raises(SampleError, match="one size and spacing"):
        open_series([*files, tmp_path / "9.dcm"])


def test_masks_and_probabilities_of_a_series_agree_with_its_voxels(tmp_path):
    nibabel = pytest.importorskip("nibabel")
    for n in range(3):
        save_slice(tmp_path / f"{n}.dcm", np.zeros((4, 5)), position=(0, 0, n))
    frame = frame_of_series(open_series(sorted(tmp_path.glob("*.dcm"))))
    mask = np.random.default_rng(0).integers(0, 3, (3, 4, 5)).astype(np.uint8)
    (tmp_path / "mask.nii.gz").write_bytes(encode_mask(mask, frame))
    stored = nibabel.load(tmp_path / "mask.nii.gz")
    assert np.array_equal(np.asarray(stored.dataobj), mask.T) and stored.header.get_zooms() == (0.25, 0.5, 1)
    probs = np.random.default_rng(1).random((3, 2, 4, 5)).astype(np.float32)
    file = ProbabilityFile(tmp_path / "p.nii", frame, probs.shape)
    file.write(1, probs[1:])
    file.write(0, probs[:1])
    assert not (tmp_path / "p.nii").exists()
    file.finish()
    assert np.array_equal(np.asarray(nibabel.load(tmp_path / "p.nii").dataobj), probs.transpose(3, 2, 0, 1))

"""DICOM segmentations: a round trip bit for bit, empty and ignored pixels, and what they are not of."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from helpers.dicom_files import SHAPE, multiframe, scan
from helpers.image_files import save_dicom
from pydicom import dcmread

from kmine.data.io.dicom import read_header
from kmine.data.io.dicom_seg import encode_seg, pair_segs, read_seg_header, read_seg_mask, require_highdicom
from kmine.errors import SampleError, UserError

NAMES = ("background", "liver", "tumour")


def masks(count=4, values=(0, 1, 2, 255)):
    return np.random.default_rng(0).choice(np.array(values, np.uint8), (count, *SHAPE))


@pytest.fixture
def written(tmp_path):
    """Images, and their segmentation with an empty slice."""
    pytest.importorskip("highdicom")
    files, truth = scan(tmp_path / "images"), masks()
    truth[2] = 0
    (tmp_path / "masks").mkdir()
    path = tmp_path / "masks" / "any name.dcm"
    path.write_bytes(encode_seg(files, truth, NAMES))
    return files, truth, path


def test_masks_come_back_bit_for_bit(written):
    files, truth, path = written
    for number, file in enumerate(files):
        np.testing.assert_array_equal(read_seg_mask(path, file, 0, NAMES), truth[number])
    header = read_seg_header(path)
    assert header.labels == {1: "liver", 2: "tumour", 3: "ignored"} and header.frame_of_reference == "1.2.9"
    assert header.covered == {str(dcmread(file).SOPInstanceUID) for file in files}
    assert read_seg_header(files[0]) is None
    with pytest.raises(SampleError, match="expected an image, got a DICOM segmentation"):
        read_header(path)


def test_an_empty_stack_and_one_class_come_back(tmp_path):
    pytest.importorskip("highdicom")
    files = scan(tmp_path, 2)
    for truth in (np.zeros((2, *SHAPE), np.uint8), masks(2, (0, 1))):
        (tmp_path / "seg.dcm").write_bytes(encode_seg(files, truth, NAMES[:2]))
        for number, file in enumerate(files):
            np.testing.assert_array_equal(read_seg_mask(tmp_path / "seg.dcm", file, 0, NAMES[:2]), truth[number])


def test_other_masks_have_other_identifiers_and_the_same_ones_the_same(tmp_path):
    pytest.importorskip("highdicom")
    count = 2**12 // (SHAPE[0] * SHAPE[1])
    files = scan(tmp_path, count)
    truth = np.zeros((count, *SHAPE), np.uint8)
    truth[:, 0, 0] = 1
    other = truth.copy()
    other[-1, -1, -1] = 1
    uids = []
    for masks_of_run in (truth, truth, other):
        (tmp_path / "seg.dcm").write_bytes(encode_seg(files, masks_of_run, NAMES[:2]))
        data = dcmread(tmp_path / "seg.dcm")
        uids.append((data.SOPInstanceUID, data.SeriesInstanceUID))
    assert uids[0] == uids[1] and not {*uids[0]} & {*uids[2]}


def test_a_segmentation_belongs_to_its_images_whatever_its_name(written):
    files, _, path = written
    images = {f"sub/{file.stem}": file for file in files}
    found = pair_segs(images, {"any name": path})
    assert found == dict.fromkeys(images, path)
    with pytest.raises(UserError, match=r"expected one mask of sub/s0, found another"):
        pair_segs(images, {"any name": path, "again": path})


def test_another_frame_of_reference_and_other_images_are_one_line(written, tmp_path):
    _, _, path = written
    elsewhere = scan(tmp_path / "elsewhere", frame="1.2.77")
    with pytest.raises(SampleError, match=r"any name.dcm: expected the frame .*\(1\.2\.77\), got 1\.2\.9; give"):
        pair_segs({"e": elsewhere[0]}, {"s": path})
    others = scan(tmp_path / "others")
    with pytest.raises(SampleError, match=r"expected a segmentation of these images, got one of 4 others; give"):
        pair_segs({"o": others[0]}, {"s": path})


def test_segments_are_classes_by_label_else_by_number(written, tmp_path):
    files, truth, path = written
    swapped = read_seg_mask(path, files[0], 0, ("background", "Tumour", "Liver"))
    expected = np.array([0, 2, 1], np.uint8)[np.where(truth[0] == 255, 0, truth[0])]
    np.testing.assert_array_equal(swapped[truth[0] != 255], expected[truth[0] != 255])
    numbered = read_seg_mask(path, files[0], 0, ("background", "a", "b", "c"))
    np.testing.assert_array_equal(numbered, truth[0])
    with pytest.raises(SampleError, match="expected segments labelled liver, ignored, got also 2 tumour; rename them"):
        read_seg_mask(path, files[0], 0, NAMES[:2])


def test_frames_of_one_file_come_back(tmp_path):
    pytest.importorskip("highdicom")
    image, truth = multiframe(tmp_path / "cine.dcm"), masks(3)
    (tmp_path / "seg.dcm").write_bytes(encode_seg([image], truth, NAMES))
    for frame in range(3):
        np.testing.assert_array_equal(read_seg_mask(tmp_path / "seg.dcm", image, frame, NAMES), truth[frame])


def test_an_image_that_lacks_what_a_segmentation_refers_to_is_one_line(tmp_path):
    pytest.importorskip("highdicom")
    bare = save_dicom(tmp_path / "bare.dcm", np.zeros(SHAPE, np.int16))
    with pytest.raises(SampleError, match=r"bare.dcm: expected an image that a DICOM segmentation can refer to"):
        encode_seg([bare], np.zeros((1, *SHAPE), np.uint8), NAMES)


def test_without_highdicom_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(UserError, match=r"pip install 'kmine\[dicom\]'"):
        require_highdicom()

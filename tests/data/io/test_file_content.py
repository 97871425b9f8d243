"""Formats known by their first bytes."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from helpers.image_files import colour_noise, dicom_dataset, save_dicom, save_image, save_volume

from kmine.data.io.file_content import describe_content, foreign_file, problem_text, read_head


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP", "GIF", "WebP"])
def test_pictures_are_known_whatever_their_name(tmp_path, kind):
    path = save_image(tmp_path / f"a.{kind.lower()}", colour_noise())
    assert describe_content(path.rename(tmp_path / "a.txt")) == f"a {kind} picture"


def test_scans_and_arrays_are_known(tmp_path):
    assert describe_content(save_volume(tmp_path / "a.nii", np.zeros((2, 3, 4), np.uint8))) == "a NIfTI volume"
    assert describe_content(save_volume(tmp_path / "a.nii.gz", np.zeros((2, 3, 4), np.uint8))) == "a gzip file"
    path = save_dicom(tmp_path / "a.dcm", colour_noise())
    assert describe_content(path) == "a DICOM file"
    path.write_bytes(path.read_bytes()[132:])
    assert describe_content(path) == "a DICOM file without its first 132 bytes"
    dicom_dataset(colour_noise()).save_as(path, enforce_file_format=False)
    assert "DICOM" in describe_content(path)
    np.save(tmp_path / "a.npy", np.zeros(3))
    assert describe_content(tmp_path / "a.npy") == "a NumPy array"


def test_what_stands_for_a_file_has_its_own_cure(tmp_path):
    path = tmp_path / "a.png"
    for content, message in {
        b"\n<!DOCTYPE HTML>\n": "expected x, got a web page; download the file itself",
        b"version https://git-lfs.github.com/spec/v1\n": "git lfs pull",
        b"PK\x03\x04": "expected x, got a zip archive; unpack it",
    }.items():
        path.write_bytes(content)
        assert message in str(foreign_file(path, "x", "unpack it"))
    path.write_bytes(b"anything")
    assert foreign_file(path, "x") is describe_content(path) is None


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero"), tmp_path / "gone"):
        assert read_head(path) == b""


def test_errors_of_libraries_lose_addresses_and_line_ends():
    assert (
        problem_text(OSError("cannot identify <_io.BytesIO object at 0x7f13ab>\n  now"))
        == "cannot identify the file now"
    )
    assert problem_text(MemoryError()) == "MemoryError"

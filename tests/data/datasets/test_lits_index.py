"""Files of LiTS: found in any folder, paired by number, one error for each misfit."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from helpers.lits_files import header_bytes, labels, rewrite, save_nifti, save_pair, scan

from kmine.data.datasets.lits_index import find_volumes
from kmine.errors import SampleError, UserError


def test_files_are_found_and_paired_in_any_folder(tmp_path):
    save_nifti(tmp_path / "Training_Batch1/media/volume-2.nii", scan(seed=2))
    save_nifti(tmp_path / "Training Batch 2/Training Batch 2/volume-10.nii.gz", scan(seed=10))
    save_nifti(tmp_path / "segmentations/segmentation-10.nii", labels())
    # Kaggle unpacks into folders named like files.
    save_nifti(tmp_path / "volume-002.nii/Segmentation-002.NII.GZ", labels())
    (tmp_path / ".hidden").mkdir()
    for name in ("._volume-2.nii", ".hidden/volume-2.nii", "readme.txt"):
        (tmp_path / name).write_bytes(b"x")
    save_nifti(tmp_path / "test-volume-3.nii", scan())
    volumes, skipped, files = find_volumes(tmp_path, "stop")
    assert {number: volume.group_id for number, volume in volumes.items()} == {2: "volume-002", 10: "volume-010"}
    assert volumes[2].mask.name == "Segmentation-002.NII.GZ" and volumes[10].mask.name == "segmentation-10.nii"
    assert volumes[2].num_slices == 5 and len(files) == 4
    assert [(s.sample_id, s.problem) for s in skipped] == [
        ("test-volume-3.nii", "not named volume-N.nii or segmentation-N.nii")
    ]


@pytest.mark.parametrize("kind", ["volume", "segmentation"])
def test_two_files_of_one_number_are_refused(tmp_path, kind):
    save_pair(tmp_path, 3)
    save_nifti(tmp_path / f"again/{kind}-03.nii", labels())
    problem = rf"one {kind} of number 3, found again/{kind}-03.nii and {kind}-3.nii.gz; keep"
    with pytest.raises(UserError, match=problem):
        find_volumes(tmp_path, "skip")


def test_segmentations_without_volumes_stop_or_are_listed(tmp_path):
    save_pair(tmp_path, 0)
    for number in range(1, 8):
        save_nifti(tmp_path / f"segmentation-{number}.nii", labels())
    problem = r"found none for .*segmentation-1.nii, .*segmentation-5.nii and 2 more; .*skip"
    with pytest.raises(UserError, match=problem):
        find_volumes(tmp_path, "stop")
    volumes, skipped, _ = find_volumes(tmp_path, "skip")
    assert list(volumes) == [0] and [s.sample_id for s in skipped] == [f"volume-{n:03}" for n in range(1, 8)]


def test_folders_without_volumes_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"expected the LiTS folder, found nothing; pass --data.root"):
        find_volumes(tmp_path / "nowhere", "stop")
    with pytest.raises(UserError, match=r"expected volume-N.nii or volume-N.nii.gz in it or below, found none"):
        find_volumes(tmp_path, "stop")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="found a file; unpack it"):
        find_volumes(tmp_path / "file", "stop")


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        (".nii", b""),
        (".nii", header_bytes((7,))),
        (".nii.gz", b"garbage"),
        (".nii.gz", gzip.compress(header_bytes((7,)), mtime=0)),
    ],
    ids=["empty", "header", "no_gzip", "short_gzip"],
)
def test_a_damaged_header_stops_or_is_listed(tmp_path, suffix, content):
    save_pair(tmp_path, 0)
    save_pair(tmp_path, 1, suffix=suffix)
    rewrite(tmp_path / f"volume-1{suffix}", lambda _: content)
    with pytest.raises(SampleError, match=rf"volume-1{suffix}: .*; or pass --data.on_error skip"):
        find_volumes(tmp_path, "stop")
    volumes, skipped, _ = find_volumes(tmp_path, "skip")
    assert [(s.sample_id, Path(s.path).name) for s in skipped] == [("volume-001", f"volume-1{suffix}")]
    assert list(volumes) == [0]


def test_an_empty_folder_named_like_a_volume_is_a_damaged_file(tmp_path):
    save_pair(tmp_path, 0)
    (tmp_path / "volume-1.nii").mkdir()
    with pytest.raises(SampleError, match=r"volume-1.nii: expected a NIfTI file, got a folder"):
        find_volumes(tmp_path, "stop")

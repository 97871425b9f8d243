"""dataset.json and the files of nnU-Net's layout: what is read, and the one line for what is not."""

from __future__ import annotations

import json

import pytest
from helpers.nnunet_files import pictures, volumes, write_dataset_json

from kmine.data.datasets.nnunet_index import Layout, choose_channels, find_cases, read_layout
from kmine.errors import UserError


def test_the_layout_is_that_of_dataset_json(tmp_path):
    root = write_dataset_json(tmp_path, ("T2", "ADC"), ("background", "PZ", "TZ"), ".tif", ignore=True)
    assert read_layout(root) == Layout(("T2", "ADC"), ("background", "PZ", "TZ"), 3, ".tif")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channel_names": None, "modality": {"0": "CT"}}, "expected `channel_names` to be an object"),
        (
            {"labels": {"background": 0, "whole": [1, 2]}},
            "expected a number for each label, got regions for whole; the files hold one number a pixel",
        ),
        (
            {"labels": {"background": 0, "a": 2}},
            "labels numbered from 0, .* got background 0",
        ),
        ({"labels": {"background": 0, "ignore": 1, "a": 2}}, "ignore last"),
        ({"file_ending": ".mha"}, r"expected file_ending .*got .mha; convert"),
        ({"channel_names": {"1": "CT"}}, "expected channel_names numbered from 0, got 1"),
    ],
)
def test_other_formats_are_one_line(tmp_path, changes, message):
    path = write_dataset_json(tmp_path, ("CT",)) / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=message):
        read_layout(tmp_path)


def test_the_first_version_of_the_format_names_its_converter(tmp_path):
    (tmp_path / "dataset.json").write_text(json.dumps({"modality": {"0": "CT"}}))
    with pytest.raises(UserError, match="nnUNetv2_convert_old_nnUNet_dataset"):
        read_layout(tmp_path)
    with pytest.raises(UserError, match=r"dataset.json: .*nnUNet_raw"):
        read_layout(tmp_path / "..")


def test_more_than_three_channels_ask_for_a_choice():
    layout = Layout(("T1", "T2", "FLAIR", "T1c"), ("background", "a"), None, ".nii.gz")
    with pytest.raises(UserError, match=r"data.channels: .*at most 3.*got 4 \(0 T1, 1 T2, 2 FLAIR, 3 T1c\).*\[0,1,2\]"):
        choose_channels(layout, None)
    assert choose_channels(layout, (3, 1)) == (3, 1)
    with pytest.raises(UserError, match="got 4; choose others"):
        choose_channels(layout, (4,))


def test_cases_without_a_label_are_kept_and_a_missing_channel_stops_or_is_skipped(tmp_path):
    root = volumes(tmp_path)
    layout = read_layout(root)
    cases, skipped, unused = find_cases(root, layout, (0, 1), "stop")
    assert [(case.name, len(case.channels), case.label is None) for case in cases] == [
        ("a", 2, False),
        ("b", 2, False),
        ("c", 2, True),
    ]
    assert (skipped, unused) == ((), 0)
    (root / "imagesTr/b_0001.nii.gz").unlink()
    with pytest.raises(UserError, match=r"expected a file 0001 \(channel ADC\), found none of b; restore .*channels"):
        find_cases(root, layout, (0, 1), "stop")
    assert [skip.sample_id for skip in find_cases(root, layout, (0, 1), "skip")[1]] == ["b"]
    assert len(find_cases(root, layout, (0,), "stop")[0]) == 3, "the cure of the message"
    (root / "imagesTr/c_0000.nii.gz").unlink()
    (only,) = [case for case in find_cases(root, layout, (1,), "skip")[0] if case.name == "c"]
    assert [path.name for path in only.channels] == ["c_0001.nii.gz"]


def test_images_of_the_test_folder_count_with_a_label_only(tmp_path):
    root = volumes(tmp_path)
    (root / "imagesTr").joinpath("c_0000.nii.gz").rename(_made(root / "imagesTs") / "c_0000.nii.gz")
    (root / "imagesTr").joinpath("c_0001.nii.gz").rename(root / "imagesTs/c_0001.nii.gz")
    cases, _, unused = find_cases(root, read_layout(root), (0, 1), "stop")
    assert [case.name for case in cases] == ["a", "b"] and unused == 1
    (_made(root / "labelsTs") / "c.nii.gz").write_bytes((root / "labelsTr/a.nii.gz").read_bytes())
    cases, _, unused = find_cases(root, read_layout(root), (0, 1), "stop")
    assert [case.is_test for case in cases] == [False, False, True] and unused == 0


def test_a_label_without_an_image_and_other_names_are_said(tmp_path):
    root = pictures(tmp_path, 3)
    (root / "imagesTr/readme.txt").write_text("x")
    assert find_cases(root, read_layout(root), (0, 1, 2), "stop")[1][0].problem == "not named NAME_0000.png"
    (root / "imagesTr/p0_0000.png").unlink()
    with pytest.raises(UserError, match=r"labelsTr: expected an image for each label, found none for p0"):
        find_cases(root, read_layout(root), (0, 1, 2), "stop")


def _made(folder):
    folder.mkdir(exist_ok=True)
    return folder

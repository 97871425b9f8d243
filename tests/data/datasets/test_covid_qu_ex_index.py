"""Folders of COVID-QU-Ex: parts at any depth and spelling, copies of one image in several places."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.covid_files import COVID_IMAGE, INFECTION, LUNG, NAMES, build_both_parts, build_part, copy_file, grey_noise
from helpers.image_files import save_image

from kmine.data.datasets import covid_qu_ex_index
from kmine.data.datasets.covid_qu_ex_index import find_parts, find_same_named, name_groups
from kmine.errors import UserError


@pytest.fixture
def root(tmp_path) -> Path:
    return build_both_parts(tmp_path / "data")


# -- parts


@pytest.mark.parametrize(
    ("infection", "lung"),
    [
        ("Infection Segmentation Data", "Lung Segmentation Data"),
        (f"COVID-QU-Ex/archive (1)/{INFECTION}", f"COVID-QU-Ex/archive (1)/{LUNG}"),
        ("infection_segmentation_data", "lung-segmentation-data"),
        ("a", "b"),
        (INFECTION, "b"),
    ],
)
def test_parts_are_found_at_any_depth(tmp_path, infection, lung):
    build_part(tmp_path / infection, infection=True)
    build_part(tmp_path / lung, infection=False)
    parts, skipped = find_parts(tmp_path)
    assert {kind: part.root for kind, part in parts.items()} == {
        "infection": tmp_path / infection,
        "lung": tmp_path / lung,
    }
    assert skipped == []
    assert len(parts["infection"].folders) == 9 * 3 and len(parts["lung"].folders) == 9 * 2


def test_the_folder_of_one_part_may_be_given(root):
    for folder, kind in ((INFECTION, "infection"), ("Infection Segmentation Data", "infection"), (LUNG, "lung")):
        assert list(find_parts(root / folder)[0]) == [kind]


def test_case_and_underscores_of_folders_are_ignored(tmp_path):
    build_part(tmp_path, infection=True)
    for folder in sorted(tmp_path.glob("*/*/*"), reverse=True):
        folder.rename(folder.with_name(folder.name.replace(" ", "_").title()))
    for folder in (*tmp_path.glob("*/*"), *tmp_path.glob("*")):
        folder.rename(folder.with_name(folder.name.lower()))
    folders = find_parts(tmp_path)[0]["infection"].folders
    assert folders["Train", "COVID-19", "infection masks"] == tmp_path / "train/covid-19/Infection_Masks"
    assert len(folders) == 27
    (tmp_path / "train/COVID-19/images").mkdir(parents=True)
    with pytest.raises(UserError, match=r"expected it once, found .*covid-19/Images as well"):
        find_parts(tmp_path)


def test_a_folder_of_another_name_is_left_out_and_listed(root):
    build_part(root / "samples", infection=True)
    parts, (skipped,) = find_parts(root)
    assert parts["infection"].root == root / INFECTION
    assert (skipped.sample_id, skipped.path) == ("samples", str(root / "samples"))


def test_two_candidates_for_a_part_are_refused(tmp_path):
    build_part(tmp_path / "one", infection=True)
    build_part(tmp_path / "two", infection=True)
    with pytest.raises(UserError, match=r"one folder of the infection part, found .*/one and .*/two; pass the one"):
        find_parts(tmp_path)


def test_folders_without_a_part_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"found nothing; pass --data.root \(published on Kaggle as .COVID-QU-Ex"):
        find_parts(tmp_path / "nowhere")
    (tmp_path / "archive.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match="found a file; unpack it"):
        find_parts(tmp_path / "archive.zip")
    build_part(tmp_path / "part", infection=True)
    for folder in ("part/Train", "part/Train/Normal"):
        with pytest.raises(UserError, match=r"expected Train/COVID-19/images or the like in it or below, found none"):
            find_parts(tmp_path / folder)


# -- copies


@pytest.fixture
def hashed(monkeypatch) -> list[Path]:
    """Files that are read to be compared."""
    read: list[Path] = []
    original = covid_qu_ex_index._content_fingerprint
    monkeypatch.setattr(covid_qu_ex_index, "_content_fingerprint", lambda path: read.append(path) or original(path))
    return read


def groups(root: Path, kind: str = "infection") -> dict[str, str]:
    """Group by path below the root."""
    named = name_groups(find_same_named(find_parts(root)[0].values(), kind))
    return {path.relative_to(root).as_posix(): group for path, group in named.items()}


def test_a_copy_in_the_other_part_has_the_same_group_in_both(root):
    copy_file(root / INFECTION / "Train" / COVID_IMAGE, root / LUNG / "Test" / COVID_IMAGE)
    found = groups(root)
    assert set(found) == {f"{INFECTION}/Train/{COVID_IMAGE}", f"{LUNG}/Test/{COVID_IMAGE}"}
    (group,) = set(found.values())
    assert group.startswith("Test/COVID-19/covid_1 (2)#")
    assert groups(root, "lung") == found


def test_copies_in_two_splits_or_classes_are_one_group(root):
    folder = root / INFECTION
    copy_file(folder / "Train" / COVID_IMAGE, folder / "Test" / COVID_IMAGE)
    for name in ("Normal", "Non-COVID"):
        save_image(folder / f"Train/{name}/images/x.png", grey_noise("x"))
    found = groups(root)
    assert len(found) == 4 and len(set(found.values())) == 2
    assert found[f"{INFECTION}/Train/Normal/images/x.png"] == found[f"{INFECTION}/Train/Non-COVID/images/x.png"]


def test_files_of_equal_size_and_other_bytes_are_no_copies(root, hashed):
    content = bytearray((root / INFECTION / "Train" / COVID_IMAGE).read_bytes())
    content[-20] ^= 1
    (root / INFECTION / "Test" / COVID_IMAGE).write_bytes(bytes(content))
    assert groups(root) == {} and root / INFECTION / "Test" / COVID_IMAGE in hashed


def test_images_in_the_same_place_of_both_parts_are_not_read(root, hashed):
    for split in ("Train", "Val", "Test"):
        for name, stem in NAMES.items():
            path = f"{split}/{name}/images/{stem}.png"
            save_image(root / INFECTION / path, grey_noise(split, name, shape=(24, 20 + len(split) * 7 + len(name))))
            copy_file(root / INFECTION / path, root / LUNG / path)
    assert groups(root) == {} and hashed == []

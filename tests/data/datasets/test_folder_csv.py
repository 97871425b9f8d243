"""A user's table: columns in any order, and one error with its line for each row that is wrong."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from kmine.data.datasets.folder_csv import read_folder_csv
from kmine.data.datasets.folder_index import Item
from kmine.errors import UserError

HEADER = "image,mask,group,label,split"


@pytest.fixture
def read(tmp_path):
    """Write a table beside four files and read it; no content is needed."""
    for name in ("images/a.png", "images/c.png", "images/sub/b.png", "masks/a.png", "masks/sub/b.tif"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    def build(*rows: str, header=HEADER, encoding="utf-8", on_error="stop"):
        path = tmp_path / "table.csv"
        path.write_text("\n".join((header, *rows)) + "\n", encoding)
        return read_folder_csv(path, on_error)

    return build


def test_all_columns_are_read(read, tmp_path):
    rows = (
        "images/sub/b.png,masks/sub/b.tif,p 1,1,val",
        "",
        "images/a.png,masks/a.png,p2,,TRAIN",
        "images/c.png,,,0,train",
    )
    items, skipped = read(*rows, encoding="utf-8-sig")
    assert items == [
        Item("images/a", tmp_path / "images/a.png", tmp_path / "masks/a.png", "p2", None, "train"),
        Item("images/c", tmp_path / "images/c.png", None, None, 0, "train"),
        Item("images/sub/b", tmp_path / "images/sub/b.png", tmp_path / "masks/sub/b.tif", "p 1", 1, "val"),
    ]
    assert skipped == ()


def test_only_image_is_required_and_columns_come_in_any_order(read, tmp_path):
    assert [item.name for item in read("images/a.png", header="image")[0]] == ["images/a"]
    assert read("masks/a.png, images/a.png", header="Mask, Image")[0][0].mask == tmp_path / "masks/a.png"
    assert read(str(tmp_path / "images/a.png"), header="image")[0][0].name == "images/a"


def test_quoted_names_may_hold_commas(tmp_path):
    (tmp_path / "d, e.png").touch()
    with (tmp_path / "q.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["image", "mask"], ["d, e.png", ""]])
    assert [item.name for item in read_folder_csv(tmp_path / "q.csv", "stop")[0]] == ["d, e"]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (" ,masks/a.png,,,", "expected an image, got an empty value"),
        ("images/a.png,,,,train", "expected each image once (suffixes apart), got images/a.png again, as in line 2"),
        (
            "images/sub/b.png,,,2,train",
            "expected the label 0 (free of the last class), 1 (shows it) or nothing",
        ),
        ("images/sub/b.png,,,,dev", "expected the split train, val, test or nothing, got 'dev'"),
        ("images/sub/b.png,,,,test", "expected a mask for an image of test, got none"),
        ("images/sub/b.png,,,,", "expected a split in every row or in none, got nothing after train"),
        ("images/sub/b.png,masks/sub/b.tif,p,,val", "expected the group p in one split, got val, but train in line 2"),
        ("images/sub/b.png,masks/none.png,,,train", "found no such file; mend the path"),
        ("images/none.png,,,,train", "found no such file; mend the path"),
        ("images/sub/b.npy,,,,train", "got 'images/sub/b.npy'; convert it"),
        ("images/sub/b.png,masks/b.nii,,,train", "as mask of b.png, got b.nii"),
        ("images/sub/b.png,,train", "expected 5 values (image,mask,group,label,split), got 3"),
        ("x.nii.gz,,,1,train", "which cannot hold for every slice"),
    ],
)
def test_a_wrong_row_is_named_with_its_line(read, tmp_path, row, problem):
    with pytest.raises(UserError) as error:
        read("images/a.png,masks/a.png,p,,train", "", row)
    assert str(error.value).startswith(f"{tmp_path / 'table.csv'}, line 4: ") and problem in str(error.value)


@pytest.mark.parametrize("header", ["image:mask", "picture,mask", "image,lable", "image,image"])
def test_a_wrong_header_is_one_error(read, header):
    with pytest.raises(UserError, match=r"table.csv, line 1: expected a header of image and any of mask"):
        read("images/a.png,x", header=header)


def test_a_wrong_table_is_one_error(read, tmp_path):
    with pytest.raises(UserError, match="got none below the header"):
        read()
    with pytest.raises(UserError, match=r"data.csv: .*none.csv: expected a CSV file, found no such file"):
        read_folder_csv(Path(tmp_path / "none.csv"), "stop")
    with pytest.raises(UserError, match="expected a CSV file in UTF-8"):
        read("images/ä.png", header="image", encoding="latin-1")


def test_tables_of_pandas_are_read(read, tmp_path):
    rows = ("0,images/a.png,masks/a.png,1.0", "1,images/c.png,nan,0.0", "2,images/sub/b.png,,NaN")
    items, _ = read(*rows, header=",image,mask,label", encoding="utf-8-sig")
    assert [(item.name, item.mask, item.label) for item in items] == [
        ("images/a", tmp_path / "masks/a.png", 1),
        ("images/c", None, 0),
        ("images/sub/b", None, None),
    ]
    assert read(*(row.replace(",", ";") for row in rows), header=";image;mask;label")[0] == items


def test_a_missing_group_is_no_group(read):
    assert [item.group for item in read("images/a.png,nan", "images/c.png,<NA>", header="image,group")[0]] == [None] * 2


def test_rows_without_their_files_are_listed(read):
    rows = ("images/a.png,", "images/x.png,", "images/c.png,masks/c.png")
    items, skipped = read(*rows, header="image,mask", on_error="skip")
    assert [item.name for item in items] == ["images/a"]
    assert [(s.sample_id, s.problem) for s in skipped] == [("images/x", "no such image"), ("images/c", "no such mask")]

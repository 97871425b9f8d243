"""Image-level labels of slices: facts of masks by hand, tables with one error for each wrong row."""

from __future__ import annotations

import os

import numpy as np
import pytest
from helpers.lits_files import labels

from kmine.data.datasets.slice_labels import SliceFacts, facts_of, facts_path, load_facts, read_image_labels, save_facts
from kmine.errors import UserError

FACTS = SliceFacts(liver=frozenset({1, 2, 3, 4}), tumour=frozenset({2, 3}))


def test_facts_by_hand():
    assert facts_of(labels()) == FACTS
    assert facts_of(np.zeros((2, 3, 3), np.uint8)) == SliceFacts(frozenset(), frozenset())


def test_facts_are_read_back_and_damaged_ones_are_not(tmp_path):
    path = tmp_path / "facts/a.json"
    assert load_facts(path) is None
    save_facts(path, FACTS)
    assert load_facts(path) == FACTS and [file.name for file in path.parent.iterdir()] == ["a.json"]
    for content in ("", '{"liver": 3}', '{"liver": []}', "[]", "{"):
        path.write_text(content)
        assert load_facts(path) is None


def test_the_file_of_facts_depends_on_size_time_and_geometry(tmp_path):
    mask = tmp_path / "segmentation-1.nii.gz"
    mask.write_bytes(b"1")
    paths = [facts_path(tmp_path, mask, (1, 2)), facts_path(tmp_path, mask, (2, 1))]
    os.utime(mask, ns=(1, 1))
    paths.append(facts_path(tmp_path, mask, (1, 2)))
    mask.write_bytes(b"12")
    os.utime(mask, ns=(1, 1))
    paths.append(facts_path(tmp_path, mask, (1, 2)))
    assert len(set(paths)) == 4 and all(path.name.startswith("segmentation-1-") for path in paths)


@pytest.fixture
def table(tmp_path):
    """Write a table and read it as one of volume 0 with 5 slices."""

    def read(*rows: str, header="sample_id,label", unread=()) -> dict[int, dict[int, int]]:
        path = tmp_path / "labels.csv"
        path.write_text("\n".join((header, *rows)) + "\n")
        return read_image_labels(path, {0: 5}, unread)

    return read


def test_labels_are_read_by_volume_and_slice(table):
    assert table("volume-000/slice-0001,1", "", "volume-0/slice-2, 0") == {0: {1: 1, 2: 0}}
    assert table("volume-000/slice-0001,1", "volume-001/slice-0000,1", unread={"volume-001"}) == {0: {1: 1}}
    assert table("0;volume-000/slice-0001;1.0", "1;volume-0/slice-2;0.0", header=";Sample_id;Label") == {
        0: {1: 1, 2: 0}
    }


@pytest.mark.parametrize(
    ("row", "problem"),
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
def test_a_wrong_row_is_named_with_its_line(table, tmp_path, row, problem):
    with pytest.raises(UserError) as error:
        table("volume-000/slice-0000,0", "", row)
    assert str(error.value).startswith(f"{tmp_path / 'labels.csv'}, line 4: ") and problem in str(error.value)


def test_a_wrong_table_is_one_error(table, tmp_path):
    with pytest.raises(UserError, match=r"line 1: expected the header sample_id,label, got 'id,label'"):
        table("volume-000/slice-0000,0", header="id,label")
    with pytest.raises(UserError, match="expected rows sample_id,label, got none"):
        table()
    with pytest.raises(UserError, match=r"data.image_labels: .*none.csv: expected a CSV file, found no such file"):
        read_image_labels(tmp_path / "none.csv", {0: 5})
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"expected a CSV file in UTF-8, got something else"):
        read_image_labels(tmp_path / "binary.csv", {0: 5})

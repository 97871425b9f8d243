"""Rows of the two tables: round trips, the frozen columns, masks, and reading by sample."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from kmine.errors import UserError
from kmine.ops.masks import to_rle
from kmine.store.table_files import TableRows, encode_table, open_table
from kmine.store.tables import DecisionRow, MaskRow, PromptRow, class_map
from kmine.types import Evidence, Prompts

BOX = [0.0, 1.0, 2.0, 3.0]
ROW = DecisionRow("a", 0, 1, True, "kept", "both", True, Evidence(agreement_iou=0.1 + 0.2), 0.9, height=1, width=4)
COLUMNS = {
    "prompts": "sample_id string, object_idx int64, class_id int64, box list<element: double>, "
    "point_coords list<element: list<element: double>>, point_labels list<element: int64>, has_mask_input bool, "
    "jittered_boxes list<element: list<element: double>>, scaled_boxes list<element: list<element: double>>, "
    "origin string",
    "decisions": "sample_id string, object_idx int64, class_id int64, kept bool, reason string, source string, "
    "in_training bool, predicted_iou double, stability_score double, agreement_iou double, jitter_dice double, "
    "confidence_inside double, confidence_outside double, area_ratio double, tta_std double, witness_dice double, "
    "slice_dice double, "
    "estimated_dice double, estimated_segmenter double, estimated_local double, height int64, width int64, "
    "local_rle string, segmenter_rle string",
    "masks": "sample_id string, height int64, width int64, class_ids list<element: int64>, rles list<element: string>",
}


def rle(text: str) -> str:
    return to_rle(np.array([[c == "x" for c in text]]))


def write(path, rows, row_type):
    path.write_bytes(encode_table(rows, row_type, "s"))
    return path


@pytest.mark.parametrize(("name", "row_type"), [("prompts", PromptRow), ("decisions", DecisionRow), ("masks", MaskRow)])
def test_names_types_and_order_of_the_columns_are_frozen(tmp_path, name, row_type):
    schema = pq.read_schema(write(tmp_path / "t", [], row_type))
    assert ", ".join(f"{field.name} {field.type}" for field in schema) == COLUMNS[name]
    assert schema.metadata == {b"signature": b"s"}


def test_rows_round_trip_with_null_and_nan_apart(tmp_path):
    rows = [ROW, DecisionRow("b", -1, 0, False, "no_component")]
    path = write(tmp_path / "t", rows, DecisionRow)
    first, second = TableRows([path], DecisionRow)
    assert first.evidence.agreement_iou == 0.1 + 0.2 and math.isnan(first.evidence.tta_std) and first.is_object
    assert second == rows[1] and second.evidence is None and not second.is_object
    assert pq.read_table(path)["tta_std"].null_count == 1
    assert open_table([path], DecisionRow, "other") is None and len(TableRows([path], DecisionRow)) == 2


def test_prompts_round_trip_without_mask_input_and_component(tmp_path):
    box, coords = np.array(BOX, np.float32), np.array([[1, 2]], np.float32)
    boxes = {"jittered_boxes": np.stack([box, box + 1]), "scaled_boxes": box[None]}
    prompts = Prompts(2, box, coords, np.array([1]), np.zeros((4, 4), np.float32), **boxes)
    rows = [PromptRow.from_prompts("a", 0, prompts), PromptRow.from_prompts("a", 1, Prompts(1))]
    read = list(TableRows([write(tmp_path / "t", rows, PromptRow)], PromptRow))
    assert read == rows and rows[0].has_mask_input and rows[1].box is rows[1].point_coords is None
    back = read[0].to_prompts()
    assert (back.class_id, back.mask_input, back.component) == (2, None, None)
    for name in ("box", "point_coords", "point_labels", "jittered_boxes", "scaled_boxes"):
        assert np.array_equal(getattr(back, name), getattr(prompts, name)), name
    older = replace(read[1], scaled_boxes=None).to_prompts()
    assert older.jittered_boxes.shape == older.scaled_boxes.shape == (0, 4)


def test_the_used_mask_is_the_local_one_only_where_the_gate_chose_it():
    row = replace(ROW, local_rle=rle("xx.."), segmenter_rle=rle("..xx"))
    assert row.mask("used").tolist() == row.mask("segmenter").tolist() == [[False, False, True, True]]
    assert replace(row, source="local").mask("used").tolist() == row.mask("local").tolist()


def test_where_two_objects_overlap_the_later_class_counts():
    rows = [replace(ROW, segmenter_rle=rle("xx..")), replace(ROW, class_id=2, segmenter_rle=rle(".xx."))]
    assert class_map(rows, (1, 4), "segmenter").tolist() == [[1, 2, 2, 0]]
    assert not class_map([], (1, 4), "segmenter").any()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"segmenter_rle": "?"}, r"a damaged mask \(.*\) of a; remove it"),
        ({"segmenter_rle": None}, "a damaged mask"),
        ({"height": None}, "a mask of None x 4 for an image of 1 x 4 of a"),
        ({"height": 2**40, "width": 2**40}, "a mask of .* for an image of 1 x 4"),
    ],
)
def test_an_edited_row_is_one_line(changes, problem):
    with pytest.raises(UserError, match=rf"^decisions\.parquet: {problem}"):
        class_map([replace(ROW, **changes)], (1, 4), "segmenter")


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (40, 33)])
@pytest.mark.parametrize("values", [(0,), (255,), (0, 1, 2, 255)])
def test_a_mask_is_the_same_bit_for_bit_after_its_run_lengths(shape, values):
    mask = np.random.default_rng(0).choice(np.array(values, np.uint8), shape)
    row = MaskRow.from_arrow(MaskRow.from_mask("a", mask).to_arrow())
    assert row.to_mask().dtype == np.uint8 and np.array_equal(row.to_mask(), mask)
    assert row.class_ids == sorted({*mask.ravel().tolist()} - {0})


@pytest.mark.parametrize(
    "changes", [{"height": 3}, {"height": 2**40}, {"width": 0}, {"rles": ["?"]}, {"rles": []}, {"class_ids": None}]
)
def test_edited_run_lengths_are_refused(changes):
    row = MaskRow.from_mask("a", np.ones((2, 2), np.uint8))
    with pytest.raises((ValueError, TypeError)):
        replace(row, **changes).to_mask()

"""A person's boxes, points and scribbles, from tables and COCO's JSON."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest

from kmine.data.person_prompts import MAX_SCRIBBLE, NO_PERSON, read_person_prompts
from kmine.errors import UserError

NAMES, IDS = ("background", "organ", "lesion"), ("a", "b/c", "d")


def read(tmp_path, text: str, names=NAMES, name: str = "drawn.csv"):
    path = tmp_path / name
    path.write_text(text)
    return read_person_prompts(str(path), names, IDS)


def test_rows_of_a_table_become_prompts_in_their_order(tmp_path) -> None:
    rows = "a,lesion,1 2 30 40,,,\na.png,2,,5 6; 7.5 8,9 10,\nb/c,ORGAN,,,,0 0; 14 0\n"
    person = read(tmp_path, f"sample_id,class,box,points,background,scribble\n{rows}")
    assert set(person.by_sample) == {"a", "b/c"}
    box, points = person.by_sample["a"]
    assert (
        box.box.tolist() == [1, 2, 30, 40] and box.point_coords is None and (box.class_id, box.origin) == (2, "person")
    )
    assert points.box is None and points.point_coords.tolist() == [[5, 6], [7.5, 8], [9, 10]]
    assert points.point_labels.tolist() == [1, 1, 0] and points.class_id == 2
    (scribble,) = person.by_sample["b/c"]
    assert scribble.point_coords.tolist() == [[2 * n, 0] for n in range(MAX_SCRIBBLE)] and scribble.class_id == 1
    assert person.sha256 == hashlib.sha256((tmp_path / "drawn.csv").read_bytes()).hexdigest()
    assert person.places["b/c"].endswith("drawn.csv, line 4")


def test_of_one_foreground_class_the_name_may_be_left_out(tmp_path) -> None:
    person = read(tmp_path, "sample_id,box\nd,1 1 5 5\n", NAMES[::2])
    assert person.by_sample["d"][0].class_id == 1
    with pytest.raises(UserError, match=r"line 2: expected a class of organ, lesion .*got ''"):
        read(tmp_path, "sample_id,box\nd,1 1 5 5\n")


def coco(**changes) -> str:
    image, category = {"id": 7, "file_name": "scans/a.png"}, {"id": 3, "name": "lesion"}
    annotation = {"id": 1, "image_id": 7, "category_id": 3, "bbox": [10, 20, 5, 1]} | changes
    return json.dumps({"images": [image], "categories": [category], "annotations": [annotation]})


def test_boxes_of_coco_end_on_their_last_pixel(tmp_path) -> None:
    (prompts,) = read(tmp_path, coco(), name="c.json").by_sample["a"]
    # Five columns from 10 on; one row, which has an area half a pixel further out.
    np.testing.assert_allclose(prompts.box, [10, 19.5, 14, 20.5])
    assert prompts.class_id == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,box\na,1 1 5 5\n", r"line 1: expected a header of sample_id and any of class, .*got 'image,box'"),
        ("sample_id,box\na,1 1 5\n", r"line 2: expected box as `x0 y0 x1 y1`, numbers in pixels, got '1 1 5'"),
        ("sample_id,points\na,1 x\n", r"line 2: expected points as `x y; x y`, .*got '1 x'"),
        ("sample_id,class,box\na,lesion,\n", r"line 2: expected a box, points or a scribble, got none"),
        ("sample_id,class,box\na,polyp,1 1 5 5\n", r"expected a class of organ, lesion .*got 'polyp'"),
        ("sample_id,class,box\nx,lesion,1 1 5 5\n", r"line 2: expected images of the data set, got 1 .* have: x;"),
        ("sample_id,box\na\n", r"line 2: expected 2 values, got 1"),
        (coco(bbox=[1, 2, 0, 4]), r"annotation 1: expected a bbox .* with an area, got 0 x 4"),
        (coco(category_id=5), r"expected COCO's JSON: .*KeyError: 5"),
        ("[1", "expected boxes of COCO as JSON"),
    ],
)
def test_what_does_not_fit_is_one_line_with_its_place(tmp_path, text, message) -> None:
    with pytest.raises(UserError, match=message) as refused:
        read(tmp_path, text)
    assert "\n" not in str(refused.value)


def test_without_a_file_there_is_nothing(tmp_path) -> None:
    assert read_person_prompts(None, NAMES, IDS) is NO_PERSON
    with pytest.raises(UserError, match=r"none\.csv: expected boxes, points and scribbles"):
        read_person_prompts(str(tmp_path / "none.csv"), NAMES, IDS)

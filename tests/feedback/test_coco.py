"""COCO files of other tools: run lengths that fill the picture, polygons, and one error for each misfit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kmine.errors import UserError
from kmine.feedback.coco import masks_of_coco
from kmine.feedback.expected import ExpectedMasks

EXPECTED = ExpectedMasks({"a": (4, 5), "b": (4, 5)}, ("background", "organ", "lesion"))
BOX = [[1, 1, 4, 1, 4, 3, 1, 3]]


def read(*segmentations: Any, **changes: Any) -> dict[str, np.ndarray]:
    value = {
        "images": [{"id": 7, "file_name": "x/a.jpg", "height": 4, "width": 5}],
        "categories": [{"id": 3, "name": "lesion"}],
        "annotations": [
            {"id": n, "image_id": 7, "category_id": 3, "segmentation": s} for n, s in enumerate(segmentations)
        ],
    }
    return dict(masks_of_coco(Path("c.json"), value | changes, EXPECTED))


@pytest.mark.parametrize(
    "segmentation",
    [BOX, {"size": [4, 5], "counts": [5, 2, 2, 2, 2, 2, 5]}, {"size": [4, 5], "counts": "522000005"}],
)
def test_polygons_and_run_lengths_fill_two_rows_of_three_pixels(segmentation):
    if segmentation != BOX and isinstance(segmentation["counts"], str):
        # 5, 2, 2, then differences from the length before the last: 2 - 2, 2 - 2, 2 - 2, 5 - 2
        segmentation = {**segmentation, "counts": "5220003"}
    mask = np.zeros((4, 5), np.uint8)
    mask[1:3, 1:4] = 2
    assert read(segmentation)["a"].tolist() == mask.tolist()


def test_an_image_without_annotations_is_empty_and_later_ones_lie_on_top():
    assert not read()["a"].any()
    names = [{"id": 3, "name": "lesion"}, {"id": "i", "name": "ignored"}]
    rows = [{"image_id": 7, "category_id": key, "segmentation": BOX} for key in (3, "i")]
    assert read(categories=names, annotations=rows)["a"][1, 1] == 255


@pytest.mark.parametrize(
    ("segmentation", "problem"),
    [
        ([], "got none"),
        ([[]], "at least 3 points"),
        ([[], *BOX], "at least 3 points"),
        ([[1, 1]], "at least 3 points"),
        ([[1, 1, 2, 2, 3]], "x, y"),
        ([[1, 1, 2, None, 3, 3]], "x, y"),
        ([{"x": 1}], "x, y"),
        ([[0, 0, 1e9, 0, 0, 1e9]], "in the image of 5 x 4"),
        ([[0, 0, 1e300, 0, 0, 1]], "in the image of 5 x 4"),
        (None, "`segmentation` to be a list or an object"),
        ({"size": [5, 4], "counts": [20]}, r"size \[4, 5\]"),
        ({"size": [4, 5], "counts": [19]}, "20 pixels in all, got 19"),
        ({"size": [4, 5], "counts": [-5, 25]}, "20 pixels in all"),
        ({"size": [4, 5], "counts": [2**62] * 4}, "20 pixels in all"),
        ({"size": [4, 5], "counts": [2**64 - 1, 5]}, "20 pixels in all"),
        ({"size": [4, 5], "counts": [2**64 - 1, -5]}, "20 pixels in all"),
        ({"size": [4, 5], "counts": [1.5, 18.5]}, "whole numbers"),
        ({"size": [4, 5], "counts": "ooo"}, "cut text"),
        ({"size": [4, 5], "counts": "a b"}, "other or cut text"),
        ({"size": [4, 5], "counts": "é"}, "other or cut text"),
        ({"size": [4, 5], "counts": "oooooooo0"}, "35 bits"),
        ({"size": [4, 5], "counts": ""}, "other or cut text"),
        ({"size": [4, 5]}, "`counts`"),
    ],
)
def test_damaged_segmentations_are_refused_by_annotation(segmentation, problem):
    with pytest.raises(UserError, match=rf"^c\.json: a, annotation 0: .*{problem}"):
        read(segmentation)


def test_foreign_and_repeated_entries_are_refused():
    row = {"id": 1, "image_id": 7, "category_id": 3, "segmentation": BOX}
    image = {"id": 7, "file_name": "a.png", "height": 4, "width": 5}
    for changes, problem in (
        ({"annotations": [row | {"image_id": 8}]}, r"annotations\[0\]: expected the image_id of an entry .* got 8"),
        ({"annotations": [row | {"category_id": 0}]}, "expected the category_id .* got 0"),
        ({"annotations": [row | {"category_id": [3]}]}, "`category_id` to be a whole number or text, got a list"),
        ({"annotations": [5]}, r"annotations\[0\] to be an object, got 5"),
        ({"annotations": {}}, "`annotations` to be a list"),
        ({"categories": [{"id": 3, "name": "bone"}]}, "classes organ, lesion, ignored, got 'bone'"),
        ({"categories": [{"id": 3, "name": "organ"}, {"id": 3, "name": "lesion"}]}, "two for 3"),
        ({"images": [image, image]}, "two for 7"),
        ({"images": [image, image | {"id": 8}]}, "one image a sample"),
        ({"images": [image | {"file_name": "z.png"}]}, "got z.png"),
        ({"images": [image | {"file_name": ["a"]}]}, "`file_name`"),
        ({"images": [image | {"height": 10**9, "width": 10**9}]}, "5 x 4 .*got 1000000000 x 1000000000"),
        ({"images": [image | {"height": "4"}]}, "`height` to be a whole number"),
    ):
        with pytest.raises(UserError, match=problem):
            read(BOX, **changes)

"""Label Studio's regions: each shape filled where it was drawn, others refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kmine.errors import UserError
from kmine.feedback import label_studio_rle
from kmine.feedback.expected import ExpectedMasks
from kmine.feedback.label_studio import masks_of_label_studio

HEIGHT, WIDTH = 10, 20
EXPECTED = ExpectedMasks({"a": (HEIGHT, WIDTH)}, ("background", "organ", "lesion"))
SQUARE = {"x": 25, "y": 20, "width": 50, "height": 60}
"""Columns 5 to 14, rows 2 to 7."""


def region(kind: str, shape: dict[str, Any], label: str = "organ", **changes: Any) -> dict[str, Any]:
    fixed = {"id": "r", "type": kind, "to_name": "image", "original_width": WIDTH, "original_height": HEIGHT}
    return {**fixed, "value": {**shape, **({kind: [label]} if kind.endswith("labels") else {})}, **changes}


def read(*results: Any, **changes: Any) -> np.ndarray:
    task = {"data": {"image": "/up/a.jpg"}, "annotations": [{"result": [*results]}]} | changes
    ((_, mask),) = masks_of_label_studio(Path("ls.json"), [task], EXPECTED)
    return mask


def drawn(rows: slice, columns: slice) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[rows, columns] = 1
    return mask


def test_rectangles_and_polygons_cover_their_pixels():
    expected = drawn(slice(2, 8), slice(5, 15))
    assert (read(region("rectanglelabels", SQUARE)) == expected).all()
    corners = [[25, 20], [75, 20], [75, 80], [25, 80]]
    assert (read(region("polygonlabels", {"points": corners, "closed": True})) == expected).all()
    # turned by 90 degrees about its first corner (10, 2), the 4 x 6 pixels lie to the left and below
    turned = {"x": 50, "y": 20, "width": 20, "height": 60, "rotation": 90}
    assert (read(region("rectanglelabels", turned)) == drawn(slice(2, 6), slice(4, 10))).all()


def test_an_ellipse_covers_the_pixels_whose_centres_it_holds():
    # radii of 3 and 1 pixels about (10, 5): rows 4 and 5 have centres at .5, sqrt(1 - .25) * 3 = 2.598, columns 7 to 12
    circle = {"x": 50, "y": 50, "radiusX": 15, "radiusY": 10}
    assert (read(region("ellipselabels", circle)) == drawn(slice(4, 6), slice(7, 13))).all()
    assert (read(region("ellipselabels", circle | {"rotation": 90})) == drawn(slice(2, 8), slice(9, 11))).all()


def test_several_regions_and_labels_beside_them():
    stroke = {"rle": label_studio_rle.encode(drawn(slice(0, 1), slice(0, 3)) > 0)}
    label = {"id": "s", "type": "labels", "value": {"labels": ["lesion"]}}
    notes = {"type": "choices", "value": {"choices": ["sure"]}}
    mask = read(region("rectanglelabels", SQUARE), region("brush", stroke, id="s"), label, notes)
    assert mask[0, :3].tolist() == [2, 2, 2] and (mask == 1).sum() == 60 and (mask == 2).sum() == 3
    assert not read().any()


@pytest.mark.parametrize(
    ("results", "problem"),
    [
        ([region("bitmasklabels", {"imageDataURL": "x"})], "got bitmasklabels"),
        ([region("rectanglelabels", SQUARE), region("keypointlabels", {"x": 1, "y": 1})], "got keypointlabels"),
        ([{"type": "choices", "value": {"choices": ["ok"]}}], "got choices"),
        ([region("rectanglelabels", SQUARE, "bone")], "classes organ, lesion, ignored, got 'bone'"),
        ([region("rectangle", SQUARE)], "`labels`"),
        (
            [region("rectanglelabels", SQUARE, value=SQUARE | {"rectanglelabels": []})],
            "one label",
        ),
        ([region("rectanglelabels", SQUARE, image_rotation=90)], "image_rotation 0, got 90"),
        ([region("rectanglelabels", SQUARE, item_index=1)], "item_index 0, got 1"),
        ([region("rectanglelabels", SQUARE, original_width=21)], "20 x 10 .*got 21 x 10"),
        ([region("rectanglelabels", SQUARE, original_width="20")], "`original_width` to be a whole number"),
        ([region("rectanglelabels", SQUARE | {"width": 1e6})], "beyond 200"),
        ([region("rectanglelabels", SQUARE | {"width": None})], "`width` to be a number"),
        ([region("ellipselabels", {"x": 1, "y": 1, "radiusX": 0, "radiusY": 1})], "beyond 200 or none"),
        ([region("polygonlabels", {"points": [[1, 1], [2, 2]]})], "at least 3 points"),
        ([region("polygonlabels", {"points": [[1, 1], [2], [3, 3]]})], r"points \[x, y\]"),
        ([region("brushlabels", {"rle": 10**9})], "`rle` to be a list"),
        ([region("brushlabels", {"rle": [1, 2, 3]})], "bits"),
        ([region("rectanglelabels", SQUARE), region("rectanglelabels", SQUARE, to_name="second")], "several"),
        ([7], "object with `type`"),
        ([{"type": None}], "`type` to be text"),
    ],
)
def test_other_regions_are_refused_by_name(results, problem):
    with pytest.raises(UserError, match=rf"^ls\.json: a.*{problem}"):
        read(*results)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"annotations": []}, "got none of 1"),
        ({"annotations": [{"result": [], "was_cancelled": True}]}, "got none of 1"),
        ({"annotations": 5}, "`annotations` to be a list"),
        ({"annotations": [None]}, "object with `result`"),
        ({"annotations": [{"result": 1}]}, "`result` to be a list"),
        ({"data": None}, "`data` to be an object"),
        ({"data": {"image": "z.jpg"}}, "got z.jpg"),
    ],
)
def test_tasks_of_another_form_are_refused(changes, problem):
    with pytest.raises(UserError, match=problem):
        read(**changes)


def test_of_several_annotations_only_equal_ones_or_the_ground_truth_are_taken():
    small = region("rectanglelabels", SQUARE | {"width": 5, "height": 10})
    one, other = {"result": [region("rectanglelabels", SQUARE)]}, {"result": [small], "updated_at": "2030-01-01"}
    said = (
        r"^ls\.json: a: expected one mask, got 2 annotations that differ; mark one of them as ground truth, or export"
    )
    with pytest.raises(UserError, match=said):
        read(annotations=[one, other])
    with pytest.raises(UserError, match="got 2 predictions that differ; keep one of them"):
        read(annotations=[], predictions=[one, other])
    expected = drawn(slice(2, 8), slice(5, 15))
    assert (read(annotations=[one, one]) == expected).all()
    assert (read(annotations=[one | {"ground_truth": True}, other]) == expected).all()
    assert (read(annotations=[one, other | {"was_cancelled": True}]) == expected).all()

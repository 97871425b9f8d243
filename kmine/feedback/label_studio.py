"""Corrected masks of a Label Studio export: brush strokes, polygons, ellipses, rectangles; other regions are refused.

Positions and sizes are percentages of the image's width and height, angles degrees clockwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np

from kmine.errors import UserError, first_names
from kmine.feedback import label_studio_rle
from kmine.feedback.expected import CURE, ExpectedMasks, Mask, refuse_duplicates, refuse_unknown
from kmine.io.json_file import is_kind, json_field, kind_of
from kmine.ops.masks import Bool, fill_ellipse, fill_polygon

Json = Mapping[str, Any]
SHAPES = ("brush", "polygon", "ellipse", "rectangle")
NO_REGIONS = {"choices", "textarea", "rating", "number", "taxonomy", "datetime", "pairwise", "ranker", "relation"}
NO_REGIONS |= {"labels"}
"""Results about the image or about other results."""


def masks_of_label_studio(path: Path, tasks: Sequence[Json], expected: ExpectedMasks) -> Iterator[tuple[str, Mask]]:
    """(sample id, mask) of each annotated task; of each task with predictions if none is annotated.

    Raises:
        UserError: nothing annotated, foreign images, classes and sizes, regions that are no shapes, damaged ones.
    """
    drawn, kind = _annotated(path, tasks, "annotations"), "annotations"
    if not drawn:
        drawn, kind = _annotated(path, tasks, "predictions"), "predictions"
    if not drawn:
        raise UserError(f"{path}: expected tasks with annotations, got none of {len(tasks)}; export as JSON")
    data = [json_field(tasks[n], "data", dict, where=f"{path}: task {n}", cure=CURE) for n in drawn]
    ids = [expected.sample_id(entry, "image", f"{path}: task {n}") for entry, n in zip(data, drawn, strict=True)]
    refuse_unknown(path, [str(entry.get("image")) for entry, name in zip(data, ids, strict=True) if name is None])
    refuse_duplicates(path, ids, "one task a sample")
    return (
        expected.check(str(path), name, _agreed(f"{path}: {name}", name, drawn[n], kind, expected))
        for name, n in zip(map(str, ids), drawn, strict=True)
    )


def _annotated(path: Path, tasks: Sequence[Json], kind: str) -> dict[int, list[Json]]:
    """Annotations, or predictions, that were not cancelled, by task; of those marked as ground truth only these."""
    found = {}
    for n, task in enumerate(tasks):
        where = f"{path}: task {n}"
        rows = json_field(task, kind, list, NoneType, where=where, cure=CURE) or []
        for row in rows:
            json_field(row, "result", list, where=f"{where}, {kind}", cure=CURE)
        valid = [row for row in rows if not row.get("was_cancelled")]
        found[n] = [row for row in valid if row.get("ground_truth")] or valid
    return {n: rows for n, rows in found.items() if rows}


def _agreed(where: str, name: str, rows: Sequence[Json], kind: str, expected: ExpectedMasks) -> Mask:
    """The mask of a task; which of several that differ is right is not guessed from their dates."""
    masks = [_mask(where, name, row, expected) for row in rows]
    if any(not np.array_equal(masks[0], mask) for mask in masks[1:]):
        cure = "mark one of them as ground truth" if kind == "annotations" else "keep one of them"
        raise UserError(f"{where}: expected one mask, got {len(masks)} {kind} that differ; {cure}, or {CURE} without")
    return masks[0]


def _mask(where: str, name: str, annotation: Json, expected: ExpectedMasks) -> Mask:
    """(H, W) class ids of the regions of an annotation, later ones on top."""
    results = [(result, json_field(result, "type", str, where=where, cure=CURE)) for result in annotation["result"]]
    regions = [(result, kind) for result, kind in results if kind not in NO_REGIONS]
    other = sorted({kind for _, kind in regions if kind.removesuffix("labels") not in SHAPES})
    if other or (results and not regions):
        actual = first_names(other or sorted({kind for _, kind in results}))
        raise UserError(
            f"{where}: expected regions as {', '.join(SHAPES)}, got {actual[:100]}; draw the mask as one of these, or "
            "remove the task"
        )
    if len({str(result.get(key)) for result, _ in regions for key in ("to_name",)}) > 1:
        raise UserError(f"{where}: expected regions on one image a task, got several (to_name); make a task of each")
    labels = {str(result.get("id")): result.get("value") for result, kind in results if kind == "labels"}
    out = np.zeros(expected.shapes[name], np.uint8)
    for number, (region, kind) in enumerate(regions):
        part = f"{where}, region {number} ({kind})"
        size = [json_field(region, f"original_{side}", int, where=part, cure=CURE) for side in ("height", "width")]
        expected.check_size(part, name, *size)
        for key in ("image_rotation", "item_index"):
            if json_field(region, key, float, NoneType, where=part, cure=CURE):
                raise UserError(f"{part}: expected {key} 0, got {kind_of(region[key])}; draw on the image as it is")
        value = json_field(region, "value", dict, where=part, cure=CURE)
        carrier = value if kind.endswith("labels") else labels.get(str(region.get("id"))) or {}
        own = json_field(carrier, kind if kind.endswith("labels") else "labels", list, where=part, cure=CURE)
        if len(own) != 1 or not isinstance(own[0], str):
            raise UserError(
                f"{part}: expected one label ({', '.join(expected.class_names[1:])}), got {len(own)}; {CURE}"
            )
        class_id = expected.class_ids(part, {0: own[0]})[0]
        try:
            out[_region(kind.removesuffix("labels"), value, *out.shape, part)] = class_id
        except ValueError as error:
            raise error if isinstance(error, UserError) else UserError(f"{part}: {error}; {CURE}") from error
    return out


def _region(shape: str, value: Json, height: int, width: int, where: str) -> Bool:
    """(height, width) mask of one region. Raises `ValueError`."""
    if shape == "brush":
        return label_studio_rle.decode(json_field(value, "rle", list, where=where, cure=CURE), height, width)
    scale = np.array([width, height]) / 100
    if shape == "polygon":
        points = json_field(value, "points", list, where=where, cure=CURE)
        if not all(isinstance(p, list) and len(p) == 2 and all(is_kind(v, float) for v in p) for p in points):
            raise ValueError("expected points [x, y], got something else")
        return fill_polygon(np.array(points, np.float64).reshape(-1, 2) * scale, height, width)
    sides = ("radiusX", "radiusY") if shape == "ellipse" else ("width", "height")
    x, y, across, down = (json_field(value, key, float, where=where, cure=CURE) for key in ("x", "y", *sides))
    degrees = json_field(value, "rotation", float, NoneType, where=where, cure=CURE) or 0.0
    if not (0 < across <= 200 and 0 < down <= 200 and max(abs(x), abs(y)) <= 200):
        raise ValueError(
            f"expected x, y, {sides[0]} and {sides[1]} in per cent of the image, got values beyond 200 or none"
        )
    start, size = np.array([x, y]) * scale, np.array([across, down]) * scale
    if shape == "ellipse":
        return fill_ellipse(start, size, degrees, height, width)
    cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))  # it turns about its first corner
    corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * size
    return fill_polygon(start + corners @ np.array([[cos, sin], [-sin, cos]]), height, width)

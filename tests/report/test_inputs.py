"""Input of the report: gallery items are checked, columns of results.csv keep their names."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest

from kmine.report.inputs import CSV_COLUMNS, GalleryItem, RoundRow


def black(height: int, width: int) -> np.ndarray:
    return np.zeros((height, width, 3), np.uint8)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"category": "fine"}, "category"),
        ({"image": np.zeros((4, 4), np.uint8)}, "image must be"),
        ({"local_mask": np.zeros((4, 5), np.uint8)}, "local_mask must be"),
        ({"pseudo_mask": np.zeros((4, 4), np.int64)}, "pseudo_mask must be"),
    ],
)
def test_a_gallery_item_refuses_arrays_of_another_shape_or_type(change, match):
    mask = np.zeros((4, 4), np.uint8)
    good = {"category": "best", "image": black(4, 4), "local_mask": mask, "segmenter_mask": mask}
    with pytest.raises(ValueError, match=match):
        GalleryItem(sample_id="s", round_idx=1, reason="kept", scores={}, prompts=[], **(good | change))


def test_fields_with_another_column_name_exist_and_columns_are_unique():
    names = [field.name for field in fields(RoundRow)]
    columns = [CSV_COLUMNS.get(name, name) for name in names]
    assert CSV_COLUMNS.keys() <= set(names) and len(set(columns)) == len(columns)
    assert {"num_new", "num_readmitted", "num_expelled", "changed_pixels", "taught_pixels"} <= set(columns)

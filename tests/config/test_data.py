"""Settings of the data set refuse values out of range."""

from __future__ import annotations

import pytest
from helpers.settings import assert_refused

from kmine.config import (
    DataConfig,
)
from kmine.errors import UserError

OUT_OF_RANGE = [
    (DataConfig, "num_samples", 0),
    (DataConfig, "size", 31),
    (DataConfig, "size", 4097),
    (DataConfig, "label_fraction", 0.0),
    (DataConfig, "label_fraction", 1.01),
    (DataConfig, "label_fraction", float("nan")),
    (DataConfig, "val_fraction", -0.1),
    (DataConfig, "val_fraction", 1.0),
    (DataConfig, "test_fraction", 1.0),
    (DataConfig, "every_nth", 0),
    (DataConfig, "window", (240.0, -160.0)),
    (DataConfig, "window", (0.0, float("inf"))),
    (DataConfig, "image_labels", ""),
    (DataConfig, "normal_images", ""),
    (DataConfig, "mask_suffix", ""),
    (DataConfig, "classes", ()),
    (DataConfig, "classes", ("Normal", "Normal")),
    (DataConfig, "classes", ("Normal", "normal")),
    (DataConfig, "fine_groups", 0.0),
    (DataConfig, "fine_groups", -1.0),
    (DataConfig, "fine_groups", 2.5),
    (DataConfig, "fine_groups", float("nan")),
    (DataConfig, "duplicate_distance", -2),
    (DataConfig, "folds", 1),
    (DataConfig, "folds", 51),
    (DataConfig, "fold", 0),
    (DataConfig, "duplicate_distance", 64),
]


@pytest.mark.parametrize(("kind", "name", "value"), OUT_OF_RANGE)
def test_a_value_out_of_range_is_refused_by_name(kind, name, value):
    assert_refused(kind, name, value)


def test_validation_and_test_must_leave_training_images():
    with pytest.raises(UserError, match=r"data\.val_fraction \+ data\.test_fraction: expected less than 1"):
        DataConfig(val_fraction=0.5, test_fraction=0.5)


def test_folds_make_a_run_each_and_one_on_all_masks():
    folds = DataConfig(folds=5)
    assert [folds.num_runs, DataConfig().num_runs, DataConfig(folds=5, fold=4).num_runs] == [6, 1, 1]
    assert folds.of_all_masks() == DataConfig(folds=5, fold=5)
    assert DataConfig(folds=5, fold=2).of_all_masks().fold == 2 and DataConfig().of_all_masks() == DataConfig()
    with pytest.raises(UserError, match=r"data.fold: expected 0 to data.folds \(5\), got 6"):
        DataConfig(folds=5, fold=6)
    with pytest.raises(UserError, match=r"data\.split_file: expected null with data.folds"):
        DataConfig(folds=5, split_file="splits.csv")

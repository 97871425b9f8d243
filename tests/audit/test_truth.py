"""True Dice of pseudo masks and its means by stratum, computed by hand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from kmine.audit.truth import Stratum, corrections, figures, strata, withheld_dice
from kmine.ops.masks import to_rle
from kmine.ops.metrics import Correction
from kmine.store.tables import DecisionRow


def report(name: str, area: float = 0.1, *classes: int) -> SimpleNamespace:
    return SimpleNamespace(sample_id=name, area=area, classes=classes, suspicion=area)


def test_pixels_ignored_by_the_pseudo_mask_are_not_counted():
    masks = {"a": np.array([[1, 1, 0, 255]], np.uint8), "b": np.zeros((1, 4), np.uint8)}
    truth = {"a": np.array([[1, 0, 0, 1]], np.uint8), "b": np.zeros((1, 4), np.uint8)}
    withheld = SimpleNamespace(ids=["a", "b"], sample=lambda i: SimpleNamespace(mask=truth[i]))
    audited = SimpleNamespace(read=lambda kind: masks.__getitem__, task=SimpleNamespace(num_classes=2))
    dice = withheld_dice(audited, [report("a"), report("b"), report("no withheld mask")], withheld)
    assert dice.keys() == {"a", "b"} and np.isnan(dice["b"])
    assert dice["a"] == pytest.approx(2 / 3)  # two predicted, one true pixel, one of them common; the fourth ignored


def test_strata_are_thirds_of_size_classes_and_groups_of_several_images():
    reports = [report("a", 0.3, 1), report("b", 0.1, 1), report("c", 0.2, 1, 2)]
    groups = {"a": "g", "b": "h", "c": "g"}
    assert strata(reports, np.array([0.9, 0.5, 0.7]), groups, ("background", "organ", "lesion")) == [
        Stratum("size", "small", 1, 0.5),
        Stratum("size", "medium", 1, 0.7),
        Stratum("size", "large", 1, 0.9),
        Stratum("class", "organ", 3, 0.7),
        Stratum("class", "lesion", 1, 0.7),
        Stratum("group", "g", 2, 0.8),
    ]


def test_without_a_known_dice_there_are_no_charts():
    assert figures(SimpleNamespace(), [report("a")], {"a": float("nan")}) == ({}, [])


def test_corrections_are_counted_in_each_round_over_images_with_objects_and_a_withheld_mask():
    truth = np.array([[1, 1, 0, 0]], np.uint8)
    rles = (to_rle(np.array([[True, False, True, False]])), to_rle(np.array([[True, True, False, False]])))
    row = DecisionRow("a", 0, 1, True, "kept", height=1, width=4, local_rle=rles[0], segmenter_rle=rles[1])
    objects = {"a": [row], "lesion-free": [], "not withheld": [row]}
    rounds = [SimpleNamespace(round_idx=n, pseudo_labeled=list(objects), objects=objects.get) for n in (1, 2)]
    masks = {1: np.array([[1, 1, 255, 1]], np.uint8), 2: np.array([[1, 0, 1, 0]], np.uint8)}
    task = SimpleNamespace(pseudo_mask=lambda round_idx, sample_id: masks[round_idx])
    withheld = SimpleNamespace(ids=["a", "lesion-free"], sample=lambda i: SimpleNamespace(mask=truth))
    found = corrections(SimpleNamespace(task=task, rounds=rounds), withheld)
    assert found == {1: Correction(wrong=2, corrected=1, broken=1), 2: Correction(2, 0, 0)}

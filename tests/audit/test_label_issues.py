"""Confident learning on pixels: thresholds, contradicted pixels and their shares, computed by hand."""

from __future__ import annotations

import doctest
import math

import numpy as np
import pytest

from kmine.audit import find_label_issues, label_issues
from kmine.audit.label_issues import confident_disagreement, confident_thresholds


def probs(foreground: list[float]) -> np.ndarray:
    p = np.array([foreground], np.float32)
    return np.stack([1 - p, p])


def test_disagreement_by_hand():
    # Four pixels; confident from 0.8 of either class on. The mask has the first two, the model the middle two.
    limits = np.array([0.8, 0.8])
    found = confident_disagreement(probs([0.1, 0.9, 0.9, 0.4]), np.array([[1, 1, 0, 0]], np.uint8), limits)
    assert found.mislabeled == pytest.approx(1 / 2)  # the first pixel, of two
    assert found.missed == pytest.approx(1 / 2)  # the third, of two that are confident foreground
    assert found.conflict == pytest.approx(2 / 3)  # of three that either has
    assert found.soft_dice_distance == pytest.approx(1 - 2 * 1.0 / (2.3 + 2))


def test_unconfident_and_ignored_pixels_are_not_counted():
    mask = np.array([[1, 0, 255, 255]], np.uint8)
    unsure = confident_disagreement(probs([0.3, 0.7, 0.9, 0.1]), mask, np.array([0.8, 0.8]))
    assert unsure.conflict == 0 and unsure.mislabeled == 0 and math.isnan(unsure.missed)


def test_only_confident_foreground_contradicts_an_empty_mask():
    empty, limits = np.zeros((1, 2), np.uint8), np.array([0.8, 0.8])
    assert confident_disagreement(probs([0.1, 0.2]), empty, limits)[2:] == (0.0, 0.0)
    assert confident_disagreement(probs([0.1, 0.9]), empty, limits)[2:] == (1.0, 1.0)


def test_another_foreground_class_is_a_conflict():
    three = np.array([[[0.0]], [[0.9]], [[0.1]]], np.float32)
    assert confident_disagreement(three, np.array([[2]], np.uint8), np.full(3, 0.5)).conflict == 1


def test_a_threshold_is_the_mean_probability_of_a_class_where_it_is_correct():
    image = np.array([[[0.9, 0.3]], [[0.1, 0.7]], [[0.0, 0.0]]], np.float32), np.array([[0, 1]], np.uint8)
    assert confident_thresholds([image], 3) == pytest.approx([0.9, 0.7, 0.5])


def test_label_issues_by_hand():
    # Foreground probabilities of two images; thresholds from the labels: background (.9 + .2 + .7) / 3 = .6,
    # foreground (.9 + .6) / 2 = .75, its third pixel being ignored.
    labels = np.array([[[0, 0, 0]], [[1, 1, 255]]])
    pred_probs = np.stack([probs([0.1, 0.8, 0.3]), probs([0.9, 0.6, 0.1])])
    assert find_label_issues(labels, pred_probs).tolist() == [[[False, True, False]], [[False, False, False]]]
    assert find_label_issues(labels, pred_probs, [0.6, 0.85]).any() == np.False_
    lenient = find_label_issues(1 - np.minimum(labels, 1), pred_probs, [0.0, 0.0])
    assert lenient.tolist() == [[[True, False, True]], [[True, True, False]]]


def test_labels_and_probabilities_that_do_not_fit_are_refused():
    labels, pred_probs = np.zeros((1, 1, 3), int), probs([0.1, 0.2, 0.3])[None]
    with pytest.raises(ValueError, match=r"got \(1, 1, 2\)"):
        find_label_issues(labels[..., :2], pred_probs)
    with pytest.raises(ValueError, match="below 2 or 255, got 2"):
        find_label_issues(labels + 2, pred_probs)
    with pytest.raises(ValueError, match="expected 2 values"):
        find_label_issues(labels, pred_probs, [0.5])


def test_the_example_in_the_docstring():
    found = doctest.testmod(label_issues)
    assert found.attempted == 2 and found.failed == 0

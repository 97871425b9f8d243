"""Rows of a batch: one per object, one for an image without."""

from __future__ import annotations

import numpy as np

from kmine.mining.tables import reviewed_rows, table_rows
from kmine.types import Candidate, Decision, Evidence, Prompts, PseudoLabel, Sample

EMPTY = np.zeros((0, 2, 3), bool)
KEPT = Decision(True, "kept_local", Evidence(tta_std=0.5), 0.9, 0.8, 0.9, "local")
DROPPED = Decision(False, "low_agreement", Evidence())


def sample(sample_id: str) -> Sample:
    return Sample(sample_id, sample_id, np.zeros((2, 3, 3), np.uint8))


def candidate(*pixels: tuple[int, int]) -> Candidate:
    mask = np.zeros((1, 2, 3), bool)
    for pixel in pixels:
        mask[0][pixel] = True
    return Candidate(mask, np.ones(1, np.float32), np.ones(1, np.float32), None, EMPTY)


def test_an_object_is_a_row_of_either_table_with_the_masks_that_were_compared():
    box = np.array([0, 0, 2, 1], np.float32)
    component = np.array([[True, False, False], [False, False, False]])
    prompts = [[Prompts(1, box=box, component=component), Prompts(2, box=box)]]
    candidates = [[candidate((0, 1)), candidate((1, 2))]]
    label = PseudoLabel(np.zeros((2, 3), np.uint8))
    prompt_rows, rows = table_rows([sample("a")], prompts, candidates, [[KEPT, DROPPED]], [label])
    assert [(row.sample_id, row.object_idx, row.class_id) for row in prompt_rows] == [("a", 0, 1), ("a", 1, 2)]
    assert [(row.kept, row.reason, row.source) for row in rows] == [
        (True, "kept_local", "local"),
        (False, "low_agreement", "both"),
    ]
    first, second = rows
    assert (first.height, first.width, first.evidence, first.in_training) == (2, 3, KEPT.evidence, True)
    assert (first.estimated_dice, first.estimated_segmenter, first.estimated_local) == (0.9, 0.8, 0.9)
    assert np.array_equal(first.mask("local"), component) and np.argwhere(first.mask("segmenter")).tolist() == [[0, 1]]
    assert np.array_equal(first.mask("used"), component) and np.argwhere(second.mask("used")).tolist() == [[1, 2]]
    assert not second.mask("local").any(), "no component, an empty local mask"


def test_an_image_without_objects_is_one_decision():
    free = PseudoLabel(np.zeros((2, 3), np.uint8), "lesion_free")
    none = [[], [], []]
    samples = [sample("a"), sample("b"), sample("c")]
    prompt_rows, rows = table_rows(samples, none, none, none, [None, free, None], {"b", "c"})
    assert prompt_rows == []
    assert [(row.sample_id, row.object_idx, row.reason, row.kept, row.in_training) for row in rows] == [
        ("a", -1, "no_component", False, False),
        ("b", -1, "lesion_free", True, True),  # the label says why, not the veto
        ("c", -1, "vetoed", False, False),
    ]


def test_reviewed_images_have_a_decision_without_scores():
    rejected, accepted = reviewed_rows(["r"], ["a"])
    assert (rejected.sample_id, rejected.reason, rejected.kept) == ("r", "rejected", False)
    assert (accepted.sample_id, accepted.reason, accepted.in_training) == ("a", "accepted", True)
    assert rejected.evidence is accepted.evidence is accepted.estimated_dice is None

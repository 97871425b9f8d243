"""Pseudo masks: votes, ignored pixels, dropped objects."""

from __future__ import annotations

import numpy as np
import pytest

from kmine.config import RefineConfig
from kmine.mining.refine import mean_estimate, refine
from kmine.types import IGNORE_INDEX, Candidate, Decision, Evidence, Probs, Prompts, PseudoLabel

KEPT = Decision(True, "kept", Evidence())
DROPPED = Decision(False, "low_rank", Evidence())
SEGMENTER_ONLY = RefineConfig(ask_local=False, doubt=None)


def row(text: str) -> np.ndarray:
    return np.array([[c == "x" for c in text]])


def candidate(best: str, *jittered: str) -> Candidate:
    jitters = np.stack([row(j) for j in jittered]) if jittered else np.zeros((0, *row(best).shape), bool)
    return Candidate(row(best)[None], np.array([0.9]), np.array([0.9]), None, jitters)


def prompt(component: str, class_id: int = 1) -> Prompts:
    return Prompts(class_id, component=row(component))


def local(*classes: str) -> Probs:
    planes = np.stack([row(c) for c in classes]).astype(np.float32)
    return Probs("a", np.concatenate([1 - planes.sum(axis=0, keepdims=True), planes]))


def text_of(label: PseudoLabel | None) -> str | None:
    return label and "".join({0: ".", 1: "1", 2: "2", IGNORE_INDEX: "?"}[v] for v in label.mask[0])


def made(probs, prompts, candidates, decisions, cfg=SEGMENTER_ONLY):
    return text_of(refine(probs, prompts, candidates, decisions, cfg))


def test_agreement_gives_the_class_disagreement_is_ignored():
    votes = candidate("xxxx....", "xxxx....", "xxx.....", "xx......")
    assert made(local("xx......"), [prompt("xx......")], [votes], [KEPT]) == "111?...."  # 4, 4, 3 and 2 of 4 votes


def test_pixels_that_the_local_model_classifies_otherwise_are_ignored_on_demand():
    votes = candidate("xxxx....", "xxxx....")
    assert made(local("..xxxx.."), [prompt("..xxxx..")], [votes], [KEPT]) == "1111...."
    both = made(local("..xxxx.."), [prompt("..xxxx..")], [votes], [KEPT], RefineConfig(ask_local=True, doubt=None))
    assert both == "??11??.."


def test_a_dropped_object_becomes_neither_lesion_nor_background():
    prompts = [prompt("xx......"), prompt(".....xx.")]
    candidates = [candidate("xx......"), candidate("....xx..")]
    assert made(local("xx...xx."), prompts, candidates, [KEPT, DROPPED]) == "11..???."


def test_nothing_kept_is_no_pseudo_mask_not_an_empty_one():
    assert made(local("xx......"), [prompt("xx......")], [candidate("xx......")], [DROPPED]) is None
    assert made(local("........"), [], [], []) is None


def test_ignored_pixels_alone_are_no_pseudo_mask():
    split = candidate("xx......", "..xx....")
    assert made(local("xx......"), [prompt("xx......")], [split], [KEPT]) is None


def test_a_pixel_claimed_for_two_classes_is_ignored():
    prompts = [prompt("xxx.....", 1), prompt("..xxx...", 2)]
    candidates = [candidate("xxx....."), candidate("..xxx...")]
    assert made(local("xx......", "..xxx..."), prompts, candidates, [KEPT, KEPT]) == "11?22..."


def labeled(image_label, probs, prompts, candidates, decisions):
    return text_of(refine(probs, prompts, candidates, decisions, SEGMENTER_ONLY, image_label=image_label))


def test_an_image_label_alone_makes_a_lesion_free_mask_empty():
    assert labeled(0, local("xx......"), [], [], []) == "........"
    assert labeled(None, local("xx......"), [], [], []) is None
    assert labeled(1, local("xx......"), [], [], []) is None


def test_a_lesion_free_label_does_not_exclude_an_organ():
    assert labeled(0, local("xx......", "........"), [], [], []) is None
    organ = labeled(0, local("xx......", "........"), [prompt("xx......")], [candidate("xx......")], [KEPT])
    assert organ == "11......"


def test_an_image_with_a_lesion_needs_a_pixel_of_it():
    both = local("xxxx....", "....xx..")
    organ, lesion = prompt("xxxx....", 1), prompt("....xx..", 2)
    candidates = [candidate("xxxx...."), candidate("....xx..")]
    assert labeled(1, both, [organ], candidates[:1], [KEPT]) is None
    assert labeled(1, both, [organ, lesion], candidates, [KEPT, DROPPED]) is None
    assert labeled(1, both, [organ, lesion], candidates, [KEPT, KEPT]) == "111122.."


def test_of_two_disagreeing_masks_the_better_supported_one_is_used_unchanged():
    both = RefineConfig(ask_local=True, doubt=None)
    votes = candidate("xxxx....", "xxxx....")
    given = (local("..xxxx.."), [prompt("..xxxx..")], [votes])
    assert made(*given, [Decision(True, "kept", Evidence(), source="segmenter")], both) == "1111...."
    assert made(*given, [Decision(True, "kept_local", Evidence(), source="local")], both) == "..1111.."
    assert made(*given, [Decision(True, "kept", Evidence(), source="both")], both) == "??11??.."


def test_pixels_that_jitters_disagree_on_are_ignored_in_a_used_mask():
    votes = candidate("xxxx....", "xxxx....", "xxx.....", "xx......")
    used = Decision(True, "kept", Evidence(), source="segmenter")
    assert (
        made(local("xxxx...."), [prompt("xxxx....")], [votes], [used], RefineConfig(ask_local=True, doubt=None))
        == "111?...."
    )


def test_a_source_trusted_for_one_object_is_not_for_another():
    both = RefineConfig(ask_local=True, doubt=None)
    prompts = [prompt("xx......"), prompt(".....xx.")]
    candidates = [candidate("xxx....."), candidate("....xx..")]
    decisions = [Decision(True, "kept", Evidence(), source="segmenter"), KEPT]
    assert made(local("xx...xx."), prompts, candidates, decisions, both) == "111.?1?."


def test_a_label_has_the_reason_and_mean_estimate_of_its_kept_objects():
    prompts = [prompt("xx......"), prompt(".....xx."), prompt("...x....")]
    candidates = [candidate("xx......"), candidate(".....xx."), candidate("...x....")]
    estimated = [Decision(True, reason, Evidence(), dice) for reason, dice in (("kept_local", 0.6), ("kept", 0.8))]
    label = refine(local("xx......"), prompts, candidates, [DROPPED, *estimated], SEGMENTER_ONLY)
    assert (label.reason, label.weight, label.lesion_free) == ("kept_local", pytest.approx(0.7), False)
    free = refine(local("........"), [], [], [], SEGMENTER_ONLY, image_label=0)
    assert (free.reason, free.weight, free.lesion_free) == ("lesion_free", None, True)


def test_mean_estimates_are_limited_to_one_and_leave_unknown_ones_out():
    assert mean_estimate([0.4, None, float("nan"), 1.2]) == pytest.approx(0.7)
    assert mean_estimate([None]) is mean_estimate([]) is None


def shaded(*foreground: float) -> Probs:
    p = np.array([foreground], np.float32)
    return Probs("a", np.stack([1 - p, p]))


def test_doubtful_pixels_outside_all_objects_are_ignored():
    # The object, its dropped neighbour, then background of probability .05, .1, .5, .6: the last is a speck.
    probs = shaded(0.9, 0.3, 0.9, 0.05, 0.1, 0.5, 0.6, 0.0)
    given = (probs, [prompt("x......."), prompt("..x.....")], [candidate("xx......"), candidate("..x.....")])
    cfg = RefineConfig(ask_local=False)
    assert made(*given, [KEPT, DROPPED], cfg) == "11?.??.."
    assert made(*given, [KEPT, DROPPED], RefineConfig(ask_local=False, doubt=0.2)) == "11?..?.."
    for off in (None, 0.5):
        assert made(*given, [KEPT, DROPPED], RefineConfig(ask_local=False, doubt=off)) == "11?....."


def test_a_lesion_free_image_has_no_doubt_about_lesions_but_about_organs():
    planes = np.array([[[0.1, 0.9, 0.7, 0.7]], [[0.9, 0.1, 0.0, 0.3]], [[0.0, 0.0, 0.3, 0.0]]], np.float32)
    given = (Probs("a", planes), [prompt("x...")], [candidate("x...")], [KEPT])
    assert made(*given, RefineConfig(ask_local=False)) == "1???"
    assert text_of(refine(*given, RefineConfig(ask_local=False), image_label=0)) == "1?.?"
    free = refine(shaded(0.3, 0.3), [], [], [], RefineConfig(ask_local=False), image_label=0)
    assert text_of(free) == ".."


def test_asking_the_local_model_leaves_corrections_of_a_ranked_gate():
    ranked = Decision(True, "kept", Evidence(), source="segmenter")
    given = (local("..xxxx.."), [prompt("..xxxx..")], [candidate("xxxx....", "xxxx....")])
    assert made(*given, [ranked], RefineConfig(ask_local=True, doubt=None)) == "1111...."

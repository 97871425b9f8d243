"""Pseudo masks: votes, ignored pixels, dropped objects."""

from __future__ import annotations

import numpy as np

from kmine.config import RefineConfig
from kmine.mining.refine import refine
from kmine.types import (
    IGNORE_INDEX,
    Candidate,
    Decision,
    Evidence,
    Probs,
    Prompts,
)

KEPT = Decision(True, "kept", Evidence())
DROPPED = Decision(False, "low_agreement", Evidence())
ALONE = RefineConfig(ask_local=False)


def row(text: str) -> np.ndarray:
    return np.array([[c == "x" for c in text]])


def answer(best: str, *jittered: str) -> Candidate:
    jitters = np.stack([row(j) for j in jittered]) if jittered else np.zeros((0, *row(best).shape), bool)
    return Candidate(row(best)[None], np.array([0.9]), np.array([0.9]), None, jitters)


def prompt(component: str, class_id: int = 1) -> Prompts:
    return Prompts(class_id, component=row(component))


def local(*classes: str) -> Probs:
    planes = np.stack([row(c) for c in classes]).astype(np.float32)
    return Probs("a", np.concatenate([1 - planes.sum(axis=0, keepdims=True), planes]))


def made(probs, prompts, candidates, decisions, cfg=ALONE):
    out = refine(probs, prompts, candidates, decisions, cfg)
    return None if out is None else "".join({0: ".", 1: "1", 2: "2", IGNORE_INDEX: "?"}[v] for v in out[0])


def test_agreement_gives_the_class_disagreement_is_ignored():
    votes = answer("xxxx....", "xxxx....", "xxx.....", "xx......")
    assert made(local("xx......"), [prompt("xx......")], [votes], [KEPT]) == "111?...."  # 4, 4, 3 and 2 of 4 votes


def test_the_segmenter_may_say_more_than_the_local_model_unless_that_is_asked():
    votes = answer("xxxx....", "xxxx....")
    assert made(local("..xxxx.."), [prompt("..xxxx..")], [votes], [KEPT]) == "1111...."
    asked = made(local("..xxxx.."), [prompt("..xxxx..")], [votes], [KEPT], RefineConfig(ask_local=True))
    assert asked == "??11??.."


def test_a_dropped_object_becomes_neither_lesion_nor_background():
    prompts = [prompt("xx......"), prompt(".....xx.")]
    answers = [answer("xx......"), answer("....xx..")]
    assert made(local("xx...xx."), prompts, answers, [KEPT, DROPPED]) == "11..???."


def test_nothing_kept_is_no_pseudo_mask_not_an_empty_one():
    assert made(local("xx......"), [prompt("xx......")], [answer("xx......")], [DROPPED]) is None
    assert made(local("........"), [], [], []) is None


def test_only_doubt_left_is_no_pseudo_mask():
    split = answer("xx......", "..xx....")
    assert made(local("xx......"), [prompt("xx......")], [split], [KEPT]) is None


def test_two_classes_that_claim_one_pixel_leave_it_open():
    prompts = [prompt("xxx.....", 1), prompt("..xxx...", 2)]
    answers = [answer("xxx....."), answer("..xxx...")]
    assert made(local("xx......", "..xxx..."), prompts, answers, [KEPT, KEPT]) == "11?22..."


def labeled(label, probs, prompts, candidates, decisions):
    out = refine(probs, prompts, candidates, decisions, ALONE, image_label=label)
    return None if out is None else "".join({0: ".", 1: "1", 2: "2", IGNORE_INDEX: "?"}[v] for v in out[0])


def test_a_lesion_free_image_is_empty_by_its_label_alone():
    assert labeled(0, local("xx......"), [], [], []) == "........"
    assert labeled(None, local("xx......"), [], [], []) is None
    assert labeled(1, local("xx......"), [], [], []) is None


def test_lesion_free_does_not_say_that_there_is_no_organ():
    assert labeled(0, local("xx......", "........"), [], [], []) is None
    organ = labeled(0, local("xx......", "........"), [prompt("xx......")], [answer("xx......")], [KEPT])
    assert organ == "11......"


def test_an_organ_alone_is_no_mask_of_an_image_with_a_lesion():
    both = local("xxxx....", "....xx..")
    organ, lesion = prompt("xxxx....", 1), prompt("....xx..", 2)
    answers = [answer("xxxx...."), answer("....xx..")]
    assert labeled(1, both, [organ], answers[:1], [KEPT]) is None
    assert labeled(1, both, [organ, lesion], answers, [KEPT, DROPPED]) is None
    assert labeled(1, both, [organ, lesion], answers, [KEPT, KEPT]) == "111122.."


def test_of_two_masks_that_disagree_the_better_supported_one_is_used_as_it_is():
    ask = RefineConfig(ask_local=True)
    votes = answer("xxxx....", "xxxx....")
    given = (local("..xxxx.."), [prompt("..xxxx..")], [votes])
    assert made(*given, [Decision(True, "kept", Evidence(), source="segmenter")], ask) == "1111...."
    assert made(*given, [Decision(True, "kept_local", Evidence(), source="local")], ask) == "..1111.."
    assert made(*given, [Decision(True, "kept", Evidence(), source="both")], ask) == "??11??.."


def test_the_segmenter_s_own_doubt_is_ignored_even_where_its_mask_is_used():
    votes = answer("xxxx....", "xxxx....", "xxx.....", "xx......")
    used = Decision(True, "kept", Evidence(), source="segmenter")
    assert made(local("xxxx...."), [prompt("xxxx....")], [votes], [used], RefineConfig(ask_local=True)) == "111?...."


def test_what_is_settled_for_one_object_is_not_for_another():
    ask = RefineConfig(ask_local=True)
    prompts = [prompt("xx......"), prompt(".....xx.")]
    answers = [answer("xxx....."), answer("....xx..")]
    decisions = [Decision(True, "kept", Evidence(), source="segmenter"), KEPT]
    assert made(local("xx...xx."), prompts, answers, decisions, ask) == "111.?1?."

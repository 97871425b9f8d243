"""The sentence at the end of a run: one thing to do next, and which."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kmine.loop.advice import Outcome, next_step
from kmine.ops.statistics import Paired

NAN = float("nan")
OUTCOME = Outcome(
    kept_none=False,
    gain=Paired(0.01, -0.02, 0.04, 30),
    num_labeled=12,
    num_masked=16,
    num_test=4,
    can_fold=True,
    missing_weights="",
    has_sam=False,
    correction=(0.4, 0.1),
    reasons="most often low_stability (7 of 9)",
)


def test_nothing_is_said_where_mining_is_shown_to_help():
    assert next_step(replace(OUTCOME, gain=Paired(0.05, 0.01, 0.09, 30))) == ""


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "no gain by mining is shown (+0.010 [-0.020, +0.040]); next: label about 8 more images, which kmine"),
        ({"num_labeled": 40}, "next: label about 20 more images"),
        ({"num_labeled": 2}, "kmine next -n 18 with this folder chooses; then the same command with another --out"),
        (
            {"gain": None},
            "too few validation images to show whether mining helped; next: --data.folds 5",
        ),
        ({"gain": Paired(0.1, NAN, NAN, 1)}, "next: --data.folds 5"),
        (
            {"gain": None, "num_masked": 9},
            "to show whether mining helped; next: label about 8 more",
        ),
        ({"gain": None, "can_fold": False}, "next: label about 8 more"),
        ({"gain": None, "num_test": 40}, "next: kmine compare with this folder, which tests on 40 images"),
        ({"gain": None, "kept_none": True}, "no mask was kept, most often low_stability (7 of 9); next: label about 8"),
        (
            {"missing_weights": "resnet34", "gain": None},
            "next: begin with ImageNet weights: kmine weights get",
        ),
        (
            {"correction": [0.1, 0.3]},
            "next: another segmenter (--segmenter.name sam_vit_b), as of labeled images",
        ),
        ({"correction": [0.1, 0.3], "has_sam": True}, "--segmenter.checkpoint of your modality"),
        ({"correction": [0.1, 0.3]}, "as it corrects (10 % / 30 %)"),
        ({"correction": ()}, "next: label about 8 more"),
        ({"correction": [None, None]}, "next: label about 8 more"),
    ],
)
def test_one_thing_is_named(changes, words):
    said = next_step(replace(OUTCOME, **changes))
    assert words in said and said.count("; next: ") == 1 and "\n" not in said

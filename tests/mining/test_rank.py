"""The ranking of objects by their evidence: hand-computed scores, and the share that is kept."""

from __future__ import annotations

import json
import math
from dataclasses import astuple, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kmine.mining.rank import LIMIT, PRIOR, TIE, Ranking, fit_ranking
from kmine.ops.calibrator import FEATURES, LATER
from kmine.types import Evidence


def test_scores_by_hand():
    # Medians .8 and .3, median deviations .1 and .1; the other scores are unknown. The sum is divided by nine.
    values = [(0.7, 0.3), (0.8, 0.2), (0.9, 0.4)]
    evidence = [Evidence(predicted_iou=iou, confidence_outside=outside) for iou, outside in values]
    ranking = fit_ranking(evidence, 0.5)
    z = 1 / 1.4826
    assert ranking.scores(evidence) == pytest.approx(np.array([-z, z, z - z]) / 9)
    assert ranking.threshold == pytest.approx(0, abs=1e-9), "the second of three is the last of half of them"
    missing = Evidence(predicted_iou=0.9)
    assert ranking.scores([missing])[0] == pytest.approx(z / 9), "a missing score counts as the median"


def test_a_far_value_is_clipped_and_one_that_most_objects_share_spreads_by_the_rest():
    evidence = [
        Evidence(predicted_iou=iou, tta_std=std) for iou, std in ((0.5, 0.1), (0.5, 0.1), (0.5, 0.1), (0.9, 0.1))
    ]
    ranking = fit_ranking(evidence, 0.25)
    assert dict(zip(FEATURES, ranking.spread, strict=True))["predicted_iou"] == pytest.approx(0.4 * np.sqrt(3) / 4)
    assert dict(zip(FEATURES, ranking.spread, strict=True))["tta_std"] == 0, "constant, so ignored"
    far = replace(evidence[0], predicted_iou=1e6)
    assert ranking.scores([far])[0] == pytest.approx(LIMIT / 9)


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.9])
def test_one_at_a_time_as_many_are_kept_as_in_the_fit(keep):
    rng = np.random.default_rng(0)
    for number in range(1, 60):
        evidence = [Evidence(*rng.uniform(0.01, 1, len(FEATURES))) for _ in range(number % 12 + 1)]
        ranking = fit_ranking(evidence, keep)
        together = ranking.scores(evidence) >= ranking.threshold - TIE
        assert [ranking.keeps(one) for one in evidence] == together.tolist()
        assert together.sum() >= math.ceil(keep * len(evidence))


def test_other_last_digits_do_not_drop_an_object_at_the_threshold():
    evidence = [Evidence(confidence_inside=value) for value in (0.2, 0.5, 0.8)]
    ranking = fit_ranking(evidence, 0.5)
    assert ranking.keeps(Evidence(confidence_inside=0.5 - 1e-8)) and not ranking.keeps(Evidence(confidence_inside=0.49))


def test_signs_of_the_prior_are_those_of_good_masks():
    good = Evidence(*(0.9 if weight > 0 else 0.1 for weight in astuple(PRIOR)))
    poor = Evidence(*(0.1 if weight > 0 else 0.9 for weight in astuple(PRIOR)))
    good, poor = replace(good, area_ratio=1.0), replace(poor, area_ratio=20.0)
    usual = replace(good, predicted_iou=0.5)
    scores = fit_ranking([good, poor, usual], 0.5).scores([good, usual, poor])
    assert scores[0] > scores[1] > scores[2]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.floats(0.05, 1))
@settings(max_examples=60, deadline=None)
def test_the_share_kept_is_that_of_the_setting_and_more_only_by_ties(values, keep):
    evidence = [Evidence(predicted_iou=value) for value in values]
    ranking = fit_ranking(evidence, keep)
    scores = ranking.scores(evidence)
    kept = int((scores >= ranking.threshold).sum())
    assert kept >= keep * len(values) - 1e-9
    assert (scores > ranking.threshold).sum() < keep * len(values) + 1e-9
    stricter = fit_ranking(evidence, keep / 2)
    assert (scores >= stricter.threshold).sum() <= kept


def test_without_objects_everything_is_kept_and_a_ranking_survives_json():
    nothing = fit_ranking([], 0.5)
    assert nothing.scores([Evidence(predicted_iou=0.1)])[0] >= nothing.threshold
    made = fit_ranking([Evidence(predicted_iou=0.1, auxiliary_dice=0.5), Evidence(area_ratio=3.0)], 0.5)
    saved = json.loads(json.dumps(made.to_json() | {"keep": 0.5}))
    assert Ranking.from_json(saved) == made and set(saved["centre"]) == set(FEATURES)
    older = {name: {k: v for k, v in saved[name].items() if k not in LATER} for name in ("centre", "spread")}
    assert Ranking.from_json(saved | older) == made

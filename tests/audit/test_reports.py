"""Reports on masks in columns: what goes in comes out, and the ranking by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from kmine.audit.label_issues import ConfidentDisagreement
from kmine.audit.ranking import SHAPE_FEATURES, WEIGHTS
from kmine.audit.reports import MaskReport, MaskReports

NO_SIGNAL = dict.fromkeys(WEIGHTS, math.nan)


def report(sample_id: str, conflict: float = math.nan, **fields) -> MaskReport:
    """Of a pseudo mask of usual shape."""
    pixels = None if math.isnan(conflict) else ConfidentDisagreement(conflict, math.nan, conflict, 0.5)
    known = {} if pixels is None else {"conflict": conflict, "unlike": 0.5}
    common = {"sample_id": sample_id, "kind": "pseudo", "signature": "0a", "height": 4, "width": 6, "classes": (1,),
              "shape": (0.0,) * len(SHAPE_FEATURES), "area": 0.25, "ignored": 0.1, "model_names": ("fold_0",),
              "contradicted": False, "predicted_rle": {1: "05:1"}}  # fmt: skip
    return MaskReport(**common | {"signals": NO_SIGNAL | known, "conflict": pixels} | fields)


def test_a_report_comes_out_as_it_went_in():
    given = [
        report("a", 0.5),
        report("b", model_names=(), predicted_rle={}, classes=(), contradicted=True),
        report("c", 0.0, predicted_rle={1: "0:", 3: "PPYo"}, classes=(1, 3), height=700, kind="labeled"),
        report("d", 0.25, shape=tuple(map(float, range(6))), area=1 / 3, signature="ffffffffffffffff"),
    ]
    packed = MaskReports(iter(given))
    assert len(packed) == 4
    # By their text, in which NaN is equal to NaN.
    assert [*map(repr, packed)] == [*map(repr, given)] and repr(packed[-1]) == repr(given[-1])
    assert [*map(repr, packed[1:3])] == [*map(repr, given[1:3])]
    assert packed.shapes[3].tolist() == [0, 1, 2, 3, 4, 5]
    with pytest.raises(IndexError):
        packed[4]


def test_missing_signals_are_unknown():
    assert math.isnan(MaskReports([report("a", signals={"edge": 0.5})])[0].signals["doubt"])


def test_ranked_by_conflict_and_contradictions_first():
    found = MaskReports(
        [report("good", 0.0), report("contradicted", 0.1, contradicted=True), report("bad", 0.9)]
    ).ranked()
    assert [(r.sample_id, r.rank) for r in found] == [("contradicted", 1), ("bad", 2), ("good", 3)]
    assert found[0].suspicion == 1 and found[1].suspicion > found[2].suspicion
    assert found[0].explanations[0] == "image label: the mask contradicts it"
    assert found[1].explanations == (
        "models: those not trained on it disagree, 90% of the mask is confidently another class",
    )
    assert [r.sample_id for r in found[:2]] == ["contradicted", "bad"]


def test_shapes_are_compared_with_those_of_other_masks_too():
    far = MaskReports([replace(report("far"), shape=(9.0,) * len(SHAPE_FEATURES))] * 3)
    assert [r.signals["area"] for r in far.ranked()] == [0.0] * 3
    others = np.zeros((5, len(SHAPE_FEATURES)))
    assert [r.signals["area"] for r in far.ranked(others)] == [180.0] * 3  # 9 over the smallest scale, .05


def test_no_masks_have_no_ranking():
    assert len(MaskReports(()).ranked(np.zeros((1, len(SHAPE_FEATURES))))) == 0

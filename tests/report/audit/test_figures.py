"""Charts of an audit: their values as text, names escaped."""

from __future__ import annotations

from kmine.report.audit.figures import strata_chart, true_coverage_chart, true_reliability_chart


def test_charts_name_their_series():
    coverage = true_coverage_chart({"estimated Dice": [(0.5, 0.9), (1.0, 0.7)]})
    reliability = true_reliability_chart([(0.4, 0.5, 9), (0.8, 0.9, 10)])
    assert "kept by estimated Dice" in coverage and "bins of 9 to 10 masks" in reliability
    for chart in (coverage, reliability):
        assert chart.startswith("<svg") and chart.endswith("</svg>") and "currentColor" in chart


def test_strata_have_their_names_and_counts_escaped():
    assert "group &lt;b&gt; (3)" in strata_chart([("group <b>", 0.5, 3), ("size small", 0.7, 4)])

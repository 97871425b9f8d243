"""The label-efficiency curve: lines, panels, escaped names."""

from __future__ import annotations

from kmine.report.curve import CurvePoint, label_efficiency

PNG = b"\x89PNG"


def point(method: str, labels: float, dice: float, model: str = "unetpp") -> CurvePoint:
    return CurvePoint(method, model, labels / 100, labels, dice, dice - 0.1, dice + 0.1, 3)


def test_a_line_per_method_and_a_panel_per_model():
    points = [point(m, n, 0.5) for m in ("supervised", "mining (tiny+adapted)") for n in (10, 20)]
    svg, png = label_efficiency(points, "polyps")
    assert png.startswith(PNG) and svg.startswith("<svg") and "currentColor" in svg
    assert all(text in svg for text in ("supervised", "mining (tiny+adapted)", "polyps", "labeled images", "10", "20%"))
    two, _ = label_efficiency([*points, point("supervised", 10, 0.6, "unet")], "polyps")
    assert two.count("labeled images") == 2 and "unet<" in two


def test_names_are_escaped_and_equal_points_give_equal_bytes():
    points = [point("<script>alert(1)</script>", n, 0.5) for n in (10, 20)]
    svg, _ = label_efficiency(points, "a & b")
    assert "<script>" not in svg and "&lt;script&gt;" in svg
    assert label_efficiency(points, "a & b")[0] == svg


def test_no_points_give_no_picture():
    assert label_efficiency([], "nothing") == ("", b"")


def test_an_unknown_number_of_labels_and_a_missing_interval_are_drawn():
    nan = float("nan")
    svg, png = label_efficiency([CurvePoint("supervised", "unet", f, f, 0.5, nan, nan, 1) for f in (0.1, 0.5)], "t")
    assert png.startswith(PNG) and "0.1" in svg

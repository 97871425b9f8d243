"""The report of a run: one self-contained HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from kmine.io.files import write_atomic
from kmine.ops.statistics import Paired
from kmine.report.figures import coverage_chart, dice_chart, reasons_chart, reliability_chart, seconds_chart
from kmine.report.inputs import CATEGORIES, Report
from kmine.report.panels import panels
from kmine.report.table import number, round_columns
from kmine.report.training_curves import training_chart

_HEADINGS = {
    "best": ("Most trusted", "kept, with the highest scores"),
    "worst": ("Least trusted", "kept, with the lowest scores"),
    "dropped": ("Dropped", "rejected by the gate"),
}

SCHEDULES = {"supervised": "in rounds", "supervised_once": "in one schedule"}
"""The supervised baselines in words."""


def write_report(path: Path, report: Report) -> None:
    """Write the page atomically."""
    write_atomic(path, render_html(report).encode("utf-8", "replace"))


def environment() -> jinja2.Environment:
    """Environment of this folder's templates: text is escaped, missing values are errors."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    env = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    env.filters["number"] = number
    return env


def render_html(report: Report) -> str:
    """Render the page; all text of the report is escaped."""
    template = environment().get_template("report.jinja")
    return template.render(
        report=report,
        verdict=headline(report),
        columns=round_columns(report.rounds, report.segmenter),
        charts=_charts(report),
        gallery=_gallery(report),
        refused=[row.round_idx for row in report.rounds if not row.adopted],
    )


def headline(report: Report) -> str:
    """One sentence on the validation result of mining and of the baseline, each by its kept round."""
    if not report.rounds:
        return "No round has finished yet, so there is nothing to compare."
    kept = next((row for row in report.rounds if row.kept), report.rounds[0])
    cases = f"{report.validation_cases} validation case{'' if report.validation_cases == 1 else 's'}"
    reached = f"reached Dice {number(kept.dice)} on {cases}"
    if not any(row.num_pseudo for row in report.rounds):
        labels = f"{kept.num_labeled} label{'' if kept.num_labeled == 1 else 's'}"
        why = f": no round with {report.segmenter} kept a pseudo mask" if report.rounds[-1].round_idx else ""
        return f"Supervised training on {labels} {reached}; nothing was mined{why}."
    reasons = {reason for row in report.rounds for reason, count in row.reasons.items() if count}
    if reasons and not reasons & {"kept", "kept_local", "accepted"}:
        return (
            f"No mask of {report.segmenter} was kept, so nothing was mined; training with pseudo masks empty by "
            f"image-level labels {reached} (round {kept.round_idx})."
        )
    mined = f"Mining with {report.segmenter} {reached} (round {kept.round_idx})"
    if not kept.round_idx:
        mined = f"No round of mining with {report.segmenter} is kept: round 0, trained on the labels alone, {reached}"
    if not report.baselines:
        return (
            f"{mined}; no supervised baseline was trained, so more optimizer steps may explain any gain over round 0."
        )
    (name, dice), *others = report.baselines.items()
    also = "".join(f"; {number(lower)} {SCHEDULES[other]}" for other, lower in others)
    baseline = f"supervised training with as many optimizer steps reached {number(dice)} ({SCHEDULES[name]}{also})"
    silence = "; silence on a clean image counts 1, a false alarm 0" if kept.num_clean or kept.num_empty else ""
    return f"{mined}; {baseline}: {_difference(report.gain)}{silence if report.gain else ''}."


def _difference(gain: Paired | None) -> str:
    """`mining is ahead by 6.3 points [+2.1, +10.5] (...)`, or that no difference is shown."""
    if gain is None:
        return "too few validation images to say which is ahead"
    points, low, high = (100 * value for value in (gain.difference, gain.low, gain.high))
    side = "ahead" if points > 0 else "behind"
    interval = f"[{low:+.1f}, {high:+.1f}] (95 % interval, image by image)"
    if low > 0 or high < 0:
        return f"mining is {side} by {abs(points):.1f} points {interval}"
    return f"no difference shown, {points:+.1f} points {interval}"


def _charts(report: Report) -> list[dict[str, Any]]:
    if not report.rounds:
        return []
    name, calibration = report.segmenter, report.calibration
    curves = training_chart(report.history, [row.round_idx for row in report.rounds if row.retrained])
    drawn = [
        ("Dice per round; the supervised baseline took as many optimizer steps.", dice_chart(report.rounds, name)),
        ("Score on validation images and loss at every validation; history.csv has them with times.", curves),
        ("Objects kept, and dropped, by the gate's reason.", reasons_chart(report.rounds, name)),
        ("Mean Dice of the masks above a threshold of the gate against their share.", coverage_chart(calibration)),
        ("Reliability of the gate's estimates.", reliability_chart(calibration)),
        ("Seconds per stage.", seconds_chart(report.rounds, name)),
    ]
    # matplotlib escapes the text in its SVG.
    return [{"caption": caption, "svg": Markup(svg)} for caption, svg in drawn if svg is not None]


def _gallery(report: Report) -> list[dict[str, Any]]:
    groups = []
    for category in CATEGORIES:
        items = [item for item in report.gallery if item.category == category]
        cards = [{"item": item, "panels": panels(item, report.segmenter)} for item in items]
        heading, meaning = _HEADINGS[category]
        if cards:
            groups.append({"heading": heading, "meaning": meaning, "cards": cards})
    return groups

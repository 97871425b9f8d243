"""The report of a run: one self-contained HTML page."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from kmine.io.files import write_atomic
from kmine.ops.statistics import Paired
from kmine.report.figures import coverage_chart, dice_chart, reliability_chart
from kmine.report.inputs import Report
from kmine.report.panels import panels
from kmine.report.table import number, round_columns
from kmine.report.training_curves import training_chart
from kmine.types import REASONS


class Headline(NamedTuple):
    """What the data show of a method, in words; sentences without their stop."""

    call: str
    """Better, Worse, Not shown or No comparison."""
    by: str
    """By how much, with its interval, on how many images; or why there is no comparison."""
    lead: str = ""
    """The figures compared."""


NO_COMPARISON = "No comparison"
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
        panels=panels,
        reasons=REASONS,
    )


def headline(report: Report) -> Headline:
    """The validation result of mining and of the baseline, each by its kept round."""
    if not report.rounds:
        return Headline(NO_COMPARISON, "no round has finished yet")
    kept = next((row for row in report.rounds if row.kept), report.rounds[0])
    cases = f"{report.validation_cases} validation image{'' if report.validation_cases == 1 else 's'}"
    reached = f"reached Dice {number(kept.dice)} on {cases}"
    if not any(row.num_pseudo for row in report.rounds):
        labels = f"{kept.num_labeled} label{'' if kept.num_labeled == 1 else 's'}"
        why = f": no round with {report.segmenter} kept a pseudo mask" if report.rounds[-1].round_idx else ""
        return Headline(NO_COMPARISON, f"supervised training on {labels} {reached}; nothing was mined{why}")
    reasons = {reason for row in report.rounds for reason, count in row.reasons.items() if count}
    if reasons and not reasons & {"kept", "kept_local", "accepted"}:
        why = f"no mask of {report.segmenter} was kept, so nothing was mined; training with pseudo masks empty by"
        return Headline(NO_COMPARISON, f"{why} image-level labels {reached} (round {kept.round_idx})")
    mined = f"Mining with {report.segmenter} {reached} (round {kept.round_idx})"
    if not kept.round_idx:
        mined = f"No round of mining with {report.segmenter} is kept: round 0, trained on the labels alone, {reached}"
    if not report.baselines:
        why = "no supervised baseline was trained, so more optimizer steps may explain any gain over round 0"
        return Headline(NO_COMPARISON, why, mined)
    (name, dice), *others = report.baselines.items()
    also = "".join(f"; {number(lower)} {SCHEDULES[other]}" for other, lower in others)
    baseline = f"supervised training with as many optimizer steps reached {number(dice)} ({SCHEDULES[name]}{also})"
    silence = "; silence on a clean image counts 1, a false alarm 0" if kept.num_clean or kept.num_empty else ""
    return verdict_on("mining", report.gain, cases)._replace(lead=f"{mined}; {baseline}{silence}")


def verdict_on(method: str, gain: Paired | None, cases: str, *, shown: bool = True) -> Headline:
    """The verdict on a method's gain in Dice over the baseline; with `shown` False not even without 0 in its interval.

    `cases` names the images compared, in words; `gain` is None where they are too few.
    """
    if gain is None:
        return Headline("Not shown", f"{cases} are too few to say whether {method} is better")
    points, low, high = (100 * value for value in (gain.difference, gain.low, gain.high))
    if points == low == high == 0:
        return Headline("Not shown", f"{method} and the baseline score the same in each of {cases}")
    if math.isnan(low):
        return Headline("Not shown", f"{points:+.1f} points of Dice by {method}, without an interval, on {cases}")
    interval = f"95 % interval {low:+.1f} to {high:+.1f}, image by image, on {cases}"
    if not shown or low <= 0 <= high:
        among = "" if low <= 0 <= high else ", among so many comparisons,"
        return Headline("Not shown", f"{points:+.1f} points of Dice by {method}{among} may be chance ({interval})")
    verb = "gains" if points > 0 else "loses"
    call = "Better" if points > 0 else "Worse"
    return Headline(call, f"{method} {verb} {abs(points):.1f} points of Dice over the baseline ({interval})")


def _charts(report: Report) -> list[dict[str, Any]]:
    if not report.rounds:
        return []
    rows, calibration = report.rounds, report.calibration
    curves = training_chart(report.history, [row.round_idx for row in rows if row.retrained])
    drawn = [
        ("Dice per round; the supervised baseline took as many optimizer steps.", dice_chart(rows, report.segmenter)),
        ("Score on validation images and loss at every validation; history.csv has them with times.", curves),
        ("Mean Dice of the masks above a threshold of the gate against their share.", coverage_chart(calibration)),
        ("Reliability of the gate's estimates.", reliability_chart(calibration)),
    ]
    # matplotlib escapes the text in its SVG.
    return [{"caption": caption, "svg": Markup(svg)} for caption, svg in drawn if svg is not None]

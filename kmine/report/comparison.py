"""The table of methods on the test split, as Markdown, LaTeX, HTML and tidy rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field, fields

from markupsafe import Markup

from kmine.config.sweep import MINING
from kmine.ops.statistics import Paired
from kmine.report.html import Headline, environment, verdict_on
from kmine.report.table import DASH, duration, number, percent

NAN = float("nan")
ALPHA = 0.05
"""A difference is shown if its interval excludes 0 and its corrected p-value is below this."""


@dataclass(frozen=True)
class ComparisonRow:
    """One method at one label fraction. Unknown floats are NaN."""

    method: str
    model: str
    label_fraction: float
    num_labeled: int | None
    seeds: tuple[int, ...]
    dice: float
    """Mean over cases and seeds, of the checkpoint in use (`fit.checkpoint`); so are `iou`, `hd95` and `num_missed`."""
    dice_sd: float
    """Standard deviation over seeds."""
    dice_final: float
    """`dice` of the checkpoint of the last step."""
    iou: float
    hd95: float
    num_missed: float
    is_baseline: bool = False
    difference: float = NAN
    """Mean paired difference in Dice to the baseline."""
    low: float = NAN
    """Lower end of its 95 % interval."""
    high: float = NAN
    p_value: float = NAN
    p_holm: float = NAN
    """Holm-corrected over all comparisons of the table."""
    num_pairs: int = 0
    """Pairs of an image (or volume) and a seed behind the difference."""
    seconds: float = NAN
    """Training and mining, mean over seeds."""
    peak_memory_mb: float = NAN
    num_parameters: float = NAN
    num_empty: float = 0.0
    """Cases without Dice (truth and prediction empty), mean over seeds."""
    dice_lesion: float = NAN
    """Mean Dice where there is a lesion: the same cases in every row."""
    num_clean: int = 0
    """Clean cases; of several classes, the sum over them."""
    false_alarm_rate: float = NAN
    """Share of the clean cases with a prediction, mean over seeds."""

    @property
    def is_shown(self) -> bool:
        """Whether the data show a difference to the baseline."""
        return (self.low > 0 or self.high < 0) and self.p_holm < ALPHA


@dataclass(frozen=True)
class Comparison:
    """The table with its notes."""

    rows: Sequence[ComparisonRow]
    baseline: str
    segmenter: str
    notes: Sequence[str]
    """Sentences on data, split and statistics."""
    labels_needed: Mapping[tuple[str, str, float], str] = field(default_factory=dict)
    """Labels that the baseline needs for the same Dice, as text, by method, model and label fraction."""
    chart: str = ""
    """Inline SVG of the label-efficiency curve; empty with one label fraction."""
    unit: str = "image"
    """What a case is: an image, or a volume."""


@dataclass(frozen=True)
class _Column:
    heading: str
    cell: Callable[[ComparisonRow], str]
    numeric: bool = True


def comparison_columns(table: Comparison) -> list[_Column]:
    """Columns of the table; those equal in all rows, or known in none, are left out."""

    def differ(name: str) -> bool:
        return len({getattr(row, name) for row in table.rows}) > 1

    def any_finite(name: str) -> bool:
        return any(math.isfinite(getattr(row, name)) for row in table.rows)

    def needed(row: ComparisonRow) -> str:
        return table.labels_needed.get((row.method, row.model, row.label_fraction), DASH)

    return [
        *([_Column("model", lambda row: row.model, False)] if differ("model") else []),
        *([_Column("labels", _labels)] if differ("label_fraction") else []),
        _Column("method", lambda row: row.method, False),
        *([_Column("seeds", lambda row: str(len(row.seeds)))] if differ("seeds") else []),
        _Column("Dice", lambda row: number(row.dice)),
        *(_CLEAN_COLUMNS if any(row.num_clean or row.num_empty for row in table.rows) else ()),
        _Column("sd over seeds", lambda row: number(row.dice_sd)),
        _Column("Dice, last step", lambda row: number(row.dice_final)),
        _Column("IoU", lambda row: number(row.iou)),
        _Column("HD95 (px or mm)", lambda row: number(row.hd95, 1)),
        _Column("missed", lambda row: number(row.num_missed, 1)),
        _Column("difference in Dice", _difference),
        _Column("p, Holm", lambda row: _p(row.p_holm)),
        *([_Column("labels for the same Dice", needed)] if table.labels_needed else []),
        *([_Column("time", lambda row: duration(row.seconds))] if any_finite("seconds") else []),
        *([_Column("peak MB", lambda row: number(row.peak_memory_mb, 0))] if any_finite("peak_memory_mb") else []),
        *([_Column("parameters", _millions)] if any_finite("num_parameters") else []),
    ]


_CLEAN_COLUMNS = (
    _Column("left out", lambda row: number(row.num_empty, 1)),
    _Column("Dice where there is a lesion", lambda row: number(row.dice_lesion)),
    _Column(
        "false alarms", lambda row: f"{percent(row.false_alarm_rate)} of {row.num_clean}" if row.num_clean else DASH
    ),
)
"""Shown where an image may be clean."""


def _labels(row: ComparisonRow) -> str:
    return f"{row.label_fraction:g}" + (f" ({row.num_labeled})" if row.num_labeled is not None else "")


def _difference(row: ComparisonRow) -> str:
    """`+0.021 [-0.003, +0.046]; no difference shown`; a dash for the baseline and without pairs."""
    if not math.isfinite(row.difference):
        return DASH
    interval = f" [{row.low:+.3f}, {row.high:+.3f}]" if math.isfinite(row.low) else ""
    return f"{row.difference:+.3f}{interval}{'' if row.is_shown else '; no difference shown'}"


def _p(value: float) -> str:
    if not math.isfinite(value):
        return DASH
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _millions(row: ComparisonRow) -> str:
    return f"{row.num_parameters / 1e6:.2f} M" if math.isfinite(row.num_parameters) else DASH


def _cells(table: Comparison) -> Iterator[list[str]]:
    used = comparison_columns(table)
    return ([column.cell(row) for column in used] for row in table.rows)


def markdown(table: Comparison) -> str:
    """The notes and the table as Markdown."""
    used = comparison_columns(table)
    lines = [*table.notes, "", _line(column.heading for column in used), "|---" * len(used) + "|"]
    return "\n".join([*lines, *(_line(text.replace("|", "\\|") for text in cells) for cells in _cells(table))]) + "\n"


def summary_lines(table: Comparison) -> Iterator[str]:
    """A line a method: Dice, and its difference to the baseline."""
    width = max((len(row.method) for row in table.rows), default=0)
    for row in table.rows:
        gap = f"   {_difference(row)} against {table.baseline}" if math.isfinite(row.difference) else ""
        yield f"  {row.method:<{width}}  {number(row.dice)}{gap}"


def _line(cells: Iterator[str]) -> str:
    return "| " + " | ".join(cells) + " |"


_LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "≤": r"$\leq$", DASH: "--",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}  # fmt: skip


def escape_latex(text: str) -> str:
    """Escape text for LaTeX, on one line."""
    return " ".join("".join(_LATEX.get(letter, letter) for letter in text).split())


def latex(table: Comparison) -> str:
    """A table environment with the notes in its caption; needs \\usepackage{booktabs}."""
    env = environment().overlay(autoescape=False)
    env.filters["tex"] = escape_latex
    return env.get_template("comparison.tex.jinja").render(
        table=table, columns=comparison_columns(table), rows=[*_cells(table)]
    )


def html(table: Comparison) -> str:
    """A self-contained page, which opens with the verdicts on mining; all text of the table is escaped."""
    differing = [row for row in table.rows if math.isfinite(row.difference)]
    page = environment().get_template("comparison.jinja")
    return page.render(
        table=table,
        columns=comparison_columns(table),
        chart=Markup(table.chart),  # matplotlib escapes the text in it
        compared=[row for row in differing if row.method.startswith(MINING)] or differing,
        reach=max((abs(end) for row in differing for end in (row.low, row.high) if math.isfinite(end)), default=0),
        verdict_of=lambda row: _verdict(row, table.unit),
        is_known=math.isfinite,
        p=_p,
    )


def _verdict(row: ComparisonRow, unit: str) -> Headline:
    num, seeds = row.num_pairs, len(row.seeds)
    cases = f"{num} {unit}s" if seeds == 1 else f"{num} pairs of {unit} and seed"
    return verdict_on(row.method, Paired(row.difference, row.low, row.high, num), cases, shown=row.is_shown)


def tidy(table: Comparison) -> tuple[list[str], list[list[object]]]:
    """Header and one row per method and label fraction, unrounded; unknown values are empty."""
    header = [column.name for column in fields(ComparisonRow)]
    return [*header, "shown"], [[*map(_plain, astuple(row)), row.is_shown] for row in table.rows]


def _plain(value: object) -> object:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    return " ".join(map(str, value)) if isinstance(value, tuple) else value

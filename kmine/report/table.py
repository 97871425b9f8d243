"""The table of rounds, for the page and the terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions
from rich.table import Table
from rich.text import Text

from kmine.io.console import duration
from kmine.report.inputs import RoundRow

DASH = "–"
"""Shown for an unknown number."""
WIDEST = 1000
"""Terminal width at which the full table is measured."""


@dataclass(frozen=True)
class Column:
    """One column: heading, meaning, and the cell of a row."""

    heading: str
    meaning: str
    cell: Callable[[RoundRow], str]
    numeric: bool = True
    detail: bool = False
    """Left out in a narrow terminal; the page shows all columns."""


def number(value: float | None, digits: int = 3) -> str:
    """`0.812`; an en dash for None, NaN and infinity."""
    return DASH if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    """`43 %` for a share of 0.43, one decimal below 10 %; an en dash if unknown."""
    if value is None or not math.isfinite(value):
        return DASH
    return f"{100 * value:.0f} %" if value >= 0.1 or value == 0 else f"{100 * value:.1f} %"


def has_baseline(rows: Sequence[RoundRow]) -> bool:
    """Whether any row has a supervised baseline."""
    return any(row.supervised_dice is not None for row in rows)


def round_columns(rows: Sequence[RoundRow], segmenter: str) -> list[Column]:
    """Columns that apply to these rows; round 0, trained on the labels only, has no segmenter."""
    changed = "share of the kept objects' pixels that the segmenter changed"
    corrected = "of the local model's wrong pixels, by withheld masks (kmine audit --with_withheld)"
    unit = "mm where the spacing of every image is known, else pixels"
    gain = "Dice, image by image, over the last adopted round, with its 80 % interval (in older runs 90 %)"
    compared = any(math.isfinite(row.difference) for row in rows)
    clean = any(row.num_clean or row.num_empty for row in rows)
    used = [
        Column("round", "0 is trained on the labels only", lambda row: str(row.round_idx)),
        Column("segmenter", "the promptable model", lambda row: segmenter if row.round_idx else DASH, False),
        Column("labeled", "images with given masks", lambda row: str(row.num_labeled), detail=clean),
        Column("pseudo", "images with a mined mask", lambda row: str(row.num_pseudo)),
        Column("cover", "share of the unlabeled images with one", lambda row: percent(row.coverage), detail=True),
        Column("in, out", "pseudo-labeled images added (new or again) and removed", _moved, detail=True),
        Column("changed", changed, lambda row: percent(row.changed_pixels), detail=True),
        Column("corrected / broken", corrected, lambda row: row.correction, detail=True),
        Column("Dice", "checkpoint in use (fit.checkpoint)", lambda row: number(row.dice)),
        Column("Dice last", "checkpoint of the last step", lambda row: number(row.dice_final), detail=clean),
    ]
    if clean:
        used += [
            Column("out", "without Dice: empty truth and prediction", lambda row: str(row.num_empty), detail=True),
            Column("Dice lesion", "where there is a lesion", lambda row: number(row.dice_lesion)),
            Column("false alarms", "share of the clean images", lambda row: percent(row.false_alarm_rate)),
        ]
    if has_baseline(rows):
        used += [
            Column("sup.", "supervised, equal steps, checkpoint in use", lambda row: number(row.supervised_dice)),
            Column("sup. last", "its last step", lambda row: number(row.supervised_dice_final), detail=clean),
        ]
    if has_baseline(rows) and clean:
        used += [
            Column("sup. lesion", "as Dice lesion", lambda row: number(row.supervised_dice_lesion), detail=True),
            Column("sup. alarms", "its share", lambda row: percent(row.supervised_false_alarm_rate), detail=True),
        ]
    for name in sorted({name for row in rows for name in row.by_model}):
        used += _columns_of_model(name, clean)
    return [
        *used,
        *([Column("gain", gain, _gain, detail=True)] if compared else []),
        Column("IoU", "checkpoint in use", lambda row: number(row.iou), detail=True),
        Column("HD95", unit, lambda row: number(row.hd95, 1), detail=True),
        Column("missed", "true objects without any prediction", lambda row: str(row.num_missed)),
        Column("adopted", "unless Dice may have fallen by more than tolerated; kept: the run's model", _adopted, False),
        Column("time", "all stages", lambda row: duration(sum(row.seconds.values())) if row.seconds else DASH),
    ]


def _columns_of_model(name: str, clean: bool) -> list[Column]:
    """Columns of a baseline model."""

    def cell(n: int) -> Callable[[RoundRow], str]:
        return lambda row: (percent if n == 2 else number)(row.by_model.get(name, (None,) * 3)[n])

    meaning = "labels only, equal steps, checkpoint in use"
    columns = [Column(name, meaning, cell(0))]
    if clean:
        columns.append(Column(f"{name} lesion", "as Dice lesion", cell(1)))
        columns.append(Column(f"{name} alarms", "its share", cell(2), detail=True))
    return columns


def _moved(row: RoundRow) -> str:
    """`+12 -3`; an en dash in round 0."""
    known = (row.num_new, row.num_readmitted, row.num_removed)
    return DASH if None in known else f"+{known[0] + known[1]} -{known[2]}"


def _gain(row: RoundRow) -> str:
    """`+0.021 [-0.003, +0.046]`; an en dash without comparison."""
    values = (row.difference, row.difference_low, row.difference_high)
    return "{:+.3f} [{:+.3f}, {:+.3f}]".format(*values) if all(map(math.isfinite, values)) else DASH


def _adopted(row: RoundRow) -> str:
    """`kept`, `yes`, or `no` with the reason, if any: `no: fell by 0.034`; a retrained model is named so."""
    verdict = "kept" if row.kept else "yes" if row.adopted else "no"
    return verdict + " (retrained)" * row.retrained + row.reason.removeprefix("adopted").removeprefix("refused")


@dataclass(frozen=True)
class RoundsTable:
    """The table for a rich console: all columns if they fit, else the essential ones."""

    rows: Sequence[RoundRow]
    segmenter: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        """Yield the table for this width."""
        full = self._table(detail=True)
        fits = console.measure(full, options=options.update(width=WIDEST)).maximum <= options.max_width
        yield full if fits else self._table(detail=False)

    def _table(self, *, detail: bool) -> Table:
        title = Text(f"validation, per round (segmenter: {self.segmenter})")
        caption = Text("Rounds were adopted and kept on validation; kmine.compare gives test figures.")
        table = Table(title=title, caption=caption, box=None, pad_edge=False, collapse_padding=True)
        used = [column for column in round_columns(self.rows, self.segmenter) if detail or not column.detail]
        for column in used:
            table.add_column(Text(column.heading.replace(" ", "\n")), justify="right" if column.numeric else "left")
        for row in self.rows:
            table.add_row(*(Text(column.cell(row)) for column in used), style=None if row.adopted else "dim")
        return table

"""history.csv of a run: loss, validation score, learning rate and clock time at every validation of every training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import NamedTuple

from kmine.store.artifacts import DamagedError
from kmine.store.run_folder import RunFolder

HISTORY = "history.csv"
COLUMNS = ("arm", "round", "step", "loss", "score", "learning_rate", "time")
LOOP_ARM = "mining"
"""Name in `arm` of the trainings of the loop itself, whose folders lie in the run folder."""
Entry = tuple[int, float, float]
"""(step, mean training loss since the last entry, validation score)."""
Clock = tuple[float, float]
"""(learning rate of that step, Unix time)."""


class HistoryRow(NamedTuple):
    """A validation of a training."""

    arm: str
    round_idx: int
    step: int
    loss: float
    score: float


def record_history(
    run: RunFolder, method_dir: str, round_idx: int, entries: Sequence[Entry], clock: Sequence[Clock] = ()
) -> None:
    """Replace the rows of one training in history.csv, at its place, and give a new last row to the run's trackers.

    `clock` belongs to the last entries, as trainings begun by older code have none. A resumed training so replaces the
    rows that it repeats.
    """
    if run.follows or not entries:
        return
    arm, shift = method_dir or LOOP_ARM, len(entries) - len(clock)
    own = [_cells(arm, round_idx, entry, clock[n - shift] if n >= shift else None) for n, entry in enumerate(entries)]
    before = _read(run)
    trainings: dict[tuple[str, str], list[list[str]]] = {}
    for row in before:
        trainings.setdefault((row[0], row[1]), []).append(row)
    trainings[arm, str(round_idx)] = own
    table = [row for rows in trainings.values() for row in rows]
    if table != before:
        run.write_csv(HISTORY, COLUMNS, table)
        step, loss, score = entries[-1]
        values = {"loss": loss, "score": score} | ({"learning_rate": clock[-1][0]} if clock else {})
        track(run, {f"{arm}/round_{round_idx:02d}/{name}": value for name, value in values.items()}, step)


def track(run: RunFolder, values: Mapping[str, float], step: int) -> None:
    """Send numbers by name to the trackers of a run."""
    for tracker in run.trackers:
        tracker.log_metrics(values, step, run.log)


def read_history(run: RunFolder) -> list[HistoryRow]:
    """Rows of history.csv; empty where there is none, as in older runs, or a damaged one."""
    try:
        return [
            HistoryRow(arm, int(n), int(step), float(loss), float(score))
            for arm, n, step, loss, score, *_ in _read(run)
        ]
    except ValueError:
        return []


def _read(run: RunFolder) -> list[list[str]]:
    """Cells of the rows; a damaged file counts as empty, as it is made anew from the trainings."""
    try:
        rows = run.read_csv(HISTORY) or []
    except DamagedError as error:
        run.log(str(error))
        rows = []
    return [[*row.values()] for row in rows if tuple(row) == COLUMNS]


def _cells(arm: str, round_idx: int, entry: Entry, clock: Clock | None) -> list[str]:
    step, loss, score = entry
    rate, at = ("", "") if clock is None else (f"{clock[0]:.4g}", _iso(clock[1]))
    return [arm, str(round_idx), str(step), f"{loss:.6f}", f"{score:.6f}", rate, at]


def _iso(at: float) -> str:
    """Local time with its offset from UTC, as 2026-01-31T12:00:00+01:00."""
    return datetime.fromtimestamp(at).astimezone().isoformat(timespec="seconds")

"""history.csv: a row a validation, replaced where a training repeats it, sent to trackers once."""

from __future__ import annotations

import csv
from datetime import datetime
from types import SimpleNamespace

import pytest

from kmine.store.history import COLUMNS, HISTORY, read_history, record_history
from kmine.store.run_folder import RunFolder

FIRST = [(10, 0.5, 0.25), (20, 0.4, 0.5)]
CLOCK = [(1e-3, 1000.0), (5e-4, 2000.0)]


@pytest.fixture
def run(tmp_path):
    store = RunFolder(tmp_path / "run")
    store.sent = []
    send = lambda values, step, log: store.sent.append((step, values))  # noqa: E731
    store.trackers = [SimpleNamespace(log_metrics=send, close=lambda log: None)]
    yield store
    store.close()


def rows(run):
    with (run.root / HISTORY).open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_row_holds_what_the_training_knows(run):
    record_history(run, "", 0, FIRST, CLOCK)
    found = rows(run)
    assert tuple(found[0]) == COLUMNS
    assert found[1] | {"time": ""} == {
        "arm": "mining",
        "round": "0",
        "step": "20",
        "loss": "0.400000",
        "score": "0.500000",
        "learning_rate": "0.0005",
        "time": "",
    }
    assert datetime.fromisoformat(found[1]["time"]).timestamp() == 2000.0
    assert [tuple(row) for row in read_history(run)] == [("mining", 0, 10, 0.5, 0.25), ("mining", 0, 20, 0.4, 0.5)]
    assert run.sent == [
        (20, {f"mining/round_00/{n}": v for n, v in (("loss", 0.4), ("score", 0.5), ("learning_rate", 5e-4))})
    ]


def test_a_repeated_training_replaces_its_own_rows_at_their_place(run):
    record_history(run, "", 0, FIRST, CLOCK)
    record_history(run, "supervised", 1, FIRST[:1], CLOCK[:1])
    record_history(run, "", 0, FIRST[:1], [(2e-3, 3000.0)])
    assert [(row["arm"], row["step"], row["learning_rate"]) for row in rows(run)] == [
        ("mining", "10", "0.002"),
        ("supervised", "10", "0.001"),
    ]


def test_what_is_read_back_unchanged_is_neither_written_nor_sent_again(run):
    record_history(run, "", 0, FIRST, CLOCK)
    (run.root / HISTORY).chmod(0o444)
    before = (run.root / HISTORY).stat().st_mtime_ns
    record_history(run, "", 0, [list(row) for row in FIRST], [list(row) for row in CLOCK])
    assert (run.root / HISTORY).stat().st_mtime_ns == before and len(run.sent) == 1


def test_a_training_begun_by_older_code_has_times_for_its_last_rows_alone(run):
    record_history(run, "", 0, FIRST, CLOCK[1:])
    assert [(row["step"], bool(row["time"])) for row in rows(run)] == [("10", False), ("20", True)]


def test_a_damaged_table_is_made_anew(run):
    (run.root / HISTORY).write_text("arm,round\n1,2,3\n")
    assert read_history(run) == []
    record_history(run, "", 0, FIRST, CLOCK)
    assert len(rows(run)) == 2


def test_a_follower_and_a_training_without_validation_write_nothing(run):
    record_history(run, "", 0, [])
    record_history(RunFolder(run.root, follows=True), "", 0, FIRST, CLOCK)
    assert not (run.root / HISTORY).exists() and not run.sent

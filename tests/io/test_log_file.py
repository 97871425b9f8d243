"""The log file of a run: clock times, everything passed on, the error that ended it."""

from __future__ import annotations

import re

import pytest
from helpers.small import Silent

from kmine.errors import UserError
from kmine.io.log_file import LogFile, logged


def test_lines_have_clock_times_and_are_passed_on(tmp_path):
    shown, path = Silent(), tmp_path / "log.txt"
    log = LogFile(path, shown)
    log.start("round 0: training", 20)
    log.advance(10, "not written")
    log.log("a\x1b[31m name")
    log.advance(20, "loss 0.5")
    log.advance(20)
    lines = path.read_text().splitlines()
    assert [re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d{4} ", "", line) for line in lines] == [
        "round 0: training (20)",
        "a\\x1b[31m name",
        "round 0: training: loss 0.5 in 0.0 s",
    ]
    assert shown.said == ["a\x1b[31m name"]


def test_sessions_follow_one_another_and_an_error_is_the_last_line(tmp_path):
    path = tmp_path / "log.txt"
    with logged(path, Silent()):
        pass
    with pytest.raises(UserError), logged(path, Silent()) as progress:
        progress.log("works")
        raise UserError("data: no file")
    with pytest.raises(UserError), logged(path, Silent()):
        raise UserError("refused: nothing is written")
    ends = [line.split(" ", 2)[2] for line in path.read_text().splitlines()]
    assert ends == ["begins", "done in 0.0 s", "begins", "works", "ended by UserError: data: no file"]

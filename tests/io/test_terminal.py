"""Sentences and progress on stderr."""

from __future__ import annotations

import re

from kmine.io.terminal import Terminal


def test_sentences_are_printed_as_they_are(capsys):
    path = "runs/" + "long/" * 40 + "[bold]name[/]"
    terminal = Terminal()
    terminal.log(f"run folder {path}")
    assert capsys.readouterr().err == f"run folder {path}\n"


def test_progress_without_a_terminal_is_a_few_lines(capsys):
    terminal = Terminal()
    terminal.start("training", 1000)
    for done in range(1, 1001):
        terminal.advance(done)
    lines = capsys.readouterr().err.splitlines()
    assert 4 <= len(lines) <= 6
    assert re.fullmatch(r"training: 1000/1000  \(\d\.\d s\)", lines[-1])

"""Control characters become visible, encodings lack characters, signals end a command with a line."""

from __future__ import annotations

import io
import logging
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from kmine import cli
from kmine.io.console import Stopped, replace_unknown_characters, say, stop_signals, tame_messages, visible


def test_controls_become_escapes_and_other_text_stays():
    assert visible("a\x1b[31mb\rc\x07\x9b\u202e") == "a\\x1b[31mb\\x0dc\\x07\\x9b\\u202e"
    assert visible("\u00e9 \u2014 mm\u00b2\t1\n") == "\u00e9 \u2014 mm\u00b2\t1\n"


def test_names_reach_the_terminal_escaped(capsys):
    terminal = cli.Terminal()
    terminal.log("image a\x1b]0;title\x07 :bug: [red]x[/]")
    say("b\x1b[2J\n")
    cli.fail("kmine x", "c\x1b[2J" + "x" * 9999)
    out, err = capsys.readouterr()
    assert err.startswith("image a\\x1b]0;title\\x07 :bug: [red]x[/]\nkmine x: error: c\\x1b[2Jxx")
    assert (out, len(err) < 2200) == ("b\\x1b[2J\n", True)


def test_warnings_and_log_messages_of_libraries_are_escaped(capsys):
    tame_messages()
    assert "\x1b" not in warnings.formatwarning("tag \x1b[2J", UserWarning, "file.py", 1)
    record = logging.getLogRecordFactory()("name", logging.WARNING, "file.py", 1, "tag %s", ("\x1b[2J",), None)
    assert record.getMessage() == "tag \\x1b[2J"


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
def test_characters_that_a_terminal_lacks_are_question_marks(monkeypatch, encoding):
    stream = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    replace_unknown_characters()
    say("Dice \u2265 0.5, file \udcff\n")
    stream.flush()
    assert (
        stream.buffer.getvalue().decode(encoding) == f"Dice {chr(0x2265) if encoding == 'utf-8' else '?'} 0.5, file ?\n"
    )


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_a_signal_ends_a_command_with_the_line_of_ctrl_c(capsys, signum, code):
    # Under nohup it is ignored.
    found = signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)

    def work() -> int:
        os.kill(os.getpid(), signum)
        return 0

    try:
        before = signal.getsignal(signum)
        assert cli.guarded("kmine x", work) == code
        assert signal.getsignal(signum) == before
    finally:
        signal.signal(signum, found)
    assert capsys.readouterr().err == "\nkmine x: interrupted; the same command resumes where it stopped\n"


def test_an_ignored_signal_stays_ignored(monkeypatch):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def test_the_second_signal_is_not_caught():
    with pytest.raises(Stopped), stop_signals():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


WORK = """
import sys
from kmine import cli
from kmine.io.console import say
def work():
    if sys.argv[1] in ("log", "both"):
        cli.Terminal().log("progress")
    if sys.argv[1] != "log":
        say("row\\n" * int(sys.argv[2]))
    return 3
sys.exit(cli.guarded("kmine x", work))
"""


@pytest.mark.parametrize("program", [["-c", WORK, "say", "1"], ["-c", WORK, "say", "99999"], ["-m", "kmine", "--help"]])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_gone_ends_the_command_without_a_word(program, unbuffered):
    env = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    assert run_into(program, stdout=broken_pipe(), env=env) == (141, "")


def test_progress_that_nobody_reads_ends_the_command_too():
    assert run_into(["-c", WORK, "log"], stderr=broken_pipe())[0] == 141


def test_help_of_a_command_into_a_reader_that_has_gone():
    program = [
        "-c",
        "from kmine import cli; from kmine.fetch import FetchConfig;"
        "cli.parse(FetchConfig, ['--help'], prog='kmine x', description='words')",
    ]
    code, err = run_into(program, stdout=broken_pipe())  # argparse drops errors of unbuffered output
    assert (code in (0, 141), err) == (True, "")


def test_a_full_or_closed_output_is_no_traceback():
    with Path("/dev/full").open("wb") as full:
        code, err = run_into(["-c", WORK, "say", "1"], stdout=full)
    said = "kmine x: error: the output: the disk is full; free some space and run the same command again, it resumes\n"
    assert (code, err) == (2, said)
    assert run_into(["-c", WORK, "both", "1"], preexec_fn=lambda: os.close(1)) == (3, "progress\n")
    assert run_into(["-c", WORK, "both", "1"], preexec_fn=lambda: os.close(2))[0] == 3


def broken_pipe() -> int:
    reading, writing = os.pipe()
    os.close(reading)
    return writing


def run_into(program: list[str], **options) -> tuple[int, str]:
    """Exit code and stderr of a Python program."""
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, **options}
    done = subprocess.run([sys.executable, *program], timeout=60, **options)
    return done.returncode, (done.stderr or b"").decode()

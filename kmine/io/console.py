"""Between a command and its terminal: control characters, encodings, signals that end it."""

from __future__ import annotations

import logging
import math
import os
import select
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TextIO

CONTROLS = [*range(9), *range(11, 32), *range(127, 160), 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
"""All but tab and newline: they move the cursor, change colours or titles, or reverse the reading direction."""
_VISIBLE = {code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" for code in CONTROLS}
STOPS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))

BROKEN_PIPE = 13
"""SIGPIPE, which Windows has not."""


class Stopped(KeyboardInterrupt):
    """A signal of `STOPS`, such as a cluster's preemption; handled as Ctrl-C is."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


def visible(text: str) -> str:
    r"""Text from names, files and notes for a terminal: control characters as escapes such as `\x1b`."""
    return text.translate(_VISIBLE)


def duration(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3.1 min` or `2.1 h`; an en dash if unknown."""
    if not math.isfinite(seconds):
        return "–"
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3597 else f"{seconds / 3600:.1f} h"


def say(text: str) -> None:
    """Write to stdout, control characters as escapes."""
    sys.stdout.write(visible(text))


@cache
def tame_messages() -> None:
    """Escape control characters in warnings and log messages of libraries, which may quote a file's content."""
    format_warning, make_record = warnings.formatwarning, logging.getLogRecordFactory()

    def record(*args: Any, **options: Any) -> logging.LogRecord:
        made = make_record(*args, **options)
        made.msg, made.args = visible(made.getMessage()), None
        return made

    warnings.formatwarning = lambda *args, **options: visible(format_warning(*args, **options))
    logging.setLogRecordFactory(record)


def replace_unknown_characters() -> None:
    """Let stdout and stderr print `?` for what their encoding lacks, also for names that are not UTF-8."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


@contextmanager
def open_outputs() -> Iterator[None]:
    """Let a command end without a traceback where stdout or stderr is closed, full, or has lost its reader (`| head`).

    Raises:
        SystemExit: with 141, as a shell names a process that SIGPIPE ended, where the reader has gone.
    """
    for name in ("stdout", "stderr"):  # None where a command is started with `>&-`
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        if not any(_has_no_reader(stream) for stream in (sys.stdout, sys.stderr)):
            raise
        raise SystemExit(128 + BROKEN_PIPE) from None
    finally:
        _drop_unwritable(sys.stdout)
        _drop_unwritable(sys.stderr)


def _has_no_reader(stream: TextIO) -> bool:
    if not hasattr(select, "poll"):  # Windows
        return True
    poll = select.poll()
    poll.register(stream, select.POLLOUT)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _drop_unwritable(stream: TextIO) -> None:
    """Send what cannot be written to nowhere, so that the interpreter's own last flush is silent."""
    try:
        stream.flush()
    except OSError:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())
        stream.flush()


@contextmanager
def stop_signals() -> Iterator[None]:
    """Raise `Stopped` on SIGTERM and SIGHUP inside the block; the second signal ends the process at once.

    A signal that is ignored (nohup) stays so, as does a handler that another program has set.
    """
    is_main = threading.current_thread() is threading.main_thread()
    ours = [signum for signum in STOPS if is_main and signal.getsignal(signum) is signal.SIG_DFL]
    for signum in ours:
        signal.signal(signum, _stop)
    try:
        yield
    finally:
        for signum in ours:
            signal.signal(signum, signal.SIG_DFL)


def _stop(signum: int, frame: object) -> None:
    signal.signal(signum, signal.SIG_DFL)
    raise Stopped(signum)

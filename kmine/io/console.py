"""Between a command and its terminal: control characters, encodings, signals that end it."""

from __future__ import annotations

import logging
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

CONTROLS = [*range(9), *range(11, 32), *range(127, 160), 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
"""All but tab and newline: they move the cursor, change colours or titles, or reverse the reading direction."""
_VISIBLE = {code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" for code in CONTROLS}
STOPS = (signal.SIGTERM, signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """A signal of `STOPS`, such as a cluster's preemption; handled as Ctrl-C is."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


def visible(text: str) -> str:
    r"""Text from names, files and notes for a terminal: control characters as escapes such as `\x1b`."""
    return text.translate(_VISIBLE)


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

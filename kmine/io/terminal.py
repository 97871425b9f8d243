"""Progress of a command on stderr: bars in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import Any, NoReturn

from kmine.io.console import duration, visible


def _broken_pipe() -> NoReturn:
    raise BrokenPipeError("the reader of the progress has gone")


class Terminal:
    """A `ProgressReporter` on stderr: progress bars in a terminal, plain lines elsewhere."""

    def __init__(self, *, quiet: bool = False) -> None:
        from rich.console import Console

        self.console = Console(stderr=True, quiet=quiet)
        self.console.on_broken_pipe = _broken_pipe  # type: ignore[method-assign]
        self._bar: Any = None
        self._title, self._total, self._shown, self._began = "", 0, -1, 0.0

    def start(self, title: str, total: int) -> None:
        """Begin a piece of work of `total` steps."""
        self.stop()
        self._title, self._total, self._shown, self._began = visible(title), total, -1, time.perf_counter()
        if self.console.is_terminal and total:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            title, text = (TextColumn(f"{{task.{name}}}", markup=False) for name in ("description", "fields[text]"))
            columns = (title, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), text)
            self._bar = Progress(*columns, console=self.console)
            self._task = self._bar.add_task(self._title, total=total, text="")
            self._bar.start()

    def advance(self, done: int, text: str = "") -> None:
        """Report `done` finished steps."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, text=visible(text))
            if done >= self._total:
                self.stop()
        elif done * 4 // max(self._total, 1) > self._shown:  # four lines for each piece of work
            self._shown = done * 4 // max(self._total, 1)
            took = f"  ({duration(time.perf_counter() - self._began)})" if done >= self._total else ""
            self._print(f"{self._title}: {done}/{self._total}  {text}".rstrip() + took)

    def log(self, text: str) -> None:
        """Print a line."""
        self.stop()
        self._print(text)

    def _print(self, text: str) -> None:
        """Print without wrapping at 80 columns, so paths stay whole, and without markup."""
        self.console.print(visible(text), highlight=False, markup=False, emoji=False, soft_wrap=True)

    def stop(self) -> None:
        """Remove the progress bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

"""Command lines: settings as flags and YAML, one-line errors, exit codes; sole home of jsonargparse.

Exit codes: 0 done, 2 a mistake of the user's (one line says what was expected, what came, the cure), 130 interrupted.
"""

from __future__ import annotations

import difflib
import errno
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, fields, is_dataclass
from typing import Any, TypeVar, get_type_hints

from kmine.records import UserError

Config = TypeVar("Config")


def parse(
    config_class: type[Config], argv: Sequence[str], *, prog: str, description: str, positional: str = ""
) -> Config:
    """Settings from `--config FILE.yaml` and flags (flags win); unknown keys are errors that suggest the nearest.

    `positional` names the field, if any, that takes the words without a flag.

    Raises:
        SystemExit: code 2 after one line on stderr; code 0 after `--help`.
    """
    from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    usage = f"{prog} {positional.upper()}{' ' if positional else ''}[--config FILE.yaml] [--SETTING VALUE ...]"
    parser = ArgumentParser(prog=prog, usage=usage, description=description, exit_on_error=False, default_meta=False)
    parser.add_argument("--config", action="config", help="YAML file of settings; flags after it win.")
    if positional:
        parser.add_argument(positional, nargs="+", type=str)
    parser.add_class_arguments(config_class, as_group=False, skip={positional} if positional else set())
    settings = {a.dest: a for a in parser._actions if a.dest not in ("help", "config", "print_config")}
    switches = set(_switches(config_class))
    try:
        values = parser.parse_args(_bare_switches(argv, switches))
        built = parser.instantiate(values)
        return config_class(**{f.name: built[f.name] for f in fields(config_class)})  # type: ignore[arg-type]
    except (ArgumentError, UserError) as error:
        raise SystemExit(fail(prog, _plain(str(error), settings))) from None


def _switches(config_class: type[Any], prefix: str = "") -> Iterator[str]:
    """Names of the settings that are true or false."""
    for name, kind in get_type_hints(config_class).items():
        if kind is bool:
            yield prefix + name
        elif is_dataclass(kind):
            yield from _switches(kind, f"{prefix}{name}.")


def _bare_switches(argv: Sequence[str], switches: set[str]) -> list[str]:
    """`--offline` alone means `--offline true`."""
    out: list[str] = []
    for n, word in enumerate(argv):
        following = argv[n + 1] if n + 1 < len(argv) else "--"
        out.append(f"{word}=true" if word[2:] in switches and following.startswith("-") else word)
    return out


def _plain(message: str, known: Iterable[str]) -> str:
    """The parser's message as one sentence in kmine's words."""
    group = re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message)
    flag = re.search(r"unrecognized arguments: (.*)", message)
    if group or flag:
        key = f"{group[1]}.{group[2]}" if group else flag[1].split()[0].split("=")[0].lstrip("-")  # type: ignore[index]
        near = difflib.get_close_matches(key, list(known), n=1)
        return f"unknown setting {key}; " + (f"did you mean {near[0]}?" if near else "see --help for those there are")
    value = re.search(r'Parser key "([\w.]+)":\s*Expected a (.*?)\. Got value: (.*)', message, re.DOTALL)
    if value:
        expected = value[2].replace("<class '", "").replace("'>", "").replace("typing.Literal", "one of ")
        return f"{value[1]}: expected {expected}, got {value[3].strip()!r}"
    return " ".join(message.split())


def fail(prog: str, message: str) -> int:
    """Print one error line; the exit code for a user's mistake."""
    sys.stderr.write(f"{prog}: error: {message}\n")
    return 2


def guarded(prog: str, work: Callable[[], int]) -> int:
    """Run a command's work; a user's mistake becomes one line and exit code 2, Ctrl-C a line and 130."""
    try:
        return work()
    except UserError as error:
        return fail(prog, str(error))
    except KeyboardInterrupt:
        sys.stderr.write(f"\n{prog}: interrupted; the same command resumes where it stopped\n")
        return 130
    except OSError as error:
        if error.errno == errno.ENOSPC:
            return fail(prog, "the disk is full; free some space and run the same command again, it resumes")
        raise


def to_dict(config: Any) -> dict[str, Any]:
    """Settings as plain nested values, tuples as lists, ready for YAML."""
    return {k: _listed(v) for k, v in asdict(config).items()}


def _listed(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _listed(v) for k, v in value.items()}
    return list(value) if isinstance(value, tuple) else value


class Terminal:
    """Progress bars and sentences on stderr; plain lines where stderr is not a terminal. A `Watcher` of the methods."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(stderr=True)
        self._bar: Any = None
        self._title, self._total, self._shown = "", 0, -1

    def start(self, title: str, total: int) -> None:
        """A piece of work of `total` steps begins."""
        self.stop()
        self._title, self._total, self._shown = title, total, -1
        if self.console.is_terminal and total:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, TextColumn("{task.fields[text]}"), console=self.console)
            self._task = self._bar.add_task(title, total=total, text="")
            self._bar.start()

    def advance(self, done: int, text: str = "") -> None:
        """`done` of its steps are done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, text=text)
            if done >= self._total:
                self.stop()
        elif done * 4 // max(self._total, 1) > self._shown:  # four lines a piece of work
            self._shown = done * 4 // max(self._total, 1)
            self.console.print(f"{self._title}: {done}/{self._total}  {text}".rstrip(), highlight=False)

    def say(self, text: str) -> None:
        """A sentence for the terminal."""
        self.stop()
        self.console.print(text, highlight=False)

    def stop(self) -> None:
        """Take the bar off the screen's last line."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

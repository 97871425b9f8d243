"""Command lines: settings as flags and YAML, one-line errors, exit codes; sole home of jsonargparse.

Exit codes: 0 done, 1 `kmine.check` found a fault or a trial of `kmine.sweep` failed, 2 a user error (one line with what
was expected, what came, the cure), 130 interrupted.
"""

from __future__ import annotations

import difflib
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from kmine.errors import UserError
from kmine.io.errors import FREE_SPACE, FULL
from kmine.io.threads import choose_wait_policy

Config = TypeVar("Config")


def parse(
    config_class: type[Config], argv: Sequence[str], *, prog: str, description: str, positional: str = ""
) -> Config:
    """Settings from `--config FILE.yaml` and flags (flags win); unknown keys are errors that suggest the nearest.

    `positional` names the field, if any, that takes the words without a flag.

    Raises:
        SystemExit: code 2 after one line on stderr; code 0 after `--help`.
    """
    usage = f"{prog} {positional.upper()}{' ' if positional else ''}[--config FILE.yaml] [--SETTING VALUE ...]"
    parser = _parser(config_class, {positional} - {""}, prog=prog, usage=usage, description=description)
    if positional:
        parser.add_argument(positional, nargs="+", type=str)
    try:
        config = _parsed(parser, config_class, argv, positional)
    except UserError as error:
        raise SystemExit(fail(prog, str(error))) from None
    choose_wait_policy()
    return config


def load_config(config_class: type[Config], path: Path, flags: Sequence[str] = ()) -> Config:
    """Settings of a YAML file, as `to_dict` and a run's config.yaml hold them; `flags`, as on a command line, win.

    Raises:
        UserError: a missing or damaged file, an unknown setting or an unfit value.
    """
    return _parsed(_parser(config_class, set()), config_class, ["--config", str(path), *flags])


def _parsed(parser: ArgumentParser, config_class: type[Config], argv: Sequence[str], positional: str = "") -> Config:
    parser.add_argument("--config", action="config", help="YAML file of settings; flags after it win.")
    kinds = _kinds(config_class)
    names, switches = set(kinds), {f"--{name}" for name, kind in kinds.items() if kind is bool}
    lists = {name: kind for name, kind in kinds.items() if get_origin(kind) is list and name != positional}
    try:
        for path in _config_files(argv):
            _check_file(path, names)
        values = parser.parse_args(_bare_switches(_joined_lists(argv, lists), switches))
        return _built(parser, values, config_class)
    except (ArgumentError, UserError) as error:
        raise UserError(_plain(str(error), names)) from error


def override(config_class: type[Config], values: Mapping[str, Any], changes: Mapping[str, str], where: str) -> Config:
    """Settings `values` (nested, see `to_dict`) with `changes` by dotted name, each written as on a command line.

    Raises:
        UserError: an unknown name or an unfit value; the message begins with `where`.
    """
    parser, names = _parser(config_class, set()), set(_kinds(config_class))
    unknown = [name for name in changes if name not in names]
    if unknown:
        raise UserError(f"{where}: {_unknown(unknown[0], names)}")
    try:
        parser.set_defaults(flat(values))
        return _built(parser, parser.parse_args([f"--{name}={value}" for name, value in changes.items()]), config_class)
    except (ArgumentError, UserError) as error:
        raise UserError(f"{where}: {_plain(str(error), names)}") from error


def _parser(config_class: type[Any], skip: set[str], **options: Any) -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    _resolve_annotations(config_class)
    parser = ArgumentParser(exit_on_error=False, default_meta=False, allow_abbrev=False, **options)
    parser.add_class_arguments(config_class, as_group=False, skip=skip)
    return parser


def _resolve_annotations(config_class: type[Any]) -> None:
    """Replace postponed annotations by types; jsonargparse would run `if TYPE_CHECKING` blocks, torch among them."""
    hints = get_type_hints(config_class)
    config_class.__init__.__annotations__ = hints
    for kind in filter(is_dataclass, hints.values()):
        _resolve_annotations(kind)


def _built(parser: ArgumentParser, values: Any, config_class: type[Config]) -> Config:
    built = parser.instantiate(values)
    return config_class(**{f.name: built[f.name] for f in fields(config_class)})  # type: ignore[arg-type]


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name."""
    out: dict[str, Any] = {}
    for name, value in values.items():
        out |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return out


def _joined_lists(argv: Sequence[str], lists: Mapping[str, Any]) -> list[str]:
    """Turn `--seeds 0 1 2` into `--seeds=[0, 1, 2]`; values of a repeated flag are joined."""
    values_by_name: dict[str, list[str]] = {}
    out: list[str] = []
    taking = out
    for word in argv:
        name, equals, value = word.removeprefix("--").partition("=")
        is_list = word.startswith("--") and name in lists
        if word.startswith("--"):
            taking = values_by_name.setdefault(name, []) if is_list else out
        if equals or not is_list:
            taking.append(value if is_list else word)
    for name, words in values_by_name.items():
        written = words[0] if len(words) == 1 and words[0].startswith("[") else json.dumps(words)
        out.append(f"--{name}={written if get_args(lists[name]) == (str,) else written.replace(chr(34), '')}")
    return out


def _kinds(config_class: type[Any], prefix: str = "") -> dict[str, Any]:
    """Types of all settings and sections by name."""
    kinds: dict[str, Any] = {}
    for name, kind in get_type_hints(config_class).items():
        kinds[prefix + name] = kind
        if is_dataclass(kind):
            kinds |= _kinds(kind, f"{prefix}{name}.")
    return kinds


def _bare_switches(argv: Sequence[str], switches: set[str]) -> list[str]:
    """Turn a bare `--offline` into `--offline=true`."""
    pairs = pairwise([*argv, "--"])
    return [f"{word}=true" if word in switches and following.startswith("-") else word for word, following in pairs]


def _config_files(argv: Sequence[str]) -> Iterator[str]:
    """Files given by `--config FILE` and `--config=FILE`."""
    for word, following in pairwise([*argv, None]):
        if word.startswith("--config="):
            yield word.removeprefix("--config=")
        elif word == "--config" and following is not None:
            yield following


def _check_file(path: str, names: set[str]) -> None:
    """Refuse a settings file that is missing, not YAML, or has unknown names, before its values are checked."""
    import yaml

    cure = "give a YAML file of settings, such as configs/phantom.yaml"
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: cannot be read ({error.strerror}); {cure}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--config {path}: expected a text file, got other bytes; {cure}") from error
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or "unreadable"
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise UserError(f"--config {path}: {where}not YAML ({problem}); mend that line") from error
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: expected lines `name: value`, got {_kind(content)}; {cure}")
    _check_keys(path, content, names)


def _check_keys(path: str, content: dict[Any, Any], names: set[str], prefix: str = "") -> None:
    for key, value in content.items():
        name = f"{prefix}{key}"
        if name not in names:
            raise UserError(f"--config {path}: {_unknown(name, names)}")
        is_section = any(other.startswith(f"{name}.") for other in names)
        if is_section and not isinstance(value, dict):
            expected = f"expected settings indented below it, got {_kind(value)}; see --help"
            raise UserError(f"--config {path}: {name}: {expected}")
        if is_section:
            _check_keys(path, value, names, f"{name}.")


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    return {list: "a list", dict: "a section"}.get(type(value), repr(value))


def _unknown(key: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, list(names), n=1)
    return f"unknown setting {key}; " + (f"did you mean {near[0]}?" if near else "see --help for those there are")


def _plain(message: str, names: Iterable[str]) -> str:
    """Rewrite a message of jsonargparse as one line in the style of kmine's errors; needs the bounded version."""
    group = re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message)
    flag = re.search(r"unrecognized arguments: (.*)", message)
    if group or flag:
        key = f"{group[1]}.{group[2]}" if group else flag[1].split()[0].split("=")[0].lstrip("-")  # type: ignore[index]
        return _unknown(key, names)
    message = re.sub(_OPTIONAL_TUPLE, _as_plain_tuple, message, flags=re.DOTALL)
    if value := re.search(r'Parser key "([\w.]+)":\s*Expected a (.*?)\. Got value: (.*)', message, re.DOTALL):
        expected, actual = value[2].replace("<class '", "").replace("'>", ""), value[3].strip()
        expected = re.sub(r"^tuple(?: with (\d+) elements)?$", _brackets, expected)
        choices = re.findall(r"'([^']*)'", expected) if expected.startswith("typing.Literal") else []
        near = difflib.get_close_matches(actual, choices, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"{value[1]}: expected {'one of ' + ', '.join(choices) if choices else expected}, got {actual!r}{hint}"
    union = re.search(r'Parser key "([\w.]+)":\s*Does not validate.*?\[(.*?)\].*Given value: (.*)', message, re.DOTALL)
    if union:
        kinds = [kind.replace("NoneType", "null") for kind in re.findall(r"<class '(\w+)'>", union[2])]
        return f"{union[1]}: expected {' or '.join(kinds)}, got {union[3].strip()!r}"
    if section := re.search(r'Parser key "([\w.]+)":\s*Unable to load config', message):
        return f"{section[1]}: it is a section, not a setting; set one of its own, as in --{section[1]}.NAME VALUE"
    if bare := re.search(r"argument (--[\w.]+): expected one argument", message):
        return f"{bare[1]}: expected a value after it, got none"
    return " ".join(message.split())


_OPTIONAL_TUPLE = (
    r'Parser key "([\w.]+)":\s*Does not validate[^\n]*\s*Subtypes: \[tuple\[.*?Errors:\s*- '
    r"(Expected a [^\n]*?)(\. Got value: [^\n]*)?\n.*Given value: (.*)"
)


def _as_plain_tuple(match: re.Match[str]) -> str:
    """Reduce the message on an optional tuple to that on a tuple."""
    return f'Parser key "{match[1]}": {match[2]}{match[3] or f". Got value: {match[4]}"}'


def _brackets(match: re.Match[str]) -> str:
    """Describe a tuple as YAML and the command line write it."""
    return f"a list of {match[1]} in brackets" if match[1] else "a list in brackets, such as [1, 2]"


def fail(prog: str, message: str) -> int:
    """Print one error line on stderr; returns exit code 2."""
    sys.stderr.write(f"{prog}: error: {message}\n")
    return 2


def guarded(prog: str, work: Callable[[], int]) -> int:
    """Run a command; a user error becomes one line and exit code 2, Ctrl-C a line and 130.

    A diverged training (`FloatingPointError`) counts as a user error: the settings are to be changed.
    """
    try:
        return work()
    except (UserError, FloatingPointError) as error:
        return fail(prog, " ".join(str(error).split()))
    except KeyboardInterrupt:
        sys.stderr.write(f"\n{prog}: interrupted; the same command resumes where it stopped\n")
        return 130
    except OSError as error:
        if error.errno in FULL:
            return fail(prog, f"{FULL[error.errno]}; {FREE_SPACE}")
        raise


def to_dict(config: Any) -> dict[str, Any]:
    """Settings as nested plain values for YAML, tuples as lists."""

    def section(fields_: list[tuple[str, Any]]) -> dict[str, Any]:
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields_}

    return asdict(config, dict_factory=section)


class Terminal:
    """A `ProgressReporter` on stderr: progress bars in a terminal, plain lines elsewhere."""

    def __init__(self, *, quiet: bool = False) -> None:
        from rich.console import Console

        self.console = Console(stderr=True, quiet=quiet)
        self._bar: Any = None
        self._title, self._total, self._shown = "", 0, -1

    def start(self, title: str, total: int) -> None:
        """Begin a piece of work of `total` steps."""
        self.stop()
        self._title, self._total, self._shown = title, total, -1
        if self.console.is_terminal and total:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, TextColumn("{task.fields[text]}"), console=self.console)
            self._task = self._bar.add_task(title, total=total, text="")
            self._bar.start()

    def advance(self, done: int, text: str = "") -> None:
        """Report `done` finished steps."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, text=text)
            if done >= self._total:
                self.stop()
        elif done * 4 // max(self._total, 1) > self._shown:  # four lines for each piece of work
            self._shown = done * 4 // max(self._total, 1)
            self._print(f"{self._title}: {done}/{self._total}  {text}".rstrip())

    def log(self, text: str) -> None:
        """Print a line."""
        self.stop()
        self._print(text)

    def _print(self, text: str) -> None:
        """Print without wrapping at 80 columns, so paths stay whole, and without markup."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def stop(self) -> None:
        """Remove the progress bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

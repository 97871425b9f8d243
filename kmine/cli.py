"""Command lines: settings as flags and YAML, one-line errors, exit codes; sole home of jsonargparse.

Exit codes: 0 done, 1 `kmine.check` found a fault or a trial of `kmine.sweep` failed, 2 a user error (one line with what
was expected, what came, the cure), 130 interrupted, 143 and 129 ended by SIGTERM and SIGHUP, 141 where the reader of
the output has gone (`| head`).
"""

from __future__ import annotations

import json
import re
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from kmine.errors import UserError
from kmine.io.argument_errors import plain_error, unknown_setting
from kmine.io.console import Stopped, open_outputs, replace_unknown_characters, stop_signals, tame_messages, visible
from kmine.io.errors import FULL, RERUN, expanded
from kmine.io.older_settings import REMOVED, older_settings
from kmine.io.presets import preset_files, settings_file
from kmine.io.settings_help import help_text, help_topic
from kmine.io.terminal import Terminal as Terminal
from kmine.io.threads import shorten_spinning
from kmine.io.yaml_file import Text, read_yaml, yaml_kind

Config = TypeVar("Config")
GIVEN: set[str] = set()
"""Settings that the last command line gave, by flag or file."""
MAX_MESSAGE = 2000
"""Characters of an error line."""
_FROM_FILES: dict[str, tuple[str, set[str]]] = {}
"""Settings of this command: the file that holds each, as errors name it (empty for a flag), and the value as text."""
_RUNS: set[str] = set()
"""Settings files of runs that this command has read."""


def parse(
    config_class: type[Config],
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    positional: str = "",
    main: Sequence[str] = (),
) -> Config:
    """Settings from `--config FILE.yaml` and flags (flags win); unknown keys are errors that suggest the nearest.

    `positional` names the field, if any, that takes the words without a flag; `main` the settings of the short help.

    Raises:
        SystemExit: code 2 after one line on stderr; code 0 after `--help`, `--help all` or `--help SECTION`.
    """
    usage = f"{prog} {positional.upper()}{' ' if positional else ''}[--config FILE.yaml] [--SETTING VALUE ...]"
    for memory in (_FROM_FILES, _RUNS, GIVEN):
        memory.clear()
    with open_outputs():
        try:
            if (topic := help_topic(argv)) is not None:
                text = help_text(config_class, topic, usage=usage, description=description, main=main, skip=positional)
                sys.stdout.write(text)
                sys.stdout.flush()
                raise SystemExit(0)
            parser = _parser(config_class, positional)
            parser.prog, parser.usage = prog, usage
            config = _parsed(config_class, argv, positional)
        except UserError as error:
            raise SystemExit(fail(prog, str(error))) from None
    replace_unknown_characters()
    shorten_spinning()
    return config


def load_config(config_class: type[Config], path: Path, flags: Sequence[str] = ()) -> Config:
    """Settings of a YAML file, as `to_dict` and a run's config.yaml hold them; `flags`, as on a command line, win.

    Raises:
        UserError: a missing or damaged file, an unknown setting or an unfit value.
    """
    return _parsed(config_class, ["--config", str(path), *flags], label="")


def _parsed(config_class: type[Config], argv: Sequence[str], positional: str = "", label: str = "--config ") -> Config:
    parser = _parser(config_class, positional)
    vars(parser).pop("print_config", None)  # left there by a command line that was refused
    kinds = {name: kind for name, kind in _kinds(config_class).items() if name != positional}
    values, rest = _given(argv, kinds, label)
    with _named(values, kinds.keys()):
        words = [f"--{name}={value.text}" for name, value in values.items() if value.text is not None]
        config = _built(parser, parser.parse_args(words + rest), config_class, values, kinds)
    GIVEN.update(values if label else ())
    built = flat(to_dict(config))
    for name, value in values.items():
        texts = [text for text in (built[name], value.text) if isinstance(text, str)]
        _FROM_FILES[name] = value.where, {*texts, *(str(Path(text)) for text in texts)} - {"", "."}
        if not label and value.where:
            _RUNS.add(value.where)
    return config


class _Given(NamedTuple):
    """A value as text, None for null, and the settings file that has it, as errors name it; empty for a flag."""

    text: str | None
    where: str = ""


@contextmanager
def _named(values: Mapping[str, _Given], names: Iterable[str], where: str = "") -> Iterator[None]:
    """Turn errors of parsing and of checks into one line that names the settings file that has the value."""
    try:
        yield
    except (ArgumentError, UserError) as error:
        message = plain_error(str(error), names)
        head = re.split(r", | \+ ", message.partition(":")[0])
        files = [values[name].where for name in head if name in values and values[name].where]
        raise UserError(": ".join([*([where] if where else []), *files[:1], message])) from error


def _with_file(message: str) -> str:
    """Open an error of a command with the settings file that has the value at fault.

    A message is on a setting if it begins with its name or value, quotes the value, or says both name and value. Of
    several runs none is named, as each has all settings; nor is `out` of a run, which opens most messages on it.
    """
    several = len(_RUNS) > 1
    known = {k: v for k, v in _FROM_FILES.items() if v[0] and (v[0] not in _RUNS or not (several or k == "out"))}

    def is_meant(name: str, texts: set[str]) -> bool:
        is_named = re.search(rf"(?<![\w.]){re.escape(name)}\b", message) is not None
        return any(
            re.search(rf"(?:^|'){text}(?=[:;, ']|$)", message)
            or (is_named and re.search(rf"(?<![\w./]){text}(?!\w)", message))
            for text in map(re.escape, texts)
        )

    names = [name for name in known if re.match(rf"(?:--)?{re.escape(name)}(?![\w.])", message)]
    if names:
        return f"{known[names[0]][0]}: {message}"
    by_length = sorted(known.items(), key=lambda item: -max(map(len, item[1][1]), default=0))
    return next((f"{where}: {name}: {message}" for name, (where, texts) in by_length if is_meant(name, texts)), message)


def override(config_class: type[Config], values: Mapping[str, Any], changes: Mapping[str, str], where: str) -> Config:
    """Settings `values` (nested, see `to_dict`) with `changes` by dotted name, each written as on a command line.

    Raises:
        UserError: an unknown name or an unfit value; the message begins with `where`.
    """
    parser, kinds = _new_parser(config_class), _kinds(config_class)
    unknown = [name for name in changes if name not in kinds]
    if unknown:
        raise UserError(f"{where}: {unknown_setting(unknown[0], kinds)}")
    before = flat(values)
    given = {name: _Given(value) for name, value in before.items() if value is None or isinstance(value, str)}
    given |= {name: _Given(_word(kinds[name], value)) for name, value in changes.items()}
    with _named({}, kinds, where):
        parser.set_defaults(before)
        words = [f"--{name}={given[name].text}" for name in changes if given[name].text is not None]
        return _built(parser, parser.parse_args(words), config_class, given, kinds)


def _new_parser(config_class: type[Any], positional: str = "") -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    _resolve_annotations(config_class)
    parser = ArgumentParser(exit_on_error=False, default_meta=False, allow_abbrev=False, add_help=False)
    parser.add_class_arguments(config_class, as_group=False, skip={positional} - {""})
    if positional:
        parser.add_argument(positional, nargs="+", type=str)
    text = f"YAML file of settings, or a preset: {', '.join(preset_files())}. Flags after it win."
    parser.add_argument("--config", action="config", help=text)
    return parser


_parser = cache(_new_parser)  # building one takes as long as all else; `override` changes defaults, on one of its own


def _resolve_annotations(config_class: type[Any]) -> None:
    """Replace postponed annotations by types; jsonargparse would run `if TYPE_CHECKING` blocks, torch among them."""
    hints = get_type_hints(config_class)
    config_class.__init__.__annotations__ = hints
    for kind in filter(is_dataclass, hints.values()):
        _resolve_annotations(kind)


def _built(
    parser: ArgumentParser, parsed: Any, config_class: type[Config], given: Mapping[str, _Given], kinds: dict[str, Any]
) -> Config:
    for name, value in given.items():
        if _is_text(kinds[name]):  # as it was typed; jsonargparse reads a comment in `#1 patients`, a null in `~`
            parsed[name] = value.text
    built = parser.instantiate(parsed)
    return config_class(**{f.name: built[f.name] for f in fields(config_class)})  # type: ignore[arg-type]


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name."""
    out: dict[str, Any] = {}
    for name, value in values.items():
        out |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return out


def _kinds(config_class: type[Any], prefix: str = "") -> dict[str, Any]:
    """Types of all settings and sections by name."""
    kinds: dict[str, Any] = {}
    for name, kind in get_type_hints(config_class).items():
        kinds[prefix + name] = kind
        if is_dataclass(kind):
            kinds |= _kinds(kind, f"{prefix}{name}.")
    return kinds


def _given(argv: Sequence[str], kinds: Mapping[str, Any], label: str) -> tuple[dict[str, _Given], list[str]]:
    """Values of flags and files, the last of each setting, and the words that are none. Flags of lists always win."""
    values: dict[str, _Given] = {}
    lists: dict[str, list[str]] = {}
    words = deque(argv)
    rest: list[str] = []
    while words and words[0] != "--":
        word = words.popleft()
        name, equals, value = word.removeprefix("--").partition("=")
        kind = kinds.get(name) if word.startswith("--") else None
        if word.startswith("--") and name == "config" and (equals or words):
            values |= _read(value if equals else words.popleft(), kinds, label)
        elif get_origin(kind) is list:
            taken = lists.setdefault(name, [])
            taken += [value] if equals else []
            while words and not words[0].startswith("--"):
                taken.append(words.popleft())
        elif kind is None or is_dataclass(kind):
            rest.append(word)
        elif equals:
            values[name] = _Given(_word(kind, value))
        elif kind is bool and (not words or words[0].startswith("-")):
            values[name] = _Given("true")
        elif words and (not words[0].startswith("-") or " " in words[0] or re.match(r"-[\d.]", words[0])):
            values[name] = _Given(_word(kind, words.popleft()))
        else:
            rest.append(word)
    for name, taken in lists.items():
        is_written = len(taken) == 1 and taken[0].startswith("[")
        values[name] = _Given(_word(kinds[name], taken[0] if is_written else taken))
    return values, [*rest, *words]


def _word(kind: Any, value: str | list[str]) -> str | None:
    """A value as jsonargparse reads it: elements of lists of names are quoted, so that `no` is no switch."""
    if isinstance(value, list):
        return f"[{', '.join(json.dumps(text) if str in get_args(kind) else text for text in value)}]"
    if _is_text(kind):
        return None if value == "null" and kind is not str else value
    if str in get_args(kind) and value.startswith("["):
        with suppress(yaml.YAMLError):
            names = yaml.load(value, yaml.BaseLoader)
            return _word(kind, names) if all(isinstance(name, str) for name in names) else value
    # Other characters mean something in YAML: 1:30 is 90, &a and !!int are dropped, brackets nest.
    is_list = value.startswith("[") and value.count("[") == 1
    return re.sub(r"[^\[\], ][^\[\],]*" if is_list else ".+", _unread, value, flags=re.DOTALL)


def _unread(match: re.Match[str]) -> str:
    return match[0] if re.fullmatch(r"[-+.\w]+ *", match[0]) else json.dumps(match[0])


def _is_text(kind: Any) -> bool:
    """Whether a setting is `str` or `str | None`."""
    return kind is str or (type(None) in get_args(kind) and str in get_args(kind))


def _read(path: str, kinds: Mapping[str, Any], label: str) -> dict[str, _Given]:
    """Values of a settings file; unknown names and sections without names are refused before any value is checked."""
    where, file = f"{label}{path}", settings_file(path) if label else expanded(path)
    cure = "give a YAML file of settings, or a preset, such as phantom" if label else "restore that file"
    content = read_yaml(file, where, cure, as_text=True)
    older = {k: v if v is None or isinstance(v, str) else json.dumps(v) for k, v in older_settings(file).items()}
    values = {name: _Given(text, where) for name, text in older.items() if name in kinds}

    def walk(section: Mapping[Any, Any], prefix: str) -> None:
        for name, value in ((f"{prefix}{key}", value) for key, value in section.items()):
            if older and name in REMOVED:
                continue
            if name not in kinds:
                raise UserError(f"{where}: {unknown_setting(name, kinds)}")
            if not is_dataclass(kinds[name]):
                values[name] = _Given(_file_word(kinds[name], value, f"{where}: {name}"), where)
            elif isinstance(value, Mapping):
                walk(value, f"{name}.")
            else:
                expected = f"expected settings indented below it, got {yaml_kind(value)}; see --help {name}"
                raise UserError(f"{where}: {name}: {expected}")

    walk(content, "")
    return values


def _file_word(kind: Any, value: Any, where: str) -> str | None:
    """`_word` of a value in a file, in which quotes keep a null a name."""
    if value is None and kind is not str:
        return None if _is_text(kind) else "null"
    if isinstance(value, Text):
        return str(value) if _is_text(kind) else _word(kind, str(value))
    if isinstance(value, list) and all(isinstance(text, Text) for text in value):
        return _word(kind, [str(text) for text in value])
    raise UserError(f"{where}: expected a value, or a list of values where several fit, got {yaml_kind(value)}")


def fail(prog: str, message: str) -> int:
    """Print one error line on stderr; returns exit code 2."""
    sys.stderr.write(f"{prog}: error: {visible(message[:MAX_MESSAGE])}\n")
    return 2


def guarded(prog: str, work: Callable[[], int]) -> int:
    """Run a command; a user error becomes one line and exit code 2, Ctrl-C a line and 130, SIGTERM 143, SIGHUP 129.

    A diverged training (`FloatingPointError`) counts as a user error: the settings are to be changed.
    """
    with open_outputs():
        replace_unknown_characters()
        tame_messages()
        return _guarded(prog, work)


def _guarded(prog: str, work: Callable[[], int]) -> int:
    try:
        with stop_signals():
            code = work()
        sys.stdout.flush()
        return code
    except (UserError, FloatingPointError) as error:
        return fail(prog, _with_file(" ".join(str(error).split())))
    except KeyboardInterrupt as error:
        with suppress(OSError):  # the terminal is gone
            sys.stderr.write(f"\n{prog}: interrupted; the same command resumes where it stopped\n")
        return 128 + (error.signum if isinstance(error, Stopped) else signal.SIGINT)
    except OSError as error:
        if error.errno in FULL:
            return fail(prog, f"{error.filename or 'the output'}: {FULL[error.errno]} {RERUN}")
        raise


def to_dict(config: Any) -> dict[str, Any]:
    """Settings as nested plain values for YAML, tuples as lists."""
    return asdict(config, dict_factory=lambda pairs: {k: list(v) if isinstance(v, tuple) else v for k, v in pairs})

"""Messages of jsonargparse as one line in the style of kmine's errors; needs the bounded version of pyproject.toml."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable

from kmine.io.older_settings import REMOVED


def unknown_setting(key: str, names: Iterable[str]) -> str:
    """What to say of a setting that does not exist: the nearest, or what became of it."""
    near = (f"did you mean {name}?" for name in difflib.get_close_matches(key, list(names), n=1))
    return f"unknown setting {key}; {REMOVED.get(key) or next(near, '--help all lists those there are')}"


def plain_error(message: str, names: Iterable[str]) -> str:
    """Rewrite a message of jsonargparse as one line in the style of kmine's errors; needs the bounded version."""
    group = re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message)
    flag = re.search(r"unrecognized arguments: (.*)", message)
    if group or flag:
        key = f"{group[1]}.{group[2]}" if group else flag[1].split()[0].split("=")[0].lstrip("-")  # type: ignore[index]
        return unknown_setting(key, names)
    message = re.sub(_OPTIONAL_TUPLE, _as_plain_tuple, message, flags=re.DOTALL)
    if value := re.search(r'Parser key "([\w.]+)":\s*Expected a (.*?)\. Got value: (.*)', message, re.DOTALL):
        expected, actual = value[2].replace("<class '", "").replace("'>", ""), _typed(value[3])
        expected = re.sub(r"^tuple(?: with (\d+) elements)?$", _brackets, expected)
        choices = re.findall(r"'([^']*)'", expected) if expected.startswith("typing.Literal") else []
        near = difflib.get_close_matches(actual, choices, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"{value[1]}: expected {'one of ' + ', '.join(choices) if choices else expected}, got {actual!r}{hint}"
    union = re.search(r'Parser key "([\w.]+)":\s*Does not validate.*?\[(.*?)\].*Given value: (.*)', message, re.DOTALL)
    if union:
        kinds = [kind.replace("NoneType", "null") for kind in re.findall(r"<class '(\w+)'>", union[2])]
        return f"{union[1]}: expected {' or '.join(kinds)}, got {_typed(union[3])!r}"
    if section := re.search(r'Parser key "([\w.]+)":\s*Unable to load config', message):
        return f"{section[1]}: it is a section, not a setting; set one of its own, as in --{section[1]}.NAME VALUE"
    if bare := re.search(r"argument (--[\w.]+): expected one argument", message):
        return f"{bare[1]}: expected a value after it, got none"
    return " ".join(re.sub(r'^Parser key "([\w.]+)":', r"\1:", message).split())


def _typed(value: str) -> str:
    """A value in a message as the user typed it, without the quotes of `_unread`."""
    try:
        return str(json.loads(value)) if value.startswith('"') else value.strip()
    except ValueError:
        return value.strip()


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

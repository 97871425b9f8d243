"""YAML files of settings, read with bounds: the size of the file, no tags of objects, no aliases of sections."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from kmine.errors import UserError

MAX_BYTES = 2**18
NULLS = ("", "~", "null", "Null", "NULL")


class Text(str):
    """A scalar as the file spells it, without quotes: `007`, `no` and `2024-01-01` stay what they are."""

    __slots__ = ()


class _Loader(yaml.SafeLoader):
    """Values of YAML's types. An alias of a section could unfold without end, a name given twice hides a value."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        is_alias, mark = self.check_event(yaml.AliasEvent), self.peek_event().start_mark
        node = super().compose_node(parent, index)  # type: ignore[no-untyped-call]
        if is_alias and not isinstance(node, yaml.ScalarNode):
            raise yaml.MarkedYAMLError(problem="an alias of a section or list: write it out", problem_mark=mark)
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} stands there twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _TextLoader(_Loader):
    """Scalars as `Text`, None for an unquoted null."""


def _text(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Text | None:
    is_plain_null = node.style is None and node.value in NULLS
    return None if is_plain_null else Text(node.value)


for _kind in ("null", "bool", "int", "float", "timestamp", "str"):
    _TextLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", _text)


def read_yaml(path: Path | str, where: str, cure: str, *, as_text: bool = False) -> dict[str, Any]:
    """The sections and values of a settings file.

    Args:
        path: the file.
        where: opens the message of an error; it names the file.
        cure: ends the message of a file that is none of settings.
        as_text: scalars as `Text`, unquoted nulls as None; else values of YAML's types.

    Raises:
        UserError: a missing, huge or damaged file, or one that does not hold names and values.
    """
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # never waits on a pipe
            data = file.read(MAX_BYTES + 1)
        is_huge = len(data) > MAX_BYTES
        content = "" if is_huge else yaml.load(data.decode("utf-8-sig"), _TextLoader if as_text else _Loader)
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror}); {cure}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: expected a text file, got other bytes; {cure}") from error
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or "unreadable"
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise UserError(f"{where}: {place}not YAML ({problem}); mend that line, or {cure}") from error
    except (ValueError, RecursionError) as error:  # a date that does not exist, deep nesting
        raise UserError(f"{where}: expected names and values, got others ({type(error).__name__}); {cure}") from error
    if is_huge:
        raise UserError(f"{where}: expected settings, got more than {MAX_BYTES // 1024} KiB; {cure}")
    if not isinstance(content, Mapping):
        raise UserError(f"{where}: expected lines `name: value`, got {yaml_kind(content)}; {cure}")
    return dict(content)


def yaml_kind(value: Any) -> str:
    """A value in words, for errors; long ones are cut."""
    if value is None:
        return "nothing"
    text = {list: "a list", dict: "a section"}.get(type(value), repr(str(value) if isinstance(value, Text) else value))
    return text if len(text) <= 200 else f"{text[:200]}..."

"""YAML files of settings, read with bounds: the size of the file, what its aliases unfold to, no tags of objects."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from kmine.errors import UserError

MAX_BYTES, MAX_VALUES = 2**18, 100_000
"""Of a file, and of values with all aliases unfolded."""
MERGE = "tag:yaml.org,2002:merge"
NULLS = ("", "~", "null", "Null", "NULL")


class Text(str):
    """A scalar as the file spells it, without quotes: `007`, `no` and `2024-01-01` stay what they are."""

    __slots__ = ()


class _Loader(yaml.SafeLoader):
    """Values of YAML's types. Aliases may not unfold without end; a name given twice would hide a value."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._sizes: dict[int, int] = {}
        """Values of a node with its aliases unfolded, by id; absent while the node is read."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        is_alias, mark = self.check_event(yaml.AliasEvent), self.peek_event().start_mark
        node = super().compose_node(parent, index)  # type: ignore[no-untyped-call]
        if not is_alias:
            self._sizes[id(node)] = 1 + sum(self._sizes[id(part)] for part in _parts(node))
        if id(node) not in self._sizes:
            raise yaml.MarkedYAMLError(problem="an alias of the section that it stands in", problem_mark=mark)
        if self._sizes[id(node)] > MAX_VALUES:
            raise yaml.MarkedYAMLError(problem=f"aliases of more than {MAX_VALUES:,} values", problem_mark=mark)
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merge sections named by `<<`: a section's own values win, then those of the first that it names.

        PyYAML 6.0.4 takes others where merges are chained.
        """
        merges = [value for key, value in node.value if key.tag == MERGE]
        own = [(key, value) for key, value in node.value if key.tag != MERGE]
        taken = {key.value for key, _ in own if isinstance(key, yaml.ScalarNode)}
        for source in (part for merge in merges for part in (_parts(merge) if _is_list(merge) else [merge])):
            if not isinstance(source, yaml.MappingNode):
                raise yaml.MarkedYAMLError(problem="<< takes a section", problem_mark=source.start_mark)
            self.flatten_mapping(source)
            own += [(key, value) for key, value in source.value if str(key.value) not in taken]
            taken.update(str(key.value) for key, _ in source.value)
        node.value = own


def _is_list(node: yaml.Node) -> bool:
    return isinstance(node, yaml.SequenceNode)


def _parts(node: yaml.Node) -> list[yaml.Node]:
    """Keys and values of a section, elements of a list. Raises `YAMLError` for a name given twice."""
    if not isinstance(node, yaml.MappingNode):
        return list(node.value) if _is_list(node) else []
    seen: set[str] = set()
    for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
        if key.value in seen:
            raise yaml.MarkedYAMLError(problem=f"{key.value} stands there twice", problem_mark=key.start_mark)
        seen.add(key.value)
    return [part for pair in node.value for part in pair]


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
        # Opening a pipe without a writer would wait for one; reading waits for the writer, as in `--config <(command)`.
        with os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
            os.set_blocking(file.fileno(), True)
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

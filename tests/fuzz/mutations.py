"""Seeded damage of files: of their bytes, of the text and values that they hold, and of the file system around them.

Each mutation takes a `random.Random` and a path and changes the file in place.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import yaml

Mutation = Callable[[Random, Path], None]

FOREIGN = {
    "empty": b"",
    "web page": b"<!DOCTYPE html><html><body>404: not found</body></html>\n",
    "LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    "gzip": gzip.compress(b"kmine" * 100, mtime=0),
    "PNG signature": b"\x89PNG\r\n\x1a\n",
    "zip signature": b"PK\x03\x04",
    "pickle": b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x07builtin\x94.",
    "zeros": bytes(4096),
    "Latin-1": "é;ü;ß\n".encode("latin-1"),
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "JSON of another kind": b"[1, 2, 3]",
    "a number": b"7",
}
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 255, 256, -(2**31), 2**31, 2**63, 2**64, 10**30, 0.5, -0.5, 1e-320, 1e308),
    *(float("nan"), float("inf"), -float("inf"), "", " ", "a", "0", "-1", "nan", "1e999", "None", "../../x", "/etc"),
    *("a/b", "a\\b", "a\rb", "a\nb", "\x1b[31mred", "\x00", "\u202e", "é", "\ud83d\ude00", "x" * 300, "~nosuchuser"),
    *([], {}, [[]], [None], {"a": None}, [1, 2, 3, 4], [float("nan")] * 4, [-1, -1, -1, -1], [10**9, 10**9]),
)
"""Values that a field may come to hold by a mistake, an export of another tool, or malice."""


def flip_bits(rng: Random, path: Path) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 4, 32))):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def flip_header_bits(rng: Random, path: Path) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 2, 8))):
        if data:
            data[rng.randrange(min(len(data), 400))] = rng.randrange(256)
    path.write_bytes(data)


def truncate(rng: Random, path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: rng.choice((0, 1, 8, rng.randrange(len(data) + 1), max(0, len(data) - 1)))])


def insert(rng: Random, path: Path) -> None:
    data = path.read_bytes()
    place = rng.randrange(len(data) + 1)
    path.write_bytes(data[:place] + rng.randbytes(rng.choice((1, 4, 100))) + data[place:])


def repeat_block(rng: Random, path: Path) -> None:
    data = path.read_bytes()
    start = rng.randrange(len(data) + 1)
    path.write_bytes(data[:start] + data[start : start + rng.choice((1, 16, 512))] * 2 + data[start:])


def zero_block(rng: Random, path: Path) -> None:
    data = bytearray(path.read_bytes())
    start = rng.randrange(len(data) + 1)
    size = min(rng.choice((1, 16, 512)), len(data) - start)
    data[start : start + size] = bytes(size)
    path.write_bytes(data)


def foreign_content(rng: Random, path: Path) -> None:
    path.write_bytes(FOREIGN[rng.choice(sorted(FOREIGN))])


def folder_in_place(rng: Random, path: Path) -> None:
    path.unlink()
    path.mkdir()


def remove(rng: Random, path: Path) -> None:
    path.unlink()


def dangling_link(rng: Random, path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere/at-all")


def link_to_itself(rng: Random, path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def pipe_in_place(rng: Random, path: Path) -> None:
    """A named pipe without a writer: opening it waits for ever."""
    path.unlink()
    os.mkfifo(path)


def other_file(rng: Random, path: Path) -> None:
    """The content of a neighbour."""
    others = [other for other in path.parent.iterdir() if other.is_file() and other != path]
    if others:
        shutil.copyfile(rng.choice(sorted(others)), path)


BYTES: tuple[Mutation, ...] = (
    *(flip_bits, flip_bits, flip_header_bits, flip_header_bits, truncate, truncate, insert, repeat_block, zero_block),
    *(foreign_content, foreign_content),
)
PLACES: tuple[Mutation, ...] = (
    folder_in_place,
    remove,
    dangling_link,
    link_to_itself,
    other_file,
    pipe_in_place,
)


def _places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to all entries of a nested value."""
    if len(at) > 100:  # nested by an earlier mutation
        return []
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [place for key in keys for place in ((*at, key), *_places(value[key], (*at, key)))]


def change_value(rng: Random, value: Any) -> Any:
    """Replace, drop, rename, repeat or nest one entry of a nested value."""
    places = _places(value)
    if not places:
        return rng.choice(VALUES)
    *head, key = rng.choice(places)
    holder = value
    for step in head:
        holder = holder[step]
    kind = rng.choice(("replace",) * 6 + ("drop", "rename", "repeat", "nest"))
    if kind == "replace":
        holder[key] = rng.choice(VALUES)
    elif kind == "drop":
        del holder[key]
    elif kind == "nest":
        for _ in range(rng.choice((1, 3, 2000))):
            holder[key] = [holder[key]]
    elif isinstance(holder, dict):
        holder[str(rng.choice(VALUES))] = holder.pop(key) if kind == "rename" else holder[key]
    else:
        holder.append(holder[key])
    return value


def _as_json(value: Any) -> str:
    """Nested deeper than Python's own encoder goes, and with NaN."""
    depth, inner = 0, value
    while isinstance(inner, list) and len(inner) == 1:
        depth, inner = depth + 1, inner[0]
    if depth > 100:
        return "[" * depth + json.dumps(inner) + "]" * depth
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(k))}: {_as_json(v)}" for k, v in value.items()) + "}"
    return "[" + ", ".join(map(_as_json, value)) + "]" if isinstance(value, list) else json.dumps(value)


def json_value(rng: Random, path: Path) -> None:
    value = json.loads(path.read_text("utf-8"))
    for _ in range(rng.choice((1, 1, 2))):
        value = change_value(rng, value)
    path.write_text(_as_json(value), "utf-8")


def json_lines(rng: Random, path: Path) -> None:
    lines = path.read_text("utf-8").splitlines()
    number = rng.randrange(len(lines))
    lines[number] = _as_json(change_value(rng, json.loads(lines[number])))
    path.write_text("".join(f"{line}\n" for line in lines), "utf-8")


def yaml_value(rng: Random, path: Path) -> None:
    value = change_value(rng, yaml.safe_load(path.read_text("utf-8")))
    path.write_text(_as_json(value) if rng.random() < 0.3 else yaml.safe_dump(value), "utf-8")


YAML_LINES = (
    "a: &a [*a]",
    "? [1]",
    "!!python/object/apply:os.system ['true']",
    "- 1",
    "\tx: 1",
    "<<: 3",
    "...",
    "x: {",
)


def text_lines(rng: Random, path: Path) -> None:
    """Drop, repeat, swap, cut or add a line."""
    lines = path.read_text("utf-8", errors="replace").split("\n")
    kind, number = rng.randrange(5), rng.randrange(len(lines))
    if kind == 0:
        del lines[number]
    elif kind == 1:
        lines.insert(number, lines[number])
    elif kind == 2:
        other = rng.randrange(len(lines))
        lines[number], lines[other] = lines[other], lines[number]
    elif kind == 3:
        lines[number] = lines[number][: rng.randrange(len(lines[number]) + 1)]
    else:
        lines.insert(number, rng.choice((*YAML_LINES, '"', ",,,", "\x00", "\ufeff", "#", "a" * 200_000)))
    path.write_text("\n".join(lines), "utf-8")


def csv_cell(rng: Random, path: Path) -> None:
    """Replace one cell, one separator or one line end."""
    rows = [line.split(",") for line in path.read_text("utf-8").splitlines()]
    row = rng.choice(rows)
    row[rng.randrange(len(row))] = str(rng.choice(VALUES))
    separator, end = rng.choice((",", ",", ",", ";", "\t")), rng.choice(("\n", "\n", "\n", "\r\n", "\r"))
    text = end.join(separator.join(row) for row in rows) + end
    path.write_bytes(text.encode(rng.choice(("utf-8", "utf-8", "utf-8-sig", "utf-16")), errors="replace"))

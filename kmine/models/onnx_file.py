"""Exported models read as bytes and examined before onnxruntime sees them, with a small reader of protobuf.

onnxruntime crashes, hangs or fills the memory on hostile or damaged graphs, and reads other files that they name.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

from kmine.errors import UserError
from kmine.io.json_file import read_regular

MAX_BYTES = 2**31
NOTES = PRODUCER = "kmine"
"""Key of the metadata with what kmine needs beside the network; name of the producer, whose version is `BLANK`, in a
file the SHA-256 of the file with `BLANK` there."""
BLANK = b"0" * 64
_DIGEST = re.compile(rb"\x12\x05kmine\x1a\x40(.{64})", re.DOTALL)
CONTROL_FLOW = {"If", "Loop", "Scan", "SequenceMap"}
SIZED = {"ConstantOfShape": 0, "Expand": 1, "Tile": 1, "Range": 1, "Resize": 3, "Pad": 1, "Reshape": 1, "OneHot": 1}
"""Operators whose output is as large as the numbers in the input with this index say."""
MAX_SIDE, MAX_SHAPE = 2**20, 2**10
"""Of an output, and bytes of the numbers that say its shape."""
DOMAINS = {b"", b"ai.onnx"}
Fields = dict[int, list[int | bytes | memoryview]]


def with_digest(data: bytes) -> bytes:
    """The bytes of a model of `PRODUCER` whose version is `BLANK`, with their SHA-256 there."""
    match = _DIGEST.search(data)
    assert match is not None and match[1] == BLANK, "written by encode_onnx"
    return data[: match.start(1)] + hashlib.sha256(data).hexdigest().encode() + data[match.end(1) :]


def read_model(path: Path) -> tuple[bytes, str]:
    """Bytes and notes of an exported model; older ones without a digest are read.

    Raises:
        UserError: the file is missing, damaged, changed after the export, or has parts that kmine never exports.
    """
    cure = "copy or export it again"
    data = read_regular(path, "an exported model", cure, MAX_BYTES)
    match = _DIGEST.search(data)
    if match:
        blank = data[: match.start(1)] + BLANK + data[match.end(1) :]
        if hashlib.sha256(blank).hexdigest().encode() != match[1]:
            raise UserError(f"{path}: not a whole ONNX model (damaged, or changed after its export); {cure}")
    try:
        model = _message(data)
        notes = [_message(entry) for entry in model.get(14, ())]
        texts = {_text(entry, 1): _text(entry, 2) for entry in notes}
        problem = _graph_problem([_message(graph) for graph in model.get(7, ())], bool(model.get(25)))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not a whole ONNX model ({error}); {cure}") from error
    if problem:
        raise UserError(f"{path}: expected a model that kmine exported, found {problem} in it; {cure}")
    return data, texts.get(NOTES, "null")


def _graph_problem(graphs: list[Fields], has_functions: bool) -> str:
    """What a model has that kmine never exports; empty if nothing."""
    if len(graphs) != 1 or has_functions:
        return "functions" if has_functions else f"{len(graphs)} graphs"
    (graph,) = graphs
    tensors = [_message(tensor) for tensor in graph.get(5, ())]
    constants = {_text(tensor, 8): tensor for tensor in tensors}
    nodes = [_message(node) for node in graph.get(1, ())]
    attributes = [_message(attribute) for node in nodes for attribute in node.get(5, ())]
    tensors += [_message(tensor) for attribute in attributes for tensor in attribute.get(5, ())]
    if any(tensor.get(13) or tensor.get(14, [0])[-1] for tensor in tensors):
        return "weights in another file"
    if any(attribute.get(6) or attribute.get(11) for attribute in attributes) or graph.get(15):
        return "a graph within the graph, or sparse weights"
    for node in nodes:
        op_type, inputs = _text(node, 4), [_bytes(name).decode() for name in node.get(1, ())]
        if op_type in CONTROL_FLOW or any(_bytes(domain) not in DOMAINS for domain in node.get(7, ())):
            return f"the operator {op_type[:40]!a}"
        place = SIZED.get(op_type)
        shape = constants.get(inputs[place]) if place is not None and place < len(inputs) else None
        if shape is not None and any(abs(side) > MAX_SIDE for side in _whole_numbers(shape)):
            return f"a huge size of the operator {op_type}"
    return ""


def _whole_numbers(tensor: Fields) -> list[int]:
    """Values of an int64 tensor; empty for other types."""
    if tensor.get(2, [0])[-1] != 7:
        return []
    if sum(len(part) if isinstance(part, memoryview) else 8 for n in (7, 9) for part in tensor.get(n, ())) > MAX_SHAPE:
        return [MAX_SIDE + 1]
    raw = b"".join(_bytes(part) for part in tensor.get(9, ()))
    values = [int.from_bytes(raw[n : n + 8], "little", signed=True) for n in range(0, len(raw), 8)]
    for part in tensor.get(7, ()):
        values += [part] if isinstance(part, int) else list(_packed(part))
    return [value - 2**64 if value >= 2**63 else value for value in values]


def _text(fields: Fields, number: int) -> str:
    return _bytes(fields.get(number, [b""])[-1]).decode()


def _bytes(value: int | bytes | memoryview) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number in place of bytes")
    return bytes(value)


def _message(data: int | bytes | memoryview) -> Fields:
    """Fields of a protobuf message by number; `ValueError` for a malformed one."""
    view, place, fields = memoryview(_bytes(data)), 0, {}
    while place < len(view):
        key, place = _varint(view, place)
        number, wire, value = key >> 3, key & 7, b""
        if wire == 0:
            value, place = _varint(view, place)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
            value, place = view[place : place + size], place + size
        elif wire == 2:
            size, place = _varint(view, place)
            value, place = view[place : place + size], place + size
        else:
            raise ValueError(f"protobuf of wire type {wire}")
        if place > len(view) or not number:
            raise ValueError("protobuf that is cut short")
        fields.setdefault(number, []).append(value)
    return fields


def _packed(data: bytes | memoryview) -> Iterator[int]:
    view, place = memoryview(data), 0
    while place < len(view):
        value, place = _varint(view, place)
        yield value


def _varint(view: memoryview, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(view):
            raise ValueError("protobuf that is cut short")
        byte, place = view[place], place + 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
    raise ValueError("a number of more than 64 bits")

"""Exported models are examined before onnxruntime sees them."""

from __future__ import annotations

from random import Random

import pytest

from kmine.errors import UserError
from kmine.models.onnx_file import BLANK, PRODUCER, read_model, with_digest

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper  # noqa: E402


def model(*nodes, constants=(), **changes):
    """Bytes of a model with the notes "n"."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph(nodes or [helper.make_node("Relu", ["x"], ["y"])], "g", ends[:1], ends[1:], constants)
    made = helper.make_model(graph, **changes)
    helper.set_model_props(made, {"kmine": "n"})
    return made.SerializeToString()


def refused(path, data, words):
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"m\.onnx: .*{words}.*; copy or export it again") as caught:
        read_model(path)
    assert "\n" not in str(caught.value)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "m.onnx"


def test_a_plain_model_is_read_with_its_notes(path):
    path.write_bytes(model())
    assert read_model(path) == (model(), "n")
    path.write_bytes(with_digest(model(producer_name=PRODUCER, producer_version=BLANK.decode())))
    assert read_model(path)[1] == "n"


def test_every_change_after_the_export_is_noticed(path):
    whole, rng = with_digest(model(producer_name=PRODUCER, producer_version=BLANK.decode())), Random(0)
    key = whole.index(PRODUCER.encode()) - 2
    for _ in range(200):
        place = rng.randrange(len(whole))
        if not key <= place < key + 9:
            refused(path, whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :], "not a whole ONNX model")


def numbers(name, *values):
    return helper.make_tensor(name, TensorProto.INT64, [len(values)], values)


def test_what_kmine_never_exports_is_refused(path):
    body = helper.make_graph([helper.make_node("Relu", ["a"], ["b"])], "b", [], [])
    outside = numbers("s", 1)
    outside.data_location = TensorProto.EXTERNAL
    entry = outside.external_data.add()
    entry.key, entry.value = "location", "../../etc/passwd"
    function = helper.make_function("own", "f", ["a"], ["b"], [], [helper.make_opsetid("", 18)])
    for data, words in (
        (model(helper.make_node("Loop", ["n", "c"], ["y"], body=body)), "a graph within the graph"),
        (model(helper.make_node("Loop", ["n", "c"], ["y"])), "the operator 'Loop'"),
        (model(helper.make_node("Own", ["x"], ["y"], domain="evil")), "the operator 'Own'"),
        (model(constants=[outside]), "weights in another file"),
        (model(helper.make_node("ConstantOfShape", ["s"], ["y"]), constants=[numbers("s", 2**40)]), "a huge size"),
        (model(helper.make_node("Expand", ["x", "s"], ["y"]), constants=[numbers("s", *[1] * 2000)]), "a huge size"),
        (model(helper.make_node("Tile", ["x", "s"], ["y"]), constants=[numbers("s", 1, 2**21)]), "a huge size"),
        (model(functions=[function]), "functions"),
        (b"", "0 graphs"),
        (b"<html>", "not a whole ONNX model"),
        (b"\x38\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "a number in place of bytes"),
        (b"\x3a\xff\xff\xff\xff\x7f", "cut short"),
    ):
        refused(path, data, words)

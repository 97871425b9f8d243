"""Files of a run that carry a checksum: every flipped bit is noticed; files of older versions are read."""

from __future__ import annotations

import json
import os
from random import Random

import pytest
import torch
from safetensors.torch import save

from kmine.errors import UserError
from kmine.store.artifacts import (
    DamagedError,
    checked,
    encode_tensors,
    fitting,
    read_checked,
    read_rows,
    read_tensors,
    record_errors,
    seconds_of,
    tensor_metadata,
)

TENSORS = {"w": torch.arange(40.0).reshape(5, 8), "n": torch.tensor(7)}


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(encode_tensors(TENSORS, "s", {"seconds": 1.5}))
    return path


def test_tensors_and_metadata_come_back(weights):
    tensors, metadata = read_tensors(weights)
    assert tensors.keys() == TENSORS.keys() and all(torch.equal(tensors[k], TENSORS[k]) for k in TENSORS)
    assert metadata == tensor_metadata(weights) and (metadata["signature"], metadata["meta"]) == (
        "s",
        '{"seconds": 1.5}',
    )
    assert seconds_of(weights) == 1.5
    assert read_tensors(weights.with_name("none")) is None and tensor_metadata(weights.with_name("none")) == {}


def test_every_flipped_bit_of_weights_is_noticed(weights):
    whole, rng = weights.read_bytes(), Random(0)
    key = whole.index(b'"sha256":"')
    for _ in range(300):
        place = rng.randrange(len(whole))
        if key <= place < key + 10:
            continue  # the file then has no checksum, and all else is whole
        data = bytearray(whole)
        data[place] ^= 1 << rng.randrange(8)
        weights.write_bytes(data)
        with pytest.raises(DamagedError, match=r"model\.safetensors: damaged or edited .*; remove it and run"):
            read_tensors(weights)


def test_weights_of_an_older_version_are_read_without_a_checksum(weights):
    weights.write_bytes(save(TENSORS, {"signature": "s", "meta": "{}"}))
    assert torch.equal(read_tensors(weights)[0]["w"], TENSORS["w"])
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(DamagedError):
        read_tensors(weights)
    assert seconds_of(weights) == 0


def test_records_are_checked_and_older_ones_read(tmp_path):
    path, value = tmp_path / "metrics.json", {"signature": "s", "x": [0.1, None], "n": {"1": 2}}
    path.write_text(json.dumps(checked(value | {"x": [0.1, float("nan")]})))
    assert read_checked(path) == value and read_checked(tmp_path / "none.json") is None
    path.write_text(path.read_text().replace("0.1", "0.2"))
    with pytest.raises(DamagedError, match=r"metrics\.json: damaged or edited"):
        read_checked(path)
    path.write_text(json.dumps(value))
    assert read_checked(path) == value
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match="a pipe"):
        read_checked(path)


@pytest.mark.parametrize(
    "text", ["", "sample_id,group_id\na,b\n", "sample_id,group_id,split\na,b\n", "a,a\n", 'a\n"b\n', "a\x00\n\ud800"]
)
def test_a_table_that_is_not_whole_is_named(tmp_path, text):
    path = tmp_path / "splits.csv"
    assert read_rows(path) is None
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(DamagedError, match=r"splits\.csv: damaged or edited"):
        read_rows(path)
    path.write_text("sample_id,group_id,split\na,g,val\n")
    assert read_rows(path) == [{"sample_id": "a", "group_id": "g", "split": "val"}]


def test_a_table_may_hold_the_replacement_character_but_no_broken_utf_8(tmp_path):
    path = tmp_path / "splits.csv"
    path.write_text("sample_id,group_id,split\npat\ufffdent,g,val\n", "utf-8")
    assert read_rows(path) == [{"sample_id": "pat\ufffdent", "group_id": "g", "split": "val"}]
    path.write_bytes(b"sample_id,group_id,split\npat\xffent,g,val\n")
    with pytest.raises(DamagedError, match=r"splits\.csv: damaged or edited \('utf-8' codec can't decode byte 0xff"):
        read_rows(path)


def test_errors_of_use_name_the_file(tmp_path):
    with pytest.raises(DamagedError, match="not of this run's model"), fitting(tmp_path / "w"):
        torch.nn.Linear(2, 1).load_state_dict({"weight": torch.ones(1, 3)})
    with pytest.raises(RuntimeError, match="other"), fitting(tmp_path / "w"):
        raise RuntimeError("other")
    with pytest.raises(DamagedError, match=r"x\.json: .*KeyError: 'a'"), record_errors(tmp_path / "x.json"):
        {}["a"]

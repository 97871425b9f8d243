"""Files of tensors: known by content, opened whatever a trainer wrapped them in, and never advice to run code."""

from __future__ import annotations

import io
import os
import threading
import zipfile

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from kmine.errors import UserError
from kmine.io.tensor_file import content_kind, encode_safetensors, read_state_dict, without_prefix

STATE = {"a": torch.arange(6.0).reshape(2, 3), "b.c": torch.ones(1)}


def same(found) -> bool:
    return found.keys() == STATE.keys() and all(torch.equal(found[name], STATE[name]) for name in STATE)


def test_the_suffix_says_nothing(tmp_path):
    save_file(STATE, tmp_path / "w.pth")
    torch.save(STATE, tmp_path / "w.safetensors")
    torch.save(STATE, tmp_path / "old", _use_new_zipfile_serialization=False)
    for name, kind in {"w.pth": "safetensors", "w.safetensors": "torch", "old": "torch"}.items():
        assert content_kind(tmp_path / name) == kind
        assert same(read_state_dict(tmp_path / name, "weights"))


@pytest.mark.parametrize(
    "wrapped",
    [
        {"model_state_dict": STATE, "epoch": 3},
        {"model": {"state_dict": STATE}, "optimizer": {"state": {}}},
        {"model_state": {f"module._orig_mod.{name}": value for name, value in STATE.items()}},
        {f"{name.replace('.', '._orig_mod.')}": value for name, value in STATE.items()},
    ],
    ids=["dictionary", "nested", "prefixes", "compiled part"],
)
def test_what_trainers_add_is_removed(tmp_path, wrapped):
    torch.save(wrapped, tmp_path / "w.pth")
    assert same(read_state_dict(tmp_path / "w.pth", "weights"))


def test_a_prefix_of_one_model_is_removed_and_two_models_are_left_alone():
    one = {f"model.sam.{name}": value for name, value in STATE.items()} | {"loss.weight": torch.ones(1)}
    assert same(without_prefix(one, ["b.c"]))
    two = one | {f"ema.{name}": value for name, value in STATE.items()}
    assert without_prefix(two, ["b.c"]) == two
    assert without_prefix(STATE, ["b.c"]) == STATE and without_prefix(STATE, ["x"]) == STATE


def zipped(compression: int, *names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name in names:
            archive.writestr(name, bytes(10_000))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "an empty file"),
        (b"\n <!DOCTYPE html><html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS.*git lfs pull"),
        (zipped(zipfile.ZIP_STORED, "a.txt"), "a zip archive without tensors"),
        (zipped(zipfile.ZIP_DEFLATED, "w/data.pkl", "w/data/0"), "a zip archive without tensors"),
        (zipped(zipfile.ZIP_STORED, "w/data.pkl", "w/constants.pkl"), "a TorchScript program"),
        (zipped(zipfile.ZIP_STORED, "w/data.pkl"), "damaged or not a checkpoint"),
        (zipped(zipfile.ZIP_STORED, "w/data.pkl")[:80], "a damaged torch or zip file"),
        (b"\x80\x02}q\x00.", "damaged or not a checkpoint|an empty one"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "damaged or not a checkpoint|Python objects"),
        (b"\x20\0\0\0\0\0\0\0{broken", "damaged or not a checkpoint"),
        (b"\x1f\x8b\x08\0", "a gzip archive"),
        (b"hello", "got text"),
        (bytes(100), "another format"),
    ],
)
def test_other_content_is_named_without_torch_s_advice(tmp_path, content, words):
    path = tmp_path / "w.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        read_state_dict(path, "weights", "copy it again")
    text = str(caught.value)
    assert text.startswith(f"{path}: ") and "\n" not in text
    assert not any(advice in text for advice in ("weights_only", "arbitrary", "likely succeed"))


def test_folders_pipes_objects_and_tensors_without_values_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    torch.save({"model": STATE, "args": threading.Event}, tmp_path / "objects")
    torch.save({"a": torch.zeros(1).expand(10**9)}, tmp_path / "huge")
    torch.save({"a": torch.zeros(1, device="meta")}, tmp_path / "meta")
    torch.save({"a": torch.eye(2).to_sparse()}, tmp_path / "sparse")
    cases = {".": "a folder", "pipe": "no regular file", "objects": "Python objects", "none": "cannot be read"}
    for name, words in (cases | {"huge": "dense", "meta": "dense", "sparse": "dense"}).items():
        with pytest.raises(UserError, match=words):
            read_state_dict(tmp_path / name, "weights")


def test_equal_tensors_and_metadata_are_equal_bytes(tmp_path):
    metadata = {f"key{n}": f'"quoted" \u00e9 {n}' for n in range(20)}
    path, first = tmp_path / "w", encode_safetensors(STATE, metadata)
    for _ in range(5):
        assert encode_safetensors(STATE, dict(reversed(metadata.items()))) == first
    path.write_bytes(first)
    assert same(read_state_dict(path, "weights"))
    with safe_open(path, "pt") as file:
        assert file.metadata() == metadata

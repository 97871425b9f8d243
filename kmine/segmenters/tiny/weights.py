"""Weights of `tiny` on disk: half-precision safetensors, and a JSON file of the same name with their provenance."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from kmine.errors import UserError
from kmine.io.download import sha256_of
from kmine.io.json_file import json_field, load_json
from kmine.io.tensor_file import content_kind, encode_safetensors, read_state_dict, without_prefix
from kmine.segmenters.tiny import SHIPPED
from kmine.segmenters.tiny.network import SIDE, TinyNet
from kmine.segmenters.weights import CHECKPOINT_FLAG, update_digest

MAX_SIDE = 2**10


def save_tiny(net: TinyNet, path: Path, provenance: Mapping[str, str | int | float]) -> None:
    """Write the weights to `path`, and `provenance` with their sha256 to the JSON file; each file atomically."""
    tensors = {key: value.detach().half().cpu().contiguous() for key, value in net.state_dict().items()}
    shape = {"widths": " ".join(map(str, net.widths)), "side": str(net.side)}
    temp = path.with_name(path.name + ".part")
    temp.write_bytes(encode_safetensors(tensors, shape))
    text = json.dumps({**provenance, "sha256": sha256_of(temp)}, indent=2, sort_keys=True)
    note = path.with_name(path.stem + ".json.part")
    note.write_text(text + "\n", "utf-8")
    temp.replace(path)
    note.replace(path.with_suffix(".json"))


def load_tiny(path: Path) -> TinyNet:
    """The network of a file, in float32 and eval mode.

    A file of torch.save has no side of the crops; it is read as one of `SIDE`. Where the JSON file exists, its sha256
    must be the file's; for the shipped weights it must exist.

    Raises:
        UserError: no such file, a wrong sha256, a damaged file, or weights of another model.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; {_cure(path, f'name the weights of `tiny` with {CHECKPOINT_FLAG}')}")
    _check_sha256(path)
    cure = _cure(path, f"copy or download it again, or name another file with {CHECKPOINT_FLAG}")
    state = without_prefix(read_state_dict(path, "weights of `tiny`", cure), ["head.bias"])
    try:
        widths = [
            len(state[f"blocks.{n}.first.weight"]) for n in range(len(state)) if f"blocks.{n}.first.weight" in state
        ]
        net = TinyNet(tuple(widths), _side(path))
        net.load_state_dict(state)
    except (IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
        problem = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: not weights of `tiny` ({problem}); {cure}") from error
    if not all(torch.isfinite(tensor).all() for tensor in net.state_dict().values()):
        cure = _cure(path, "the training that wrote them failed: train again")
        raise UserError(f"{path}: some weights are not finite; {cure}")
    return net.eval()


def _side(path: Path) -> int:
    """The side of the crops that the weights are for, from the metadata that `save_tiny` writes."""
    if content_kind(path) != "safetensors":
        return SIDE
    with safe_open(path, "pt") as stream:
        return min(int((stream.metadata() or {}).get("side", SIDE)), MAX_SIDE)


def _check_sha256(path: Path) -> None:
    note = path.with_suffix(".json")
    if not note.is_file():
        if path == SHIPPED:
            raise UserError(f"{note}: no such file, so {path.name} cannot be checked; {_cure(path, '')}")
        return
    cure = _cure(path, "restore it, or delete it")
    found = load_json(note, "an object with the key `sha256`", cure)
    expected = json_field(found, "sha256", str, where=str(note), cure=cure)
    actual = sha256_of(path)
    if actual != expected:
        cure = _cure(path, f"restore both, or name another with {CHECKPOINT_FLAG}")
        raise UserError(
            f"{path}: expected SHA-256 {expected} from {note.name}, got {actual}: the file is damaged or was "
            f"replaced; {cure}"
        )


def _cure(path: Path, own_file: str) -> str:
    """`own_file` for a file of the user; the shipped one comes back by a reinstallation."""
    return "it is part of kmine: reinstall kmine" if path == SHIPPED else own_file


def signature_of(net: TinyNet) -> str:
    """sha256 over widths, side and every weight."""
    digest = hashlib.sha256(f"tiny {net.widths} {net.side}".encode())
    update_digest(digest, net.state_dict())
    return digest.hexdigest()

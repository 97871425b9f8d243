"""Weights of `tiny` on disk: half-precision safetensors, and a JSON file of the same name with their provenance."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from kmine.errors import UserError
from kmine.io.download import sha256_of
from kmine.segmenters.tiny import SHIPPED
from kmine.segmenters.tiny.network import TinyNet
from kmine.segmenters.weights import CHECKPOINT_FLAG, update_digest


def save_tiny(net: TinyNet, path: Path, provenance: Mapping[str, str | int | float]) -> None:
    """Write the weights to `path`, and `provenance` with their sha256 to the JSON file; each file atomically."""
    tensors = {key: value.detach().half().cpu().contiguous() for key, value in net.state_dict().items()}
    shape = {"widths": " ".join(map(str, net.widths)), "side": str(net.side)}
    temp = path.with_name(path.name + ".part")
    save_file(tensors, temp, metadata=shape)
    text = json.dumps({**provenance, "sha256": sha256_of(temp)}, indent=2, sort_keys=True)
    note = path.with_name(path.stem + ".json.part")
    note.write_text(text + "\n", "utf-8")
    temp.replace(path)
    note.replace(path.with_suffix(".json"))


def load_tiny(path: Path) -> TinyNet:
    """The network of a file, in float32 and eval mode.

    Where the JSON file exists, its sha256 must be the file's; for the shipped weights it must exist.

    Raises:
        UserError: no such file, a wrong sha256, a damaged file, or weights of another model.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; {_cure(path, f'name the weights of `tiny` with {CHECKPOINT_FLAG}')}")
    _check_sha256(path)
    try:
        with safe_open(path, "pt") as stream:
            shape = stream.metadata() or {}
            tensors = {key: stream.get_tensor(key).float() for key in stream.keys()}  # noqa: SIM118
        net = TinyNet(tuple(int(width) for width in shape["widths"].split()), int(shape["side"]))
        net.load_state_dict(tensors)
    except (SafetensorError, OSError) as error:
        cure = _cure(path, "copy or download it again")
        raise UserError(f"{path}: not a whole safetensors file ({error}); {cure}") from error
    except (KeyError, ValueError, RuntimeError) as error:
        cure = _cure(path, f"name another file with {CHECKPOINT_FLAG}")
        raise UserError(f"{path}: not weights of `tiny` ({str(error).splitlines()[0]}); {cure}") from error
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        cure = _cure(path, "the training that wrote them failed: train again")
        raise UserError(f"{path}: some weights are not finite; {cure}")
    return net.eval()


def _check_sha256(path: Path) -> None:
    note = path.with_suffix(".json")
    if not note.is_file():
        if path == SHIPPED:
            raise UserError(f"{note}: no such file, so {path.name} cannot be checked; {_cure(path, '')}")
        return
    try:
        expected = json.loads(note.read_text("utf-8"))["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        cure = _cure(path, "restore it, or delete it")
        raise UserError(f"{note}: expected JSON with the key `sha256`; {cure}") from error
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

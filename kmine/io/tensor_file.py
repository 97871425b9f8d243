"""Tensors from files of any origin: known by their content, not by their name; code in a file is never executed."""

from __future__ import annotations

import json
import stat
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kmine.errors import UserError, first_names

if TYPE_CHECKING:
    from torch import Tensor

CONTAINERS = ("model_state_dict", "state_dict", "model_state", "model", "module", "net", "network", "weights", "params")
"""Keys under which trainers save the state dict of a model."""
WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Parts of tensor names that torch.compile and distributed training add."""
_FORMATS = (
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself (git lfs pull fetches it)"),
    (b"\x1f\x8b", "a gzip archive (unpack it)"),
    (b"BZh", "a bzip2 archive (unpack it)"),
    (b"7z\xbc\xaf", "a 7z archive (unpack it)"),
    (b"\xfd7zXZ", "an xz archive (unpack it)"),
    (b"\x89HDF", "an HDF5 file, as Keras saves"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x89PNG", "a PNG picture"),
    (b"GGUF", "a GGUF file"),
)


def content_kind(path: Path) -> str:
    """What a file is, by its content: `safetensors`, `torch`, else words for a message."""
    with path.open("rb") as file:
        head = file.read(512)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**27:
        return "safetensors"
    if head[:4] == b"PK\x03\x04":
        return _zip_kind(path)
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05":
        return "torch"
    if head[257:262] == b"ustar":
        return "a tar archive (unpack it, or kmine weights unbundle)"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<script")):
        return "a web page, so the download failed"
    known = next((words for magic, words in _FORMATS if head.startswith(magic)), None)
    is_text = head.isascii() and b"\0" not in head
    return known or ("text" if head and is_text else "another format" if head else "an empty file")


def encode_safetensors(tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Safetensors of contiguous tensors. Equal arguments give equal bytes: the library orders metadata at random."""
    from safetensors.torch import save

    data = save(tensors, dict(metadata))
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[end:]


def _zip_kind(path: Path) -> str:
    """Kind of a zip archive; torch.save writes one with data.pkl, without compression."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return "a damaged torch or zip file"
    names = {entry.filename.rpartition("/")[2] for entry in entries}
    if "constants.pkl" in names:
        return "a TorchScript program, which is code"
    is_bomb = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    return "torch" if "data.pkl" in names and not is_bomb else "a zip archive without tensors of torch.save (unpack it)"


def read_state_dict(path: Path, expected: str, cure: str = "download or copy it again") -> dict[str, Tensor]:
    """The state dict of a file of safetensors or torch.save, on the CPU.

    Containers of trainers (`CONTAINERS`) are opened, and parts of names that wrappers add are removed.

    Args:
        path: the file; its suffix does not matter.
        expected: what it should hold, for messages.
        cure: for messages on damage.

    Raises:
        UserError: the file is missing, damaged, of another format, or holds Python objects or no state dict.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f"{path}: expected {expected}, got {'a folder' if path.is_dir() else 'no regular file'}")
        kind, size = content_kind(path), path.stat().st_size
        if kind not in ("safetensors", "torch"):
            raise UserError(f"{path}: expected {expected} (safetensors, or of torch.save), got {kind}; {cure}")
        content = _read_safetensors(path, cure) if kind == "safetensors" else _read_torch(path, cure)
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: expected {expected}, cannot be read ({reason}); {cure}") from error
    return _plain_names(_unwrapped(content), path, size)


def without_prefix(state: dict[str, Tensor], anchors: Iterable[str]) -> dict[str, Tensor]:
    """The tensors below the prefix that one of the names `anchors` has (`model.`, `sam.`), without it.

    Unchanged if none has one, or if several do: those are several models.
    """
    prefixes = {name[: -len(a)] for a in anchors for name in state if name == a or name.endswith(f".{a}")}
    if len(prefixes) != 1:
        return state
    (prefix,) = prefixes
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _unwrapped(content: Any) -> Any:
    for _ in range(4):
        inner = next((content[k] for k in CONTAINERS if isinstance(content, dict) and _is_mapping(content, k)), None)
        if inner is None:
            break
        content = inner
    return content


def _is_mapping(content: dict[Any, Any], key: str) -> bool:
    return isinstance(content.get(key), dict)


def _plain_names(content: Any, path: Path, size: int) -> dict[str, Tensor]:
    import torch

    is_state = isinstance(content, dict) and content and all(isinstance(name, str) for name in content)
    if not is_state or not all(torch.is_tensor(value) for value in content.values()):
        actual = first_names(sorted(map(str, content))) if isinstance(content, dict) else type(content).__name__
        raise UserError(
            f"{path}: expected a state dict (names to tensors), plain or under {', '.join(CONTAINERS[:4])}, got "
            f"{actual or 'an empty one'}; save the model's state_dict() alone"
        )
    for name, tensor in content.items():
        whole = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
        if not whole or tensor.numel() * tensor.element_size() > size:
            raise UserError(f"{path}: expected plain dense tensors, got another kind in {name[:80]}; save it again")
    renamed = {".".join(p for p in name.split(".") if p not in WRAPPERS): value for name, value in content.items()}
    return renamed if len(renamed) == len(content) else dict(content)


def _read_safetensors(path: Path, cure: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, KeyError, TypeError) as error:  # KeyError: a type of number that torch lacks
        first_line = str(error).split("\n")[0][:200]
        raise UserError(f"{path}: damaged or not a checkpoint ({first_line}); {cure}") from error


def _read_torch(path: Path, cure: str) -> object:
    """Content of a torch.save file; torch's own messages advise to allow code and are not passed on."""
    import torch

    try:
        with path.open("rb") as file, warnings.catch_warnings():  # by its path, torch would trust the suffix
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise  # not the file's fault
    except Exception as error:  # The class depends on the damaged byte.
        if "Unsupported global" in str(error) or "Unsupported class" in str(error):
            raise UserError(
                f"{path}: expected tensors only, got Python objects, which could run code; "
                "save only the state dict, best as .safetensors"
            ) from error
        raise UserError(f"{path}: damaged or not a checkpoint (torch cannot read it); {cure}") from error

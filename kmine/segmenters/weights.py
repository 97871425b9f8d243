"""Weights of the official segmenters: where they come from, and how a checkpoint becomes a state dict.

The digits in the official file names are the first six of the files' MD5, not of their SHA-256 (which torch.hub's
`check_hash` would want). The SHA-256 sums below are those of micro-sam's registry (computational-cell-analytics/
micro-sam, `micro_sam/util.py`); several other public projects check the same three. The largest file has 2.6 GB.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kmine.errors import UserError
from kmine.io.download import download, sha256_of
from kmine.io.files import cache_root

if TYPE_CHECKING:
    import torch

CHECKPOINT_FLAG = "--segmenter.checkpoint FILE"


@dataclass(frozen=True)
class Weights:
    """One file on a server."""

    url: str
    sha256: str

    @property
    def filename(self) -> str:
        """Last part of the address."""
        return self.url.rsplit("/", 1)[-1]


_HOST = "https://dl.fbaipublicfiles.com/segment_anything/"
OFFICIAL_WEIGHTS: dict[str, Weights] = {
    "sam_vit_b": Weights(
        _HOST + "sam_vit_b_01ec64.pth", "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912"
    ),
    "sam_vit_l": Weights(
        _HOST + "sam_vit_l_0b3195.pth", "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622"
    ),
    "sam_vit_h": Weights(
        _HOST + "sam_vit_h_4b8939.pth", "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e"
    ),
}


def default_cache_dir() -> Path:
    """Folder for downloaded weights: `weights` in $KMINE_CACHE, else in ~/.cache/kmine."""
    return cache_root() / "weights"


def is_official(name: str, path: Path) -> bool:
    """Whether a file is, byte for byte, the official download of that name."""
    return path.is_file() and name in OFFICIAL_WEIGHTS and sha256_of(path) == OFFICIAL_WEIGHTS[name].sha256


def download_weights(name: str, cache_dir: Path, offline: bool) -> Path:
    """The official weights of a segmenter, downloaded unless they are in `cache_dir` already.

    A broken download leaves `FILE.part`, which the next call continues. The final name appears only after the SHA-256
    agreed; a file found in the folder is checked as well.

    Raises:
        UserError: offline and the file is missing, the server failed, or the content is not the official one.
    """
    weights = OFFICIAL_WEIGHTS[name]
    path = cache_dir / weights.filename
    if not path.exists():
        if offline:
            raise UserError(
                f"{path}: the weights of {name} are missing and --offline forbids the download; "
                f"put {weights.url} there, or name your own copy with {CHECKPOINT_FLAG}"
            )
        otherwise = f"fetch the file by other means and name it with {CHECKPOINT_FLAG}"
        download(weights.url, weights.sha256, path, otherwise=otherwise)
    elif sha256_of(path) != weights.sha256:
        raise UserError(
            f"{path}: not the official {weights.filename} (its SHA-256 differs): delete it so that it is downloaded "
            f"again, or, if these are weights of your own, move it and name it with {CHECKPOINT_FLAG}"
        )
    return path


def require_checkpoint(path: Path) -> None:
    """Refuses a checkpoint that is no file.

    Raises:
        UserError: it is missing.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected the weights of a segmenter, see {CHECKPOINT_FLAG}")


def read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """The state dict of a checkpoint, on the CPU; nothing in the file is ever executed.

    Read are `.safetensors` files and, by any other name, what torch.save writes: a plain state dict, or one under
    `model` or `state_dict`; the prefix `module.` of distributed training is taken off.

    Raises:
        UserError: the file is missing, damaged, holds Python objects or no state dict.
    """
    import torch

    require_checkpoint(path)
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content or not all(torch.is_tensor(v) for v in content.values()):
        actual = sorted(map(str, content))[:5] if isinstance(content, dict) else type(content).__name__
        raise UserError(
            f"{path}: expected a state dict (names to tensors), plain or under model or state_dict, got {actual}"
        )
    if all(name.startswith("module.") for name in content):
        content = {name.removeprefix("module."): tensor for name, tensor in content.items()}
    return content


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise _damaged(path, error) from error


def _read_torch(path: Path) -> object:
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise  # The file is not to blame.
    except Exception as error:  # Which class a damaged file raises depends on the byte that is wrong.
        if "Unsupported global" in str(error) or "Unsupported class" in str(error):
            raise UserError(
                f"{path}: holds Python objects beside the weights and is not opened, for they could run code; "
                "save the state dict alone, best as .safetensors"
            ) from error
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> UserError:
    first_line = str(error).split("\n")[0] or type(error).__name__
    return UserError(f"{path}: damaged or not a checkpoint ({first_line}); download or copy it again")

"""Checkpoints of segmenters: addresses of the official weights, download, and reading as a state dict."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kmine.errors import UserError
from kmine.io.download import download, sha256_of
from kmine.io.tensor_file import read_state_dict
from kmine.segmenters.hf.files import model_folder

if TYPE_CHECKING:
    import torch
    from torch import nn

CHECKPOINT_FLAG = "--segmenter.checkpoint FILE"


@dataclass(frozen=True)
class Weights:
    """A file on a server."""

    url: str
    sha256: str

    @property
    def filename(self) -> str:
        """Last part of the address."""
        return self.url.rsplit("/", 1)[-1]


_SAM = "https://dl.fbaipublicfiles.com/segment_anything/sam_"
# The digits in the names are of the files' MD5. The SHA-256 are those of micro-sam's registry (`micro_sam/util.py` of
# computational-cell-analytics/micro-sam). The largest file has 2.6 GB.
OFFICIAL_WEIGHTS: dict[str, Weights] = {
    "sam_vit_b": Weights(_SAM + "vit_b_01ec64.pth", "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912"),
    "sam_vit_l": Weights(_SAM + "vit_l_0b3195.pth", "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622"),
    "sam_vit_h": Weights(_SAM + "vit_h_4b8939.pth", "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e"),
    "mobile_sam": Weights(
        "https://github.com/ChaoningZhang/MobileSAM/raw/master/weights/mobile_sam.pt",
        "6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f",
    ),
}


MEDSAM_ID = "wanglab/medsam-vit-base"
"""Repository of the Hugging Face hub with MedSAM's weights, from its authors."""


def weights_path(name: str, checkpoint: str | None, cache_dir: Path, offline: bool) -> Path:
    """The file of a segmenter of SAM's layout: the user's `checkpoint`, or the published one, downloaded if need be.

    Raises:
        UserError: offline and the file is missing, a failed download, weights that are published by hand alone.
    """
    if checkpoint is not None:
        return Path(checkpoint)
    if name in OFFICIAL_WEIGHTS:
        return download_weights(name, cache_dir, offline)
    if name == "medsam":
        folder = model_folder(MEDSAM_ID, offline)
        safe = folder / "model.safetensors"
        return safe if safe.exists() else folder / "pytorch_model.bin"
    raise UserError(
        f"segmenter.checkpoint: the weights of {name} have no address for programs; download lite_medsam.pth as "
        f"github.com/bowang-lab/MedSAM (branch LiteMedSAM) says, and name it with {CHECKPOINT_FLAG}"
    )


def is_official(name: str, path: Path) -> bool:
    """Whether a file equals the official download of that name."""
    return path.is_file() and name in OFFICIAL_WEIGHTS and sha256_of(path) == OFFICIAL_WEIGHTS[name].sha256


def download_weights(name: str, cache_dir: Path, offline: bool) -> Path:
    """Path of the official weights of a segmenter, checked; downloaded, or the download continued, if not there yet.

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
        otherwise = f"download the file by other means and name it with {CHECKPOINT_FLAG}"
        download(weights.url, weights.sha256, path, otherwise=otherwise)
    elif sha256_of(path) != weights.sha256:
        raise UserError(
            f"{path}: expected the official {weights.filename}, got another SHA-256: delete it so that it is "
            f"downloaded again, or, if these are your own weights, move it and name it with {CHECKPOINT_FLAG}"
        )
    return path


def require_checkpoint(path: Path) -> None:
    """Raise `UserError` for a checkpoint that is not a file."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected the weights of a segmenter, see {CHECKPOINT_FLAG}")


def read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """The state dict of a checkpoint: `kmine.io.tensor_file.read_state_dict`.

    Raises:
        UserError: the file is missing, damaged, of another format, holds Python objects or no state dict.
    """
    require_checkpoint(path)
    return read_state_dict(path, "the weights of a segmenter")


def load_adapted(module: nn.Module, state: Mapping[str, torch.Tensor], expected: str) -> None:
    """Load the tensors of a fine-tuned copy into `module`; `ValueError` where they do not fit `expected`."""
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"expected {expected}, got tensors that do not fit: {one_line(error)}; adapt this segmenter again"
        ) from error


def one_line(error: RuntimeError) -> str:
    """The reasons of `load_state_dict`, cut after 400 characters."""
    return " ".join(str(error).split())[:400]


def update_digest(digest: hashlib._Hash, state: Mapping[str, torch.Tensor]) -> None:
    """Add names, dtypes, shapes and values of tensors to a hash, in the order of their names."""
    for key, tensor in sorted(state.items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().numpy().data)

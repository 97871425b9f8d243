"""Weights of the official segmenters: where they come from, and how a checkpoint becomes a state dict.

The digits in the official file names are the first six of the files' MD5, not of their SHA-256 (which torch.hub's
`check_hash` would want). The SHA-256 sums below are those of micro-sam's registry (computational-cell-analytics/
micro-sam, `micro_sam/util.py`); several other public projects check the same three.

pooch is not used: its HTTP downloader starts over after every break and cannot tell an answer to a Range request
(206) from the whole file (200), and the largest file has 2.6 GB. So `requests` does it here.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kmine.records import UserError

if TYPE_CHECKING:
    import requests
    from rich.progress import Progress

CHECKPOINT_FLAG = "--segmenter.checkpoint FILE"
CHUNK_BYTES = 1 << 16
MAX_FAILURES = 4
"""Breaks in a row, without one byte gained, after which a download gives up."""
RETRY_WAIT_S = 1.0
"""Pause after the first break; doubles with each further one."""
TIMEOUT_S = 30.0


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
KNOWN: dict[str, Weights] = {
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
    root = os.environ.get("KMINE_CACHE")
    return (Path(root).expanduser() if root else Path.home() / ".cache" / "kmine") / "weights"


def sha256_of(path: Path) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def is_official(name: str, path: Path) -> bool:
    """Whether a file is, byte for byte, the official download of that name."""
    return path.is_file() and name in KNOWN and sha256_of(path) == KNOWN[name].sha256


def fetch(name: str, cache_dir: Path, offline: bool) -> Path:
    """The official weights of a segmenter, downloaded unless they are in `cache_dir` already.

    A broken download leaves `FILE.part`, which the next call continues. The final name appears only after the SHA-256
    agreed; a file found in the folder is checked as well.

    Raises:
        UserError: offline and the file is missing, the server failed, or the content is not the official one.
    """
    weights = KNOWN[name]
    path = cache_dir / weights.filename
    if not path.exists():
        if offline:
            raise UserError(
                f"{path}: the weights of {name} are missing and --offline forbids the download; "
                f"put {weights.url} there, or name your own copy with {CHECKPOINT_FLAG}"
            )
        part = path.with_name(path.name + ".part")
        _download(weights.url, part)
        _verify(part, weights)
        part.replace(path)
    elif sha256_of(path) != weights.sha256:
        raise UserError(
            f"{path}: not the official {weights.filename} (its SHA-256 differs): delete it so that it is downloaded "
            f"again, or, if these are weights of your own, move it and name it with {CHECKPOINT_FLAG}"
        )
    return path


def _verify(part: Path, weights: Weights) -> None:
    came = sha256_of(part)
    if came != weights.sha256:
        # Kept, it would be continued for ever.
        part.unlink()
        raise UserError(
            f"{weights.url}: expected SHA-256 {weights.sha256}, got {came}; the download was discarded: run "
            f"the command again, or fetch the file by other means and name it with {CHECKPOINT_FLAG}"
        )


def _download(url: str, part: Path) -> None:
    """Fills `part` from where it ends; breaks are retried as long as bytes keep coming."""
    import requests

    part.parent.mkdir(parents=True, exist_ok=True)
    failures = 0
    with _progress() as progress:
        while True:
            before = _size(part)
            try:
                return _continue(url, part, progress)
            except requests.RequestException as error:
                failures = 1 if _size(part) > before else failures + 1
                if failures >= MAX_FAILURES or not _may_pass(error):
                    raise UserError(
                        f"{url}: the download failed ({error}); {_size(part)} bytes are kept, run the command again "
                        f"to go on, or fetch the file by other means and name it with {CHECKPOINT_FLAG}"
                    ) from error
                time.sleep(RETRY_WAIT_S * 2 ** (failures - 1))


def _may_pass(error: requests.RequestException) -> bool:
    """Whether trying again makes sense: lost connections and server faults (5xx), not refusals (4xx)."""
    return error.response is None or error.response.status_code >= 500


def _continue(url: str, part: Path, progress: Progress) -> None:
    import requests

    offset = _size(part)
    # Compressed transfer would make offsets count other bytes than those on disk.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={offset}-"} if offset else {})
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT_S) as response:
        if offset and response.status_code == requests.codes.requested_range_not_satisfiable:
            return  # Nothing is left to fetch; the hash decides whether what is there is right.
        response.raise_for_status()
        if response.status_code != requests.codes.partial_content:
            offset = 0  # A server that does not know Range sends the whole file.
        length = response.headers.get("Content-Length")
        task = progress.add_task(
            url.rsplit("/", 1)[-1], total=offset + int(length) if length else None, completed=offset
        )
        with part.open("ab" if offset else "wb") as stream, contextlib.ExitStack() as stack:
            stack.callback(progress.remove_task, task)
            for chunk in response.iter_content(CHUNK_BYTES):
                progress.advance(task, stream.write(chunk))


def _progress() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """The state dict of a checkpoint, on the CPU; nothing in the file is ever executed.

    Read are `.safetensors` files and, by any other name, what torch.save writes: a plain state dict, or one under
    `model` or `state_dict`; the prefix `module.` of distributed training is taken off.

    Raises:
        UserError: the file is missing, damaged, holds Python objects or no state dict.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected the weights of a segmenter, see {CHECKPOINT_FLAG}")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content or not all(torch.is_tensor(v) for v in content.values()):
        came = sorted(map(str, content))[:5] if isinstance(content, dict) else type(content).__name__
        raise UserError(
            f"{path}: expected a state dict (names to tensors), plain or under model or state_dict, got {came}"
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

"""Pretrained encoder weights from a local file, and errors of building an encoder."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from torch import Tensor, nn

from kmine.config import ModelConfig
from kmine.errors import UserError
from kmine.io.tensor_file import read_state_dict

HUB_TIMEOUT_S, STALL_S = 5.0, 20.0
"""Seconds for the hub to answer, and for any server to send more."""
_MOBILENET_V2_BLOCKS = (1, 2, 3, 4, 3, 3, 1)
"""Blocks of each of MobileNetV2's stages."""


@contextmanager
def encoder_errors(cfg: ModelConfig, settings: str, offline: bool) -> Iterator[None]:
    """Turn errors of building the encoder of `cfg` within the block into `UserError`; `settings` is for its message."""
    if cfg.encoder_weights == "hub" and offline:
        raise UserError(
            "model.encoder_weights is hub, which may download, and --offline forbids it; "
            "pass a local .safetensors file or leave it empty for random weights"
        )
    try:
        with _answering_hub(cfg.encoder_weights == "hub"):
            yield
    except UserError:
        raise
    except OSError as error:  # huggingface_hub and urllib errors are OSErrors
        raise UserError(
            f"the ImageNet weights of encoder {cfg.encoder} could not be downloaded ({type(error).__name__}); "
            "pass a local .safetensors file as --model.encoder_weights, or leave it empty for random weights"
        ) from error
    except (ValueError, KeyError, RuntimeError, AttributeError, TypeError, AssertionError) as error:
        # smp and timm raise all of these for unsuitable encoders
        raise UserError(f"model.encoder {cfg.encoder!r} cannot be built with {settings}: {error}") from error


@contextmanager
def _answering_hub(is_used: bool) -> Iterator[None]:
    """Let the hub's library use its cache alone where the hub does not answer; else it retries for minutes.

    Other servers, of encoders that load by torch.hub, which sets no time limit, are waited for `STALL_S`.
    """
    from huggingface_hub import constants

    url, before = urlsplit(constants.ENDPOINT), constants.HF_HUB_OFFLINE
    if is_used and not getproxies():
        try:
            port = url.port or (80 if url.scheme == "http" else 443)
            socket.create_connection((url.hostname or "", port), HUB_TIMEOUT_S).close()
        except OSError:
            constants.HF_HUB_OFFLINE = True
    stall_s = socket.getdefaulttimeout()
    try:
        if is_used and stall_s is None:
            socket.setdefaulttimeout(STALL_S)
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
        socket.setdefaulttimeout(stall_s)


def load_encoder(encoder: nn.Module, weights: str | None, name: str) -> None:
    """Load the file `weights` into `encoder` in place, unless it is None, none or hub; other tensors are ignored.

    Tensor names are normalized first: timm's `features_only` encoders write `layers_0` for `layers.0`, and
    segmentation-models-pytorch adds `model.`; any prefix that all have is removed. Weights of torchvision's MobileNetV2
    also fit timm's `mobilenetv2_100`.

    Raises:
        UserError: the file is missing, damaged, or of another encoder `name`.
    """
    if weights in (None, "none", "hub"):
        return
    path = Path(weights)
    own = encoder.state_dict()
    needed = [k for k in own if not k.endswith("num_batches_tracked")]
    tensors = _below_prefix(_read(path), [_spelling(k) for k in needed])
    matching = {k: tensors[_spelling(k)] for k in own if _spelling(k) in tensors}
    missing = [k for k in needed if k not in matching]
    mismatched = [k for k in needed if k in matching and matching[k].shape != own[k].shape]
    if missing or mismatched:
        first, problem = (missing or mismatched)[0], "is missing"
        if not missing:
            problem = f"has shape {tuple(matching[first].shape)}, not {tuple(own[first].shape)}"
        raise UserError(
            f"model.encoder_weights: {path} is not a checkpoint of encoder {name}: {len(missing)} of {len(needed)} "
            f"tensors missing, {len(mismatched)} of another shape; {first} {problem}. "
            "Choose the encoder that the file was made for"
        )
    encoder.load_state_dict(matching, strict=False)


def _read(path: Path) -> dict[str, Tensor]:
    """Tensors of a file by every spelling of their names."""
    if not path.is_file():
        raise UserError(f"model.encoder_weights: no file {path}; expected a .safetensors file, hub or none")
    tensors = read_state_dict(path, "model.encoder_weights")
    translated = {name: v for k, v in tensors.items() if (name := _mobilenet_v2_by_timm(k))}
    return {_spelling(k): v for k, v in (tensors | translated).items()}


def _below_prefix(tensors: dict[str, Tensor], needed: list[str]) -> dict[str, Tensor]:
    """The tensors below the shortest prefix (`encoder_`, `backbone_`) that has all needed ones; unchanged without."""
    prefixes = (name[: -len(needed[0])] for name in tensors if name.endswith(needed[0]))
    for prefix in sorted(prefixes, key=len):
        if all(prefix + name in tensors for name in needed):
            return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    return tensors


def _spelling(key: str) -> str:
    return key.removeprefix("model.").replace(".", "_")


def _mobilenet_v2_by_timm(key: str) -> str | None:
    """timm's name for a tensor of torchvision's MobileNetV2; None for other tensors and for those after the blocks."""
    match = re.fullmatch(r"(.*\.)?features\.(\d{1,3})\.(.+)\.(\w+)", key)
    number, layer, tensor = (int(match[2]), match[3], match[4]) if match else (0, "", "")
    prefix = match[1] or "" if match else ""
    if number == 0:
        layers = {"0": "conv_stem", "1": "bn1"}
        return f"{prefix}{layers[layer]}.{tensor}" if layer in layers else None
    expanding = {"0.0": "conv_pw", "0.1": "bn1", "1.0": "conv_dw", "1.1": "bn2", "2": "conv_pwl", "3": "bn3"}
    first = {"0.0": "conv_dw", "0.1": "bn1", "1": "conv_pw", "2": "bn2"}
    layers = first if number == 1 else expanding
    place = [(stage, n) for stage, count in enumerate(_MOBILENET_V2_BLOCKS) for n in range(count)]
    layer = layer.removeprefix("conv.")
    if number > len(place) or layer not in layers:
        return None
    stage, n = place[number - 1]
    return f"{prefix}blocks.{stage}.{n}.{layers[layer]}.{tensor}"

"""Pretrained encoder weights from a local file, and errors of building an encoder."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from kmine.config import ModelConfig
from kmine.config.model import SCALINGS
from kmine.errors import UserError
from kmine.io.download import sha256_of
from kmine.io.errors import user_errors
from kmine.io.files import default_cache_dir
from kmine.io.tensor_file import content_kind, read_state_dict
from kmine.models.encoder_hub import encoder_record, fetch_encoder, published_scaling, weights_name

_MOBILENET_V2_BLOCKS = (1, 2, 3, 4, 3, 3, 1)
"""Blocks of each of MobileNetV2's stages."""


class LostWeightsError(UserError):
    """The encoder weights that a run began with are missing or were changed; without them it may be finished."""


@contextmanager
def encoder_errors(cfg: ModelConfig, settings: str) -> Iterator[None]:
    """Turn errors of building the encoder of `cfg` within the block into `UserError`; `settings` is for its message."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, KeyError, RuntimeError, AttributeError, TypeError, AssertionError) as error:
        # smp and timm raise all of these for unsuitable encoders
        raise UserError(f"model.encoder {cfg.encoder!r} cannot be built with {settings}: {error}") from error


def with_local_weights(cfg: ModelConfig, *, offline: bool = False) -> ModelConfig:
    """Settings whose encoder weights are a file, or None for random ones, and whose normalization has a name.

    `hub` is fetched into kmine's cache. Where `auto` was not resolved by a run, it stands for random weights, and for
    the scaling that the file or else its publisher states.

    Raises:
        LostWeightsError: the file is missing or not that of `encoder_sha256`.
        UserError: the download failed or is forbidden by `offline`.
    """
    name = weights_name(cfg.name, cfg.encoder)
    if not cfg.is_pretrained:
        scaling = "half" if cfg.normalization == "auto" else cfg.normalization
        return replace(cfg, encoder_weights=None, normalization=scaling)
    if cfg.encoder_weights == "hub":
        cfg = replace(cfg, encoder_weights=str(fetch_encoder(name, default_cache_dir(), offline=offline)))
    path = Path(cfg.encoder_weights)
    actual = weights_sha256(path)
    if cfg.encoder_sha256 not in (None, actual):
        raise LostWeightsError(
            f"model.encoder_weights: expected {path} with SHA-256 {cfg.encoder_sha256}, got {actual}; restore "
            "that file, or begin another run folder with --out"
        )
    if cfg.normalization == "auto":
        cfg = replace(cfg, normalization=stated_scaling(path) or published_scaling(name) or "half")
    return cfg


def weights_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file of encoder weights. `LostWeightsError` if there is none."""
    if not path.is_file():
        raise LostWeightsError(
            f"model.encoder_weights: no file {path}; expected a .safetensors file, auto, hub or none"
        )
    with user_errors(path, cure="check the file", otherwise="cannot be read"):
        return sha256_of(path)


def stated_scaling(path: Path) -> str | None:
    """Input scaling that the metadata of a safetensors file or kmine's record beside it name; None without either."""
    if record := encoder_record(path):
        return record.normalization
    if content_kind(path) != "safetensors":
        return None
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            stated = (file.metadata() or {}).get("normalization")
    except (SafetensorError, OSError):
        return None  # the reader of the tensors says what is wrong
    return stated if stated in SCALINGS else None


def load_encoder(encoder: nn.Module, weights: str | None, name: str) -> None:
    """Load the file `weights` into `encoder` in place, unless it is None; other tensors are ignored.

    Tensor names are normalized first: timm's `features_only` encoders write `layers_0` for `layers.0`, and
    segmentation-models-pytorch adds `model.`; any prefix that all have is removed. Weights of torchvision's MobileNetV2
    also fit timm's `mobilenetv2_100`.

    Raises:
        UserError: the file is missing, damaged, or of another encoder `name`.
    """
    if weights is None:
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

"""The start of an encoder: from a local .safetensors file, and what goes wrong when one is built."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn

from kmine.config import ModelConfig
from kmine.records import UserError


@contextmanager
def building(cfg: ModelConfig, settings: str, offline: bool) -> Iterator[None]:
    """Say as `UserError` why the encoder of `cfg` with `settings` cannot be built inside this block."""
    if cfg.encoder_weights == "hub" and offline:
        raise UserError(
            "model.encoder_weights is hub, which may download, and --offline forbids it; "
            "pass a local .safetensors file or leave it empty for random weights"
        )
    try:
        yield
    except UserError:
        raise
    except OSError as error:  # huggingface_hub and urllib errors are OSErrors
        raise UserError(
            f"the ImageNet weights of encoder {cfg.encoder} could not be downloaded ({type(error).__name__}); "
            "pass a local .safetensors file as --model.encoder_weights, or leave it empty for random weights"
        ) from error
    except (ValueError, KeyError, RuntimeError, AttributeError, TypeError, AssertionError) as error:
        # smp and timm say so in as many ways as there are encoders; their own words follow ours
        raise UserError(f"model.encoder {cfg.encoder!r} cannot be built with {settings}: {error}") from error


def load_encoder(encoder: nn.Module, weights: str | None, name: str) -> None:
    """Load the file that `weights` names, if it names one; what the encoder has no place for (a classifier) is left.

    Names are compared as timm spells them: its `features_only` encoders write `layers_0` for the `layers.0` of its
    checkpoints, and segmentation-models-pytorch puts `model.` before.

    Raises:
        UserError: the file is missing, damaged, or of another encoder.
    """
    if weights in (None, "none", "hub"):
        return
    path = Path(weights)
    tensors = _read(path)
    own = encoder.state_dict()
    given = {k: tensors[_spelling(k)] for k in own if _spelling(k) in tensors}
    needed = [k for k in own if not k.endswith("num_batches_tracked")]
    missing = [k for k in needed if k not in given]
    other = [k for k in needed if k in given and given[k].shape != own[k].shape]
    if missing or other:
        first = (missing or other)[0]
        came = "is missing" if missing else f"has shape {tuple(given[first].shape)}, not {tuple(own[first].shape)}"
        raise UserError(
            f"model.encoder_weights: {path} is not a checkpoint of encoder {name}: {len(missing)} of {len(needed)} "
            f"tensors missing, {len(other)} of another shape; {first} {came}. "
            "Choose the encoder that the file was made for"
        )
    encoder.load_state_dict(given, strict=False)


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise UserError(f"model.encoder_weights: no file {path}; expected a .safetensors file, hub, or nothing")
    try:
        return {_spelling(k): v for k, v in load_file(path).items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"model.encoder_weights: {path} is not a readable .safetensors file ({error})") from error


def _spelling(key: str) -> str:
    return key.removeprefix("model.").replace(".", "_")

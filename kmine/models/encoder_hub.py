"""Published encoder weights: where they are on the hub, what lies in local caches, and the input scaling they expect.

kmine's own cache holds `encoder-NAME.safetensors`, the bytes as published, and beside it its record in JSON.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from kmine.config.model import SCALINGS
from kmine.errors import UserError
from kmine.io.download import check_space, sha256_of
from kmine.io.errors import storage_errors
from kmine.io.files import read_json, write_atomic, write_json
from kmine.io.hub import hub_session
from kmine.io.tensor_file import content_kind

PREFIX = "encoder:"
"""Of an encoder's name in `kmine weights`."""
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
_FILE = "model.safetensors"


class EncoderSource(NamedTuple):
    """A repository of the Hugging Face hub with the weights of an encoder."""

    repo: str
    revision: str | None
    url: str = ""
    """Of the same weights on another server, by whose file name they lie in PyTorch's cache."""


@dataclass(frozen=True)
class EncoderRecord:
    """What kmine's cache keeps of an encoder, beside its file."""

    sha256: str
    source: str
    revision: str
    normalization: str | None

    @classmethod
    def of(cls, value: Any) -> EncoderRecord | None:
        """The record in a JSON value of any origin; None if a field is missing or not as kmine writes it."""
        found = {name: value.get(name) for name in cls.__annotations__} if isinstance(value, Mapping) else {}
        texts = [text for name, text in found.items() if name != "normalization"]
        is_plain = bool(texts) and all(isinstance(t, str) and t.isascii() and t.isprintable() for t in texts)
        is_known = found.get("normalization") in (None, *SCALINGS)
        return cls(**found) if is_plain and is_known and re.fullmatch("[0-9a-f]{64}", texts[0]) else None


def weights_name(architecture: str, encoder: str) -> str:
    """Name of an encoder's weights: segmentation-models-pytorch's own, or `tu-` and timm's, as all of sks and dpt."""
    return f"tu-{encoder.removeprefix('tu-')}" if architecture in ("sks", "dpt") else encoder


def encoder_path(folder: Path, name: str) -> Path:
    """The file of an encoder in kmine's cache of weights. `UserError` for a name that is none."""
    if not re.fullmatch(_NAME, name):
        raise UserError(f"{PREFIX}{name[:100]}: expected the name of an encoder, such as resnet34 or tu-resnet18")
    return folder / f"encoder-{name}.safetensors"


def encoder_name(filename: str) -> str:
    """The encoder whose weights a file of kmine's cache holds; empty for another file name."""
    match = re.fullmatch(rf"encoder-({_NAME})\.safetensors", filename)
    return match[1] if match else ""


def encoder_record(path: Path) -> EncoderRecord | None:
    """The record beside a file of encoder weights; None without one."""
    return EncoderRecord.of(read_json(path.with_suffix(".json"))) if encoder_name(path.name) else None


def source_of(name: str) -> EncoderSource | None:
    """Where the ImageNet weights of an encoder are published; None where they are not, or for an unknown name."""
    if name.startswith("tu-"):
        found = _timm_config(name)
        is_plain = found is not None and found.hf_hub_id and not found.hf_hub_filename
        return EncoderSource(found.hf_hub_id, None, found.url or "") if is_plain else None
    from segmentation_models_pytorch.encoders import encoders

    settings = encoders.get(name, {}).get("pretrained_settings", {}).get("imagenet")
    url = ""
    if settings and re.fullmatch(r"(resnet|resnext50|vgg)\d+\w*|mobilenet_v2", name):  # torchvision's, published again
        from torchvision.models import get_model_weights

        url = str(get_model_weights(name)["IMAGENET1K_V1"].url)
    return EncoderSource(settings["repo_id"], settings["revision"], url) if settings else None


def published_scaling(name: str) -> str | None:
    """Input scaling of an encoder's published weights, as far as known without the hub; None where it is not."""
    if name.startswith("tu-"):
        published = _timm_config(name)
        return scaling_name(published.mean, published.std) if published else None
    is_half = name.startswith(("inception", "xception", "timm-tf_efficientnet_lite"))
    return "half" if is_half else "dpn" if name.startswith("dpn") else "imagenet"


def scaling_name(mean: Sequence[float], std: Sequence[float]) -> str | None:
    """Name of a mean and deviation of RGB in [0, 1]; None for one that kmine does not know."""
    with suppress(TypeError, ValueError):
        given = [*map(float, mean), *map(float, std)]
        for name, known in SCALINGS.items():
            values = [*known[0], *known[1]]
            if len(given) == 6 and all(abs(a - b) < 2e-3 for a, b in zip(given, values, strict=True)):
                return name
    return None


def cached_weights(name: str, folder: Path) -> Path | None:
    """Weights of an encoder in the cache of kmine (`folder`), of Hugging Face or of PyTorch; downloads nothing.

    Raises:
        UserError: the file in kmine's cache is not the recorded one.
    """
    path = encoder_path(folder, name)
    if path.is_file():
        require_recorded(path)
        return path
    source = source_of(name)
    return source and (_in_hub_cache(source) or _in_torch_cache(source))


def require_recorded(path: Path) -> EncoderRecord:
    """The record of a file in kmine's cache. `UserError` if there is none or the file is another."""
    record = encoder_record(path)
    with storage_errors(path):
        if record is None or sha256_of(path) != record.sha256:
            raise UserError(
                f"{path}: expected the weights that {path.with_suffix('.json').name} records, got others or no such "
                f"record; remove the file and run `kmine weights get {PREFIX}{encoder_name(path.name)}`"
            )
    return record


def fetch_encoder(name: str, folder: Path, *, offline: bool = False) -> Path:
    """Path of an encoder's weights in kmine's cache; downloaded from the hub, or copied from its cache, if not there.

    Raises:
        UserError: no weights are published, the download failed or is forbidden by `offline`.
    """
    path = encoder_path(folder, name)
    if path.is_file():
        require_recorded(path)
        return path
    source = source_of(name)
    if source is None:
        raise UserError(
            f"{PREFIX}{name}: no ImageNet weights are published under that name; expected an encoder of "
            "segmentation-models-pytorch (resnet34, mobilenet_v2), or tu- and a name of timm (tu-resnet18)"
        )
    file = _in_hub_cache(source)
    if file is None and offline:
        raise UserError(
            f"the weights of encoder {name} are in no cache, and --offline forbids the download; fetch them on another "
            f"machine (kmine weights bundle FILE.tar {PREFIX}{name}), or give a local .safetensors file or none"
        )
    with _hub_errors(name, offline):
        from huggingface_hub import hf_hub_download
        from segmentation_models_pytorch.encoders import get_preprocessing_params

        file = file or Path(hf_hub_download(source.repo, _FILE, revision=source.revision))
        try:
            found = get_preprocessing_params(name)
            is_rgb = (found["input_space"], found["input_range"]) == ("RGB", [0, 1])
            normalization = scaling_name(found["mean"], found["std"]) if is_rgb else None
        except Exception:  # of any type: the hub's configuration is not at hand, the weights are
            normalization = published_scaling(name)
    with storage_errors(path):
        if (kind := content_kind(file)) != "safetensors":
            raise UserError(f"{source.repo}: expected a safetensors file, got {kind}; nothing was kept")
        path.parent.mkdir(parents=True, exist_ok=True)
        check_space(path.parent, file.stat().st_size, path.name)
        address = f"https://huggingface.co/{source.repo}"
        record = EncoderRecord(sha256_of(file), address, file.parent.name, normalization)  # snapshots/REVISION/FILE
        write_json(path.with_suffix(".json"), asdict(record))
        write_atomic(path, file.read_bytes())
    return path


@contextmanager
def _hub_errors(encoder: str, offline: bool) -> Iterator[None]:
    """Turn errors of a download within the block into `UserError`; see `hub_session`."""
    try:
        with hub_session(offline):
            yield
    except Exception as error:  # huggingface_hub and httpx raise many
        raise UserError(
            f"the ImageNet weights of encoder {encoder} could not be downloaded ({type(error).__name__}); "
            "pass a local .safetensors file as --model.encoder_weights, or none for random weights"
        ) from error


def _in_hub_cache(source: EncoderSource) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(source.repo, _FILE, revision=source.revision)
    return Path(found) if isinstance(found, str) else None


def _in_torch_cache(source: EncoderSource) -> Path | None:
    import torch

    path = Path(torch.hub.get_dir()) / "checkpoints" / source.url.rsplit("/", 1)[-1]
    return path if source.url and path.is_file() else None


def _timm_config(name: str) -> Any:
    """timm's configuration of the pretrained weights of `tu-NAME`; None without weights."""
    from timm.models import get_pretrained_cfg, is_model_pretrained

    plain = name.removeprefix("tu-")
    with suppress(RuntimeError, KeyError, ValueError):
        return get_pretrained_cfg(plain) if is_model_pretrained(plain) else None
    return None

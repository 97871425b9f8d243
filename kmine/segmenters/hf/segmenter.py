"""Models of transformers as `Segmenter`s: pixels by the library's own processor, coordinates by `SquareFrame`.

B images or prompts, C channels, h, w sides of the coarsest feature map, S side of mask inputs and logits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from kmine.errors import UserError
from kmine.segmenters.base import ALL_ABILITIES, Embedding
from kmine.segmenters.batched import BatchedSegmenter, DecoderQuery, QueryDecoder
from kmine.segmenters.cached_encoder import CachedEncoder
from kmine.segmenters.frame import SquareFrame
from kmine.segmenters.pixels import BOXES_ONLY, medsam_pixels
from kmine.segmenters.weights import update_digest

VERSION = 1
"""Part of signatures. Increase it when embeddings or masks change by more than rounding."""
_UNSIGNED = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "_attn_implementation")


@dataclass(frozen=True)
class HfModel:
    """A network with its image processor."""

    network: nn.Module
    processor: Any
    frame: SquareFrame
    is_medsam: bool
    """MedSAM is fed as its authors do: its repository names the processor of SAM, which it was not trained with."""

    @cached_property
    def levels(self) -> list[tuple[int, int]]:
        """(channels, side over that of the coarsest) of the feature maps of an image, the finest first."""
        config, kind = self.network.config, type(self.network).__name__
        if kind in ("SamModel", "SamHQModel"):
            own = [(config.vision_config.output_channels, 1)]
            return own + ([(config.vision_config.hidden_size, 1)] if kind == "SamHQModel" else [])
        width = config.mask_decoder_config.hidden_size
        return [(width // 8, 4), (width // 4, 2), (width, 1)]

    @cached_property
    def digest(self) -> str:
        """sha256 over weights, architecture and processor."""
        parts = [_plain(part.to_dict()) for part in (self.network.config, self.processor)]
        settings = json.dumps([VERSION, type(self.network).__name__, self.is_medsam, *parts], sort_keys=True)
        digest = hashlib.sha256(settings.encode())
        update_digest(digest, self.network.state_dict())
        return digest.hexdigest()

    def pixels(self, images: Sequence[NDArray[np.uint8]]) -> Tensor:
        """(B, 3, E, E) float32 on the device of images (H, W, 3) uint8 RGB."""
        if self.is_medsam:
            values = torch.from_numpy(np.stack([medsam_pixels(image, self.frame) for image in images]))
        else:
            batch = self.processor(images=list(images), return_tensors="pt", input_data_format="channels_last")
            values = batch["pixel_values"]
        return values.to(self.network.device)


class HfEncoder(CachedEncoder):
    """The image encoder; maps of several sides are rearranged to one array."""

    def __init__(self, model: HfModel, **settings: Any) -> None:
        super().__init__(**settings)
        self._model = model

    @cached_property
    def signature(self) -> str:
        """See `CachedEncoder.signature`; another version of the library may resize otherwise."""
        import transformers

        return hashlib.sha256(f"{self._model.digest} {transformers.__version__} {self._dtype}".encode()).hexdigest()

    def forward(self, images: Sequence[NDArray[np.uint8]]) -> Tensor:
        """(B, C, h, w): `stacked` maps."""
        out = self._model.network.get_image_embeddings(self._model.pixels(images))
        if isinstance(out, Tensor):
            maps = [out]
        elif type(self._model.network).__name__ == "SamHQModel":
            # The mask decoder reads the first of the intermediate maps, (B, h, w, C), only.
            maps = [out[0], out[1][0].permute(0, 3, 1, 2)]
        else:
            maps = list(out)
        return stacked(maps)


class HfDecoder(QueryDecoder):
    """Prompt encoder and mask decoder; each prompt is a row of the batch with its own mask input."""

    def __init__(self, model: HfModel, name: str) -> None:
        self._model, self._name = model, name
        self._sides = tuple(model.network.prompt_encoder.image_embedding_size)
        super().__init__(model.frame, 4 * self._sides[0], BOXES_ONLY if model.is_medsam else ALL_ABILITIES)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self._model.network.device

    def features(self, embedding: Embedding) -> Tensor:
        """(1, C, h, w) float32 on the device; `ValueError` for those of another model."""
        expected = (sum(channels * ratio**2 for channels, ratio in self._model.levels), *self._sides)
        actual = None if embedding.features is None else embedding.features.shape
        if actual != expected:
            raise ValueError(
                f"embedding: expected features {expected} of {self._name}, got {actual}; encode the image again"
            )
        return torch.from_numpy(embedding.features.astype(np.float32)).to(self.device)[None]

    def low_res(
        self, features: Tensor, size: tuple[int, int], queries: Sequence[DecoderQuery], multimask: bool
    ) -> tuple[Tensor, Tensor]:
        """See `QueryDecoder.low_res`; SAM 2 chooses among its masks itself where one is wanted."""
        points, labels, boxes, masks = self.framed(queries, size)
        maps = [m.expand(len(queries), -1, -1, -1) for m in unstacked(features, self._model.levels)]
        kind = type(self._model.network).__name__
        inputs: dict[str, Any] = {"image_embeddings": maps if kind not in ("SamModel", "SamHQModel") else maps[0]}
        if kind == "SamHQModel":
            inputs["intermediate_embeddings"] = [maps[1].permute(0, 2, 3, 1)]
        given = {"input_points": points, "input_labels": labels, "input_boxes": boxes}
        inputs |= {name: tensor[:, None] for name, tensor in given.items() if tensor is not None}
        out = self._model.network(**inputs, input_masks=masks, multimask_output=multimask)
        return out.pred_masks[:, 0], out.iou_scores[:, 0]


class HfSegmenter(BatchedSegmenter):
    """A model of transformers; its mask decoder is not fine-tuned, and it makes no proposals.

    Args:
        model: from `load_network`; its weights must not change any more.
        name: for tables.
        encoding: settings of `CachedEncoder`.
    """

    def __init__(self, model: HfModel, name: str, **encoding: Any) -> None:
        multimask = False if model.is_medsam else None
        super().__init__(name, HfEncoder(model, **encoding), HfDecoder(model, name), multimask)
        self.signature = model.digest


def load_network(folder: Path, name: str, device: str) -> HfModel:
    """The network of a folder that `model_folder` gave, in eval mode on a torch device, with its image processor.

    Raises:
        UserError: files that transformers cannot read, weights that are missing or of another layout.
    """
    from transformers import AutoImageProcessor, AutoModelForMaskGeneration, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    settings = {"local_files_only": True, "output_loading_info": True, "dtype": torch.float32}
    try:
        network, info = AutoModelForMaskGeneration.from_pretrained(folder, **settings)
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        size = dict(processor.to_dict()["size"])
    except Exception as error:  # of many types: of files, of safetensors, of checks of the settings
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{folder}: expected a promptable model, transformers cannot read it ({type(error).__name__}: {reason}); "
            "download it again, or update transformers"
        ) from error
    lacking = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if lacking:
        raise UserError(
            f"{folder}: expected all weights of {type(network).__name__}, {len(lacking)} are missing or of another "
            f"shape, such as {lacking[0]}; config.json and the weights do not belong together: download both again"
        )
    is_medsam = type(network).__name__ == "SamModel" and "medsam" in name.lower()
    squash = is_medsam or not size.get("longest_edge")
    side, expected = size.get("longest_edge") or size.get("height"), network.prompt_encoder.input_image_size
    if side != expected or size.get("width", side) != side:
        raise UserError(
            f"{folder}: expected images of {expected} px, as config.json says, preprocessor_config.json has {size}; "
            "take both files from one repository"
        )
    frame = SquareFrame(side, squash=squash, as_probabilities=is_medsam)
    return HfModel(network.to(device).eval(), processor, frame, is_medsam)


def stacked(maps: Sequence[Tensor]) -> Tensor:
    """(B, C, h, w) of maps (B, C_i, r_i h, r_i w), the coarsest last or all alike: finer pixels become channels."""
    sides = [m.shape[-1] // maps[-1].shape[-1] for m in maps]
    return torch.cat([F.pixel_unshuffle(m, side) if side > 1 else m for m, side in zip(maps, sides, strict=True)], 1)


def unstacked(features: Tensor, levels: Sequence[tuple[int, int]]) -> list[Tensor]:
    """The inverse of `stacked`; `levels` as in `HfModel`."""
    parts = features.split([channels * ratio**2 for channels, ratio in levels], 1)
    return [F.pixel_shuffle(part, ratio) if ratio > 1 else part for part, (_, ratio) in zip(parts, levels, strict=True)]


def _plain(settings: Any) -> Any:
    """Settings as JSON without what does not change a result."""
    if isinstance(settings, Mapping):
        return {str(key): _plain(value) for key, value in settings.items() if key not in _UNSIGNED}
    return [_plain(value) for value in settings] if isinstance(settings, list | tuple) else str(settings)

"""DPT (arXiv 2103.13413): a plain vision transformer of timm, such as DINOv2 or DINOv3, and a convolutional decoder."""

from __future__ import annotations

from typing import Any

from segmentation_models_pytorch.decoders.dpt.decoder import DPTDecoder, DPTSegmentationHead
from segmentation_models_pytorch.encoders.timm_vit import TimmViTEncoder
from torch import Tensor, nn
from torch.nn import functional as F

from kmine.config import ModelConfig
from kmine.models.base import LocalModel
from kmine.models.encoder_weights import encoder_errors, load_encoder

STRIDE, DEPTH = 16, 4
"""Side of the image that a token stands for; blocks whose tokens the decoder takes, evenly spaced."""
DEEPEST = 32
"""Stride of the decoder's coarsest level, of which the image's sides are multiples."""
FUSED = 8
"""Channels of the decoder as a multiple of `model.decoder_width`; with 32 the default width would have DPT's 256."""


class DptNet(nn.Module):
    """(B, 3, H, W) scaled images -> (B, K, H, W) logits; sides are multiples of `DEEPEST`.

    A transformer whose patches have another side, 14 in DINOv2, sees the image resized so that one patch is 16 pixels
    of it: features have stride 16 and the decoder's, 4 to 32, are powers of two.
    """

    def __init__(self, encoder: str, width: int, num_classes: int) -> None:
        super().__init__()
        options: dict[str, Any] = {"dynamic_img_size": True, "num_classes": 0}
        self.encoder = TimmViTEncoder(encoder.removeprefix("tu-"), pretrained=False, depth=DEPTH, **options)
        # The last norm would have no gradient, which several processes do not allow.
        self.encoder.model.prune_intermediate_layers(1, prune_norm=True, prune_head=True)
        if len({*self.encoder.output_strides}) > 1:
            raise ValueError("its stages have different strides; unet and unetpp take it")
        self.patch = self.encoder.output_stride
        self.decoder = DPTDecoder(
            self.encoder.out_channels,
            [STRIDE] * DEPTH,
            self.encoder.has_prefix_tokens,
            "cat" if self.encoder.has_prefix_tokens else "ignore",
            [FUSED * width * n for n in (1, 1, 2, 2)],
            FUSED * width,
        )
        self.segmentation_head = DPTSegmentationHead(FUSED * width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        if self.patch != STRIDE:
            sides = [side // STRIDE * self.patch for side in images.shape[-2:]]
            images = F.interpolate(images, sides, mode="bilinear", antialias=True)
        return self.segmentation_head(self.decoder(*self.encoder(images)))


def build_dpt(cfg: ModelConfig, num_classes: int) -> LocalModel:
    """The network of `cfg`. `UserError` for an encoder that is no plain transformer; weights as in `build_model`."""
    known = "model.name dpt, which takes plain vision transformers of timm (tu-vit_tiny_patch16_224)"
    with encoder_errors(cfg, known):
        net = DptNet(cfg.encoder, cfg.decoder_width, num_classes)
    load_encoder(net.encoder, cfg.encoder_weights, cfg.encoder)
    return LocalModel(net, num_classes, DEEPEST, cfg.normalization)

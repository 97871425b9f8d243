"""The decoder of U-Net++ (arXiv 1807.10165) for the levels of a pyramid, which may lack fine ones."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class NestedDecoder(nn.Module):
    """segmentation-models-pytorch's `UnetPlusPlusDecoder` and head, up to full resolution.

    `strides` and `channels` are of the input features, finest first, powers of 2; a stride that is missing (2, for
    transformers) has no skip there. `widths` are the channels of the steps, deepest first, the last one at stride 1.
    Features at stride 1 are not used.
    """

    def __init__(
        self, strides: Sequence[int], channels: Sequence[int], widths: Sequence[int], num_classes: int
    ) -> None:
        from segmentation_models_pytorch.base.heads import SegmentationHead
        from segmentation_models_pytorch.base.initialization import initialize_decoder, initialize_head
        from segmentation_models_pytorch.decoders.unetplusplus.decoder import UnetPlusPlusDecoder

        super().__init__()
        self.strides = tuple(strides)
        self.levels = tuple(2**n for n in range(1, len(widths) + 1))
        at = dict(zip(strides, channels, strict=True))
        self.blocks = UnetPlusPlusDecoder(
            encoder_channels=(3, *(at.get(stride, 0) for stride in self.levels)),
            decoder_channels=tuple(widths),
            n_blocks=len(widths),
        )
        self.head = SegmentationHead(widths[-1], num_classes, kernel_size=3)
        initialize_decoder(self.blocks)
        initialize_head(self.head)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Features, finest first -> (B, K, H, W) logits at stride 1."""
        at, deepest = dict(zip(self.strides, features, strict=True)), features[-1]
        for stride in set(self.levels) - at.keys():
            (batch, _, *grid), factor = deepest.shape, self.strides[-1] // stride
            at[stride] = deepest.new_zeros(batch, 0, *(side * factor for side in grid))
        # The decoder takes the image first, and drops it.
        return self.head(self.blocks([deepest, *(at[stride] for stride in self.levels)]))

"""Fusion of batch norm into the preceding convolution, for inference: the same function up to rounding, less work."""

from __future__ import annotations

from itertools import pairwise

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def fuse_conv_bn(model: nn.Module) -> None:
    """Fuse every `BatchNorm2d` that follows a `Conv2d` within a `Sequential`, in place, and set the model to eval mode.

    This changes the names in its state dict. Other norms are not changed.
    """
    model.eval()
    for sequence in [module for module in model.modules() if isinstance(module, nn.Sequential)]:
        for (before, conv), (name, norm) in pairwise(list(sequence.named_children())):
            if type(conv) is nn.Conv2d and type(norm) is nn.BatchNorm2d:
                setattr(sequence, before, fuse_conv_bn_eval(conv, norm))
                setattr(sequence, name, nn.Identity())

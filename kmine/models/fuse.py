"""Batch norm made part of the convolution before it: the same function to rounding, less work; for inference alone."""

from __future__ import annotations

from itertools import pairwise

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def fuse_conv_bn(model: nn.Module) -> None:
    """Fold every `BatchNorm2d` that follows a `Conv2d` within a `Sequential`, and put the model to eval.

    Its state dict has other names afterwards. Other norms and other neighbours are left alone.
    """
    model.eval()
    for sequence in [module for module in model.modules() if isinstance(module, nn.Sequential)]:
        for (before, conv), (name, norm) in pairwise(list(sequence.named_children())):
            if type(conv) is nn.Conv2d and type(norm) is nn.BatchNorm2d:
                setattr(sequence, before, fuse_conv_bn_eval(conv, norm))
                setattr(sequence, name, nn.Identity())

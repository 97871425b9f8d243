"""Fusing batch norm keeps the function."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kmine.config import ModelConfig
from kmine.models.build import build_model
from kmine.models.fuse import fuse_conv_bn


def norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if type(module) is nn.BatchNorm2d]


@pytest.mark.parametrize("name", ["unet", "unetpp", "sks"])
def test_logits_are_equal_and_the_norms_of_the_decoder_are_gone(name):
    encoder = "mobilenetv2_050" if name == "sks" else "mobilenet_v2"
    model = build_model(ModelConfig(name=name, encoder=encoder, decoder_channels=16), 2, seed=0)
    with torch.no_grad():
        for norm in norms(model):  # as after training: no norm is the identity
            norm.running_mean.uniform_(-1, 1)
            norm.running_var.uniform_(0.5, 2)
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.uniform_(-1, 1)
        images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
        before = model.eval()(images)
        count = len(norms(model))
        fuse_conv_bn(model)
        after = model(images)
    assert len(norms(model)) < count / 2
    torch.testing.assert_close(after, before, atol=1e-4 * float(before.abs().max()), rtol=1e-4)


def test_norms_that_do_not_follow_a_convolution_are_kept():
    sequential = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4))
    fuse_conv_bn(sequential)
    assert len(norms(sequential)) == 2 and not sequential.training

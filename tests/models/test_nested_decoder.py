"""The nested decoder: with it the fine branch of sks is segmentation-models-pytorch's U-Net++."""

from __future__ import annotations

import pytest
import torch

from kmine.config import ModelConfig
from kmine.models.build import build_model
from kmine.models.nested_decoder import NestedDecoder


@pytest.mark.parametrize(("levels", "depth"), [(3, 4), (4, 5)])
def test_the_fine_branch_alone_is_u_net_plus_plus(levels, depth):
    settings = {"decoder": "unetpp", "levels": levels, "veto": False, "decoder_channels": 32}
    fine = ModelConfig("sks", "mobilenetv2_050", **settings).with_architecture("unetpp")
    own = build_model(fine, 3, 0).eval()
    theirs = build_model(ModelConfig("unetpp", "tu-mobilenetv2_050", encoder_depth=depth, decoder_channels=32), 3, 1)
    encoder, tensors = theirs.net.encoder.state_dict(), own.net.fine.state_dict().values()
    encoder |= dict(zip(encoder, tensors, strict=False))  # stage by stage in both; theirs may have unused ones
    theirs.net.encoder.load_state_dict(encoder)
    theirs.net.decoder.load_state_dict(own.net.decoder.blocks.state_dict())
    theirs.net.segmentation_head.load_state_dict(own.net.decoder.head.state_dict())
    x = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    assert torch.equal(own(x), theirs.eval()(x))


def test_a_missing_stride_has_no_skip():
    decoder = NestedDecoder((4, 8, 16), (6, 7, 9), (16, 12, 10, 8), 2).eval()
    features = [torch.randn(2, c, 64 // s, 32 // s) for c, s in ((6, 4), (7, 8), (9, 16))]
    logits = decoder(features)
    assert logits.shape == (2, 2, 64, 32)
    for n in range(3):
        changed = [f + (i == n) for i, f in enumerate(features)]
        assert not torch.equal(decoder(changed), logits)

"""TinyViT equals timm's, with the stride of MobileSAM; tensors as in the published checkpoints."""

from __future__ import annotations

import re

import pytest
import torch

from kmine.segmenters.sam.build import build_sam
from kmine.segmenters.sam.tiny_vit import TinyVitEncoder


def timm_name(name: str) -> str:
    """A name of the published checkpoints in timm."""
    for ours, theirs in (
        *((r"\.c\.", ".conv."), (r"^patch_embed\.seq\.0\.", "patch_embed.conv1."), (r"\.fc", ".fc")),
        *((r"^patch_embed\.seq\.2\.", "patch_embed.conv2."), (r"^layers\.(\d)\.", r"stages.\1.")),
    ):
        name = re.sub(ours, theirs, name)
    # timm counts a merging to the stage that it leads to.
    return re.sub(r"^stages\.(\d)\.downsample", lambda m: f"stages.{int(m[1]) + 1}.downsample", name)


@pytest.fixture(scope="module")
def encoder():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = TinyVitEncoder(224, lite=False).eval()
        for tensor in (*net.parameters(), *(b for n, b in net.named_buffers() if n.endswith("running_mean"))):
            tensor.data.add_(torch.randn_like(tensor), alpha=0.05)
    return net


def test_features_equal_those_of_timm(encoder) -> None:
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("tiny_vit_5m_224", num_classes=0).eval()
    theirs.stages[3].downsample.conv2.conv.stride = (1, 1)
    body = {n: t for n, t in encoder.state_dict().items() if not n.startswith(("neck.", "head.", "norm_head."))}
    missing, unexpected = theirs.load_state_dict({timm_name(n): t for n, t in body.items()}, strict=False)
    assert not unexpected and all(name.startswith("head.") for name in missing), (missing, unexpected)
    pixels = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = encoder.neck(theirs.forward_features(pixels))
        torch.testing.assert_close(encoder(pixels), expected, atol=2e-4, rtol=1e-3)
        assert encoder(pixels).shape == (2, 256, 6, 6)


def shapes(name: str) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {key: tuple(value.shape) for key, value in build_sam(name, None).state_dict().items()}


BLOCK = ("attn.attention_biases", "attn.norm.weight", "attn.norm.bias", "attn.qkv.weight", "attn.qkv.bias")
BLOCK += ("attn.proj.weight", "attn.proj.bias", "mlp.norm.weight", "mlp.norm.bias", "mlp.fc1.weight", "mlp.fc1.bias")
BLOCK += ("mlp.fc2.weight", "mlp.fc2.bias", "local_conv.c.weight")
NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def test_names_and_shapes_are_those_of_the_published_checkpoints() -> None:
    # From mobile_sam/modeling/tiny_vit_sam.py (ChaoningZhang/MobileSAM) and tiny_vit_sam.py (bowang-lab/MedSAM, branch
    # LiteMedSAM), as built by build_sam_vit_t and CVPR24_LiteMedSAM_infer.py.
    mobile, lite, sam = shapes("mobile_sam"), shapes("lite_medsam"), shapes("sam_vit_b")
    prefix = "image_encoder."
    assert {n: s for n, s in mobile.items() if not n.startswith(prefix)} == {
        n: s for n, s in sam.items() if not n.startswith(prefix)
    }
    for width, heads, stage, depth, biases in ((128, 4, 1, 2, 49), (160, 5, 2, 6, 196), (320, 10, 3, 2, 49)):
        for block in range(depth):
            at = f"{prefix}layers.{stage}.blocks.{block}."
            assert {n.removeprefix(at) for n in mobile if n.startswith(at)} == {
                *BLOCK,
                *(f"local_conv.bn.{part}" for part in NORM),
            }
            assert mobile[at + "attn.attention_biases"] == (heads, biases)  # |dy|, |dx| below the window's side
            assert mobile[at + "attn.qkv.weight"] == (3 * width, width)
            assert mobile[at + "mlp.fc1.weight"] == (4 * width, width)
            assert mobile[at + "local_conv.c.weight"] == (width, 1, 3, 3)
        assert f"{prefix}layers.{stage}.blocks.{depth}.mlp.fc1.weight" not in mobile
    assert mobile[prefix + "layers.0.blocks.1.conv2.c.weight"] == (256, 1, 3, 3)
    assert [mobile[f"{prefix}layers.{n}.downsample.conv2.c.weight"] for n in range(3)] == [
        (128, 1, 3, 3),
        (160, 1, 3, 3),
        (320, 1, 3, 3),
    ]
    assert prefix + "layers.3.downsample.conv1.c.weight" not in mobile
    assert (mobile[prefix + "head.weight"], mobile[prefix + "norm_head.weight"]) == ((1000, 320), (320,))
    assert [mobile[f"{prefix}neck.{n}.weight"] for n in range(4)] == [
        (256, 320, 1, 1),
        (256,),
        (256, 256, 3, 3),
        (256,),
    ]
    # The file of the server has 40,728,226 bytes: the numbers, and some hundred bytes a tensor of torch.save.
    floats = sum(int(torch.Size(shape).numel()) for shape in mobile.values())
    assert 100 < (40_728_226 - 4 * floats) / len(mobile) < 600
    different = {n for n in mobile.keys() | lite.keys() if mobile.get(n) != lite.get(n)}
    convs = {f"{prefix}patch_embed.seq.{n}.c.weight" for n in (0, 2)}
    assert different == convs | {
        f"{prefix}{n}" for n in ("head.weight", "head.bias", "norm_head.weight", "norm_head.bias")
    }
    assert lite[prefix + "patch_embed.seq.0.c.weight"] == (32, 3, 1, 1)


def test_features_of_lite_medsam_have_a_quarter_of_the_side() -> None:
    with torch.no_grad():
        assert TinyVitEncoder(64, lite=True).eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 256, 16, 16)

"""The public suite of segmenters, that of proposals, and small random models."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from kmine.segmenters.base import AutomaticMaskGenerator, Embedding
from kmine.segmenters.sam.build import ARCHITECTURES, Architecture, build_sam
from kmine.segmenters.testing import SIZES, SegmenterSuite, assert_same, box_prompts
from kmine.segmenters.testing import noise_images as images
from kmine.segmenters.tiny.network import TinyNet

__all__ = ["SIZES", "SegmenterSuite", "assert_same", "box_prompts", "images"]

SMALL = Architecture(embed_dim=64, depth=2, num_heads=2, global_attn_indexes=(1,))


def random_sam(name: str = "sam_small", seed: int = 0, image_size: int = 256):
    """A SAM with seeded random weights; `sam_small` has a shallow encoder, its decoders have their true size."""
    with torch.random.fork_rng(), pytest.MonkeyPatch.context() as patch:
        torch.manual_seed(seed)
        patch.setitem(ARCHITECTURES, "sam_small", SMALL)
        sam = build_sam(name, None, image_size)
        # Relative positions start as zeros: drawn, so that tests notice when they are ignored.
        with torch.no_grad():
            for parameter in sam.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return sam


def random_net(seed: int = 0, *shape) -> TinyNet:
    """`TinyNet(*shape)` with seeded random weights, the last layer's among them, which start as zeros."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = TinyNet(*shape)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return net


def count_encoded(sam, monkeypatch) -> list[int]:
    """Images of every later forward pass of the image encoder."""
    counts, forward = [], sam.image_encoder.forward

    def counting(pixels):
        counts.append(len(pixels))
        return forward(pixels)

    monkeypatch.setattr(sam.image_encoder, "forward", counting)
    return counts


def record_prompts(sam, monkeypatch) -> list[dict]:
    """Arguments of every later call of the prompt encoder."""
    calls, forward = [], sam.prompt_encoder.forward

    def recorded(**kwargs):
        calls.append(kwargs)
        return forward(**kwargs)

    monkeypatch.setattr(sam.prompt_encoder, "forward", recorded)
    return calls


def disc(size, row: float, column: float, radius: float) -> np.ndarray:
    rows, columns = np.mgrid[: size[0], : size[1]]
    return np.hypot(rows - row, columns - column) <= radius


class ProposalSuite:
    """Laws of `AutomaticMaskGenerator`. Fixture: `segmenter`, which proposes something on noise."""

    def test_proposals_are_connected_masks_in_the_image_s_frame(self, segmenter) -> None:
        assert isinstance(segmenter, AutomaticMaskGenerator)
        proposals = list(segmenter.propose(segmenter.encode(images())))
        assert len(proposals) == len(SIZES)
        for size, of_image in zip(SIZES, proposals, strict=True):
            count = len(of_image.masks)
            assert count > 0 and of_image.masks.shape == (count, *size) and of_image.masks.dtype == np.bool_
            for score in (of_image.predicted_iou, of_image.stability_score):
                assert score.shape == (count,) and score.dtype == np.float32
                assert ((score >= 0) & (score <= 1)).all()
            assert [cv2.connectedComponents(mask.astype(np.uint8))[0] for mask in of_image.masks] == [2] * count

    def test_proposals_are_lazy_and_need_no_encoding(self, segmenter, monkeypatch) -> None:
        embeddings = segmenter.encode(images()[:2])
        monkeypatch.setattr(segmenter, "encode", None)
        together = segmenter.propose(embeddings)
        assert iter(together) is together
        for embedding in embeddings:
            (separate,) = segmenter.propose([embedding])
            np.testing.assert_array_equal(next(together).masks, separate.masks)

    def test_embeddings_of_another_segmenter_are_refused(self, segmenter) -> None:
        with pytest.raises(ValueError, match="embedding: expected"):
            next(segmenter.propose([Embedding((20, 30))]))

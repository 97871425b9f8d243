"""Laws of the segmenters' protocols as suites to subclass, and small random models."""

from __future__ import annotations

import copy
import re
import types

import cv2
import numpy as np
import pytest
import torch

from kmine.segmenters.base import AutomaticMaskGenerator, Embedding
from kmine.segmenters.sam.build import ARCHITECTURES, Architecture, build_sam
from kmine.segmenters.tiny.network import TinyNet
from kmine.types import Candidate, Prompts

SIZES = ((40, 60), (70, 30), (33, 33))
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


def images(seed: int = 0, sizes=SIZES) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


def box_prompts(*boxes, jitters: int = 0) -> list[Prompts]:
    def with_jitters(box):
        jittered = [np.add(box, (1, 0, -1, i)) for i in range(jitters)]
        return Prompts(1, np.array(box, np.float32), jittered_boxes=np.array(jittered, np.float32).reshape(-1, 4))

    return [with_jitters(box) for box in boxes]


def assert_same(left: Candidate, right: Candidate, flipped: float = 0.0) -> None:
    """Equal scores, and masks that differ in at most a share `flipped` of the pixels."""
    np.testing.assert_allclose(left.predicted_iou, right.predicted_iou, atol=1e-4)
    for a, b in ((left.masks, right.masks), (left.jittered_masks, right.jittered_masks)):
        assert a.shape == b.shape
        assert np.count_nonzero(a != b) <= flipped * a.size
    if not flipped:
        np.testing.assert_array_equal(left.stability_score, right.stability_score)


class SegmenterSuite:
    """Laws of `Segmenter`. Fixtures: `segmenter`; `other`, the same with other weights, or None without weights."""

    def test_shapes_and_dtypes(self, segmenter) -> None:
        embeddings = segmenter.encode(images())
        candidates = segmenter.decode(
            embeddings, [box_prompts((3, 4, 20, 25), jitters=2), box_prompts((5, 5, 9, 9)), []]
        )
        assert [len(of_image) for of_image in candidates] == [1, 1, 0]
        for size, (candidate,), num_jitters in zip(SIZES[:2], candidates[:2], (2, 0), strict=True):
            num_masks = len(candidate.masks)
            assert candidate.masks.shape == (num_masks, *size)
            assert candidate.masks.dtype == candidate.jittered_masks.dtype == np.bool_
            assert candidate.jittered_masks.shape == (num_jitters, *size)
            for score in (candidate.predicted_iou, candidate.stability_score):
                assert score.shape == (num_masks,)
                assert score.dtype == np.float32
                assert ((score >= 0) & (score <= 1) | np.isnan(score)).all()
            assert candidate.low_res_logits is None or candidate.low_res_logits.shape[0] == num_masks

    def test_name_and_signature(self, segmenter, other) -> None:
        assert segmenter.name
        assert re.fullmatch("[0-9a-f]{64}", segmenter.signature)
        assert segmenter.signature == segmenter.signature
        assert other is None or other.signature != segmenter.signature

    def test_encoding_keeps_the_order_of_mixed_sizes(self, segmenter) -> None:
        assert [embedding.size for embedding in segmenter.encode(images())] == list(SIZES)
        assert segmenter.encode([]) == []

    def test_encoding_in_batches_changes_nothing(self, segmenter) -> None:
        pictures = images()
        prompts = [box_prompts((3, 4, 20, 25), jitters=1)] * 3
        together = segmenter.encode(pictures)
        separate = [segmenter.encode([picture])[0] for picture in pictures]
        for a, b in zip(together, separate, strict=True):
            assert (a.features is None) == (b.features is None)
            if a.features is not None:
                assert a.features.dtype == np.float32
                np.testing.assert_allclose(a.features, b.features, atol=1e-4)
        # Matrix products of another batch size round differently: a pixel on the threshold may fall either way.
        for (a,), (b,) in zip(segmenter.decode(together, prompts), segmenter.decode(separate, prompts), strict=True):
            assert_same(a, b, flipped=2e-3)

    def test_images_decode_alike_together_and_one_by_one(self, segmenter) -> None:
        embeddings = segmenter.encode(images())
        prompts = [box_prompts((3, 4, 20, 25), (1, 1, 9, 9), jitters=2), [], box_prompts((0, 0, 30, 30))]
        together = segmenter.decode(embeddings, prompts)
        for index in range(3):
            (separate,) = segmenter.decode(embeddings[index : index + 1], prompts[index : index + 1])
            assert len(separate) == len(prompts[index]) == len(together[index])
            for a, b in zip(together[index], separate, strict=True):
                assert_same(a, b)

    def test_prompts_decode_alike_together_and_one_by_one(self, segmenter) -> None:
        embeddings = segmenter.encode(images()[:1])
        prompts = box_prompts((3, 4, 20, 25), (1, 1, 9, 9), (30, 10, 55, 38), jitters=2)
        (together,) = segmenter.decode(embeddings, [prompts])
        for prompt, a in zip(prompts, together, strict=True):
            assert_same(a, segmenter.decode(embeddings, [[prompt]])[0][0], flipped=2e-3)

    def test_a_jittered_box_gives_the_mask_of_the_same_box(self, segmenter) -> None:
        embeddings = segmenter.encode(images()[:1])
        (prompts,) = box_prompts((3, 4, 20, 25), jitters=3)
        candidate = segmenter.decode(embeddings, [[prompts]])[0][0]
        assert len(candidate.jittered_masks) == 3
        for box, mask in zip(prompts.jittered_boxes, candidate.jittered_masks, strict=True):
            own = segmenter.decode(embeddings, [box_prompts(box)])[0][0]
            assert np.mean(own.masks[own.best] != mask) <= 2e-3

    def test_decoding_is_deterministic(self, segmenter) -> None:
        prompts = [box_prompts((3, 4, 20, 25), jitters=2)]
        first, second = (segmenter.decode(segmenter.encode(images()[:1]), prompts)[0][0] for _ in range(2))
        assert_same(first, second)

    def test_inputs_are_not_modified(self, segmenter) -> None:
        pictures = images()[:1]
        prompts = box_prompts((-3, 4, 500, 25), jitters=2)
        before = copy.deepcopy((pictures, prompts))
        segmenter.decode(segmenter.encode(pictures), [prompts])
        np.testing.assert_array_equal(pictures[0], before[0][0])
        np.testing.assert_array_equal(prompts[0].box, before[1][0].box)
        np.testing.assert_array_equal(prompts[0].jittered_boxes, before[1][0].jittered_boxes)

    def test_a_box_over_the_border_is_clipped(self, segmenter) -> None:
        embeddings = segmenter.encode(images()[:1])
        over, clipped = segmenter.decode(embeddings * 2, [box_prompts((-9, 4, 99, 70)), box_prompts((0, 4, 60, 40))])
        assert_same(over[0], clipped[0])

    @pytest.mark.parametrize("unfit", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3), np.float32)])
    def test_unfit_images_are_refused(self, segmenter, unfit) -> None:
        with pytest.raises(ValueError, match="image 1: expected"):
            segmenter.encode([images()[0], unfit])

    def test_unfit_prompts_are_refused(self, segmenter) -> None:
        embeddings = segmenter.encode(images()[:1])
        with pytest.raises(ValueError, match="box"):
            segmenter.decode(embeddings, [box_prompts((5, 5, 5, 9))])
        with pytest.raises(ValueError, match="one list of prompts per embedding"):
            segmenter.decode(embeddings, [])


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
        assert isinstance(together, types.GeneratorType)
        for embedding in embeddings:
            (separate,) = segmenter.propose([embedding])
            np.testing.assert_array_equal(next(together).masks, separate.masks)

    def test_embeddings_of_another_segmenter_are_refused(self, segmenter) -> None:
        with pytest.raises(ValueError, match="embedding: expected"):
            next(segmenter.propose([Embedding((20, 30))]))

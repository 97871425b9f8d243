"""Laws of the `Segmenter` protocol as test classes, for kmine's own segmenters and those of other packages.

Needs pytest (extra `suite`), which alone imports this module. See docs/segmenters.md:

    class TestMine(SegmenterSuite):
        @pytest.fixture
        def segmenter(self):
            return Mine(SegmenterConfig("mine"), "cpu", True, print)
"""

# ruff: noqa: D102
from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from kmine.segmenters.base import Segmenter, abilities_of
from kmine.types import Candidate, Prompts

SIZES = ((40, 60), (70, 30), (33, 33))
"""(H, W) of the images that the suites use."""


def noise_images(seed: int = 0, sizes: Sequence[tuple[int, int]] = SIZES) -> list[NDArray[np.uint8]]:
    """(H, W, 3) uint8 of uniform noise."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


def box_prompts(*boxes: Sequence[float], jitters: int = 0) -> list[Prompts]:
    """A prompt of class 1 for each box (4,) XYXY, with `jitters` copies that are shifted a little."""

    def with_jitters(box: Sequence[float]) -> Prompts:
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
    """Laws of `Segmenter`, with boxes. Fixture `segmenter`; `other`, the same with other weights, or None."""

    @pytest.fixture
    def other(self) -> Segmenter | None:
        """None for a segmenter without weights; override it for others."""
        return None

    def test_shapes_and_dtypes(self, segmenter: Segmenter) -> None:
        embeddings = segmenter.encode(noise_images())
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

    def test_what_it_lacks_has_no_effect(self, segmenter: Segmenter) -> None:
        able, embeddings = abilities_of(segmenter), segmenter.encode(noise_images()[:1])
        (prompt,) = box_prompts((3, 4, 20, 25), jitters=1)
        coords, labels = np.array([[40, 30]], np.float32), np.array([1], np.int64)
        pointed = replace(prompt, point_coords=coords, point_labels=labels)
        hinted = replace(prompt, mask_input=np.full(SIZES[0], 5, np.float32))
        plain, with_point, with_hint = segmenter.decode(embeddings, [[prompt, pointed, hinted]])[0]
        if not able.points:
            assert_same(plain, with_point, flipped=2e-3)
        if not able.mask_input:
            assert_same(plain, with_hint, flipped=2e-3)
        assert able.predicted_iou or np.isnan(plain.predicted_iou).all()

    def test_name_and_signature(self, segmenter: Segmenter, other: Segmenter | None) -> None:
        assert segmenter.name
        assert re.fullmatch("[0-9a-f]{64}", segmenter.signature)
        assert segmenter.signature == segmenter.signature
        assert other is None or other.signature != segmenter.signature

    def test_encoding_keeps_the_order_of_mixed_sizes(self, segmenter: Segmenter) -> None:
        assert [embedding.size for embedding in segmenter.encode(noise_images())] == list(SIZES)
        assert segmenter.encode([]) == []

    def test_encoding_in_batches_changes_nothing(self, segmenter: Segmenter) -> None:
        pictures = noise_images()
        prompts = [box_prompts((3, 4, 20, 25), jitters=1)] * 3
        together = segmenter.encode(pictures)
        separate = [segmenter.encode([picture])[0] for picture in pictures]
        for a, b in zip(together, separate, strict=True):
            assert (a.features is None) == (b.features is None)
            if a.features is not None and b.features is not None:
                assert a.features.dtype == np.float32
                np.testing.assert_allclose(a.features, b.features, atol=1e-4)
        # Matrix products of another batch size round differently: a pixel on the threshold may fall either way.
        for (a,), (b,) in zip(segmenter.decode(together, prompts), segmenter.decode(separate, prompts), strict=True):
            assert_same(a, b, flipped=2e-3)

    def test_images_decode_alike_together_and_one_by_one(self, segmenter: Segmenter) -> None:
        embeddings = segmenter.encode(noise_images())
        prompts = [box_prompts((3, 4, 20, 25), (1, 1, 9, 9), jitters=2), [], box_prompts((0, 0, 30, 30))]
        together = segmenter.decode(embeddings, prompts)
        for index in range(3):
            (separate,) = segmenter.decode(embeddings[index : index + 1], prompts[index : index + 1])
            assert len(separate) == len(prompts[index]) == len(together[index])
            for a, b in zip(together[index], separate, strict=True):
                assert_same(a, b)

    def test_prompts_decode_alike_together_and_one_by_one(self, segmenter: Segmenter) -> None:
        embeddings = segmenter.encode(noise_images()[:1])
        prompts = box_prompts((3, 4, 20, 25), (1, 1, 9, 9), (30, 10, 55, 38), jitters=2)
        (together,) = segmenter.decode(embeddings, [prompts])
        for prompt, a in zip(prompts, together, strict=True):
            assert_same(a, segmenter.decode(embeddings, [[prompt]])[0][0], flipped=2e-3)

    def test_a_jittered_box_gives_the_mask_of_the_same_box(self, segmenter: Segmenter) -> None:
        embeddings = segmenter.encode(noise_images()[:1])
        (prompts,) = box_prompts((3, 4, 20, 25), jitters=3)
        candidate = segmenter.decode(embeddings, [[prompts]])[0][0]
        assert len(candidate.jittered_masks) == 3
        for box, mask in zip(prompts.jittered_boxes, candidate.jittered_masks, strict=True):
            own = segmenter.decode(embeddings, [box_prompts(box.tolist())])[0][0]
            assert np.mean(own.masks[own.best] != mask) <= 2e-3

    def test_decoding_is_deterministic(self, segmenter: Segmenter) -> None:
        prompts = [box_prompts((3, 4, 20, 25), jitters=2)]
        first, second = (segmenter.decode(segmenter.encode(noise_images()[:1]), prompts)[0][0] for _ in range(2))
        assert_same(first, second)

    def test_inputs_are_not_modified(self, segmenter: Segmenter) -> None:
        pictures = noise_images()[:1]
        prompts = box_prompts((-3, 4, 500, 25), jitters=2)
        before = copy.deepcopy((pictures, prompts))
        segmenter.decode(segmenter.encode(pictures), [prompts])
        np.testing.assert_array_equal(pictures[0], before[0][0])
        np.testing.assert_array_equal(prompts[0].box, before[1][0].box)
        np.testing.assert_array_equal(prompts[0].jittered_boxes, before[1][0].jittered_boxes)

    def test_a_box_over_the_border_is_clipped(self, segmenter: Segmenter) -> None:
        embeddings = segmenter.encode(noise_images()[:1])
        over, clipped = segmenter.decode(embeddings * 2, [box_prompts((-9, 4, 99, 70)), box_prompts((0, 4, 60, 40))])
        assert_same(over[0], clipped[0])

    @pytest.mark.parametrize("unfit", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3), np.float32)])
    def test_unfit_images_are_refused(self, segmenter: Segmenter, unfit: NDArray[np.generic]) -> None:
        with pytest.raises(ValueError, match="image 1: expected"):
            segmenter.encode([noise_images()[0], unfit])

    def test_unfit_prompts_are_refused(self, segmenter: Segmenter) -> None:
        embeddings = segmenter.encode(noise_images()[:1])
        with pytest.raises(ValueError, match="box"):
            segmenter.decode(embeddings, [box_prompts((5, 5, 5, 9))])
        with pytest.raises(ValueError, match="one list of prompts per embedding"):
            segmenter.decode(embeddings, [])

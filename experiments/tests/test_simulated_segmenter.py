"""Laws of the simulated segmenter, and its absence from the package."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from helpers.segmenter_suite import ProposalSuite, SegmenterSuite, images
from helpers.simulated_segmenter import FALSE_PROPOSALS, Simulated, image_key

import kmine
from kmine.config import SegmenterConfig
from kmine.data.cache.sample_cache import SampleCache
from kmine.data.datasets.phantom.dataset import PhantomSource
from kmine.data.pool import Pool
from kmine.errors import UserError
from kmine.mining.segment import segment
from kmine.ops.masks import (
    components,
    grow_box,
    jitter_boxes,
    tight_box,
)
from kmine.ops.metrics import dice, iou, mean_pairwise_dice
from kmine.segmenters import SEGMENTERS, open_segmenter
from kmine.segmenters.base import FineTunable
from kmine.segmenters.ellipse import ellipse_mask
from kmine.types import Prompts, Sample

SIZE = 64
LEVELS = (0.5, 0.7, 0.85, 0.95, 1.0)


@pytest.fixture(scope="module")
def scenes() -> list[tuple[np.ndarray, np.ndarray]]:
    """Phantom polyps: image and mask."""
    source = PhantomSource("polyp", 20, SIZE)
    return [(source.image(ref.sample_id), source.mask(ref.sample_id)) for ref in source.refs()]


@pytest.fixture(scope="module")
def truths(scenes) -> dict[str, np.ndarray]:
    return {image_key(image): mask for image, mask in scenes}


def prompts_of(mask: np.ndarray) -> list[Prompts]:
    """A box with margin and three jittered ones for each object of 100 pixels or more."""
    prompts = []
    for number, part in enumerate(components(mask == 1, 100)):
        box = grow_box(tight_box(part), 0.05, *mask.shape)
        rng = np.random.default_rng(number)
        prompts.append(Prompts(1, box, jittered_boxes=jitter_boxes(box, 3, 0.1, *mask.shape, rng)))
    return prompts


def decode_all(segmenter, scenes):
    """(true object, candidate) of all prompts."""
    found = segmenter.decode(segmenter.encode([image for image, _ in scenes]), [prompts_of(mask) for _, mask in scenes])
    pairs = zip(scenes, found, strict=True)
    return [(part, one) for (_, mask), of in pairs for part, one in zip(components(mask == 1, 100), of, strict=True)]


class TestSimulated(SegmenterSuite, ProposalSuite):
    """The laws of every segmenter."""

    @pytest.fixture
    def truths(self):
        masks = [ellipse_mask(np.array([2, 3, 22, 26]), image.shape[:2]).astype(np.uint8) for image in images()]
        return {image_key(image): mask for image, mask in zip(images(), masks, strict=True)}

    @pytest.fixture
    def segmenter(self, truths):
        return Simulated(truths, 0.8, 0)

    @pytest.fixture
    def other(self, truths):
        return Simulated(truths, 0.8, 1)


@pytest.mark.parametrize("level", LEVELS)
def test_masks_of_boxes_and_jittered_boxes_have_the_given_iou(scenes, truths, level) -> None:
    found = decode_all(Simulated(truths, level, 0), scenes)
    assert len(found) >= 20
    for truth, candidate in found:
        for mask in (*candidate.masks, *candidate.jittered_masks):
            assert iou(mask, truth) == pytest.approx(level, abs=0.01)


def test_an_iou_of_one_gives_the_true_object(scenes, truths) -> None:
    for truth, candidate in decode_all(Simulated(truths, 1.0, 0), scenes):
        assert all(np.array_equal(mask, truth) for mask in (*candidate.masks, *candidate.jittered_masks))


def test_errors_at_a_higher_iou_are_a_subset_of_those_at_a_lower_one(scenes, truths) -> None:
    by_level = [decode_all(Simulated(truths, level, 0), scenes) for level in LEVELS]
    for worse, better in pairwise(by_level):
        for (truth, bad), (_, good) in zip(worse, better, strict=True):
            for a, b in zip((*bad.masks, *bad.jittered_masks), (*good.masks, *good.jittered_masks), strict=True):
                assert not ((b != truth) & ~(a != truth)).any()
                assert iou(b, truth) >= iou(a, truth)


def test_masks_of_jittered_boxes_differ_and_agree_more_at_a_higher_iou(scenes, truths) -> None:
    def agreement(level):
        found = decode_all(Simulated(truths, level, 0), scenes)
        return [mean_pairwise_dice(np.concatenate([one.masks, one.jittered_masks])) for _, one in found]

    bad, good = agreement(0.7), agreement(0.95)
    assert max(bad) < 1 and min(bad) > 0.7
    assert np.mean(bad) < np.mean(good) < 1


def test_the_score_is_the_true_iou_with_noise(scenes, truths) -> None:
    for level in (0.6, 1.0):
        scores = np.array([one.predicted_iou[0] for _, one in decode_all(Simulated(truths, level, 0), scenes)])
        assert scores.min() >= 0 and scores.max() <= 1
        assert 0.03 < scores.std() < 0.2
        assert abs(np.median(scores) - level) < 0.1


def test_masks_depend_on_the_seed_and_not_on_the_order_of_images(scenes, truths) -> None:
    first = decode_all(Simulated(truths, 0.7, 3), scenes)
    again = decode_all(Simulated(dict(reversed(truths.items())), 0.7, 3), scenes[::-1])
    key = lambda pair: pair[0].tobytes()  # noqa: E731
    for (_, a), (_, b) in zip(sorted(first, key=key), sorted(again, key=key), strict=True):
        assert np.array_equal(a.masks, b.masks) and np.array_equal(a.jittered_masks, b.jittered_masks)
        assert a.predicted_iou == b.predicted_iou
    other = decode_all(Simulated(truths, 0.7, 4), scenes)
    assert not any(np.array_equal(a.masks, b.masks) for (_, a), (_, b) in zip(first, other, strict=True))


BLANK = np.zeros((40, 60, 3), np.uint8)


def two_squares() -> np.ndarray:
    """Class 1 in the left half, class 2 in the right, and an ignored corner."""
    mask = np.zeros((40, 60), np.uint8)
    mask[10:30, 5:25], mask[10:30, 35:55], mask[:4, :4] = 1, 2, 255
    return mask


def decode(prompts: Prompts, level: float = 1.0):
    segmenter = Simulated({image_key(BLANK): two_squares()}, level, 0)
    return segmenter.decode(segmenter.encode([BLANK]), [[prompts]])[0][0]


def box(*corners) -> np.ndarray:
    return np.array(corners, np.float32)


def test_a_box_selects_the_object_of_its_class_that_it_overlaps() -> None:
    left, right = two_squares() == 1, two_squares() == 2
    assert np.array_equal(decode(Prompts(1, box(8, 8, 30, 28))).masks[0], left)
    assert np.array_equal(decode(Prompts(2, box(8, 8, 52, 28))).masks[0], right)
    # By hand: 4 x 20 of 400 + 20 x 20 - 80 pixels are shared, IoU 80 / 720 = .11; one column less, 60 / 740 = .08.
    assert np.array_equal(decode(Prompts(1, box(21, 10, 40, 29))).masks[0], left)
    assert not np.array_equal(decode(Prompts(1, box(22, 10, 41, 29))).masks[0], left)


@pytest.mark.parametrize("level", [0.7, 1.0])
def test_where_there_is_no_object_the_mask_is_a_false_positive(level) -> None:
    for prompts in (Prompts(1, box(35, 10, 54, 29)), Prompts(1, box(0, 0, 3, 3))):
        candidate = decode(prompts, level)
        assert np.array_equal(candidate.masks[0], ellipse_mask(prompts.box, (40, 60))) and candidate.masks.any()
        assert 0.2 <= candidate.predicted_iou[0] <= 0.8


def test_without_a_box_component_mask_input_and_points_select_the_object() -> None:
    left = two_squares() == 1
    point = {"point_coords": np.array([[15, 20]], np.float32), "point_labels": np.array([1])}
    away = {"point_coords": np.array([[58, 38]], np.float32), "point_labels": np.array([1])}
    part = np.zeros_like(left)
    part[12:28, 8:30] = True
    mask_input = np.where(part, 5, -5).astype(np.float32)
    assert np.array_equal(decode(Prompts(1, **point)).masks[0], left)
    assert np.array_equal(decode(Prompts(1, **away, component=part)).masks[0], left)
    assert np.array_equal(decode(Prompts(1, **away, mask_input=mask_input)).masks[0], left)
    wrong = decode(Prompts(1, **away)).masks[0]
    assert wrong.any() and not (wrong & left).any()


@pytest.mark.parametrize("mask", [np.ones((40, 60)), np.eye(40, 60), np.pad(np.ones((1, 1)), ((0, 39), (0, 59)))])
def test_odd_objects_are_degraded_as_exactly_as_pixels_allow(mask) -> None:
    truth = mask.astype(np.uint8)
    segmenter = Simulated({image_key(BLANK): truth}, 0.7, 0)
    prompts = Prompts(1, grow_box(tight_box(truth > 0), 0.05, 40, 60))
    ((candidate,),) = segmenter.decode(segmenter.encode([BLANK]), [[prompts]])
    # One pixel more or less changes the IoU of an object of n pixels by 1 / n at most.
    assert iou(candidate.masks[0], truth > 0) == pytest.approx(0.7, abs=max(0.01, 1 / truth.sum()))
    assert dice(candidate.masks[0], truth > 0) > 0


def test_the_name_marks_it_and_the_signature_covers_rule_iou_seed_and_masks() -> None:
    mask, other = two_squares(), np.roll(two_squares(), 1)
    built = [Simulated({"a": m}, level, seed) for m, level, seed in [(mask, 0.7, 0), (mask, 0.704, 0), (mask, 0.7, 1)]]
    built += [Simulated({"a": other}, 0.7, 0), Simulated({"b": mask}, 0.7, 0)]
    assert {one.name for one in built} == {"simulated_0.70"}
    assert len({one.signature for one in built}) == len(built)
    assert Simulated({"a": mask.copy()}, 0.7, 0).signature == built[0].signature
    assert not isinstance(built[0], FineTunable)


def test_an_iou_out_of_range_and_an_unknown_image_are_refused() -> None:
    for level in (0, 1.01, float("nan")):
        with pytest.raises(ValueError, match="iou: expected"):
            Simulated({}, level, 0)
    segmenter = Simulated({image_key(BLANK): two_squares()}, 0.7, 0)
    unknown_image = segmenter.encode([BLANK + 1])
    with pytest.raises(ValueError, match="got an unknown one"):
        segmenter.decode(unknown_image, [[Prompts(1, box(5, 5, 9, 9))]])
    assert segmenter.decode(unknown_image, [[]]) == [[]]


def test_pools_give_their_true_masks_unless_they_withhold_them(tmp_path) -> None:
    source = PhantomSource("polyp", 4, 32)
    cache = SampleCache(source, 32, tmp_path)
    ids = [ref.sample_id for ref in source.refs()]
    pools = [Pool(cache, some, {i: i for i in ids}, "true") for some in (ids[:1], ids[1:])]
    expected = {image_key(source.image(i)): source.mask(i) for i in ids}
    assert Simulated.from_pools(pools, 0.7, 0).signature == Simulated(expected, 0.7, 0).signature
    with pytest.raises(ValueError, match="withholds"):
        Simulated.from_pools([Pool(cache, ids, {i: i for i in ids})], 0.7, 0)
    same = [pools[0], pools[0].with_masks(ids[:1], lambda i: 1 - source.mask(i))]
    with pytest.raises(ValueError, match="same pixels, and another mask"):
        Simulated.from_pools(same, 0.7, 0)


def test_the_package_does_not_contain_it() -> None:
    assert not [name for name in SEGMENTERS.names() if "simul" in name]
    with pytest.raises(UserError, match="unknown name"):
        open_segmenter(SegmenterConfig("simulated_0.85"), device="cpu", offline=True)
    package = Path(kmine.__file__).parent
    assert package / "types.py" in (files := sorted(package.rglob("*.py")))
    assert not [path for path in files if "simulated_segmenter" in path.read_text("utf-8")]


def test_a_mask_depends_on_image_object_box_and_seed_alone(scenes, truths) -> None:
    """Not on hints, points, components, further boxes, or what else is prompted."""
    segmenter = Simulated(truths, seed=0)
    assert segmenter.name == "simulated_0.85"
    image, mask = scenes[0]
    part = components(mask == 1, 100)[0]
    wide = grow_box(tight_box(part), 0.3, *mask.shape)
    plain = Prompts(1, grow_box(tight_box(part), 0.05, *mask.shape))
    point = {"point_coords": np.array([[5, 5]], np.float32), "point_labels": np.array([1])}
    hinted = replace(plain, **point, mask_input=np.ones(mask.shape, np.float32), component=~part)
    several = replace(plain, scaled_boxes=wide[None])
    (samples,) = [[Sample("a", "a", image)]]
    ((alone,),) = segment(segmenter, samples, [[plain]])
    ((first, second, merged),) = segment(segmenter, samples, [[hinted, replace(plain, box=wide), several]])
    for found in (first, merged):
        assert any(np.array_equal(mask, alone.masks[0]) for mask in (*found.masks, *found.jittered_masks))
    assert alone.predicted_iou == first.predicted_iou and not np.array_equal(alone.masks, second.masks)
    masks = sorted(m.tobytes() for m in (merged.masks[0], merged.jittered_masks[0]))
    assert masks == sorted(m.tobytes() for m in (alone.masks[0], second.masks[0]))
    again = [m.masks[0].tobytes() for _ in range(20) for m in segment(segmenter, samples, [[plain]])[0]]
    assert set(again) == {alone.masks[0].tobytes()}


def test_proposals_have_every_object_at_the_given_iou_and_false_ones(scenes, truths) -> None:
    segmenter = Simulated(truths, 0.85, 0)
    for (_, mask), found in zip(
        scenes, segmenter.propose(segmenter.encode([image for image, _ in scenes])), strict=True
    ):
        parts = components(mask == 1, 100)
        assert len(parts) <= len(found.masks) <= len(components(mask == 1)) + FALSE_PROPOSALS
        for part in parts:  # a degraded object may have lost a speck
            assert max(iou(one, part) for one in found.masks) == pytest.approx(0.85, abs=0.05)

"""Near-duplicates: similarity of copies and of other images, limits of the search."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.image_stats import own_groups, phantom_image, stats_of

from kmine.data.quality import near_duplicates
from kmine.data.quality.image_stats import compute_stats
from kmine.data.quality.near_duplicates import (
    SAME_PICTURE,
    DuplicateSearch,
    compute_descriptor,
    find_duplicates,
    find_similar_pairs,
    similarity,
)


def views(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    stats = compute_stats("a", image, None)
    return stats.small, stats.whole


@pytest.mark.parametrize("kind", ["polyp", "ct", "xray"])
def test_crops_are_above_the_threshold_and_other_images_below(kind):
    whole = [views(phantom_image(i, kind)) for i in range(12)]
    crops = [views(phantom_image(i, kind)[3:-3, 2:-4]) for i in range(12)]
    same = [similarity(a, b, 1.0) for a, b in zip(whole, crops, strict=True)]
    other = [similarity(whole[i], crops[j], 1.0) for i in range(12) for j in range(12) if i != j]
    assert min(same) > SAME_PICTURE > max(other) + 0.02


def test_an_image_has_similarity_1_to_itself_and_a_blank_one_0():
    image, blank = views(phantom_image(0)), views(np.zeros((96, 96, 3), np.uint8))
    assert similarity(image, image, 1.0) == pytest.approx(1, abs=1e-3)
    assert similarity(blank, blank, 1.0) == similarity(image, blank, 1.0) == 0


def test_equal_images_are_each_paired_with_the_first():
    stats = [stats_of(name) for name in "abc"] + [stats_of("d", 1)]
    pairs, _ = find_duplicates(stats, own_groups(stats), 6)
    assert [(pair.first, pair.second, pair.exact) for pair in pairs] == [("a", "b", True), ("a", "c", True)]


@pytest.mark.parametrize("distance", [-1, 6])
def test_blank_images_are_no_duplicates(distance):
    """The black end slices of two volumes are equal, and none of them tells anything of the other volume."""
    stats = [compute_stats(name, np.zeros((96, 96, 3), np.uint8), None) for name in "ab"]
    assert find_duplicates(stats, own_groups(stats), distance)[0] == []


def test_similar_images_of_one_group_and_distance_below_0_give_no_pairs():
    stats = [stats_of("a"), compute_stats("b", phantom_image(0)[2:-2, 2:-2], None)]
    assert len(find_duplicates(stats, own_groups(stats), 6)[0]) == 1
    assert find_duplicates(stats, {"a": "v", "b": "v"}, 6) == ([], DuplicateSearch(0, complete=True))
    assert find_duplicates(stats, own_groups(stats), -1) == ([], DuplicateSearch(0, complete=False))
    assert find_duplicates([], {}, 6) == ([], DuplicateSearch(0, complete=True))


def test_pairs_within_the_distance_are_returned_whatever_their_content():
    stats = [stats_of("a"), stats_of("b", 1)]
    (pair,), _ = find_duplicates(stats, own_groups(stats), 63)
    assert not pair.same_picture and pair.bits == (stats[0].image_hash ^ stats[1].image_hash).bit_count()
    assert find_duplicates(stats, own_groups(stats), 0)[0] == []


def test_blank_images_are_left_out():
    noise = np.random.default_rng(0).integers(0, 2, (2, 96, 96, 3), dtype=np.uint8)
    stats = [compute_stats(name, image, None) for name, image in zip("ab", noise, strict=True)]
    assert find_duplicates(stats, own_groups(stats), 63) == ([], DuplicateSearch(0, complete=True))


def test_of_too_many_pairs_the_most_similar_are_compared(monkeypatch):
    stats = [stats_of(str(i), i) for i in range(20)] + [compute_stats("copy", phantom_image(0)[2:-2, 2:-2], None)]
    descriptors = np.stack([compute_descriptor(item.small, item.whole) for item in stats])
    monkeypatch.setattr(near_duplicates, "FLOOR", -1.0)
    all_pairs, complete = find_similar_pairs(descriptors, np.arange(21), 1000)
    assert complete and len(all_pairs) == 21 * 20 // 2 and tuple(all_pairs[0]) == (0, 20)
    for block in (1, 50, 1000):
        monkeypatch.setattr(near_duplicates, "BLOCK", block)
        limited, complete = find_similar_pairs(descriptors, np.arange(21), 5)
        assert not complete and limited.tolist() == all_pairs[:5].tolist()
    monkeypatch.setattr(near_duplicates, "MAX_PAIRS", 5)
    pairs, search = find_duplicates(stats, own_groups(stats), 0)
    assert [str(pair) for pair in pairs] == ["0 = copy"] and search == DuplicateSearch(5, complete=False)

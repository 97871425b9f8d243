"""examine: counted by hand, laws of the two measures, and severities."""

from __future__ import annotations

import numpy as np
import pytest

from kmine.data.datasets.phantom.dataset import PhantomSource
from kmine.data.perceptual_hash import grey_of
from kmine.data.quality import examine
from kmine.data.quality import near_duplicates as copies
from kmine.data.quality.examine import DuplicatePair
from kmine.data.quality.near_duplicates import compute_descriptor, find_similar_pairs, similarity
from kmine.types import Finding, SampleRef


def image(index: int, kind: str = "polyp") -> np.ndarray:
    return PhantomSource(kind, 64, 96).image(f"{kind}_{index:06d}")


def seen(sample_id: str, picture: np.ndarray, mask: np.ndarray | None = None) -> examine.ImageStats:
    return examine.compute_stats(sample_id, picture, mask)


def views(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    found = seen("a", picture)
    return found.small, found.whole


def groups_of(looks: list[examine.ImageStats]) -> dict[str, str]:
    return {item.sample_id: item.sample_id for item in looks}


def codes(found: list[Finding]) -> dict[str, str]:
    return {f.code: f.severity for f in found}


def test_a_look_counts_what_is_there():
    picture = np.full((4, 5, 3), 7, np.uint8)
    picture[0, 0] = (0, 255, 7)
    mask = np.zeros((4, 5), np.uint8)
    mask[0] = 1
    mask[3, 0] = 255
    found = seen("a", picture, mask)
    assert (found.shape, found.low, found.high) == ((4, 5), 0, 255)
    assert found.mask.pixels == {0: 14, 1: 5, 255: 1}
    assert found.mask.foreground_share == 0.25
    assert found.mask.rim_share == pytest.approx(7 / 18)  # corners belong to a row and to a column


def test_only_equal_pixels_have_equal_digests():
    a = image(0)
    b = a.copy()
    b[50, 50, 0] ^= 1
    assert seen("a", a).fingerprint == seen("b", a.copy()).fingerprint != seen("c", b).fingerprint
    flat = np.zeros((2, 6, 3), np.uint8)
    assert seen("a", flat).fingerprint != seen("b", flat.reshape(6, 2, 3)).fingerprint


@pytest.mark.parametrize("kind", ["polyp", "ct", "xray"])
def test_a_crop_is_the_same_picture_and_another_one_is_not(kind):
    whole = [views(image(i, kind)) for i in range(12)]
    crops = [views(image(i, kind)[3:-3, 2:-4]) for i in range(12)]
    same = [similarity(a, b, 1.0) for a, b in zip(whole, crops, strict=True)]
    other = [similarity(whole[i], crops[j], 1.0) for i in range(12) for j in range(12) if i != j]
    assert min(same) > examine.SAME_PICTURE > max(other) + 0.02


def test_a_picture_agrees_with_itself_and_a_blank_one_with_nothing():
    a, blank = views(image(0)), views(np.zeros((96, 96, 3), np.uint8))
    assert similarity(a, a, 1.0) == pytest.approx(1, abs=1e-3)
    assert similarity(blank, blank, 1.0) == similarity(a, blank, 1.0) == 0


def test_many_equal_images_are_chained_to_the_first():
    looks = [seen(name, image(0)) for name in "abc"] + [seen("d", image(1))]
    twins, _ = examine.find_duplicates(looks, {name: name for name in "abcd"}, 6)
    assert [(t.first, t.second, t.exact) for t in twins] == [("a", "b", True), ("a", "c", True)]


def test_alike_images_of_one_group_are_no_news_and_distance_below_0_asks_for_none():
    looks = [seen("a", image(0)), seen("b", image(0)[2:-2, 2:-2])]
    assert len(examine.find_duplicates(looks, {"a": "a", "b": "b"}, 6)[0]) == 1
    assert examine.find_duplicates(looks, {"a": "v", "b": "v"}, 6) == ([], examine.DuplicateSearch(0, complete=True))
    assert examine.find_duplicates(looks, {"a": "a", "b": "b"}, -1) == ([], examine.DuplicateSearch(0, complete=False))
    assert examine.find_duplicates([], {}, 6) == ([], examine.DuplicateSearch(0, complete=True))


def test_pairs_within_the_distance_are_named_whatever_they_show():
    looks = [seen("a", image(0)), seen("b", image(1))]
    (twins,), _ = examine.find_duplicates(looks, groups_of(looks), 63)
    assert not twins.same_picture and twins.bits == (looks[0].image_hash ^ looks[1].image_hash).bit_count()
    assert examine.find_duplicates(looks, groups_of(looks), 0)[0] == []


def test_flat_images_are_like_everything_and_left_out():
    noise = np.random.default_rng(0).integers(0, 2, (2, 96, 96, 3), dtype=np.uint8)
    looks = [seen("a", noise[0]), seen("b", noise[1])]
    assert examine.find_duplicates(looks, groups_of(looks), 63) == ([], examine.DuplicateSearch(0, complete=True))


def test_of_too_many_pairs_the_most_alike_are_compared_and_it_is_said(monkeypatch):
    looks = [seen(str(i), image(i)) for i in range(20)] + [seen("copy", image(0)[2:-2, 2:-2])]
    described = np.stack([compute_descriptor(item.small, item.whole) for item in looks])
    monkeypatch.setattr(copies, "FLOOR", -1.0)
    every = find_similar_pairs(described, np.arange(21), 1000)
    assert every.complete and len(every.pairs) == 21 * 20 // 2 and tuple(every.pairs[0]) == (0, 20)
    for block in (1, 50, 1000):
        monkeypatch.setattr(copies, "BLOCK", block)
        some = find_similar_pairs(described, np.arange(21), 5)
        assert not some.complete and some.pairs.tolist() == every.pairs[:5].tolist()
    monkeypatch.setattr(examine, "MAX_PAIRS", 5)
    twins, search = examine.find_duplicates(looks, groups_of(looks), 0)
    assert [str(t) for t in twins] == ["0 = copy"] and search == examine.DuplicateSearch(5, complete=False)


SIDES = {"a": "train", "b": "test", "c": "train"}


@pytest.mark.parametrize(
    ("twins", "code"),
    [
        (DuplicatePair("a", "b", 0, 1.0, exact=True), "exact_duplicates_across"),
        (DuplicatePair("a", "b", 9, 0.95, exact=False), "near_duplicates_across"),
        (DuplicatePair("a", "c", 0, 1.0, exact=True), "exact_duplicates_within"),
        (DuplicatePair("a", "c", 9, 0.95, exact=False), "near_duplicates_within"),
        (DuplicatePair("a", "left_out", 0, 1.0, exact=True), "exact_duplicates_within"),
        (DuplicatePair("a", "b", 4, 0.5, exact=False), "hash_alike"),
    ],
)
def test_only_a_copy_on_another_side_is_a_fault(twins, code):
    severity = "fault" if "across" in code else "note"
    assert codes(examine.check_duplicates([twins], SIDES, allow_leaks=False)) == {code: severity}
    assert codes(examine.check_duplicates([twins], SIDES, allow_leaks=True)) == {code: "note"}


def masks_of(*masks: np.ndarray, label: int | None = None, num_classes: int = 2) -> dict[str, str]:
    looks = [seen(str(n), image(n % 64), mask) for n, mask in enumerate(masks)]
    refs = {item.sample_id: SampleRef(item.sample_id, item.sample_id, image_label=label) for item in looks}
    return codes(examine.check_masks(looks, refs, num_classes))


def square(low: int, high: int, value: int = 1) -> np.ndarray:
    mask = np.zeros((96, 96), np.uint8)
    mask[low:high, low:high] = value
    return mask


def test_findings_about_masks():
    assert masks_of(square(20, 40), square(0, 0)) == {}
    assert masks_of(square(0, 0)) == {"masks_empty": "fault"}
    assert masks_of(square(20, 40, 2)) == {"mask_values": "fault"}
    assert masks_of(square(20, 40, 2), num_classes=3) == {}
    assert masks_of(square(20, 40)[:90]) == {"mask_size": "fault"}
    assert masks_of(1 - square(20, 40)) == {"masks_inverted": "fault"}
    assert masks_of(square(3, 93)) == {}  # large, but not at the rim
    assert masks_of(square(20, 40), label=0) == {"label_0_with_mask": "fault"}
    assert masks_of(square(20, 40), label=0, num_classes=3) == {}  # of which class does it speak?
    assert masks_of(square(20, 40), square(0, 0), label=1) == {"label_1_empty_mask": "note"}


def test_one_inverted_mask_among_others_is_named():
    ordinary = [square(20 + n, 40) for n in range(9)]
    assert masks_of(*ordinary, 1 - square(20, 40)) == {"mask_inverted": "fault"}
    to_the_rim = 1 - square(60, 96)  # inverted, of an object that leaves the image
    assert masks_of(*ordinary, to_the_rim) == masks_of(*ordinary, square(0, 96)) == {"mask_at_rim": "note"}
    assert masks_of(ordinary[0], 1 - square(20, 40)) == {"mask_inverted": "fault"}


def test_an_image_without_contrast_is_a_note_and_with_a_mask_a_fault():
    flat = np.full((96, 96, 3), 130, np.uint8)
    flat[::2] += 1
    for mask, found in ((square(0, 0), {}), (square(20, 40), {"mask_on_nothing": "fault"})):
        looks = [seen("flat", flat, mask), seen("b", image(1), square(30, 50))]
        refs = {name: SampleRef(name, name) for name in ("flat", "b")}
        assert codes(examine.check_masks(looks, refs, 2)) == {"no_contrast": "note", **found}
    flat[::2] += 2  # standard deviation 1.5
    assert examine.check_masks([seen("flat", flat, square(20, 40))], refs, 2) == []


def test_an_image_stored_as_its_own_mask():
    bright = (np.asarray(grey_of(image(0))) > 127).astype(np.uint8)
    assert masks_of(bright) == {"mask_is_image": "fault"}
    shifted = np.roll(bright, 6, axis=1)
    assert "mask_is_image" not in masks_of(shifted)


def test_a_class_that_no_mask_shows():
    looks = [seen("a", image(0), square(20, 40, 2)), seen("b", image(1), square(0, 0))]
    (found,) = examine.check_classes(looks, ("background", "liver", "tumour"))
    assert (found.code, found.severity, found.samples) == ("class_absent", "fault", ("1 liver",))
    assert examine.check_classes(looks[1:], ("background", "liver", "tumour")) == []  # masks_empty says so
    assert examine.check_classes(looks, ("background", "a")) == []
    both = [*looks, seen("c", image(2), square(20, 40))]
    assert examine.check_classes(both, ("background", "liver", "tumour")) == []


def test_one_mask_on_different_images():
    looks = [seen(name, image(n), square(20, 40)) for n, name in enumerate("abc")]
    looks.append(seen("d", image(3), square(20, 41)))
    (found,) = examine.check_identical_masks(looks, groups_of(looks), [])
    assert (found.code, found.severity, found.samples) == ("same_mask", "fault", ("a = b", "a = c"))
    assert found.text.startswith("3 different images share 1 mask,")
    assert examine.check_identical_masks(looks[1:], groups_of(looks), [])[0].samples == ("b = c",)
    assert examine.check_identical_masks(looks, dict.fromkeys("abcd", "one volume"), []) == []
    near = [DuplicatePair("a", other, 4, 0.95, exact=False) for other in "bc"]
    assert examine.check_identical_masks(looks, groups_of(looks), near) == []
    copy = [seen("a", image(0), square(20, 40)), seen("b", image(0), square(20, 40))]
    assert examine.check_identical_masks(copy, groups_of(copy), []) == []
    for mask in (square(20, 23), square(0, 96), square(0, 0)):  # too small, all, nothing: no accident
        assert (
            examine.check_identical_masks([seen(n, image(k), mask) for k, n in enumerate("ab")], groups_of(looks), [])
            == []
        )


def test_a_group_on_two_sides():
    refs = [SampleRef(name, "v") for name in "abc"]
    assert examine.check_groups(refs, {"a": "train", "c": "train"}, allow_leaks=False) == []
    assert codes(examine.check_groups(refs, SIDES, allow_leaks=False)) == {"group_on_two_sides": "fault"}
    assert codes(examine.check_groups(refs, SIDES, allow_leaks=True)) == {"group_on_two_sides": "note"}


@pytest.mark.parametrize("absent", [(), ("a",), ("b",), ("a", "c"), ("a", "b")])
def test_an_equal_image_that_takes_no_part_hides_no_leak(absent):
    sides = {"a": "train", "b": "train", "c": "train", "d": "test"}
    pairs = [DuplicatePair("a", other, 0, 1.0, exact=True) for other in "bcd"]
    found = examine.check_duplicates(pairs, {k: v for k, v in sides.items() if k not in absent}, allow_leaks=False)
    leaks = [finding for finding in found if finding.code == "exact_duplicates_across"]
    assert [len(finding.samples) for finding in leaks] == [1] and leaks[0].samples[0].endswith("= d")

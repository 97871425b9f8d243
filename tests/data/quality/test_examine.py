"""Checks of a data set: one finding per planted fault, with its severity."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.image_stats import own_groups, phantom_image, severities, square_mask, stats_of

from kmine.config import DataConfig
from kmine.data.perceptual_hash import grey_of
from kmine.data.quality.examine import (
    check_classes,
    check_duplicates,
    check_groups,
    check_identical_masks,
    check_masks,
    check_numbers,
)
from kmine.data.quality.image_stats import compute_stats
from kmine.data.quality.near_duplicates import DuplicatePair
from kmine.types import SampleRef

SIDES = {"a": "train", "b": "test", "c": "train"}


@pytest.mark.parametrize(
    ("pair", "code"),
    [
        (DuplicatePair("a", "b", 0, 1.0, exact=True), "exact_duplicates_across"),
        (DuplicatePair("a", "b", 9, 0.95, exact=False), "near_duplicates_across"),
        (DuplicatePair("a", "c", 0, 1.0, exact=True), "exact_duplicates_within"),
        (DuplicatePair("a", "c", 9, 0.95, exact=False), "near_duplicates_within"),
        (DuplicatePair("a", "left_out", 0, 1.0, exact=True), "exact_duplicates_within"),
        (DuplicatePair("a", "b", 4, 0.5, exact=False), "hash_alike"),
    ],
)
def test_only_a_copy_on_another_side_is_a_fault(pair, code):
    severity = "fault" if "across" in code else "note"
    assert severities(check_duplicates([pair], SIDES, allow_leaks=False)) == {code: severity}
    assert severities(check_duplicates([pair], SIDES, allow_leaks=True)) == {code: "note"}


@pytest.mark.parametrize("absent", [(), ("a",), ("b",), ("a", "c"), ("a", "b")])
def test_a_leak_is_found_if_an_equal_image_is_in_no_split(absent):
    sides = {"a": "train", "b": "train", "c": "train", "d": "test"}
    pairs = [DuplicatePair("a", other, 0, 1.0, exact=True) for other in "bcd"]
    findings = check_duplicates(pairs, {k: v for k, v in sides.items() if k not in absent}, allow_leaks=False)
    leaks = [finding for finding in findings if finding.code == "exact_duplicates_across"]
    assert [len(finding.samples) for finding in leaks] == [1] and leaks[0].samples[0].endswith("= d")


def findings_of(*masks: np.ndarray, label: int | None = None, num_classes: int = 2) -> dict[str, str]:
    stats = [stats_of(str(n), n, mask) for n, mask in enumerate(masks)]
    refs = {item.sample_id: SampleRef(item.sample_id, item.sample_id, image_label=label) for item in stats}
    return severities(check_masks(stats, refs, num_classes))


def test_findings_about_masks():
    square = square_mask(20, 40)
    empty = np.zeros_like(square)
    assert findings_of(square, empty) == {}
    assert findings_of(empty) == {"masks_empty": "fault"}
    assert findings_of(2 * square) == {"mask_values": "fault"}
    assert findings_of(2 * square, num_classes=3) == {}
    assert findings_of(square[:90]) == {"mask_size": "fault"}
    assert findings_of(1 - square) == {"masks_inverted": "fault"}
    assert findings_of(square_mask(3, 93)) == {}  # large, but not at the rim
    assert findings_of(square, label=0) == {"label_0_with_mask": "fault"}
    assert findings_of(square, label=0, num_classes=3) == {}  # the label refers to one unknown class
    assert findings_of(square, empty, label=1) == {"label_1_empty_mask": "note"}


def test_one_inverted_mask_among_others_is_a_fault():
    ordinary = [square_mask(20 + n, 40) for n in range(9)]
    assert findings_of(*ordinary, 1 - square_mask(20, 40)) == {"mask_inverted": "fault"}
    to_the_rim = 1 - square_mask(60, 96)  # inverted, of an object that leaves the image
    assert findings_of(*ordinary, to_the_rim) == {"mask_at_rim": "note"}
    assert findings_of(*ordinary, square_mask(0, 96)) == {"mask_at_rim": "note"}
    assert findings_of(ordinary[0], 1 - square_mask(20, 40)) == {"mask_inverted": "fault"}


def test_a_blank_image_is_a_note_and_with_a_mask_a_fault():
    blank = np.full((96, 96, 3), 130, np.uint8)
    blank[::2] += 1
    for mask, expected in ((square_mask(0, 0), {}), (square_mask(20, 40), {"mask_on_nothing": "fault"})):
        stats = [compute_stats("blank", blank, mask), stats_of("b", 1, square_mask(30, 50))]
        refs = {name: SampleRef(name, name) for name in ("blank", "b")}
        assert severities(check_masks(stats, refs, 2)) == {"no_contrast": "note", **expected}
    blank[::2] += 2  # standard deviation 1.5
    assert check_masks([compute_stats("blank", blank, square_mask(20, 40))], refs, 2) == []


def test_an_image_stored_as_its_own_mask_is_a_fault():
    bright = (np.asarray(grey_of(phantom_image(0))) > 127).astype(np.uint8)
    assert findings_of(bright) == {"mask_is_image": "fault"}
    assert "mask_is_image" not in findings_of(np.roll(bright, 6, axis=1))


def test_black_and_white_is_no_mask_of_several_classes():
    ids, white = square_mask(20, 40, 2), square_mask(20, 40, 255)
    bordered = np.where(square_mask(10, 12) > 0, np.uint8(255), ids)
    assert findings_of(white, white, num_classes=3) == {"masks_ignored": "fault", "masks_empty": "fault"}
    assert findings_of(ids, white, num_classes=3) == {"masks_ignored": "fault"}
    assert findings_of(ids, bordered, white, num_classes=3) == {"masks_ignored": "note"}
    assert findings_of(ids, bordered, num_classes=3) == {}
    assert findings_of(ids // 2, np.full_like(ids, 255), num_classes=3) == {}  # a slice that was left out
    assert findings_of(ids // 2, white) == {}  # two classes: a rim that is ignored


def test_a_class_without_a_pixel_is_a_fault():
    names = ("background", "liver", "tumour")
    stats = [stats_of("a", 0, square_mask(20, 40, 2)), stats_of("b", 1, square_mask(0, 0))]
    (finding,) = check_classes(stats, names)
    assert (finding.code, finding.severity, finding.samples) == ("class_absent", "fault", ("1 liver",))
    assert check_classes(stats[1:], names) == []  # reported as masks_empty
    assert check_classes(stats, ("background", "a")) == []
    assert check_classes([*stats, stats_of("c", 2, square_mask(20, 40))], names) == []


def test_equal_masks_of_different_images_are_a_fault():
    stats = [stats_of(name, n, square_mask(20, 40)) for n, name in enumerate("abc")]
    stats.append(stats_of("d", 3, square_mask(20, 41)))
    groups = own_groups(stats)
    (finding,) = check_identical_masks(stats, groups, [])
    assert (finding.code, finding.severity, finding.samples) == ("same_mask", "fault", ("a = b", "a = c"))
    assert finding.text.startswith("3 different images share 1 mask,")
    assert check_identical_masks(stats[1:], groups, [])[0].samples == ("b = c",)


def test_equal_masks_of_one_volume_of_copies_or_of_trivial_shape_are_allowed():
    stats = [stats_of(name, n, square_mask(20, 40)) for n, name in enumerate("abc")]
    assert check_identical_masks(stats, dict.fromkeys("abc", "one volume"), []) == []
    near = [DuplicatePair("a", other, 4, 0.95, exact=False) for other in "bc"]
    assert check_identical_masks(stats, own_groups(stats), near) == []
    copies = [stats_of(name, 0, square_mask(20, 40)) for name in "ab"]
    assert check_identical_masks(copies, own_groups(copies), []) == []
    for mask in (square_mask(20, 23), square_mask(0, 96), square_mask(0, 0)):  # small, full, empty
        trivial = [stats_of(name, n, mask) for n, name in enumerate("ab")]
        assert check_identical_masks(trivial, own_groups(trivial), []) == []


def test_a_group_on_two_sides_is_a_fault_unless_leaks_are_allowed():
    refs = [SampleRef(name, "v") for name in "abc"]
    assert check_groups(refs, {"a": "train", "c": "train"}, allow_leaks=False) == []
    assert severities(check_groups(refs, SIDES, allow_leaks=False)) == {"group_on_two_sides": "fault"}
    assert severities(check_groups(refs, SIDES, allow_leaks=True)) == {"group_on_two_sides": "note"}


def numbers(train: int, val: int, test: int, *, group_size: int = 1, split: str | None = None, **data: object) -> str:
    """The text on a data set of so many images with masks on each side, and 30 without; empty without a finding."""
    sides = ["train"] * train + ["val"] * val + ["test"] * test
    refs = [SampleRef(f"s{n}", f"{side}{n // group_size}", split=split) for n, side in enumerate(sides)]
    refs += [SampleRef(f"u{n}", f"u{n}", has_mask=False, split=split) for n in range(30)]
    found = check_numbers(DataConfig(**data), refs, dict(zip((r.sample_id for r in refs), sides, strict=False)))
    assert {finding.severity for finding in found} <= {"note"}
    return " ".join(finding.text for finding in found)


def test_too_few_validation_or_test_images_are_said_with_what_they_cannot_show_and_the_cure():
    said = numbers(10, 2, 4)
    assert said.startswith(
        "2 validation and 4 test images: no gain can be told from noise; --data.folds 5 of kmine loop"
    )
    assert "tests on all 16 (from about 0.11 on)" in said
    assert "below about 0.32 cannot be told from noise" in numbers(40, 10, 4)
    assert "2 validation and 2 test groups" in numbers(8, 8, 8, group_size=4)
    assert numbers(4, 1, 2).endswith("label 3 more, then pass --data.folds 5 to kmine loop")
    assert numbers(30, 3, 4, split="train").endswith("put more into them")
    assert numbers(10, 3, 0).startswith("3 validation and 0 test images")


def test_enough_images_and_folds_are_no_finding():
    assert numbers(10, 10, 10) == "" and numbers(10, 10, 0) == ""
    assert numbers(11, 2, 3, folds=5, fold=0) == "" and numbers(4, 2, 1, folds=5, fold=0) == ""
    said = "7 images with masks: a gain below about 0.18 cannot be told from noise; label 3 more"
    assert numbers(4, 3, 0, folds=5, fold=5) == said == numbers(4, 3, 0, folds=5)

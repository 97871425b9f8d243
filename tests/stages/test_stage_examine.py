"""examine: counted by hand, laws of the two measures, and severities."""

from __future__ import annotations

import numpy as np
import pytest

from kmine.data.phantom import PhantomSource
from kmine.records import Finding, SampleRef
from kmine.stages import examine
from kmine.stages.examine import Twins


def image(index: int, kind: str = "polyp") -> np.ndarray:
    return PhantomSource(kind, 64, 96).image(f"{kind}_{index:06d}")


def seen(sample_id: str, picture: np.ndarray, mask: np.ndarray | None = None) -> examine.Look:
    return examine.look(sample_id, picture, mask)


def details(*indices: int, kind: str = "polyp") -> list[np.ndarray]:
    return [examine._detail(seen("a", image(i, kind)).small) for i in indices]


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
    assert seen("a", a).digest == seen("b", a.copy()).digest != seen("c", b).digest
    flat = np.zeros((2, 6, 3), np.uint8)
    assert seen("a", flat).digest != seen("b", flat.reshape(6, 2, 3)).digest


@pytest.mark.parametrize("kind", ["polyp", "xray"])
def test_correlation_knows_a_crop_from_another_picture(kind):
    small = [seen("a", image(i, kind)[3:-3, 2:-4]).small for i in range(12)]
    whole = details(*range(12), kind=kind)
    crops = [examine._detail(s) for s in small]
    same = [examine.correlation(a, b) for a, b in zip(whole, crops, strict=True)]
    other = [examine.correlation(whole[i], crops[j]) for i in range(12) for j in range(12) if i != j]
    assert min(same) > examine.SAME_PICTURE > max(other)


def test_correlation_is_symmetric_and_blank_pictures_have_none():
    a, b = details(0, 1)
    assert examine.correlation(a, b) == examine.correlation(b, a)
    blank = np.zeros_like(a)
    assert examine.correlation(blank, blank) == examine.correlation(a, blank) == 0


def test_many_equal_images_are_chained_to_the_first():
    looks = [seen(name, image(0)) for name in "abc"] + [seen("d", image(1))]
    twins, _ = examine.find_twins(looks, {name: name for name in "abcd"}, 6)
    assert [(t.first, t.second, t.exact) for t in twins] == [("a", "b", True), ("a", "c", True)]


def test_alike_images_of_one_group_are_no_news_and_distance_below_0_asks_for_none():
    looks = [seen("a", image(0)), seen("b", image(0)[2:-2, 2:-2])]
    assert len(examine.find_twins(looks, {"a": "a", "b": "b"}, 6)[0]) == 1
    assert examine.find_twins(looks, {"a": "v", "b": "v"}, 6) == ([], examine.REACH)
    assert examine.find_twins(looks, {"a": "a", "b": "b"}, -1) == ([], -1)
    assert examine.find_twins([], {}, 6) == ([], examine.REACH)


def test_only_the_nearest_pairs_are_compared_when_there_are_too_many(monkeypatch):
    looks = [seen(str(i), image(i)) for i in range(20)] + [seen("copy", image(0)[2:-2, 2:-2])]
    groups = {item.sample_id: item.sample_id for item in looks}
    every = examine._candidates(looks, groups, 64)
    assert len(every) == 21 * 20 // 2
    monkeypatch.setattr(examine, "MAX_PAIRS", 5)
    assert examine._candidates(looks, groups, 64) == every[:5]
    assert every[0][1:] == (0, 20)
    monkeypatch.setattr(examine, "REACH", 64)
    assert examine.find_twins(looks, groups, 6)[1] == every[4][0] - 1


SIDES = {"a": "train", "b": "test", "c": "train"}


@pytest.mark.parametrize(
    ("twins", "code"),
    [
        (Twins("a", "b", 0, 1.0, exact=True), "exact_duplicates_across"),
        (Twins("a", "b", 9, 0.95, exact=False), "near_duplicates_across"),
        (Twins("a", "c", 0, 1.0, exact=True), "exact_duplicates_within"),
        (Twins("a", "c", 9, 0.95, exact=False), "near_duplicates_within"),
        (Twins("a", "left_out", 0, 1.0, exact=True), "exact_duplicates_within"),
        (Twins("a", "b", 4, 0.5, exact=False), "hash_alike"),
    ],
)
def test_only_a_copy_on_another_side_is_a_fault(twins, code):
    severity = "fault" if "across" in code else "note"
    assert codes(examine.examine_twins([twins], SIDES, allow_leaks=False)) == {code: severity}
    assert codes(examine.examine_twins([twins], SIDES, allow_leaks=True)) == {code: "note"}


def masks_of(*masks: np.ndarray, label: int | None = None, num_classes: int = 2) -> dict[str, str]:
    looks = [seen(str(n), image(n), mask) for n, mask in enumerate(masks)]
    refs = {item.sample_id: SampleRef(item.sample_id, item.sample_id, image_label=label) for item in looks}
    return codes(examine.examine_masks(looks, refs, num_classes))


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
    assert masks_of(square(20, 40), label=0) == {"label_0_with_mask": "note"}
    assert masks_of(square(20, 40), square(0, 0), label=1) == {"label_1_empty_mask": "note"}


def test_a_group_on_two_sides():
    refs = [SampleRef(name, "v") for name in "abc"]
    assert examine.examine_groups(refs, {"a": "train", "c": "train"}, allow_leaks=False) == []
    assert codes(examine.examine_groups(refs, SIDES, allow_leaks=False)) == {"group_on_two_sides": "fault"}
    assert codes(examine.examine_groups(refs, SIDES, allow_leaks=True)) == {"group_on_two_sides": "note"}

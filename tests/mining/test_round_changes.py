"""Changes of a round: cases counted by hand, and the flags that separate mining from self-training."""

from __future__ import annotations

import json
import math
import weakref
from dataclasses import replace

import numpy as np
import pytest

from kmine.io.files import nan_to_none
from kmine.mining.round_changes import (
    MIN_CHANGED_SHARE,
    MaskComparison,
    RoundChanges,
    class_shares,
    compare_rounds,
    explain_empty_round,
    summary_line,
    warnings,
)
from kmine.ops.masks import to_rle
from kmine.store.tables import DecisionRow, class_map


def mask(text: str) -> np.ndarray:
    """One row of pixels: digits are classes, a dot is background, a question mark is ignored."""
    return np.array([[{".": 0, "?": 255}.get(c) if c in ".?" else int(c) for c in text]], np.uint8)


def image(sample_id: str = "a", pseudo: str = "", local: str = "", used: str = "", **fields: object) -> MaskComparison:
    """An image whose objects were all kept; by default the segmenter returns the local mask `.11.`."""
    local = local or ".11.".ljust(len(pseudo), ".")
    masks = {"pseudo": pseudo or used or local, "local": local, "local_kept": local, "used_mask": used or local}
    return MaskComparison(sample_id, **{name: mask(text) for name, text in masks.items()}, **fields)


def changes_of(*images: MaskComparison, labeled=(".1..",), earlier=(), num_classes: int = 2) -> RoundChanges:
    labels = (mask(text) for text in labeled)
    return compare_rounds(iter(images), labels, earlier, num_unlabeled=9, num_classes=num_classes)


def row(local: str, segmenter: str, class_id: int = 1, *, kept: bool = True, source: str = "both") -> DecisionRow:
    rles = {"local_rle": to_rle(mask(local) == 1), "segmenter_rle": to_rle(mask(segmenter) == 1)}
    reason = "kept" if kept else "low_agreement"
    return DecisionRow("a", 0, class_id, kept, reason, source, True, height=1, width=len(local), **rles)


def without(reason: str) -> DecisionRow:
    """A dropped object or image."""
    return DecisionRow("a", -1, 0, False, reason)


# -- images in training


def test_new_retained_readmitted_and_removed_images_by_hand():
    earlier = [{"a", "b"}, {"b", "c"}]
    then = mask(".11.")
    moved = changes_of(image("d"), image("b", previous=then), image("a"), earlier=earlier)
    assert (moved.new, moved.retained, moved.readmitted, moved.removed) == (("d",), ("b",), ("a",), ("c",))
    assert moved.pseudo_labeled == {"a", "b", "d"} and not moved.training_set_unchanged


def test_in_the_first_round_everything_is_new_and_nothing_is_unchanged():
    first = changes_of(image("a"), image("b"))
    assert first.new == ("a", "b") and not (first.retained or first.readmitted or first.removed)
    assert not first.training_set_unchanged


@pytest.mark.parametrize(
    ("then", "now", "unchanged"),
    [
        ({"a": ".11.", "b": "11.."}, ("a", "b"), True),
        ({"a": ".1..", "b": "11.."}, ("a", "b"), False),
        ({"a": ".11?", "b": "11.."}, ("a", "b"), False),
        ({"a": ".11."}, ("a", "b"), False),
        ({"a": ".11.", "b": "11.."}, ("a",), False),
    ],
    ids=["the same", "a pixel", "an ignored pixel", "one entered", "one left"],
)
def test_a_training_set_is_unchanged_only_with_the_same_images_and_masks(then, now, unchanged):
    pseudo = {"a": ".11.", "b": "11.."}
    images = [image(i, pseudo[i], previous=mask(then[i]) if i in then else None) for i in now]
    assert changes_of(*images, earlier=[set(then)]).training_set_unchanged == unchanged


def test_an_empty_training_set_is_not_unchanged():
    none = changes_of(earlier=[{"a"}])
    assert none.removed == ("a",) and not none.noop and warnings(none) == []
    assert summary_line(none) == "0 of 9 unlabeled images have a pseudo mask (1 removed)"


# -- what the segmenter changed


@pytest.mark.parametrize(
    ("local", "used", "share"),
    [
        ("1111......", "1111......", 0),
        ("1111......", "..1111....", 4 / 6),
        ("11........", "..11......", 1),
        ("11........", "22........", 1),
        ("1122......", "1112......", 1 / 4),
        ("11........", "..........", 1),
    ],
)
def test_changed_pixels_by_hand(local, used, share):
    assert changes_of(image(local=local, used=used), num_classes=3).changed_pixels == pytest.approx(share)


def test_changed_pixels_are_counted_over_all_images_not_averaged():
    wide, narrow = image("a", local="11111111", used="11111111"), image("b", local="1.", used=".1")
    assert changes_of(wide, narrow).changed_pixels == pytest.approx(2 / 10)


def test_changed_label_pixels_differ_from_the_local_mask_and_are_not_ignored():
    # Local 1111, segmenter ..1111: of six pixels two are new object pixels, two lost ones are ignored.
    overlap = image(local="1111......", used="..1111....", pseudo="??1111....")
    assert changes_of(overlap).changed_label_pixels == pytest.approx(2 / 6)
    where_both_agree = replace(overlap, pseudo=mask("??11??...."))
    assert changes_of(where_both_agree).changed_label_pixels == 0 and changes_of(
        where_both_agree
    ).ignored_pixels == pytest.approx(4 / 10)


def test_images_with_any_pixel_unlike_the_local_mask_are_counted_once():
    assert changes_of(image("a"), image("b", pseudo=".1?."), image("c", pseudo="11..")).num_differing == 2


@pytest.mark.parametrize(("changed", "nothing"), [(0, True), (1, True), (2, False)])
def test_up_to_the_stated_share_the_segmenter_changed_nothing(changed, nothing):
    assert MIN_CHANGED_SHARE == 0.001
    changes = changes_of(image(local="1" * 1000, used="." * changed + "1" * (1000 - changed)))
    assert changes.segmenter_changed_nothing == changes.noop == nothing
    assert any("self-training" in text for text, _ in warnings(changes)) == nothing


def test_with_empty_masks_alone_the_segmenter_changed_nothing():
    empty = changes_of(image(pseudo="....", local="....", lesion_free=True))
    assert math.isnan(empty.changed_pixels) and empty.segmenter_changed_nothing and empty.num_empty == 1
    assert warnings(empty)[0][0] == "the segmenter changed nothing: all pseudo masks are empty by image-level labels"


# -- from the table of decisions


def test_kept_objects_are_compared_and_the_local_mask_holds_all():
    rows = [row("11......", ".11....."), row("....1...", "....11..", kept=False), row("......1.", "......1.", 2)]
    comparison = MaskComparison.from_rows(rows, mask(".11..?2."))
    for name, text in {"local": "11..1.2.", "local_kept": "11....2.", "used_mask": ".11...2."}.items():
        assert np.array_equal(getattr(comparison, name), mask(text)), name
    assert not comparison.lesion_free and comparison.previous is None


def test_where_the_gate_chose_the_local_mask_nothing_is_changed():
    comparison = MaskComparison.from_rows([row("11..", "..11", source="local")], mask("11.."))
    assert np.array_equal(comparison.local_kept, comparison.used_mask)


def test_a_lesion_free_image_has_no_objects():
    nothing = DecisionRow("a", -1, 0, True, "lesion_free", in_training=True)
    comparison = MaskComparison.from_rows([nothing], mask("...."), mask("...."))
    assert (
        comparison.lesion_free
        and not comparison.local.any()
        and not comparison.used_mask.any()
        and comparison.previous is not None
    )


def test_where_two_objects_overlap_the_later_class_counts():
    rows = [row("....", "11.."), row("....", ".11.", 2)]
    assert np.array_equal(class_map(rows, (1, 4), "segmenter"), mask("122."))


# -- shares of classes


def test_class_shares_leave_ignored_pixels_out_and_average_over_images():
    assert class_shares(mask("1.2?"), 3).tolist() == pytest.approx([1 / 3, 1 / 3])
    changes = changes_of(
        image("a", pseudo="11.."), image("b", pseudo="...." * 5), image("c", pseudo="????"), labeled=["1...", "1?"]
    )
    assert changes.pseudo_shares == (pytest.approx(0.25),) and changes.labeled_shares == (pytest.approx(0.625),)


def test_a_class_shown_by_pseudo_masks_or_labels_alone_is_warned_of():
    changes = changes_of(image(pseudo="2...", used="11.."), labeled=["1..."], num_classes=3)
    assert [text for text, _ in warnings(changes, ("background", "liver"))] == [
        "no pseudo mask shows liver, though labels do",
        "pseudo masks show class 2, which no label does",
    ]
    assert all(cure for _, cure in warnings(changes))


# -- changes.json and messages


def test_json_round_trips_through_a_file_with_the_frozen_keys():
    changes = changes_of(image("a", pseudo="????", previous=mask("....")), image("b"), earlier=[{"a", "x"}])
    empty = changes_of(image(pseudo="....", local="....", lesion_free=True), labeled=[])
    for written in (changes, empty):
        value = json.loads(json.dumps(nan_to_none(written.to_json()), allow_nan=False))
        assert repr(RoundChanges.from_json(value)) == repr(written)
    kept = changes.to_json()
    assert (kept["num_teaching"], kept["num_new"], kept["num_kept_on"], kept["num_expelled"]) == (2, 1, 1, 1)
    assert kept["noop"] and kept["segmenter_changed_nothing"] and not kept["training_set_unchanged"]


def test_a_round_in_one_line():
    changes = changes_of(image("a", ".11.", ".1..", ".11."), image("b", "????"), earlier=[{"b", "x"}])
    assert summary_line(changes) == (
        "2 of 9 unlabeled images have a pseudo mask (1 new, 1 retained), 1 removed; the segmenter changed 25.0 % of "
        "the object pixels of the local masks, 25.0 % are labeled otherwise; class 1 covers 50.0 % of a pseudo mask, "
        "25.0 % of a label"
    )
    assert warnings(changes) == []


def test_an_empty_round_is_explained_by_the_reasons_of_the_gate():
    assert "found no object in any image" in explain_empty_round([without("no_component")] * 3)
    vetoed = [without("no_component"), *[without("vetoed")] * 2]
    assert "no object in any image (the classifier vetoed 2 of 3): train it" in explain_empty_round(vetoed)
    mixed = [without("no_component"), *[without("low_agreement")] * 2]
    assert explain_empty_round(mixed) == "objects by the gate's reason: low_agreement 2, no_component 1"


def test_one_image_is_in_memory_at_a_time():
    alive: list[weakref.ref] = []

    def images():
        for n in range(6):
            assert sum(ref() is not None for ref in alive) <= 1
            comparison = image(f"i{n}")
            alive.append(weakref.ref(comparison))
            yield comparison
            del comparison

    assert len(compare_rounds(images(), [], [], num_unlabeled=6, num_classes=2).new) == 6

"""What a round changed: cases counted by hand, and the flags that tell mining from self-training."""

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
    PseudoLabel,
    RoundChanges,
    class_map,
    class_shares,
    compare_rounds,
    explain_empty_round,
    pseudo_label_of,
    summary_line,
    warnings,
)
from kmine.ops.masks import to_rle


def mask(text: str) -> np.ndarray:
    """One row of pixels: digits are classes, a dot is background, a question mark is ignored."""
    return np.array([[{".": 0, "?": 255}.get(c) if c in ".?" else int(c) for c in text]], np.uint8)


def image(sample_id: str = "a", pseudo: str = "", local: str = "", answered: str = "", **more: object) -> PseudoLabel:
    """An image whose objects were all kept; without more words the segmenter gives the local mask `.11.` back."""
    local = local or ".11.".ljust(len(pseudo), ".")
    masks = {"pseudo": pseudo or answered or local, "local": local, "local_kept": local, "used_mask": answered or local}
    return PseudoLabel(sample_id, **{name: mask(text) for name, text in masks.items()}, **more)


def found(*images: PseudoLabel, labeled=(".1..",), earlier=(), num_classes: int = 2) -> RoundChanges:
    labels = (mask(text) for text in labeled)
    return compare_rounds(iter(images), labels, earlier, num_unlabeled=9, num_classes=num_classes)


def row(local: str, answer: str, class_id: int = 1, *, kept: bool = True, source: str = "both") -> dict:
    rles = {"local_rle": to_rle(mask(local) == 1), "segmenter_rle": to_rle(mask(answer) == 1)}
    shape = {"height": 1, "width": len(local)}
    verdict = {"kept": kept, "reason": "kept" if kept else "low_agreement", "source": source}
    return {"sample_id": "a", "object_idx": 0, "class_id": class_id, **verdict, **shape, **rles}


# -- who teaches


def test_admissions_and_expulsions_by_hand():
    earlier = [{"a", "b"}, {"b", "c"}]
    then = mask(".11.")
    moved = found(image("d"), image("b", previous=then), image("a"), earlier=earlier)
    assert (moved.new, moved.kept_on, moved.readmitted, moved.expelled) == (("d",), ("b",), ("a",), ("c",))
    assert moved.pseudo_labeled == {"a", "b", "d"} and not moved.training_set_unchanged


def test_in_the_first_round_everything_is_new_and_nothing_is_unchanged():
    first = found(image("a"), image("b"))
    assert first.new == ("a", "b") and not (first.kept_on or first.readmitted or first.expelled)
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
    assert found(*images, earlier=[set(then)]).training_set_unchanged == unchanged


def test_nothing_that_teaches_is_no_unchanged_set():
    none = found(earlier=[{"a"}])
    assert none.expelled == ("a",) and not none.noop and warnings(none) == []
    assert summary_line(none) == "none of 9 unlabeled images teaches (1 did the round before)"


# -- what the segmenter changed


@pytest.mark.parametrize(
    ("local", "answered", "share"),
    [
        ("1111......", "1111......", 0),
        ("1111......", "..1111....", 4 / 6),
        ("11........", "..11......", 1),
        ("11........", "22........", 1),
        ("1122......", "1112......", 1 / 4),
        ("11........", "..........", 1),
    ],
)
def test_changed_pixels_by_hand(local, answered, share):
    assert found(image(local=local, answered=answered), num_classes=3).changed_pixels == pytest.approx(share)


def test_changed_pixels_are_counted_over_all_images_not_averaged():
    wide, narrow = image("a", local="11111111", answered="11111111"), image("b", local="1.", answered=".1")
    assert found(wide, narrow).changed_pixels == pytest.approx(2 / 10)


def test_taught_pixels_are_those_that_differ_from_the_local_mask_and_are_not_ignored():
    #                local 1111, answer ..1111: of six pixels two are taught as objects anew, two lost are ignored
    one = image(local="1111......", answered="..1111....", pseudo="??1111....")
    assert found(one).taught_pixels == pytest.approx(2 / 6)
    asked_too = replace(one, pseudo=mask("??11??...."))
    assert found(asked_too).taught_pixels == 0 and found(asked_too).ignored_pixels == pytest.approx(4 / 10)


def test_images_that_differ_from_the_local_mask_are_counted_once_each_ignored_pixels_included():
    assert found(image("a"), image("b", pseudo=".1?."), image("c", pseudo="11..")).num_differing == 2


@pytest.mark.parametrize(("changed", "nothing"), [(0, True), (1, True), (2, False)])
def test_up_to_the_stated_share_the_segmenter_changed_nothing(changed, nothing):
    assert MIN_CHANGED_SHARE == 0.001
    told = found(image(local="1" * 1000, answered="." * changed + "1" * (1000 - changed)))
    assert told.segmenter_changed_nothing == told.noop == nothing
    assert any("self-training" in said for said in warnings(told)) == nothing


def test_only_empty_images_mean_that_the_segmenter_did_nothing():
    empty = found(image(pseudo="....", local="....", known_empty=True))
    assert math.isnan(empty.changed_pixels) and empty.segmenter_changed_nothing and empty.num_empty == 1
    assert warnings(empty)[0] == "the segmenter changed nothing: only images known to be empty teach"


# -- from the table of decisions


def test_of_an_image_the_kept_objects_count_and_the_local_mask_is_all_of_them():
    rows = [row("11......", ".11....."), row("....1...", "....11..", kept=False), row("......1.", "......1.", 2)]
    one = pseudo_label_of(rows, mask(".11..?2."))
    for name, text in {"local": "11..1.2.", "local_kept": "11....2.", "used_mask": ".11...2."}.items():
        assert np.array_equal(getattr(one, name), mask(text)), name
    assert not one.known_empty and one.previous is None


def test_where_the_gate_took_the_local_mask_nothing_is_changed():
    one = pseudo_label_of([row("11..", "..11", source="local")], mask("11.."))
    assert np.array_equal(one.local_kept, one.used_mask)


def test_an_image_known_to_be_empty_has_no_objects():
    nothing = {"sample_id": "a", "object_idx": -1, "class_id": 0, "kept": True, "reason": "lesion_free"}
    one = pseudo_label_of([nothing], mask("...."), mask("...."))
    assert one.known_empty and not one.local.any() and not one.used_mask.any() and one.previous is not None


def test_of_two_objects_on_a_pixel_the_later_one_s_class_counts():
    rows = [row("....", "11.."), row("....", ".11.", 2)]
    assert np.array_equal(class_map(rows, (1, 4), "segmenter_rle"), mask("122."))


# -- balance of classes


def test_class_shares_leave_ignored_pixels_out_and_average_over_images():
    assert class_shares(mask("1.2?"), 3).tolist() == pytest.approx([1 / 3, 1 / 3])
    told = found(
        image("a", pseudo="11.."), image("b", pseudo="...." * 5), image("c", pseudo="????"), labeled=["1...", "1?"]
    )
    assert told.pseudo_shares == (pytest.approx(0.25),) and told.labeled_shares == (pytest.approx(0.625),)


def test_a_class_on_one_side_alone_is_warned_of():
    told = found(image(pseudo="2...", answered="11.."), labeled=["1..."], num_classes=3)
    assert warnings(told) == [
        "no pseudo mask shows class 1, though labels do",
        "pseudo masks show class 2, which no label does",
    ]


# -- as it is kept and said


def test_json_gives_the_same_back_through_a_file():
    told = found(image("a", pseudo="????", previous=mask("....")), image("b"), earlier=[{"a", "x"}])
    empty = found(image(pseudo="....", local="....", known_empty=True), labeled=[])
    for one in (told, empty):
        value = json.loads(json.dumps(nan_to_none(one.to_json()), allow_nan=False))
        assert repr(RoundChanges.from_json(value)) == repr(one)
    kept = told.to_json()
    assert (kept["num_teaching"], kept["num_new"], kept["num_kept_on"], kept["num_expelled"]) == (2, 1, 1, 1)
    assert kept["noop"] and kept["segmenter_changed_nothing"] and not kept["training_set_unchanged"]


def test_a_round_in_one_line():
    told = found(image("a", ".11.", ".1..", ".11."), image("b", "????"), earlier=[{"b", "x"}])
    assert summary_line(told) == (
        "2 of 9 unlabeled images teach (1 new, 1 kept on), 1 of the round before no more; the segmenter changed 25.0 % "
        "of the object pixels of the local masks, 25.0 % are taught otherwise; class 1 covers 50.0 % of a pseudo mask, "
        "25.0 % of a label"
    )
    assert warnings(told) == []


def test_why_nothing_was_kept():
    assert "found no object in any image" in explain_empty_round([{"reason": "no_component"}] * 3)
    mixed = [{"reason": "no_component"}, *[{"reason": "low_agreement"}] * 2]
    assert explain_empty_round(mixed) == "objects by the gate's reason: low_agreement 2, no_component 1"


def test_no_more_than_one_image_is_held():
    alive: list[weakref.ref] = []

    def images():
        for n in range(6):
            assert sum(ref() is not None for ref in alive) <= 1
            one = image(f"i{n}")
            alive.append(weakref.ref(one))
            yield one
            del one

    assert len(compare_rounds(images(), [], [], num_unlabeled=6, num_classes=2).new) == 6

"""Splits: nested, by group, independent of order; near-duplicates share a group."""

import os
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from kmine.data import splits
from kmine.data.perceptual_hash import perceptual_hash
from kmine.data.splits import Splits, make_splits, merge_duplicates, near_pairs
from kmine.errors import UserError
from kmine.types import SampleRef

DATA = os.environ.get("KMINE_TEST_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="KMINE_TEST_DATA is not set to the folder that holds kvasir_seg/")


def split(
    refs, label_fraction=0.5, val_fraction=0.1, test_fraction=0.25, split_seed=0, seed=0, fine_groups=None, fold=None
) -> Splits:
    return make_splits(
        refs,
        label_fraction=label_fraction,
        val_fraction=val_fraction,
        test_fraction=test_fraction,
        split_seed=split_seed,
        seed=seed,
        fine_groups=fine_groups,
        fold=fold,
    )


def refs_of(count: int, group_size: int = 1) -> list[SampleRef]:
    return [SampleRef(f"s{i:03}", f"g{i // group_size:03}") for i in range(count)]


ref_lists = st.lists(
    st.tuples(st.integers(0, 30), st.sampled_from([True, True, True, False])), min_size=60, max_size=90
)


def drawn_refs(drawn) -> list[SampleRef]:
    """Every third sample is its own group and has a mask, so that a split is always possible."""
    return [
        SampleRef(f"s{i:03}", f"single{i}") if i % 3 == 0 else SampleRef(f"s{i:03}", f"g{group}", has_mask)
        for i, (group, has_mask) in enumerate(drawn)
    ]


@settings(max_examples=60, deadline=None)
@given(ref_lists, st.integers(0, 5), st.integers(0, 5), st.tuples(st.floats(0.1, 1), st.floats(0.1, 1)))
def test_splits_are_nested_by_group_and_independent_of_order(drawn, split_seed, seed, fractions):
    refs = drawn_refs(drawn)
    small, large = (split(refs, f, split_seed=split_seed, seed=seed) for f in sorted(fractions))
    assert set(small.labeled) <= set(large.labeled)
    assert (small.val, small.test) == (large.val, large.test)
    assert small == split(refs[::-1], min(fractions), split_seed=split_seed, seed=seed)
    assert sorted(small.groups) == [ref.sample_id for ref in refs]
    has_mask = {ref.sample_id: ref.has_mask for ref in refs}
    assert all(has_mask[i] for i in (*small.labeled, *small.val, *small.test))
    sides: dict[str, set[str]] = {}
    for _, group_id, name in small.rows():
        sides.setdefault(group_id, set()).add(name if name in ("val", "test") else "train")
    assert all(len(names) == 1 for names in sides.values())
    assert Splits.from_rows(small.rows()) == small


def test_counts_by_hand():
    found = split(refs_of(200), label_fraction=0.1)
    assert (len(found.test), len(found.val), len(found.labeled), len(found.unlabeled)) == (50, 20, 13, 117)
    assert (found.val[0], found.groups[found.val[0]], "val") in found.rows() and found.rows() == sorted(found.rows())


def test_counts_in_groups_are_as_close_as_groups_allow():
    found = split(refs_of(200, group_size=8), label_fraction=0.1)
    assert len(found.test) in (48, 56) and len(found.val) in (16, 24) and len(found.labeled) == 16


def test_each_seed_draws_its_own_splits():
    refs = refs_of(100)
    base, other_seed, other_split = split(refs), split(refs, seed=1), split(refs, split_seed=1)
    assert (base.val, base.test) == (other_seed.val, other_seed.test)
    assert base.labeled != other_seed.labeled
    assert base.test != other_split.test


def test_removing_a_sample_moves_few_others():
    refs = refs_of(200)
    before, after = split(refs).rows(), split(refs[1:]).rows()
    moved = set(after) - set(before)
    assert len(moved) <= 4


def test_a_group_with_a_sample_without_mask_stays_in_training():
    refs = [SampleRef(f"s{i}", "mixed" if i < 2 else f"g{i}", has_mask=i != 0) for i in range(20)]
    for seed in range(20):
        found = split(refs, split_seed=seed)
        assert "s0" in found.unlabeled
        assert "s1" in found.labeled + found.unlabeled


def groups_in(found: Splits, name: str) -> set[str]:
    return {group for _, group, split_name in found.rows() if split_name == name}


@settings(max_examples=60, deadline=None)
@given(ref_lists, st.integers(0, 5), st.tuples(st.integers(1, 15), st.integers(1, 15)))
def test_fine_groups_are_nested_and_in_the_same_order_as_fractions(drawn, seed, counts):
    refs = drawn_refs(drawn)
    usable = len(groups_in(split(refs, label_fraction=1.0), "labeled"))
    counts = [min(count, usable) for count in sorted(counts)]
    few, more = (split(refs, seed=seed, fine_groups=count) for count in counts)
    assert groups_in(few, "labeled") <= groups_in(more, "labeled") and set(few.labeled) <= set(more.labeled)
    assert len(groups_in(few, "labeled")) == min(counts)
    assert (few.val, few.test) == (more.val, more.test) == (split(refs).val, split(refs).test)
    masked = {ref.sample_id for ref in refs if ref.has_mask}
    assert not {i for i in few.unlabeled if i in masked and few.groups[i] in groups_in(few, "labeled")}
    assert groups_in(few, "labeled").isdisjoint(groups_in(few, "val") | groups_in(few, "test"))
    # a fraction takes the first groups of the same order
    by_fraction = groups_in(split(refs, label_fraction=0.3, seed=seed), "labeled")
    assert groups_in(split(refs, seed=seed, fine_groups=len(by_fraction)), "labeled") == by_fraction


def test_fine_groups_by_hand():
    refs = refs_of(120, group_size=10)  # 12 groups: 3 test, 1 validation, 8 training
    for fine_groups, count in ((1, 1), (3.0, 3), (8, 8), (0.25, 2), (0.0625, 1), (0.99, 8)):
        found = split(refs, fine_groups=fine_groups)
        assert (len(found.labeled), len(found.unlabeled)) == (10 * count, 80 - 10 * count)
    with pytest.raises(UserError, match=r"fine_groups: .*all of 8 training groups with masks, got 9; choose fewer"):
        split(refs, fine_groups=9)
    with pytest.raises(UserError, match=r"of 8 .* got 0.06; the smallest share that works is 0.0625"):
        split(refs, fine_groups=0.06)


def test_groups_without_masks_are_not_counted_as_fine_groups():
    refs = [SampleRef(f"s{i:02}", f"g{i // 4}", has_mask=i >= 20) for i in range(80)]
    for seed in range(10):
        assert min(split(refs, seed=seed, fine_groups=5).labeled) >= "s20"


def official(sample_id, group_id, name, has_mask=True):
    return SampleRef(sample_id, group_id, has_mask, split=name)


def test_an_official_split_is_used():
    refs = [official(f"{name}{i}", f"{name}{i}", name) for name in ("train", "val", "test") for i in range(4)]
    found = split(refs, label_fraction=0.5)
    assert found.test == tuple(f"test{i}" for i in range(4))
    assert found.val == tuple(f"val{i}" for i in range(4))
    assert len(found.labeled) == 2


def test_samples_of_a_group_in_several_official_splits_stay_in_one():
    refs = [official(f"{name}{i}", f"{name}{i}", name) for name in ("train", "val", "test") for i in range(4)]
    refs += [
        official("copy_a", "test0", "train"),
        official("copy_b", "test1", "val"),
        official("copy_c", "val0", "train"),
    ]
    refs += [official("no_mask", "no_mask", "test", has_mask=False)]
    found = split(refs)
    assert len(found.groups) == 12
    assert not found.groups.keys() & {"copy_a", "copy_b", "copy_c", "no_mask"}


def test_a_missing_official_validation_split_is_drawn_from_train():
    refs = [official(f"{name}{i:02}", f"{name}{i}", name) for name in ("train", "test") for i in range(20)]
    found = split(refs)
    assert len(found.test) == 20 and len(found.val) == 4
    assert all(i.startswith("train") for i in found.val)


def test_errors_recommend_a_fraction_that_works():
    refs = refs_of(100)
    with pytest.raises(UserError, match=r"got 0.005 of 65 training images.*the smallest that works is 0.0077"):
        split(refs, label_fraction=0.005)
    assert len(split(refs, label_fraction=0.0077).labeled) == 1
    with pytest.raises(UserError, match=r"100 images with masks, got 0; the smallest fraction that works is 0.005"):
        split(refs, val_fraction=0)
    assert len(split(refs, val_fraction=0.005).val) == 1
    with pytest.raises(UserError, match="3 images and no mask"):
        split([SampleRef(f"s{i}", f"s{i}", has_mask=False) for i in range(3)])
    with pytest.raises(UserError, match=r"data.test_fraction: .* of 10 images"):
        split(refs_of(10, group_size=10))
    with pytest.raises(UserError, match=r"data.val_fraction: .* of 5 images"):
        split(refs_of(10, group_size=5), test_fraction=0.5)


def test_invalid_rows_are_refused():
    with pytest.raises(UserError, match="got 'valid' for a"):
        Splits.from_rows([("a", "a", "valid")])
    with pytest.raises(UserError, match="a twice"):
        Splits.from_rows([("a", "a", "val"), ("a", "a", "test")])
    with pytest.raises(UserError, match="got g in val and test"):
        Splits.from_rows([("a", "g", "val"), ("b", "g", "test")])


def groups_of(refs):
    return [ref.group_id for ref in refs]


def test_groups_are_merged_by_hand():
    refs = [SampleRef(i, f"g_{i}") for i in "dcba"]
    hashes = {"a": 0, "b": 0b111, "c": 0b111111, "d": 2**64 - 1}
    assert groups_of(merge_duplicates(refs, hashes, 3)) == ["g_d", "g_a", "g_a", "g_a"]
    assert groups_of(merge_duplicates(refs, hashes, 2)) == groups_of(refs)
    assert merge_duplicates(refs, hashes, -1) == tuple(refs)
    assert merge_duplicates([], {}, 6) == ()


def test_samples_without_a_hash_are_near_none_but_go_with_their_group():
    refs = [SampleRef("a", "x"), SampleRef("black", "x"), SampleRef("b", "y"), SampleRef("grey", "z")]
    assert groups_of(merge_duplicates(refs, {"a": 7, "b": 7}, 6)) == ["x", "x", "x", "z"]
    assert merge_duplicates(refs, {}, 6) == tuple(refs)


def test_whole_groups_are_merged():
    refs = [SampleRef("a", "volume1"), SampleRef("b", "volume1"), SampleRef("c", "volume2"), SampleRef("d", "volume2")]
    hashes = {"a": 0, "b": 2**20 - 1, "c": 2**63 - 1, "d": 1}
    assert groups_of(merge_duplicates(refs, hashes, 1)) == ["volume1"] * 4


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=30), st.integers(0, 40), st.randoms())
def test_merging_equals_its_definition(words, distance, random):
    refs = [SampleRef(f"s{i:02}", f"s{i:02}") for i in range(len(words))]
    hashes = {ref.sample_id: word for ref, word in zip(refs, words, strict=True)}
    group = {ref.sample_id: ref.sample_id for ref in refs}
    for a in hashes:
        for b in hashes:
            if (hashes[a] ^ hashes[b]).bit_count() <= distance:
                low, high = sorted((group[a], group[b]))
                group = {i: low if g == high else g for i, g in group.items()}
    random.shuffle(refs)
    assert {ref.sample_id: ref.group_id for ref in merge_duplicates(refs, hashes, distance)} == group


def test_merging_crosses_blocks_in_bounded_time():
    words = np.random.default_rng(0).integers(0, 2**64, 3000, dtype=np.uint64)
    words[-1] = words[0] ^ np.uint64(1)
    refs = refs_of(3000)
    hashes = {ref.sample_id: int(word) for ref, word in zip(refs, words, strict=True)}
    start = time.perf_counter()
    merged = merge_duplicates(refs, hashes, 6)
    assert time.perf_counter() - start < 5
    assert merged[-1].group_id == merged[0].group_id
    assert len(set(groups_of(merged))) == 2999


@pytest.mark.parametrize("distance", [0, 3, 6, 20])
def test_near_pairs_of_many_words_are_those_of_comparing_all(distance, monkeypatch):
    rng = np.random.default_rng(0)
    words = [int(word) for word in rng.integers(0, 2**64, 12, dtype=np.uint64)]
    words += [words[n % 12] ^ sum(1 << int(bit) for bit in rng.choice(64, n % 9, replace=False)) for n in range(80)]
    pairs = [(i, j) for j in range(len(words)) for i in range(j) if (words[i] ^ words[j]).bit_count() <= distance]
    monkeypatch.setattr(splits, "MANY", 20)
    arrays = near_pairs(np.array(words, np.uint64), distance)
    found = [pair for rows, cols in arrays for pair in zip(rows.tolist(), cols.tolist(), strict=True)]
    assert len(found) == len({*found}) and {*found} == {*pairs} and len(pairs) > 5


def test_many_equal_images_are_one_group_at_once():
    refs = refs_of(20_000)
    merged = merge_duplicates(refs, dict.fromkeys((ref.sample_id for ref in refs), 7), 6)
    assert set(groups_of(merged)) == {refs[0].group_id}


@needs_data
def test_real_frames_saved_twice_share_a_group():
    """Three of these 300 frames were exported twice, with another surround and inset; no other pair is near."""
    files = sorted((Path(DATA) / "kvasir_seg/Kvasir-SEG/images").iterdir())
    refs = [SampleRef(file.stem, file.stem) for file in files]
    hashes = {file.stem: perceptual_hash(np.array(Image.open(file))) for file in files}
    for bits in (4, 6, 12):
        merged = merge_duplicates(refs, hashes, bits)
        assert [i for i, ref in enumerate(merged) if ref.group_id != ref.sample_id] == [289, 293, 294]
        assert [merged[i].group_id for i in (289, 293, 294)] == [refs[i].group_id for i in (108, 237, 42)]
    half = [np.array(Image.open(file).convert("RGB").reduce(2)) for file in files[:40]]
    assert all(
        (perceptual_hash(image) ^ hashes[ref.sample_id]).bit_count() <= 6
        for image, ref in zip(half, refs, strict=False)
    )


@settings(max_examples=40, deadline=None)
@given(ref_lists, st.integers(0, 5), st.integers(2, 6))
def test_folds_test_each_image_with_a_mask_once_and_never_separate_a_group(drawn, split_seed, count):
    refs = drawn_refs(drawn)
    masked = {ref.sample_id for ref in refs if ref.has_mask}
    largest = max(sum(ref.has_mask and ref.group_id == g for ref in refs) for g in {ref.group_id for ref in refs})
    assume(largest <= 10)
    folds = [split(refs, 1.0, split_seed=split_seed, fold=(k, count)) for k in range(count)]
    assert sorted(i for fold in folds for i in fold.test) == sorted(masked)
    sizes = [len(fold.test) for fold in folds]
    assert max(sizes) - min(sizes) <= largest
    for fold in folds:
        assert fold.val and fold.labeled and Splits.from_rows(fold.rows()) == fold  # refuses a group on two sides
        assert {*fold.val, *fold.test, *fold.labeled} <= masked
        assert fold == split(refs[::-1], 1.0, split_seed=split_seed, seed=0, fold=(folds.index(fold), count))


def test_folds_by_hand():
    refs = [*refs_of(16), *(SampleRef(f"u{i}", f"u{i}", has_mask=False) for i in range(4))]
    folds = [split(refs, 1.0, val_fraction=0.2, fold=(k, 5)) for k in range(5)]
    assert [len(fold.test) for fold in folds] == [4, 3, 3, 3, 3]
    assert [(len(fold.val), len(fold.labeled), len(fold.unlabeled)) for fold in folds[:2]] == [(2, 10, 4), (3, 10, 4)]
    assert len({fold.val for fold in folds}) > 1, "validation is drawn anew for each fold"
    every = split(refs, 1.0, val_fraction=0.2, fold=(5, 5))
    assert (len(every.test), len(every.val), len(every.labeled)) == (0, 3, 13)
    assert folds[0].test != split(refs, 1.0, split_seed=1, fold=(0, 5)).test
    assert folds[0].test == split(refs, 1.0, seed=7, fold=(0, 5)).test


def test_a_group_with_maskless_samples_is_tested_too_and_its_maskless_samples_are_left_out():
    refs = [SampleRef(f"s{i}", f"g{i // 2}", has_mask=i % 2 == 0) for i in range(8)] + refs_of(4)
    for k in range(2):
        fold = split(refs, 1.0, fold=(k, 2))
        tested = {fold.groups[i] for i in fold.test}
        assert len(fold.test) == 4 and all(int(i[1:]) % 2 for i in fold.unlabeled)
        assert not tested & {fold.groups[i] for i in fold.unlabeled}


@pytest.mark.parametrize(
    ("refs", "words"),
    [
        (refs_of(4), "data.folds: expected at most 4, the groups with masks, got 5; choose fewer"),
        (refs_of(40, group_size=20), "data.folds: expected at most 2, the groups with masks, got 5"),
        ([SampleRef(f"s{i}", f"s{i}", split=("train", "test")[i % 2]) for i in range(20)], "leave data.folds out"),
    ],
)
def test_folds_that_cannot_be_are_refused(refs, words):
    with pytest.raises(UserError, match=words):
        split(refs, 1.0, fold=(0, 5))

"""Splits into labeled, unlabeled, validation and test samples, drawn by group from names and seeds."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from kmine.errors import UserError
from kmine.ops.seeding import derive_seed
from kmine.types import SPLIT_NAMES, SampleRef, SplitName

BLOCK = 256
"""Rows compared with all images at once; needs 35 MB for 34,000 images."""
MANY = 2**15  # words from which near ones are searched by parts of their bits: at distance 6 one comparison in 70
SIDES = ("test", "val", "train")
"""A group belongs to one side only; of several, the first in this order keeps it."""


@dataclass(frozen=True)
class Splits:
    """Sorted sample ids of each split; samples may be in none (see `make_splits`)."""

    labeled: tuple[str, ...]
    unlabeled: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]
    groups: dict[str, str]
    """Group id by sample id."""

    def rows(self) -> list[tuple[str, str, SplitName]]:
        """(sample_id, group_id, split), sorted by sample_id: the rows of splits.csv."""
        return sorted((i, self.groups[i], name) for name in SPLIT_NAMES for i in getattr(self, name))

    @classmethod
    def from_rows(cls, rows: Iterable[tuple[str, str, str]]) -> Splits:
        """Inverse of `rows`.

        Raises:
            UserError: for an unknown split, a sample named twice, or a group on two sides.
        """
        members: dict[str, list[str]] = {name: [] for name in SPLIT_NAMES}
        groups: dict[str, str] = {}
        sides: dict[str, str] = {}
        for sample_id, group_id, name in rows:
            if name not in members:
                raise UserError(f"splits: expected one of {', '.join(SPLIT_NAMES)}, got {name!r} for {sample_id}")
            if sample_id in groups:
                raise UserError(f"splits: expected each sample once, got {sample_id} twice; remove one of its rows")
            side = side_of(name)
            if sides.setdefault(group_id, side) != side:
                raise UserError(
                    f"splits: expected each group on one side, got {group_id} in {sides[group_id]} and {side}; "
                    "move all of the group to one of them"
                )
            groups[sample_id] = group_id
            members[name].append(sample_id)
        return cls(**{name: tuple(sorted(ids)) for name, ids in members.items()}, groups=groups)


def side_of(split: str) -> str:
    """train, val or test: labeled and unlabeled samples are in train."""
    return split if split in ("val", "test") else "train"


def merge_duplicates(refs: Sequence[SampleRef], hashes: Mapping[str, int], distance: int) -> tuple[SampleRef, ...]:
    """Merge the groups of samples whose 64-bit hashes differ in at most `distance` bits.

    Transitive: if a is near b and b near c, all three are one group. It is named after the group of its first sample by
    id. Samples without a hash are near none. `distance` -1 changes nothing. Returns the samples in the same order, with
    new `group_id`.
    """
    hashed = [n for n, ref in enumerate(refs) if ref.sample_id in hashes]
    if distance < 0 or not hashed:
        return tuple(refs)
    of_group = np.unique([ref.group_id for ref in refs], return_inverse=True)[1]
    words, of_word = np.unique([np.uint64(hashes[refs[n].sample_id]) for n in hashed], return_inverse=True)
    offset = of_group.max() + 1
    labels = np.arange(offset + len(words))  # of groups, then of words; those of one component become equal
    found = ((rows + offset, cols + offset) for rows, cols in near_pairs(words, distance))
    for rows, cols in chain([(of_group[hashed], of_word + offset)], found):
        nodes, ends = np.unique([labels[rows], labels[cols]], return_inverse=True)
        edges = (np.ones(len(rows), dtype=bool), tuple(ends.reshape(2, -1)))
        joined = connected_components(coo_array(edges, shape=(len(nodes),) * 2), directed=False)[1]
        labels[nodes] = nodes[np.unique(joined, return_index=True)[1]][joined]
        labels = labels[labels]
    labels = labels[of_group]
    first: dict[int, str] = {}
    for index in sorted(range(len(refs)), key=lambda i: refs[i].sample_id):
        first.setdefault(int(labels[index]), refs[index].group_id)
    return tuple(replace(ref, group_id=first[int(label)]) for ref, label in zip(refs, labels, strict=True))


def near_pairs(words: NDArray[np.uint64], distance: int) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """Index pairs (i, j), i < j, within the Hamming distance, each once, block by block.

    With bits as -1 and 1, the dot product of two words is 64 - 2 * distance, exact in float32. More than `MANY` words
    are compared only where they agree in one of distance + 1 parts of their bits: any two within the distance do.
    """
    bits = np.unpackbits(words.view(np.uint8).reshape(len(words), 8), axis=1).astype(np.float32) * 2 - 1
    parts = np.array_split(np.arange(64), distance + 1) if len(words) > MANY and distance < 16 else [np.arange(0)]
    for n, part in enumerate(parts):
        codes = (bits[:, part] > 0) @ (1 << np.arange(len(part)))
        order = np.argsort(codes, kind="stable")
        for alike in np.split(order, np.flatnonzero(np.diff(codes[order])) + 1):
            own = bits[alike]
            for start in range(0, len(own), BLOCK):
                near = own[start : start + BLOCK] @ own[start:].T >= 64 - 2 * distance
                rows, cols = (found + start for found in np.nonzero(np.triu(near, k=1)))
                new = np.ones(len(rows), bool)  # not found before, by another part
                for known in parts[:n]:
                    new &= (own[rows][:, known] != own[cols][:, known]).any(axis=1)
                if new.any():
                    yield alike[rows[new]], alike[cols[new]]


def make_splits(
    refs: Sequence[SampleRef],
    *,
    label_fraction: float,
    val_fraction: float,
    test_fraction: float,
    split_seed: int,
    seed: int,
    fine_groups: float | None = None,
    fold: tuple[int, int] | None = None,
) -> Splits:
    """Draw the splits by group: test and validation from `split_seed`, labeled images from `seed`.

    Fractions refer to the images with masks. Groups are ordered by a keyed hash of their name: the order of `refs` does
    not matter, and adding a sample hardly moves the others. Labeled groups are a prefix of that order, so those of a
    small fraction are a subset of those of a larger one. `fine_groups` sets the length of the prefix in groups: at
    least 1, the number; below 1, the share of the training groups with masks.

    `fold` (k, n) takes the place of `test_fraction`: test is fold k of n of the groups with masks, which are of nearly
    equal numbers of masks and drawn from `split_seed`; validation is drawn from the rest, anew for each k. k = n holds
    nothing out. Of a group with masks all samples leave training with it; those without a mask are then in no split.

    - A group with a sample without a mask stays in training; that sample is unlabeled.
    - Official splits (train, val or test of every sample) are used; an official validation or test split that does not
      exist is drawn from train. A group in several official splits keeps its test samples, else its validation samples;
      its other samples are in no split, nor are official validation and test samples without a mask.

    Raises:
        UserError: when no labeled, validation or (if requested) test image would remain.
    """
    refs, sides = _official(sorted(refs, key=lambda ref: ref.sample_id))
    official = set(sides.values())
    num_masks = sum(ref.has_mask for ref in refs)
    if not num_masks:
        raise UserError(f"data: expected images with masks, got {len(refs)} images and no mask")
    if fold is not None:
        if official != {"train"}:
            raise UserError("data.folds: expected images without a split of their own, got one; leave data.folds out")
        refs = _hold_out(refs, sides, fold, split_seed)
        num_masks = sum(ref.has_mask for ref in refs if sides[ref.group_id] == "train")
        split_seed = derive_seed("fold", split_seed, fold[0])
    elif "test" not in official and test_fraction > 0:
        _draw(refs, sides, "test", test_fraction * num_masks, split_seed)
    if "val" not in official:
        if val_fraction <= 0:
            raise UserError(
                f"data.val_fraction: expected at least one of {num_masks} images with masks, got {val_fraction}; "
                f"the smallest fraction that works is {_ceil(0.5 / num_masks)}"
            )
        _draw(refs, sides, "val", val_fraction * num_masks, split_seed)
    train = [ref for ref in refs if sides[ref.group_id] == "train"]
    labeled = _labeled(train, label_fraction, fine_groups, seed)
    return Splits(
        labeled=tuple(sorted(labeled)),
        unlabeled=tuple(ref.sample_id for ref in train if ref.sample_id not in labeled),
        val=tuple(ref.sample_id for ref in refs if sides[ref.group_id] == "val"),
        test=tuple(ref.sample_id for ref in refs if sides[ref.group_id] == "test"),
        groups={ref.sample_id: ref.group_id for ref in refs},
    )


def _official(refs: Sequence[SampleRef]) -> tuple[list[SampleRef], dict[str, str]]:
    """Used samples and the side of each group; all train unless every sample has an official split."""
    if not all(ref.split in SIDES for ref in refs):
        return list(refs), {ref.group_id: "train" for ref in refs}
    sides_of_group: dict[str, set[str]] = defaultdict(set)
    for ref in refs:
        sides_of_group[ref.group_id].add(ref.split or "")
    sides = {group: min(names, key=SIDES.index) for group, names in sides_of_group.items()}
    kept = [ref for ref in refs if ref.split == sides[ref.group_id] and (ref.has_mask or ref.split == "train")]
    return kept, sides


def _hold_out(refs: Sequence[SampleRef], sides: dict[str, str], fold: tuple[int, int], seed: int) -> list[SampleRef]:
    """Move fold k of n from train to test; returns the samples without the maskless ones of its groups.

    The largest group first, each goes to the fold with the fewest masks so far.
    """
    sizes = Counter(ref.group_id for ref in refs if ref.has_mask)
    index, count = fold
    if len(sizes) < count:
        raise UserError(f"data.folds: expected at most {len(sizes)}, the groups with masks, got {count}; choose fewer")
    totals = [0] * count
    for group in sorted(_order(sizes, "fold", seed), key=lambda group: -sizes[group]):
        chosen = totals.index(min(totals))
        totals[chosen] += sizes[group]
        sides[group] = "test" if chosen == index else "train"
    return [ref for ref in refs if ref.has_mask or sides[ref.group_id] == "train"]


def _draw(refs: Sequence[SampleRef], sides: dict[str, str], side: str, target: float, seed: int) -> None:
    """Move groups from train to `side` in seeded order, each if it brings the number of masks closer to `target`."""
    sizes = Counter[str]()
    for ref in refs:
        if sides[ref.group_id] == "train":
            sizes[ref.group_id] += ref.has_mask
    maskless = {ref.group_id for ref in refs if not ref.has_mask}
    order = [group for group in _order(sizes, side, seed) if group not in maskless]
    count = 0
    for group in order:
        if abs(count + sizes[group] - target) < abs(count - target):
            sides[group], count = side, count + sizes[group]
    if not count and order:
        smallest = min(order, key=sizes.__getitem__)
        sides[smallest], count = side, sizes[smallest]
    if not count or count == sum(sizes.values()):
        raise UserError(
            f"data.{side}_fraction: expected {max(1, round(target))} of {sum(sizes.values())} images for {side} and "
            f"some left to train on, but {len(order)} whole groups can be moved; "
            "add images, or lower data.duplicate_distance, data.val_fraction or data.test_fraction"
        )


def _labeled(train: Sequence[SampleRef], label_fraction: float, fine_groups: float | None, seed: int) -> set[str]:
    """Samples with masks of the first groups in seeded order, up to `fine_groups` or the fraction."""
    by_group: dict[str, list[str]] = defaultdict(list)
    for ref in train:
        if ref.has_mask:
            by_group[ref.group_id].append(ref.sample_id)
    order = _order(by_group, "labeled", seed)
    if fine_groups is not None:
        return {sample_id for group in order[: _num_fine(fine_groups, len(order))] for sample_id in by_group[group]}
    num_masks = sum(map(len, by_group.values()))
    target = math.floor(label_fraction * num_masks + 0.5)
    if not target:
        works = f"the smallest that works is {_ceil(0.5 / num_masks)}" if num_masks else "lower data.test_fraction"
        raise UserError(
            f"data.label_fraction: expected at least one labeled image, got {label_fraction} of {num_masks} training "
            f"images with masks; {works}"
        )
    labeled: set[str] = set()
    for group in order:
        if len(labeled) >= target:
            break
        labeled.update(by_group[group])
    return labeled


def _num_fine(fine_groups: float, num_groups: int) -> int:
    """Number of labeled groups among the training groups with masks."""
    count = int(fine_groups) if fine_groups >= 1 else math.floor(fine_groups * num_groups + 0.5)
    if not 1 <= count <= num_groups:
        smallest = f"the smallest share that works is {_ceil(0.5 / max(num_groups, 1))}"
        raise UserError(
            f"data.fine_groups: expected at least 1 and at most all of {num_groups} training groups with masks, got "
            f"{fine_groups:g}; {'choose fewer, or add masks' if count else smallest}"
        )
    return count


def _order(groups: Iterable[str], purpose: str, seed: int) -> list[str]:
    return sorted(groups, key=lambda group: (derive_seed(purpose, seed, group), group))


def _ceil(fraction: float) -> float:
    """Rounded up to four decimals, so that a recommended value works."""
    return math.ceil(fraction * 10_000) / 10_000

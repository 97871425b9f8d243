"""What a data set looks like, and what in it would spoil a result: facts of each sample -> findings."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kmine.data.io.find_files import FOREGROUND_ABOVE
from kmine.data.perceptual_hash import grey_of, hash_views
from kmine.data.quality.near_duplicates import compute_descriptor, find_similar_pairs, similarity
from kmine.data.splits import near_pairs
from kmine.io.threads import thread_pool
from kmine.types import (
    IGNORE_INDEX,
    Finding,
    SampleRef,
    Severity,
)

MAX_NAMED = 20
"""Samples, or pairs of samples, that one finding names."""
MAX_PAIRS = 30_000
"""Pairs of pictures compared in detail, the most alike first: one or two milliseconds each."""
SAME_PICTURE = 0.9
"""Sameness from which two pictures are one; see experiments/data_doctor.

Of 600 copies (phantoms, Kvasir-SEG, X-rays; 2 or 4 % off each side or 4 % off two, saved as JPEG of quality 60) 598 had
.91 or more; the most similar of different pictures, X-ray phantoms, .87."""
FLAT = 1.0
"""An image whose grey values have a smaller standard deviation shows nothing."""
INVERTED = 0.8
"""Share of the masks that must cover both most of the image and most of its rim to call all of them inverted."""
RIM = 0.95
"""A single mask that covers so much of the rim, and has a hole, is inverted, where masks are not all like that."""
IMAGE_AS_MASK = 0.98
"""Dice from which a mask is the bright half of its own image."""
MIN_SHAPE = 16
"""Pixels of foreground, and of background, from which equal masks are no accident."""


@dataclass(frozen=True)
class MaskStats:
    """One mask, counted."""

    shape: tuple[int, ...]
    pixels: dict[int, int]
    """Number of pixels by class id."""
    rim_share: float
    """Share of the outermost pixels that are foreground."""
    fingerprint: bytes
    """Hash of shape and pixels."""
    like_image: float
    """Dice of the foreground and of what the image itself would be, read as a mask; 0 for another size."""

    @property
    def num_foreground(self) -> int:
        """Number of pixels that are neither background nor ignored."""
        return sum(n for value, n in self.pixels.items() if value not in (0, IGNORE_INDEX))

    @property
    def foreground_share(self) -> float:
        """Share of the pixels that are neither background nor ignored."""
        return self.num_foreground / sum(self.pixels.values())

    @property
    def maybe_inverted(self) -> bool:
        """Whether it covers most of the image and most of its rim."""
        return self.foreground_share > 0.5 and self.rim_share > 0.5


@dataclass(frozen=True)
class ImageStats:
    """One sample, counted; small enough to be kept for every sample of a large set (about 10 kB)."""

    sample_id: str
    shape: tuple[int, int]
    low: int
    high: int
    mean: float
    contrast: float
    """Standard deviation of the grey values."""
    fingerprint: bytes
    """Hash of shape and pixels: the same for the same picture under another name or in another file format."""
    image_hash: int
    small: NDArray[np.uint8]
    """(SMALL, SMALL) grey: the part that is hashed."""
    whole: NDArray[np.uint8]
    """(SMALL, SMALL) grey: everything."""
    mask: MaskStats | None
    """None where there is no mask, or none that can be read."""


@dataclass(frozen=True)
class DuplicatePair:
    """Two images that show the same."""

    first: str
    second: str
    bits: int
    """Of 64, in which their hashes differ."""
    correlation: float
    """Of the pictures, aligned, see `kmine.data.quality.near_duplicates.similarity`."""
    exact: bool
    """Whether every pixel is the same."""

    @property
    def same_picture(self) -> bool:
        """Whether the pictures agree, too, and not the hashes alone."""
        return self.exact or self.correlation >= SAME_PICTURE

    def __str__(self) -> str:
        return f"{self.first} = {self.second}"


@dataclass(frozen=True)
class DuplicateSearch:
    """How far copies were looked for."""

    num_compared: int
    """Pairs of pictures compared in detail."""
    complete: bool
    """False where more pairs looked alike than were compared."""


def compute_stats(sample_id: str, image: NDArray[np.uint8], mask: NDArray[np.uint8] | None) -> ImageStats:
    """Count one sample.

    Args:
        sample_id: its id.
        image: (H, W, 3) RGB, [0, 255].
        mask: class ids, of whatever shape it came in.
    """
    height, width = image.shape[:2]
    grey = grey_of(image)
    image_hash, small, whole = hash_views(grey)
    values = np.asarray(grey)
    return ImageStats(
        sample_id=sample_id,
        shape=(height, width),
        low=int(image.min()),
        high=int(image.max()),
        mean=float(image.mean()),
        contrast=float(values.std()),
        fingerprint=_fingerprint(image),
        image_hash=image_hash,
        small=small,
        whole=whole,
        mask=None if mask is None else compute_mask_stats(mask, values > FOREGROUND_ABOVE),
    )


def compute_mask_stats(mask: NDArray[np.uint8], bright: NDArray[np.bool_] | None = None) -> MaskStats:
    """Count the pixels of one (H, W) mask of class ids; `bright` says which of the image's are, to compare with."""
    counts = np.bincount(mask.ravel(), minlength=IGNORE_INDEX + 1)
    rim = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
    inside = (mask != 0) & (mask != IGNORE_INDEX)
    if bright is None or mask.shape != bright.shape:
        bright = np.zeros_like(inside)
    both = int((inside & bright).sum())
    return MaskStats(
        shape=mask.shape,
        pixels={int(v): int(counts[v]) for v in np.flatnonzero(counts)},
        rim_share=float(((rim != 0) & (rim != IGNORE_INDEX)).mean()),
        fingerprint=_fingerprint(mask),
        like_image=2 * both / max(int(inside.sum()) + int(bright.sum()), 1),
    )


def _fingerprint(array: NDArray[np.uint8]) -> bytes:
    blake = hashlib.blake2b(repr(array.shape).encode(), digest_size=16)
    blake.update(np.ascontiguousarray(array))
    return blake.digest()


def check_masks(stats: Sequence[ImageStats], refs: Mapping[str, SampleRef], num_classes: int) -> list[Finding]:
    """Sizes, values, emptiness, convention and image-level labels of the masks that could be read."""
    with_mask = [(item, item.mask) for item in stats if item.mask is not None]
    sizes = [item.sample_id for item, mask in with_mask if mask.shape != item.shape]
    allowed = {*range(num_classes), IGNORE_INDEX}
    foreign = {v for _, mask in with_mask for v in mask.pixels} - allowed
    invalid = [item.sample_id for item, mask in with_mask if mask.pixels.keys() - allowed]
    filled = [(item, mask) for item, mask in with_mask if mask.num_foreground]
    flat = [item.sample_id for item in stats if item.contrast < FLAT]
    blind = [item.sample_id for item, _ in filled if item.contrast < FLAT]
    images = [item.sample_id for item, mask in filled if item.contrast >= FLAT and mask.like_image >= IMAGE_AS_MASK]
    # Of several classes one does not know which the label speaks of: in LiTS, not of the liver.
    labeled = filled if num_classes == 2 else []
    free = [item.sample_id for item, _ in labeled if refs[item.sample_id].image_label == 0]
    missing = [i.sample_id for i, m in with_mask if refs[i.sample_id].image_label == 1 and not m.num_foreground]
    findings = [
        _fault("mask_size", sizes, f"{count(sizes, 'mask')} of another size than the image"),
        _fault(
            "mask_values", invalid, f"{count(invalid, 'mask')} with values that are no class: {sorted(foreign)[:10]}"
        ),
        _fault("mask_is_image", images, f"{count(images, 'mask')} equal to the image itself; store masks, not images"),
        _note("no_contrast", flat, f"{count(flat, 'image')} without any contrast"),
        _fault("mask_on_nothing", blind, f"{count(blind, 'mask')} not empty on an image without any contrast"),
        _fault("label_0_with_mask", free, f"{count(free, 'sample')} labeled lesion-free with a mask that is not empty"),
        _note("label_1_empty_mask", missing, f"{count(missing, 'sample')} labeled 1 with an empty mask"),
        *_check_convention(filled),
    ]
    if with_mask and not filled:
        findings.append(
            _fault("masks_empty", [i.sample_id for i, _ in with_mask], f"all {len(with_mask)} masks are empty")
        )
    return [finding for finding in findings if finding.samples]


def _check_convention(filled: Sequence[tuple[ImageStats, MaskStats]]) -> list[Finding]:
    """Foreground and background swapped, in all masks or in some."""
    inverted = [item.sample_id for item, mask in filled if mask.maybe_inverted]
    if len(inverted) >= INVERTED * len(filled):
        text = (
            f"{len(inverted)} of {len(filled)} masks cover most of the image and of its rim: foreground and background "
            "look swapped; store the foreground as the class, the background as 0"
        )
        return [_fault("masks_inverted", inverted, text)]
    certain = [
        item.sample_id for item, m in filled if m.maybe_inverted and m.rim_share >= RIM and m.foreground_share < 1
    ]
    unsure = [sample_id for sample_id in inverted if sample_id not in set(certain)]
    few = "unlike the others, on most of the image and"
    return [
        _fault("mask_inverted", certain, f"{count(certain, 'mask')}, {few} all of its rim, around a hole: inverted?"),
        _note("mask_at_rim", unsure, f"{count(unsure, 'mask')}, {few} of its rim: inverted, or a close view?"),
    ]


def check_classes(stats: Sequence[ImageStats], class_names: Sequence[str]) -> list[Finding]:
    """Classes, of more than one beside the background, that no mask shows."""
    present = {value for item in stats if item.mask is not None for value in item.mask.pixels}
    absent = [f"{n} {name}" for n, name in enumerate(class_names) if n and n not in present]
    if len(class_names) < 3 or not present - {0, IGNORE_INDEX} or not absent:
        return []
    text = f"no mask shows the class {' or '.join(absent)}; mend the masks, or do not name the class"
    return [_fault("class_absent", absent, text)]


def check_identical_masks(
    stats: Sequence[ImageStats], groups: Mapping[str, str], duplicates: Sequence[DuplicatePair]
) -> list[Finding]:
    """One mask on images of several groups that are no copies of one another."""
    by_fingerprint: dict[bytes, list[ImageStats]] = defaultdict(list)
    for item in stats:
        if item.mask is not None and MIN_SHAPE <= item.mask.num_foreground <= np.prod(item.mask.shape) - MIN_SHAPE:
            by_fingerprint[item.mask.fingerprint].append(item)
    same_pictures = {frozenset((t.first, t.second)) for t in duplicates if t.same_picture}
    shared: list[list[str]] = []
    for items in by_fingerprint.values():
        distinct: list[ImageStats] = []
        seen_keys: set[object] = set()  # of many, one of a group and of a picture is enough
        for item in items:
            keys = {groups[item.sample_id], item.fingerprint}
            copied = any(frozenset((item.sample_id, other.sample_id)) in same_pictures for other in distinct)
            if not keys & seen_keys and not copied:
                distinct.append(item)
            seen_keys |= keys
        if len(distinct) > 1:
            shared.append([item.sample_id for item in distinct])
    shared.sort(key=len, reverse=True)
    total = sum(map(len, shared))
    names = [f"{names[0]} = {name}" for names in shared for name in names[1:]]
    text = f"{total} different images share {count(shared, 'mask')}, pixel by pixel: copied to the wrong image?"
    return [_fault("same_mask", names, text)] if shared else []


def check_groups(refs: Iterable[SampleRef], sides: Mapping[str, str], *, allow_leaks: bool) -> list[Finding]:
    """Groups with samples on two sides of the data set's own split."""
    sides_of_group: dict[str, set[str]] = defaultdict(set)
    for ref in refs:
        if ref.sample_id in sides:
            sides_of_group[ref.group_id].add(sides[ref.sample_id])
    straddling = sorted(group for group, names in sides_of_group.items() if len(names) > 1)
    text = f"{count(straddling, 'group')} (patient, volume, copies of one picture) on two sides of the split"
    return [_finding("group_on_two_sides", _leak(allow_leaks), straddling, text)] if straddling else []


def find_duplicates(
    stats: Sequence[ImageStats], groups: Mapping[str, str], distance: int
) -> tuple[list[DuplicatePair], DuplicateSearch]:
    """Images that show the same: equal pixels, or of different groups alike.

    Every image of equal pixels is paired with the first of them. Beyond that, pairs that look alike at a glance are
    compared in detail, at most `MAX_PAIRS`, and those that agree are returned; so are all pairs within `distance`
    bits, whatever they show. Images without contrast are like everything, and left out.

    Args:
        stats: of all samples.
        groups: the index's group id by sample id; alike images of one group are what a group is for.
        distance: data.duplicate_distance; below 0 only equal pixels are looked for.
    """
    first: dict[bytes, ImageStats] = {}
    exact = [
        DuplicatePair(first[item.fingerprint].sample_id, item.sample_id, 0, 1.0, exact=True)
        for item in stats
        if first.setdefault(item.fingerprint, item) is not item
    ]
    unique = [item for item in first.values() if item.contrast >= FLAT]
    if distance < 0 or len(unique) < 2:
        return exact, DuplicateSearch(0, complete=distance >= 0)
    group = np.unique([groups[item.sample_id] for item in unique], return_inverse=True)[1]
    words = np.array([item.image_hash for item in unique], dtype=np.uint64)
    descriptors = np.empty((len(unique), *compute_descriptor(unique[0].small, unique[0].whole).shape), np.float32)
    for n, item in enumerate(unique):
        descriptors[n] = compute_descriptor(item.small, item.whole)
    similar = find_similar_pairs(descriptors, group, MAX_PAIRS)
    hashed, all_hashed = _near_hashes(words, group, distance)
    pairs = list(dict.fromkeys([*map(tuple, similar.pairs.tolist()), *hashed]))

    def compare(pair: tuple[int, int]) -> DuplicatePair:
        left, right = (unique[n] for n in pair)
        bits = (left.image_hash ^ right.image_hash).bit_count()
        similarity_score = similarity((left.small, left.whole), (right.small, right.whole), SAME_PICTURE)
        return DuplicatePair(left.sample_id, right.sample_id, bits, similarity_score, exact=False)

    with thread_pool() as threads:
        near = [
            duplicate
            for duplicate in threads.map(compare, pairs)
            if duplicate.same_picture or duplicate.bits <= distance
        ]
    return exact + near, DuplicateSearch(len(pairs), similar.complete and all_hashed)


def _near_hashes(
    words: NDArray[np.uint64], group: NDArray[np.int64], distance: int
) -> tuple[list[tuple[int, int]], bool]:
    """Pairs within so many bits, and whether these are all; at most `MAX_PAIRS`."""
    pairs: list[tuple[int, int]] = []
    for rows, cols in near_pairs(words, distance):
        other = group[rows] != group[cols]
        pairs += zip(rows[other][:MAX_PAIRS].tolist(), cols[other][:MAX_PAIRS].tolist(), strict=True)
        if len(pairs) >= MAX_PAIRS:
            return pairs[:MAX_PAIRS], False
    return pairs, True


def check_duplicates(
    duplicates: Sequence[DuplicatePair], sides: Mapping[str, str], *, allow_leaks: bool
) -> list[Finding]:
    """Copies across train, val and test, and within one of them.

    Args:
        duplicates: as `find_duplicates` returns them.
        sides: train, val or test by sample id; a sample in none of them leaks nothing.
        allow_leaks: data.allow_leaks.
    """

    def across(pair: DuplicatePair) -> bool:
        a, b = sides.get(pair.first), sides.get(pair.second)
        return a is not None and b is not None and a != b

    findings = []
    for code, kind, pairs in (
        ("exact", "the same pixels", _reanchored(sides, [t for t in duplicates if t.exact])),
        (
            "near",
            "nearly the same picture (cropped, recompressed)",
            [t for t in duplicates if t.same_picture and not t.exact],
        ),
    ):
        leaks = [str(t) for t in pairs if across(t)]
        within = [str(t) for t in pairs if not across(t)]
        between = Counter(" and ".join(sorted((sides[t.first], sides[t.second]))) for t in pairs if across(t))
        where = ", ".join(f"{n} between {names}" for names, n in sorted(between.items()))
        text = f"{count(leaks, 'pair')} of images with {kind} on two sides of the split: {where}"
        findings.append(_finding(f"{code}_duplicates_across", _leak(allow_leaks), leaks, text))
        text = f"{count(within, 'pair')} of images with {kind} on one side of the split"
        findings.append(_note(f"{code}_duplicates_within", within, text))
    hash_alike = [str(t) for t in duplicates if not t.same_picture]
    text = (
        f"{count(hash_alike, 'pair')} within data.duplicate_distance, so one group, but the pictures differ; lower it?"
    )
    findings.append(_note("hash_alike", hash_alike, text))
    return [finding for finding in findings if finding.samples]


def _reanchored(sides: Mapping[str, str], exact: Sequence[DuplicatePair]) -> list[DuplicatePair]:
    """Equal images, each paired with the first that takes part in the split: none hides behind one that does not."""
    anchors: dict[str, str] = {}
    out = []
    for pair in exact:
        anchor = anchors.setdefault(pair.first, pair.first if pair.first in sides else pair.second)
        if anchor == pair.second:
            out.append(pair)
            if pair.second not in sides:
                del anchors[pair.first]
        else:
            out.append(replace(pair, first=anchor))
    return out


def count(things: Sequence[object], word: str) -> str:
    """`3 masks`, `1 mask`."""
    return f"{len(things)} {word}{'' if len(things) == 1 else 's'}"


def _leak(allowed: bool) -> Severity:
    return "note" if allowed else "fault"


def _fault(code: str, samples: Sequence[str], text: str) -> Finding:
    return _finding(code, "fault", samples, text)


def _note(code: str, samples: Sequence[str], text: str) -> Finding:
    return _finding(code, "note", samples, text)


def _finding(code: str, severity: Severity, samples: Sequence[str], text: str) -> Finding:
    return Finding(code, severity, text, tuple(samples[:MAX_NAMED]))

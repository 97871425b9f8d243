"""What a data set looks like, and what in it would spoil a result: facts of each sample -> findings."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from kmine.data.hashing import SMALL, perceptual_hash, small_grey
from kmine.data.splits import near_pairs
from kmine.records import IGNORE_INDEX, Finding, SampleRef, Severity

MAX_NAMED = 20
"""Samples, or pairs of samples, that one finding names."""
MAX_PAIRS = 20_000
"""Pairs of small pictures compared, nearest hashes first: half a millisecond each."""
REACH, REACH_OF_MANY, MANY = 20, 12, 3000
"""Hashes that differ in at most so many bits have their pictures compared; with more than `MANY` images, fewer bits."""
SAME_PICTURE = 0.87
"""Correlation from which two small pictures are one.

Measured on 600 chance pairs each: at most .54 on Kvasir-SEG, .84 on phantoms; on all 4005 pairs of 90 X-rays .81, one
true copy (.94) apart. Of copies cropped by up to 4 % a side and saved as JPEG of quality 60, 95 % are above .87
(Kvasir-SEG), .89 (polyp phantom) and .92 (X-ray phantom)."""
DETAIL = 3.0
"""Blur (sigma in pixels of the small picture) that is subtracted: what all X-rays share does not count."""
BLANK = 0.5
"""Small pictures whose grey values vary less show nothing."""
CROP_STEP, CROP_STEPS = 2, 4
"""Small pictures are compared with crops of one another, down to SMALL - 2 * 4 pixels a side."""
INVERTED = 0.8
"""Share of the masks that must cover both most of the image and most of its rim to be called inverted."""


@dataclass(frozen=True)
class MaskLook:
    """One mask, counted."""

    shape: tuple[int, ...]
    pixels: dict[int, int]
    """Number of pixels by class id."""
    rim_share: float
    """Share of the outermost pixels that are foreground."""

    @property
    def foreground_share(self) -> float:
        """Share of the pixels that are neither background nor ignored."""
        return sum(n for value, n in self.pixels.items() if value not in (0, IGNORE_INDEX)) / sum(self.pixels.values())


@dataclass(frozen=True)
class Look:
    """One sample, counted; small enough to be kept for every sample of a large set (about 2 kB)."""

    sample_id: str
    shape: tuple[int, int]
    low: int
    high: int
    mean: float
    digest: bytes
    """Hash of shape and pixels: the same for the same picture under another name or in another file format."""
    image_hash: int
    small: NDArray[np.uint8]
    """(SMALL, SMALL) grey."""
    mask: MaskLook | None
    """None where there is no mask, or none that can be read."""


@dataclass(frozen=True)
class Twins:
    """Two images that show the same."""

    first: str
    second: str
    bits: int
    """Of 64, in which their hashes differ."""
    correlation: float
    exact: bool
    """Whether every pixel is the same."""

    @property
    def same_picture(self) -> bool:
        """Whether the pictures agree, too, and not the hashes alone."""
        return self.exact or self.correlation >= SAME_PICTURE

    def __str__(self) -> str:
        return f"{self.first} = {self.second}"


def look(sample_id: str, image: NDArray[np.uint8], mask: NDArray[np.uint8] | None) -> Look:
    """Count one sample.

    Args:
        sample_id: its id.
        image: (H, W, 3) RGB, [0, 255].
        mask: class ids, of whatever shape it came in.
    """
    digest = hashlib.blake2b(repr(image.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(image))
    height, width = image.shape[:2]
    return Look(
        sample_id=sample_id,
        shape=(height, width),
        low=int(image.min()),
        high=int(image.max()),
        mean=float(image.mean()),
        digest=digest.digest(),
        image_hash=perceptual_hash(image),
        small=small_grey(image),
        mask=None if mask is None else look_at_mask(mask),
    )


def look_at_mask(mask: NDArray[np.uint8]) -> MaskLook:
    """Count the pixels of one mask of class ids, of whatever shape."""
    values, counts = np.unique(mask, return_counts=True)
    rim = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
    return MaskLook(
        shape=mask.shape,
        pixels={int(v): int(n) for v, n in zip(values, counts, strict=True)},
        rim_share=float(((rim != 0) & (rim != IGNORE_INDEX)).mean()),
    )


def examine_masks(looks: Sequence[Look], refs: Mapping[str, SampleRef], num_classes: int) -> list[Finding]:
    """Sizes, values, emptiness, convention and image-level labels of the masks that could be read."""
    seen = [(item, item.mask) for item in looks if item.mask is not None]
    sizes = [item.sample_id for item, mask in seen if mask.shape != item.shape]
    allowed = {*range(num_classes), IGNORE_INDEX}
    foreign = {v for _, mask in seen for v in mask.pixels} - allowed
    strange = [item.sample_id for item, mask in seen if mask.pixels.keys() - allowed]
    filled = [(item, mask) for item, mask in seen if mask.foreground_share > 0]
    inverted = [item.sample_id for item, mask in filled if mask.foreground_share > 0.5 and mask.rim_share > 0.5]
    constant = [item.sample_id for item in looks if item.low == item.high]
    free = [item.sample_id for item, _ in filled if refs[item.sample_id].image_label == 0]
    missing = [i.sample_id for i, m in seen if refs[i.sample_id].image_label == 1 and m.foreground_share == 0]
    found = [
        _fault("mask_size", sizes, f"{count(sizes, 'mask')} of another size than the image"),
        _fault(
            "mask_values", strange, f"{count(strange, 'mask')} with values that are no class: {sorted(foreign)[:10]}"
        ),
        _note("constant_image", constant, f"{count(constant, 'image')} of one single value"),
        _note("label_0_with_mask", free, f"{count(free, 'sample')} labeled lesion-free with a mask that is not empty"),
        _note("label_1_empty_mask", missing, f"{count(missing, 'sample')} labeled 1 with an empty mask"),
    ]
    if seen and not filled:
        found.append(_fault("masks_empty", [i.sample_id for i, _ in seen], f"all {len(seen)} masks are empty"))
    if filled and len(inverted) >= INVERTED * len(filled):
        text = (
            f"{len(inverted)} of {len(filled)} masks cover most of the image and of its rim: foreground and background "
            "look swapped; store the foreground as the class, the background as 0"
        )
        found.append(_fault("masks_inverted", inverted, text))
    return [finding for finding in found if finding.samples]


def examine_groups(refs: Iterable[SampleRef], sides: Mapping[str, str], *, allow_leaks: bool) -> list[Finding]:
    """Groups with samples on two sides of the data set's own split."""
    found: dict[str, set[str]] = defaultdict(set)
    for ref in refs:
        if ref.sample_id in sides:
            found[ref.group_id].add(sides[ref.sample_id])
    torn = sorted(group for group, names in found.items() if len(names) > 1)
    text = f"{count(torn, 'group')} (patient, volume, copies of one picture) on two sides of the split"
    return [_finding("group_on_two_sides", _leak(allow_leaks), torn, text)] if torn else []


def find_twins(looks: Sequence[Look], groups: Mapping[str, str], distance: int) -> tuple[list[Twins], int]:
    """Images that show the same: equal pixels, or near hashes of samples of different groups.

    Every image of equal pixels is paired with the first of them. Beyond that, all pairs within `distance` bits are
    returned, and of those within `REACH` bits the ones whose small pictures correlate after the best shift and crop.

    Args:
        looks: of all samples.
        groups: the index's group id by sample id; alike images of one group are what a group is for.
        distance: data.duplicate_distance; below 0 only equal pixels are looked for.

    Returns:
        The pairs, and how many bits were searched whole: fewer than asked for where `MAX_PAIRS` cut the search short,
        -1 where only equal pixels were looked for.
    """
    first: dict[bytes, Look] = {}
    exact = [
        Twins(first[item.digest].sample_id, item.sample_id, 0, 1.0, exact=True)
        for item in looks
        if first.setdefault(item.digest, item) is not item
    ]
    if distance < 0:
        return exact, -1
    unique = list(first.values())
    near = []
    details: dict[int, NDArray[np.float32]] = {}
    reach = max(distance, REACH if len(unique) <= MANY else REACH_OF_MANY)
    candidates = _candidates(unique, groups, reach)
    for bits, i, j in candidates:
        for k in (i, j):
            if k not in details:
                details[k] = _detail(unique[k].small)
        twins = Twins(unique[i].sample_id, unique[j].sample_id, bits, correlation(details[i], details[j]), exact=False)
        if bits <= distance or twins.same_picture:
            near.append(twins)
    return exact + near, reach if len(candidates) < MAX_PAIRS else candidates[-1][0] - 1


def _candidates(looks: Sequence[Look], groups: Mapping[str, str], reach: int) -> list[tuple[int, int, int]]:
    """(bits, i, j), at most `MAX_PAIRS`, nearest first."""
    words = np.array([item.image_hash for item in looks], dtype=np.uint64)
    group = np.unique([groups[item.sample_id] for item in looks], return_inverse=True)[1]
    kept = np.zeros((0, 3), np.int64)
    for rows, cols in near_pairs(words, reach) if len(looks) > 1 else ():
        other = group[rows] != group[cols]
        rows, cols = rows[other], cols[other]
        bits = np.unpackbits((words[rows] ^ words[cols]).view(np.uint8).reshape(-1, 8), axis=1).sum(axis=1)
        kept = np.concatenate([kept, np.stack([bits, rows, cols], axis=1)])
        kept = kept[np.argsort(kept[:, 0], kind="stable")[:MAX_PAIRS]]
    return [(int(bits), int(i), int(j)) for bits, i, j in kept]


def _detail(small: NDArray[np.uint8]) -> NDArray[np.float32]:
    grey = small.astype(np.float32)
    return grey - cv2.GaussianBlur(grey, (0, 0), DETAIL)


def correlation(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """Highest normalised correlation of one small picture with a crop of the other, either way round; 0 for a blank."""
    if min(float(a.std()), float(b.std())) < BLANK:
        return 0.0  # where cv2 says 1
    return max(_correlation_with_crop(a, b), _correlation_with_crop(b, a))


def _correlation_with_crop(whole: NDArray[np.float32], crop: NDArray[np.float32]) -> float:
    sides = [SMALL - CROP_STEP * n for n in range(CROP_STEPS + 1)]
    best = 0.0
    for width in sides:
        for height in sides:
            if abs(width - height) > CROP_STEP:
                continue
            same = width == height == SMALL
            # Not cropped, but shifted: the middle, moved about.
            part = crop[2:-2, 2:-2] if same else cv2.resize(crop, (width, height), interpolation=cv2.INTER_AREA)
            found = cv2.matchTemplate(whole, np.ascontiguousarray(part), cv2.TM_CCOEFF_NORMED)
            best = max(best, float(np.nan_to_num(found, nan=0.0, posinf=0.0).max()))
    return best


def examine_twins(twins: Sequence[Twins], sides: Mapping[str, str], *, allow_leaks: bool) -> list[Finding]:
    """Copies across train, val and test, and within one of them.

    Args:
        twins: as `find_twins` returns them.
        sides: train, val or test by sample id; a sample in none of them leaks nothing.
        allow_leaks: data.allow_leaks.
    """

    def across(pair: Twins) -> bool:
        a, b = sides.get(pair.first), sides.get(pair.second)
        return a is not None and b is not None and a != b

    found = []
    for code, kind, pairs in (
        ("exact", "the same pixels", [t for t in twins if t.exact]),
        (
            "near",
            "nearly the same picture (cropped, recompressed)",
            [t for t in twins if t.same_picture and not t.exact],
        ),
    ):
        leaks = [str(t) for t in pairs if across(t)]
        within = [str(t) for t in pairs if not across(t)]
        between = Counter(" and ".join(sorted((sides[t.first], sides[t.second]))) for t in pairs if across(t))
        where = ", ".join(f"{n} between {names}" for names, n in sorted(between.items()))
        text = f"{count(leaks, 'pair')} of images with {kind} on two sides of the split: {where}"
        found.append(_finding(f"{code}_duplicates_across", _leak(allow_leaks), leaks, text))
        text = f"{count(within, 'pair')} of images with {kind} on one side of the split"
        found.append(_note(f"{code}_duplicates_within", within, text))
    alike = [str(t) for t in twins if not t.same_picture]
    text = f"{count(alike, 'pair')} within data.duplicate_distance, so one group, but the pictures differ; lower it?"
    found.append(_note("hash_alike", alike, text))
    return [finding for finding in found if finding.samples]


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

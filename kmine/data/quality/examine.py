"""Checks of a data set: statistics of its samples -> findings."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from kmine.config import DataConfig
from kmine.data.quality.image_stats import FLAT, ImageStats, MaskStats
from kmine.data.quality.near_duplicates import DuplicatePair
from kmine.data.source import Source
from kmine.ops.statistics import smallest_shown
from kmine.types import IGNORE_INDEX, Finding, SampleRef, Severity

MAX_NAMED = 20
"""Limit for the samples, or pairs of samples, named in one finding."""
INVERTED = 0.8
"""Share of possibly inverted masks from which all are called inverted."""
RIM = 0.95
"""Share of the rim from which a single mask with a hole is called inverted."""
IMAGE_AS_MASK = 0.98
"""Dice with the bright pixels of the image from which a mask is the image itself."""
FEW = 10
"""Groups of validation or test below which a difference is hardly ever shown; own choice."""
MIN_SHAPE = 16
"""Pixels of foreground, and of background, from which equal masks are not a coincidence."""


def check_masks(stats: Sequence[ImageStats], refs: Mapping[str, SampleRef], num_classes: int) -> list[Finding]:
    """Check sizes, values, emptiness, convention and image-level labels of the readable masks."""
    with_mask = [(item, item.mask) for item in stats if item.mask is not None]
    sizes = [item.sample_id for item, mask in with_mask if mask.shape != item.shape]
    allowed = {*range(num_classes), IGNORE_INDEX}
    foreign = {v for _, mask in with_mask for v in mask.pixels} - allowed
    invalid = [item.sample_id for item, mask in with_mask if mask.pixels.keys() - allowed]
    filled = [(item, mask) for item, mask in with_mask if mask.num_foreground]
    flat = [item.sample_id for item in stats if item.contrast < FLAT]
    blind = [item.sample_id for item, _ in filled if item.contrast < FLAT]
    images = [item.sample_id for item, mask in filled if item.contrast >= FLAT and mask.like_image >= IMAGE_AS_MASK]
    # With several classes the label refers to one of them only: in LiTS, not to the liver.
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
        *(_check_ignored(with_mask) if num_classes > 2 else ()),
    ]
    if with_mask and not filled:
        empty = [item.sample_id for item, _ in with_mask]
        findings.append(_fault("masks_empty", empty, f"all {len(with_mask)} masks are empty"))
    return [finding for finding in findings if finding.samples]


def _check_ignored(masks: Sequence[tuple[ImageStats, MaskStats]]) -> list[Finding]:
    """Find masks of black and white where the values are class ids; a fault if 255 occurs in such masks only."""
    ignoring = [(item.sample_id, mask) for item, mask in masks if IGNORE_INDEX in mask.pixels]
    white = [sample_id for sample_id, mask in ignoring if mask.pixels.keys() == {0, IGNORE_INDEX}]
    kind = _fault if len(white) == len(ignoring) else _note
    text = f"{count(white, 'mask')} of 0 and {IGNORE_INDEX}, which is ignored where there are more than two classes"
    return [kind("masks_ignored", white, f"{text}; store class ids, or name two classes in data.class_names")]


def _check_convention(filled: Sequence[tuple[ImageStats, MaskStats]]) -> list[Finding]:
    """Find swapped foreground and background, in all masks or in some."""
    inverted = [item.sample_id for item, mask in filled if mask.maybe_inverted]
    if len(inverted) >= INVERTED * len(filled):
        text = (
            f"{len(inverted)} of {len(filled)} masks cover most of the image and of its rim: foreground and background "
            "look swapped; store the foreground as the class, the background as 0"
        )
        return [_fault("masks_inverted", inverted, text)]
    certain = [i.sample_id for i, m in filled if m.maybe_inverted and m.rim_share >= RIM and m.foreground_share < 1]
    unsure = [sample_id for sample_id in inverted if sample_id not in set(certain)]
    few = "unlike the others, on most of the image and"
    return [
        _fault("mask_inverted", certain, f"{count(certain, 'mask')}, {few} all of its rim, around a hole: inverted?"),
        _note("mask_at_rim", unsure, f"{count(unsure, 'mask')}, {few} of its rim: inverted, or a close view?"),
    ]


def check_classes(stats: Sequence[ImageStats], class_names: Sequence[str]) -> list[Finding]:
    """Find classes without a pixel in any mask; for more than one foreground class."""
    present = {value for item in stats if item.mask is not None for value in item.mask.pixels}
    absent = [f"{n} {name}" for n, name in enumerate(class_names) if n and n not in present]
    if len(class_names) < 3 or not present - {0, IGNORE_INDEX} or not absent:
        return []
    text = f"no mask shows the class {' or '.join(absent)}; mend the masks, or remove the class from data.class_names"
    return [_fault("class_absent", absent, text)]


def check_palettes(source: Source) -> list[Finding]:
    """Say how masks whose colour palette differs from that of the others are read."""
    palettes = getattr(source, "palettes", None)
    text = palettes.note(source.class_names) if palettes and len(source.class_names) > 2 else ""
    return [_note("palettes_differ", [path.name for path in palettes.differing], text)] if text else []


def check_identical_masks(
    stats: Sequence[ImageStats], groups: Mapping[str, str], duplicates: Sequence[DuplicatePair]
) -> list[Finding]:
    """Find equal masks of images of several groups that are no copies of one another."""
    by_fingerprint: dict[bytes, list[ImageStats]] = defaultdict(list)
    for item in stats:
        if item.mask is not None and MIN_SHAPE <= item.mask.num_foreground <= np.prod(item.mask.shape) - MIN_SHAPE:
            by_fingerprint[item.mask.fingerprint].append(item)
    same_pictures = {frozenset((t.first, t.second)) for t in duplicates if t.same_picture}
    shared: list[list[str]] = []
    for items in by_fingerprint.values():
        distinct: list[ImageStats] = []
        seen_keys: set[object] = set()  # one image per group and per content is enough
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


def check_numbers(cfg: DataConfig, refs: Collection[SampleRef], sides: Mapping[str, str]) -> list[Finding]:
    """Say where validation or test are too few to show anything, and what would help; data.folds tests on all.

    Few are fewer than `FEW` groups with a mask; an absent test split is a decision of the user.
    """
    groups: dict[str, set[str]] = defaultdict(set)
    num_images = 0
    for ref in refs:
        if ref.has_mask and (side := sides.get(ref.sample_id)):
            groups[side].add(ref.group_id)
            num_images += 1
    val, test, masked = len(groups["val"]), len(groups["test"]), sum(map(len, groups.values()))
    unit = "images" if masked == num_images else "groups"
    place, few = f"{val} validation and {test} test {unit}", [count for count in (val, test) if 0 < count < FEW]
    if cfg.folds:
        place, few = f"{masked} {unit} with masks", [masked] * (masked < FEW and cfg.fold in (None, cfg.folds))
    if not few:
        return []
    gain = smallest_shown(min(few))
    lacking = f"a gain below about {gain:.2f} cannot" if gain < 0.5 else "no gain can"
    if cfg.split_file or all(ref.split for ref in refs):
        cure = "put more into them"
    elif masked < FEW:
        cure = f"label {FEW - masked} more" + ("" if cfg.folds else ", then pass --data.folds 5 to kmine loop")
    else:
        cure = f"--data.folds 5 of kmine loop tests on all {masked} (from about {smallest_shown(masked):.2f} on)"
    return [Finding("few_cases", "note", f"{place}: {lacking} be told from noise; {cure}")]


def check_groups(refs: Iterable[SampleRef], sides: Mapping[str, str], *, allow_leaks: bool) -> list[Finding]:
    """Find groups with samples on two sides of the split."""
    sides_of_group: dict[str, set[str]] = defaultdict(set)
    for ref in refs:
        if ref.sample_id in sides:
            sides_of_group[ref.group_id].add(sides[ref.sample_id])
    straddling = sorted(group for group, names in sides_of_group.items() if len(names) > 1)
    text = f"{count(straddling, 'group')} (patient, volume, copies of one picture) on two sides of the split"
    return [_finding("group_on_two_sides", _leak(allow_leaks), straddling, text)] if straddling else []


def check_duplicates(
    duplicates: Sequence[DuplicatePair], sides: Mapping[str, str], *, allow_leaks: bool
) -> list[Finding]:
    """Report copies across train, val and test, and within one of them.

    Samples that `sides` (train, val or test by sample id) lacks cannot leak. `allow_leaks` is data.allow_leaks.
    """

    def across(pair: DuplicatePair) -> bool:
        a, b = sides.get(pair.first), sides.get(pair.second)
        return a is not None and b is not None and a != b

    findings = []
    exact = _reanchored(sides, [t for t in duplicates if t.exact])
    near = [t for t in duplicates if t.same_picture and not t.exact]
    kinds = (("exact", "the same pixels", exact), ("near", "nearly the same content (cropped, recompressed)", near))
    for code, kind, pairs in kinds:
        leaks = [str(t) for t in pairs if across(t)]
        within = [str(t) for t in pairs if not across(t)]
        between = Counter(" and ".join(sorted((sides[t.first], sides[t.second]))) for t in pairs if across(t))
        where = ", ".join(f"{n} between {names}" for names, n in sorted(between.items()))
        text = f"{count(leaks, 'pair')} of images with {kind} on two sides of the split: {where}"
        findings.append(_finding(f"{code}_duplicates_across", _leak(allow_leaks), leaks, text))
        text = f"{count(within, 'pair')} of images with {kind} on one side of the split"
        findings.append(_note(f"{code}_duplicates_within", within, text))
    hash_alike = [str(t) for t in duplicates if not t.same_picture]
    text = f"{count(hash_alike, 'pair')} within data.duplicate_distance, so one group, but the images differ; lower it?"
    findings.append(_note("hash_alike", hash_alike, text))
    return [finding for finding in findings if finding.samples]


def _reanchored(sides: Mapping[str, str], exact: Sequence[DuplicatePair]) -> list[DuplicatePair]:
    """Pair equal images with the first of them that is in the split, so that no leak is hidden by one that is not."""
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


def count(items: Sequence[object], word: str) -> str:
    """`3 masks`, `1 mask`."""
    return f"{len(items)} {word}{'' if len(items) == 1 else 's'}"


def _leak(allowed: bool) -> Severity:
    return "note" if allowed else "fault"


def _fault(code: str, samples: Sequence[str], text: str) -> Finding:
    return _finding(code, "fault", samples, text)


def _note(code: str, samples: Sequence[str], text: str) -> Finding:
    return _finding(code, "note", samples, text)


def _finding(code: str, severity: Severity, samples: Sequence[str], text: str) -> Finding:
    return Finding(code, severity, text, tuple(samples[:MAX_NAMED]))

"""Checks of the data before training, on what is decoded anyway.

Covers index, splits and hashes of all images, and labeled and validation masks at the size of training. `kmine.check`
opens every file and finds more.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from kmine.config import DataConfig
from kmine.data.cache.sample_cache import SampleCache
from kmine.data.pool import Pool
from kmine.data.quality.examine import (
    MAX_NAMED,
    check_duplicates,
    check_groups,
    check_masks,
    check_numbers,
    check_palettes,
    count,
)
from kmine.data.quality.image_stats import ImageStats, compute_mask_stats, compute_stats
from kmine.data.quality.mask_alignment import MIN_PAIRS, check_alignment, edges, measure_alignment, outline
from kmine.data.quality.near_duplicates import find_duplicates
from kmine.data.split_file import GivenSplit
from kmine.data.splits import Splits
from kmine.errors import UserError
from kmine.store.run_folder import RunFolder
from kmine.types import Finding, ProgressReporter, SampleRef

MAX_ALIGNED = 120
"""Images whose masks are compared with all their images: the time grows with the square."""
ENOUGH_PAIRS, SURE_Z = 100, 1.0
"""Misaligned masks stop a run only with at least this number of pairs, and below this z.

Measured at 96 pixels, 30 draws each. The lowest z of 100 true pairs was 2.6 for LiTS tumours (median 3.5), and 6.4 to
20 for phantoms, polyps, lungs and livers; of 50 true pairs of LiTS tumours it was 0.5 (median 2.1). For shuffled masks
z is about standard normal: at most 2.9 in 990 draws."""
LEAKS = ("group_on_two_sides", "exact_duplicates_across")
IGNORED_WHEN_RESIZED = ("label_1_empty_mask",)
"""Findings that do not apply to shrunk masks, where a small lesion may be lost."""


def check_before_training(
    cfg: DataConfig, store: RunFolder, progress: ProgressReporter, signature: str, examine: Callable[[], list[Finding]]
) -> None:
    """Examine the data, log every finding and record all in run.json under `check`.

    Skipped if a check of the same `signature` (of data and splits) has passed. `examine` returns the findings.

    Raises:
        UserError: the first fault with its cure, unless `data.on_fault` is "say".
    """
    previous = store.run().get("check") or {}
    if previous.get("passed") and previous.get("made_from") == signature:
        return
    findings = sorted(examine(), key=lambda finding: finding.severity)
    faults = [finding for finding in findings if finding.severity == "fault"]
    stops = bool(faults) and cfg.on_fault == "stop"
    store.update_run(check={"made_from": signature, "passed": not stops, "findings": [asdict(f) for f in findings]})
    for finding in findings[1:] if stops else findings:
        progress.log(f"check: {finding.severity}: {finding}")
    if stops:
        raise UserError(_refusal(faults))


def _refusal(faults: Sequence[Finding]) -> str:
    more = f" (and {count(faults[1:], 'fault')} more, see `check` in run.json)" if len(faults) > 1 else ""
    going_on = (
        "mend the split, or pass --data.allow_leaks true to go on with such leaks"
        if faults[0].code in LEAKS
        else "mend them, or if they are right pass --data.on_fault say"
    )
    return f"{faults[0]}{more}; look the data over with kmine.check and the same settings, {going_on}"


def find_issues(
    cfg: DataConfig, cache: SampleCache, splits: Splits, given_split: GivenSplit | None, labeled: Pool, val: Pool
) -> list[Finding]:
    """All findings, unordered. Masks are read through the two pools; no further file is decoded.

    `given_split` is the split of data.split_file.
    """
    names = {sample_id: name for sample_id, _, name in splits.rows()}
    sides = {sample_id: name if name in ("val", "test") else "train" for sample_id, name in names.items()}
    return [
        *_check_left_out(cache.refs, sides, given_split),
        *check_numbers(cfg, cache.refs, sides),
        *check_groups(cache.refs, sides, allow_leaks=cfg.allow_leaks),
        *_check_copies(cache, sides, allow_leaks=cfg.allow_leaks),
        *check_palettes(cache.source),
        *_check_masks(cache, labeled, val, len(cache.source.class_names)),
    ]


def _check_left_out(
    refs: Sequence[SampleRef], sides: Mapping[str, str], given_split: GivenSplit | None
) -> Iterator[Finding]:
    """Readable images outside all splits, by reason."""
    requested_sides = given_split.sides if given_split else {ref.sample_id: ref.split or "" for ref in refs}
    out: dict[str, list[str]] = defaultdict(list)
    for ref in refs:
        if ref.sample_id not in sides:
            maskless = requested_sides.get(ref.sample_id) in ("val", "test") and not ref.has_mask
            kind = "unlisted" if ref.sample_id not in requested_sides else "maskless" if maskless else "straddling"
            out[kind].append(ref.sample_id)
    reasons = {
        "unlisted": "that data.split_file does not name",
        "maskless": "of the validation or test split without a mask",
        "straddling": "whose group (patient, volume, copies of one picture) is also in test, or in validation",
    }
    for kind, ids in out.items():
        text = f"{count(ids, 'image')} {reasons[kind]}: left out of every split"
        yield Finding(f"left_out_{kind}", "note", text, tuple(ids[:MAX_NAMED]))


def _check_copies(cache: SampleCache, sides: Mapping[str, str], *, allow_leaks: bool) -> list[Finding]:
    """Equal images on two sides of the split; only images with equal hash and size are read."""
    alike: dict[tuple[int, int, int], list[str]] = defaultdict(list)
    for sample_id, image_hash in cache.hashes.items():
        if sample_id in sides:
            alike[(image_hash, *cache.native_shape(sample_id))].append(sample_id)
    across = [ids for ids in alike.values() if len({sides[sample_id] for sample_id in ids}) > 1]
    stats = [compute_stats(sample_id, cache.image_resized(sample_id), None) for ids in across for sample_id in ids]
    duplicates, _ = find_duplicates(stats, {}, -1)
    return check_duplicates(duplicates, sides, allow_leaks=allow_leaks)


def _check_masks(cache: SampleCache, labeled: Pool, val: Pool, num_classes: int) -> Iterator[Finding]:
    """Findings on labeled and validation masks: empty, inverted, foreign values, absent classes, alignment."""
    pool_of = {sample_id: pool for pool in (labeled, val) for sample_id in pool.ids}
    stats = [_mask_stats(sample_id, pool_of[sample_id]) for sample_id in sorted(pool_of)]
    refs = {sample_id: cache.ref(sample_id) for sample_id in pool_of}
    findings = [f for f in check_masks(stats, refs, num_classes) if f.code not in IGNORED_WHEN_RESIZED]
    if all(finding.code != "masks_empty" for finding in findings):
        labeled_stats = [item for item in stats if pool_of[item.sample_id] is labeled]
        empty = [f for f in check_masks(labeled_stats, refs, num_classes) if f.code == "masks_empty"]
        yield from (replace(finding, text=f"of the labeled images {finding.text}") for finding in empty)
    yield from _check_absent_classes(stats, {i for i, pool in pool_of.items() if pool is labeled}, num_classes)
    yield from (replace(f, text=f"of the labeled and validation images {f.text}") for f in findings)
    filled = [item.sample_id for item in stats if item.mask and 0 < item.mask.foreground_share < 1]
    yield from _check_pairing({sample_id: pool_of[sample_id] for sample_id in filled})


def _check_absent_classes(stats: Sequence[ImageStats], labeled: Collection[str], num_classes: int) -> Iterator[Finding]:
    """Classes that no labeled mask shows at the size of training, although another class is shown.

    A note, as a rare class can be absent from a small draw. The model cannot learn such a class.
    """
    shown = {n for item in stats if item.mask and item.sample_id in labeled for n in item.mask.pixels}
    absent = [str(n) for n in range(1, num_classes) if n not in shown]
    if absent and len(absent) < num_classes - 1:
        text = f"no labeled image shows class {' or '.join(absent)}: nothing teaches it; label some, or do not name it"
        yield Finding("class_unlabeled", "note", text)


def _mask_stats(sample_id: str, pool: Pool) -> ImageStats:
    """Statistics of a mask; the image is not read."""
    mask = pool.mask_resized(sample_id)
    height, width = mask.shape
    rest: dict[str, Any] = {"low": 0, "high": 255, "mean": 0.0, "contrast": np.inf, "fingerprint": b"", "image_hash": 0}
    no_view = np.zeros((0, 0), np.uint8)
    return ImageStats(sample_id, (height, width), **rest, small=no_view, whole=no_view, mask=compute_mask_stats(mask))


def _check_pairing(pool_of: Mapping[str, Pool]) -> Iterator[Finding]:
    """Whether masks are aligned with their images; a fault only with enough pairs and a low z."""
    ids = list(pool_of)
    sampled = [ids[n * len(ids) // MAX_ALIGNED] for n in range(MAX_ALIGNED)] if len(ids) > MAX_ALIGNED else ids
    images = [edges(pool_of[sample_id].image_resized(sample_id)) for sample_id in sampled]
    outlines = [outline(pool_of[sample_id].mask_resized(sample_id)) for sample_id in sampled]
    # These images are not neighbours in their folder, so a shift by position has no meaning.
    alignment = replace(measure_alignment(images, outlines), better_shift=0)
    if alignment.num_pairs < MIN_PAIRS:
        return
    (finding,) = check_alignment(alignment)
    is_certain = alignment.num_pairs >= ENOUGH_PAIRS and alignment.z < SURE_Z
    if finding.severity == "fault" and not is_certain:
        more = "perhaps by chance: kmine.check looks at more of them"
        finding = Finding("pairing_unsure", "note", f"{finding.text}; {more}")
    yield finding

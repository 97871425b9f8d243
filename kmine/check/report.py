"""Output of kmine.check: check.json as plain values, the contact sheet, and the text for the terminal."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import asdict
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from kmine import cli
from kmine.check.findings import DataCheck, DatasetScan
from kmine.config import DataConfig
from kmine.data.quality.image_stats import ImageStats
from kmine.data.source import Source
from kmine.data.split_file import SIDES
from kmine.ops.seeding import derive_seed
from kmine.report.sheet import Tile, contact_sheet
from kmine.types import IGNORE_INDEX, Finding, SampleRef

NUM_TILES = 24


def report_values(data: DataConfig, source: Source, checked: DataCheck) -> dict[str, Any]:
    """Content of check.json."""
    scan, sides, duplicates = checked.scan, checked.sides, checked.duplicates
    stats, refs = scan.stats, scan.refs
    masks = [item.mask for item in stats if item.mask is not None]
    groups = Counter(refs[item.sample_id].group_id for item in stats)
    images_with = Counter(value for mask in masks for value in mask.pixels)
    pixels = {value: sum(mask.pixels.get(value, 0) for mask in masks) for value in sorted(images_with)}
    own = {ref.split in SIDES for ref in refs.values()} == {True}
    drawn = "the data set's own" if own else "as kmine.loop draws them"
    shares = sorted(mask.foreground_share for mask in masks if mask.foreground_share)
    return {
        "dataset": source.name,
        "fingerprint": source.fingerprint(),
        "data": cli.to_dict(data),
        "num_samples": len(refs),
        "num_pairs": len(masks),
        "splits": drawn if data.split_file is None else f"of {data.split_file}",
        "counts": _counts(scan, sides),
        "images": {
            "sizes": dict(Counter(f"{item.shape[1]} x {item.shape[0]}" for item in stats).most_common(5)),
            "num_sizes": len({item.shape for item in stats}),
            "shortest_side": min((min(item.shape) for item in stats), default=None),
            "longest_side": max((max(item.shape) for item in stats), default=None),
            "lowest_value": min((item.low for item in stats), default=None),
            "highest_value": max((item.high for item in stats), default=None),
            "mean_value": sum(item.mean for item in stats) / len(stats) if stats else None,
        },
        "masks": {
            "values": {str(value): {"masks": images_with[value], "pixels": n} for value, n in pixels.items()},
            "class_names": list(source.class_names),
            "num_empty": sum(mask.foreground_share == 0 for mask in masks),
            "median_share_of_filled": shares[len(shares) // 2] if shares else None,
        },
        "groups": {"count": len(groups), "largest": max(groups.values(), default=0)},
        "duplicates": {
            "exact": [str(t) for t in duplicates if t.exact],
            "near": [asdict(t) for t in duplicates if t.same_picture and not t.exact],
            "hash_alone": [asdict(t) for t in duplicates if not t.same_picture],
        },
        "pairing": asdict(checked.alignment),
        "damaged": [asdict(s) for s in scan.damaged],
        "left_out": [asdict(s) for s in source.skipped],
        "findings": [asdict(f) for f in sorted(checked.findings, key=lambda f: f.severity)],
    }


def _counts(scan: DatasetScan, sides: Mapping[str, str]) -> dict[str, dict[str, int]]:
    """By split, the number of samples: in all, with a mask, of each class, of each image-level label."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for item in scan.stats:
        ref = scan.refs[item.sample_id]
        row = counts[sides.get(item.sample_id, "left out")]
        row["samples"] += 1
        row["with a mask" if ref.has_mask else "without a mask"] += 1
        if item.mask is not None:
            row["empty mask"] += item.mask.foreground_share == 0
            row.update(f"class {value}" for value in item.mask.pixels if value not in (0, IGNORE_INDEX))
        row[f"image label {ref.image_label}" if ref.image_label is not None else "no image label"] += 1
    first = ("samples", "with a mask", "without a mask", "empty mask")
    return {
        side: {k: counts[side][k] for k in dict.fromkeys((*first, *sorted(counts[side]))) if counts[side][k]}
        for side in (*SIDES, "left out")
        if side in counts
    }


def stratum_of(item: ImageStats, ref: SampleRef, sides: Mapping[str, str]) -> tuple[str, str]:
    """Split, and content of the mask with the image-level label."""
    label = "" if ref.image_label is None else f", label {ref.image_label}"
    if item.mask is None:
        state = "mask unreadable" if ref.has_mask else "no mask"
    else:
        classes = sorted(value for value in item.mask.pixels if value not in (0, IGNORE_INDEX))
        state = f"class {'+'.join(map(str, classes))}" if classes else "empty mask"
    return sides.get(item.sample_id, "left out"), state + label


def contact_sheet_png(source: Source, checked: DataCheck) -> bytes:
    """PNG of `NUM_TILES` samples, taken in turn from every split, label state and class."""
    scan = checked.scan
    strata: dict[tuple[str, str], list[str]] = defaultdict(list)
    for item in sorted(scan.stats, key=lambda item: derive_seed("contact sheet", item.sample_id)):
        strata[stratum_of(item, scan.refs[item.sample_id], checked.sides)].append(item.sample_id)
    readable = {item.sample_id for item in scan.stats if item.mask is not None}
    in_turn = chain.from_iterable(zip_longest(*(strata[key] for key in sorted(strata))))
    captions = {sample_id: ", ".join(key) for key, ids in strata.items() for sample_id in ids}
    sampled = [sample_id for sample_id in in_turn if sample_id is not None][:NUM_TILES]
    sampled.sort(key=lambda sample_id: (captions[sample_id], sample_id))
    tiles = [Tile(source.image(i), source.mask(i) if i in readable else None, i, captions[i]) for i in sampled]
    return contact_sheet(tiles)


def render_text(report: Mapping[str, Any], folder: Path) -> str:
    """The report as text for the terminal."""
    images, masks, groups, duplicates = (report[key] for key in ("images", "masks", "groups", "duplicates"))
    sizes = ", ".join(f"{size} ({n})" for size, n in images["sizes"].items())
    num_more = images["num_sizes"] - len(images["sizes"])
    more = f" and {num_more} more" if num_more else ""
    values = ", ".join(f"{value} in {n['masks']}" for value, n in masks["values"].items())
    share, objects = masks["median_share_of_filled"], ", ".join(masks["class_names"][1:])
    lines = [
        f"{report['dataset']}: {report['num_samples']} samples, {report['num_pairs']} pairs of image and readable "
        f"mask, {len(report['damaged'])} damaged, {len(report['left_out'])} files left out",
        f"splits ({report['splits']}):",
        *(f"  {side}: {', '.join(f'{n} {what}' for what, n in row.items())}" for side, row in report["counts"].items()),
        f"sizes (width x height): {sizes}{more}; values {images['lowest_value']} to {images['highest_value']}",
        f"mask values: {values or 'none'}; {masks['num_empty']} of {report['num_pairs']} empty"
        + ("" if share is None else f"; of the others {share:.1%} is {objects} (median)"),
        f"groups: {groups['count']}, the largest of {groups['largest']}; duplicates: {len(duplicates['exact'])} exact, "
        f"{len(duplicates['near'])} near, {len(duplicates['hash_alone'])} by hash only",
        *(f"{f['severity'].upper()} {f['code']}: {Finding(**f)}" for f in report["findings"]),
    ]
    faults = sum(finding["severity"] == "fault" for finding in report["findings"])
    result = f"{faults} fault{'' if faults == 1 else 's'}" if faults else "no fault"
    lines.append(f"{result}; written: {folder / 'check.json'}   {folder / 'check.png'}")
    return "\n".join(lines) + "\n"

"""`python -m kmine.check`: what would spoil a result in a data set, before anything is trained on it.

Opens every image and every mask, those of the test split too; nothing that is trained or chosen hears of it.
"""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kmine import cli
from kmine.config import DataConfig, LoopConfig
from kmine.data import open_source
from kmine.records import IGNORE_INDEX, Finding, SampleError, SampleRef, Skipped, UserError, derive_seed

if TYPE_CHECKING:
    from kmine.data.source import Source
    from kmine.data.splits import Splits
    from kmine.stages.examine import Look, Twins
    from kmine.stages.pairing import Pairing

DESCRIPTION = """Examine a data set: counts, sizes, masks, duplicates, leaks between splits, and whether masks belong to
their images. Writes check.json and check.png (samples with their masks) into the folder --out. Takes the settings of
kmine.loop; those of training are ignored. Exit code 1 where something would spoil a result."""

NUM_TILES = 24
NUM_PAIRED, RUN = 200, 20
"""Masked images whose pairing is tested, taken in runs of neighbours, so that masks off by one file are recognised."""
SIDES = ("train", "val", "test")
MAX_SHOWN = 3
"""Samples that the text names for each finding; check.json names more."""


@dataclass(frozen=True)
class Survey:
    """What one pass over a data set found."""

    refs: dict[str, SampleRef]
    looks: list[Look]
    damaged: list[Skipped]
    """Images and masks that cannot be read."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    prog = "kmine check"
    cfg = cli.parse(LoopConfig, sys.argv[1:] if argv is None else argv, prog=prog, description=DESCRIPTION)
    return cli.guarded(prog, lambda: check(cfg))


def check(cfg: LoopConfig) -> int:
    """Examine the data of `cfg`, print and write what was found; 1 if there is a fault."""
    source, refusals = _open(cfg.data)
    return check_source(cfg, source, refusals)


def check_source(cfg: LoopConfig, source: Source, refusals: Sequence[str] = ()) -> int:
    """The same for a source that is open; `refusals` are what it would have stopped with."""
    from kmine.stages.examine import examine_groups, examine_masks, examine_twins, find_twins
    from kmine.stages.pairing import examine_pairing

    terminal = cli.Terminal()
    try:
        survey = _survey(source, terminal)
        sides, split_problem = _sides(cfg, source, survey)
        groups = {sample_id: ref.group_id for sample_id, ref in survey.refs.items()}
        terminal.say("comparing images")
        twins, searched = find_twins(survey.looks, groups, cfg.data.duplicate_distance)
        pairing = _pairing(source, survey, terminal)
        allow = cfg.data.allow_leaks
        findings: list[Finding] = [
            *(Finding("refused", "fault", f"kmine.loop would stop: {text}") for text in refusals),
            *_damage(survey.damaged, cfg.data.on_error),
            *examine_masks(survey.looks, survey.refs, len(source.class_names)),
            *examine_groups(survey.refs.values(), sides, allow_leaks=allow),
            *examine_twins(twins, sides, allow_leaks=allow),
            *_cut_short(searched, cfg.data.duplicate_distance),
            *examine_pairing(pairing),
            *([Finding("splits", "fault", f"kmine.loop would stop: {split_problem}")] if split_problem else []),
            *_left_out(source.skipped),
        ]
        report = _report(cfg, source, survey, sides, twins, pairing, findings)
        _write(Path(cfg.out), report, _sheet(source, survey, sides))
    finally:
        terminal.stop()
    sys.stdout.write(text_of(report, Path(cfg.out)))
    return int(any(finding.severity == "fault" for finding in findings))


def _open(cfg: DataConfig) -> tuple[Source, list[str]]:
    """The source, damage listed and not stopped at, and what it stops at as the settings are."""
    try:
        return open_source(cfg), []
    except UserError as error:
        if cfg.on_error == "skip":
            raise
        return open_source(replace(cfg, on_error="skip")), [str(error)]


def _survey(source: Source, terminal: cli.Terminal) -> Survey:
    """Read every sample once, each thread one at a time; only counts are kept."""
    from kmine.data.cache_build import thread_pool
    from kmine.stages.examine import look

    refs = source.refs()

    def read(ref: SampleRef) -> tuple[Look | None, Skipped | None]:
        try:
            image = source.image(ref.sample_id)
        except SampleError as error:
            return None, Skipped(ref.sample_id, error.path, error.problem)
        try:
            mask = source.mask(ref.sample_id) if ref.has_mask else None
        except SampleError as error:
            return look(ref.sample_id, image, None), Skipped(ref.sample_id, error.path, error.problem)
        return look(ref.sample_id, image, mask), None

    looks, damaged = [], []
    terminal.start(f"{source.name}: reading", len(refs))
    with thread_pool() as threads:
        for done, (seen, skipped) in enumerate(threads.map(read, refs), start=1):
            looks += [seen] if seen else []
            damaged += [skipped] if skipped else []
            terminal.advance(done)
    terminal.stop()
    return Survey({ref.sample_id: ref for ref in refs}, looks, damaged)


def _sides(cfg: LoopConfig, source: Source, survey: Survey) -> tuple[dict[str, str], str]:
    """train, val or test by sample id, and why the loop could not draw its splits, if so.

    The split of data.split_file, or the data set's own where every sample has one; what that lacks, and else
    everything, as the loop draws it.
    """
    from kmine.data.split_file import read_split, settle_splits

    refs = [survey.refs[item.sample_id] for item in survey.looks]
    try:
        given = read_split(cfg.data.split_file, source)
    except UserError as error:
        return {}, str(error)
    own = given.sides if given else {ref.sample_id: ref.split for ref in refs if ref.split in SIDES}
    sides = own if given or len(own) == len(refs) else {}
    hashes = {item.sample_id: item.image_hash for item in survey.looks}
    try:
        drawn: Splits = settle_splits(cfg.data, cfg.seed, refs, hashes, given)
    except UserError as error:
        return sides, str(error)
    named = {sample_id: name for sample_id, _, name in drawn.rows()}
    return sides | {i: name if name in ("val", "test") else "train" for i, name in named.items()}, ""


def _pairing(source: Source, survey: Survey, terminal: cli.Terminal) -> Pairing:
    """Read some masked images again, and hold their masks against each other's images."""
    from kmine.data.cache_build import thread_pool
    from kmine.stages.pairing import edges, measure_pairing, outline

    def read(sample_id: str) -> tuple[Any, Any]:
        return edges(source.image(sample_id)), outline(source.mask(sample_id))

    filled = [item.sample_id for item in survey.looks if item.mask is not None and 0 < item.mask.foreground_share < 1]
    chosen = list(_runs(filled))
    terminal.start("masks against images", len(chosen))
    images, outlines = [], []
    with thread_pool() as threads:
        for done, (image, at) in enumerate(threads.map(read, chosen), start=1):
            images.append(image)
            outlines.append(at)
            terminal.advance(done)
    terminal.stop()
    return measure_pairing(images, outlines)


def _runs(ids: Sequence[str]) -> Iterator[str]:
    """`NUM_PAIRED` ids in evenly spaced runs of `RUN` neighbours; all where there are no more."""
    if len(ids) <= NUM_PAIRED:
        yield from ids
        return
    num_runs = NUM_PAIRED // RUN
    for n in range(num_runs):
        start = n * (len(ids) - RUN) // (num_runs - 1)
        yield from ids[start : start + RUN]


def _damage(damaged: Sequence[Skipped], on_error: str) -> list[Finding]:
    from kmine.stages.examine import MAX_NAMED, count

    if not damaged:
        return []
    text = f"{count(damaged, 'file')} damaged or unfit; the first: {damaged[0].path}: {damaged[0].problem}"
    names = tuple(skipped.sample_id for skipped in damaged[:MAX_NAMED])
    return [Finding("damaged", "note" if on_error == "skip" else "fault", text, names)]


def _cut_short(searched: int, distance: int) -> list[Finding]:
    """Say so where near copies were not looked for, or not as far as `REACH_OF_MANY` bits."""
    from kmine.stages.examine import MAX_PAIRS, REACH_OF_MANY

    if distance < 0:
        return [Finding("near_unsearched", "note", "data.duplicate_distance -1: near copies were not looked for")]
    if searched >= REACH_OF_MANY:
        return []
    text = f"many images look alike: of pairs whose hashes differ in more than {searched} bits, not all were compared"
    return [Finding("near_cut_short", "note", f"{text} ({MAX_PAIRS} pairs are)")]


def _left_out(skipped: Sequence[Skipped]) -> list[Finding]:
    from kmine.stages.examine import MAX_NAMED, count

    if not skipped:
        return []
    text = f"{count(skipped, 'file')} left out; the first: {skipped[0].path}: {skipped[0].problem}"
    return [Finding("left_out", "note", text, tuple(s.sample_id for s in skipped[:MAX_NAMED]))]


def _report(
    cfg: LoopConfig,
    source: Source,
    survey: Survey,
    sides: Mapping[str, str],
    twins: Sequence[Twins],
    pairing: Pairing,
    findings: Sequence[Finding],
) -> dict[str, Any]:
    """What check.json holds."""
    looks, refs = survey.looks, survey.refs
    masks = [item.mask for item in looks if item.mask is not None]
    groups = Counter(refs[item.sample_id].group_id for item in looks)
    images_with = Counter(value for mask in masks for value in mask.pixels)
    pixels = Counter[int]()
    for mask in masks:
        pixels.update(mask.pixels)
    own = {ref.split in SIDES for ref in refs.values()} == {True}
    shares = sorted(mask.foreground_share for mask in masks if mask.foreground_share)
    return {
        "dataset": source.name,
        "fingerprint": source.fingerprint(),
        "data": cli.to_dict(cfg.data),
        "num_samples": len(refs),
        "num_pairs": len(masks),
        "splits": _origin(cfg.data, own),
        "counts": _counts(survey, sides),
        "images": {
            "sizes": _most_common(Counter(f"{item.shape[1]} x {item.shape[0]}" for item in looks)),
            "num_sizes": len({item.shape for item in looks}),
            "shortest_side": min((min(item.shape) for item in looks), default=None),
            "longest_side": max((max(item.shape) for item in looks), default=None),
            "lowest_value": min((item.low for item in looks), default=None),
            "highest_value": max((item.high for item in looks), default=None),
            "mean_value": sum(item.mean for item in looks) / len(looks) if looks else None,
        },
        "masks": {
            "values": {str(value): {"masks": images_with[value], "pixels": n} for value, n in sorted(pixels.items())},
            "class_names": list(source.class_names),
            "num_empty": sum(mask.foreground_share == 0 for mask in masks),
            "median_share_of_filled": shares[len(shares) // 2] if shares else None,
        },
        "groups": {"count": len(groups), "largest": max(groups.values(), default=0)},
        "duplicates": {
            "exact": [str(t) for t in twins if t.exact],
            "near": [asdict(t) for t in twins if t.same_picture and not t.exact],
            "hash_alone": [asdict(t) for t in twins if not t.same_picture],
        },
        "pairing": asdict(pairing),
        "damaged": [asdict(s) for s in survey.damaged],
        "left_out": [asdict(s) for s in source.skipped],
        "findings": [asdict(f) for f in sorted(findings, key=lambda f: f.severity)],
    }


def _origin(cfg: DataConfig, own: bool) -> str:
    if cfg.split_file is not None:
        return f"of {cfg.split_file}"
    return "the data set's own" if own else "as kmine.loop draws them"


def _most_common(counter: Counter[str], num: int = 5) -> dict[str, int]:
    return dict(counter.most_common(num))


def _counts(survey: Survey, sides: Mapping[str, str]) -> dict[str, dict[str, int]]:
    """By split: samples, those with a mask, those that show each class, those of each image-level label."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for item in survey.looks:
        ref = survey.refs[item.sample_id]
        row = counts[sides.get(item.sample_id, "left out")]
        row["samples"] += 1
        row["with a mask" if ref.has_mask else "without a mask"] += 1
        if item.mask is not None:
            row["empty mask"] += item.mask.foreground_share == 0
            row.update(f"class {value}" for value in item.mask.pixels if value not in (0, IGNORE_INDEX))
        row[f"image label {ref.image_label}" if ref.image_label is not None else "no image label"] += 1
    order = (*SIDES, "left out")
    first = ("samples", "with a mask", "without a mask", "empty mask")
    return {
        side: {k: counts[side][k] for k in dict.fromkeys((*first, *sorted(counts[side]))) if counts[side][k]}
        for side in order
        if side in counts
    }


def _sheet(source: Source, survey: Survey, sides: Mapping[str, str]) -> bytes:
    """The contact sheet: samples taken in turn from every split, label state and class that there is."""
    from kmine.report.sheet import Tile, contact_sheet

    kinds: dict[tuple[str, str], list[str]] = defaultdict(list)
    for item in sorted(survey.looks, key=lambda item: derive_seed("contact sheet", item.sample_id)):
        kinds[_kind(item, survey.refs[item.sample_id], sides)].append(item.sample_id)
    readable = {item.sample_id for item in survey.looks if item.mask is not None}
    in_turn = chain.from_iterable(zip_longest(*(kinds[kind] for kind in sorted(kinds))))
    kind_of = {sample_id: ", ".join(kind) for kind, ids in kinds.items() for sample_id in ids}
    chosen = [sample_id for sample_id in in_turn if sample_id is not None][:NUM_TILES]
    chosen.sort(key=lambda sample_id: (kind_of[sample_id], sample_id))
    return contact_sheet(
        [Tile(source.image(i), source.mask(i) if i in readable else None, i, kind_of[i]) for i in chosen]
    )


def _kind(item: Look, ref: SampleRef, sides: Mapping[str, str]) -> tuple[str, str]:
    """Split, and what the mask or the image-level label says."""
    label = "" if ref.image_label is None else f", label {ref.image_label}"
    if item.mask is None:
        state = "mask unreadable" if ref.has_mask else "no mask"
    else:
        classes = sorted(value for value in item.mask.pixels if value not in (0, IGNORE_INDEX))
        state = f"class {'+'.join(map(str, classes))}" if classes else "empty mask"
    return sides.get(item.sample_id, "left out"), state + label


def _write(folder: Path, report: Mapping[str, Any], sheet: bytes) -> None:
    from kmine.store.files import no_nan, write_atomic

    write_atomic(folder / "check.json", json.dumps(no_nan(report), indent=1, allow_nan=False).encode())
    write_atomic(folder / "check.png", sheet)


def text_of(report: Mapping[str, Any], folder: Path) -> str:
    """The report as text for the terminal."""
    images, masks, groups, doubles = (report[key] for key in ("images", "masks", "groups", "duplicates"))
    sizes = ", ".join(f"{size} ({n})" for size, n in images["sizes"].items())
    more = (
        f" and {images['num_sizes'] - len(images['sizes'])} more" if images["num_sizes"] > len(images["sizes"]) else ""
    )
    values = ", ".join(f"{value} in {n['masks']}" for value, n in masks["values"].items())
    share = masks["median_share_of_filled"]
    lines = [
        f"{report['dataset']}: {report['num_samples']} samples, {report['num_pairs']} pairs of image and readable "
        f"mask, {len(report['damaged'])} damaged, {len(report['left_out'])} files left out",
        f"splits ({report['splits']}):",
        *(f"  {side}: {', '.join(f'{n} {what}' for what, n in row.items())}" for side, row in report["counts"].items()),
        f"sizes (width x height): {sizes}{more}; values {images['lowest_value']} to {images['highest_value']}",
        f"mask values: {values or 'none'}; {masks['num_empty']} of {report['num_pairs']} empty"
        + ("" if share is None else f"; median foreground of the others {share:.1%} of the image"),
        f"groups: {groups['count']}, the largest of {groups['largest']}; duplicates: {len(doubles['exact'])} exact, "
        f"{len(doubles['near'])} near, {len(doubles['hash_alone'])} by hash alone",
        *_finding_lines(report["findings"]),
    ]
    faults = sum(finding["severity"] == "fault" for finding in report["findings"])
    verdict = f"{faults} fault{'' if faults == 1 else 's'}" if faults else "no fault"
    lines.append(f"{verdict}; written: {folder / 'check.json'}   {folder / 'check.png'}")
    return "\n".join(lines) + "\n"


def _finding_lines(findings: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    for finding in findings:
        names = finding["samples"]
        some = f" [{'; '.join(names[:MAX_SHOWN])}{'; ...' if len(names) > MAX_SHOWN else ''}]" if names else ""
        yield f"{finding['severity'].upper()} {finding['code']}: {finding['text']}{some}"


if __name__ == "__main__":
    sys.exit(main())

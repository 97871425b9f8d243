"""`python -m kmine.check`: what would spoil a result in a data set, before anything is trained on it.

Opens every image and every mask, those of the test split too; nothing that is trained or chosen hears of it.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from kmine import cli
from kmine.check import report as check_report
from kmine.check.report import (
    SIDES,
    DataCheck,
    DatasetScan,
    render_text,
    report_values,
    stratum_of,
)
from kmine.config import DataConfig, LoopConfig
from kmine.data import open_source
from kmine.errors import SampleError, UserError
from kmine.seeding import derive_seed
from kmine.types import Finding, SampleRef, Skipped

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kmine.data.quality.examine import ImageStats
    from kmine.data.quality.mask_alignment import MaskAlignment
    from kmine.data.source import Source
    from kmine.data.splits import Splits

DESCRIPTION = """Examine a data set: counts, sizes, masks, duplicates, leaks between splits, and whether masks belong to
their images. Writes check.json and check.png (samples with their masks) into the folder --out. Takes the settings of
kmine.loop; those of training are ignored. Exit code 1 where something would spoil a result."""

ItemT, ResultT = TypeVar("ItemT"), TypeVar("ResultT")

NUM_TILES = 24
NUM_ALIGNED, RUN = 200, 20
"""Masked images whose pairing is tested, taken in runs of neighbours, so that masks off by one file are recognised."""
AHEAD = 64
"""Samples read ahead of the one that is counted: what waits in memory, however many there are and however long one
takes."""


@dataclass(frozen=True)
class _ScannedSample:
    """What one sample comes down to."""

    stats: ImageStats | None = None
    damaged: Skipped | None = None
    edges: NDArray[Any] | None = None
    outline: NDArray[Any] | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    prog = "kmine check"
    cfg = cli.parse(LoopConfig, sys.argv[1:] if argv is None else argv, prog=prog, description=DESCRIPTION)
    return cli.guarded(prog, lambda: run_check(cfg))


def run_check(cfg: LoopConfig) -> int:
    """Examine the data of `cfg`, print and write what was found; 1 if there is a fault."""
    source, refusals = _open(cfg.data)
    return check_source(cfg, source, refusals)


def check_source(cfg: LoopConfig, source: Source, refusals: Sequence[str] = ()) -> int:
    """The same for a source that is open; `refusals` are what it would have stopped with."""
    terminal = cli.Terminal()
    try:
        checked = examine_source(cfg, source, refusals, terminal)
        report = report_values(cfg.data, source, checked)
        _write(Path(cfg.out), report, _sheet(source, checked))
    finally:
        terminal.stop()
    sys.stdout.write(render_text(report, Path(cfg.out)))
    return int(checked.has_fault)


def examine_source(cfg: LoopConfig, source: Source, refusals: Sequence[str], terminal: cli.Terminal) -> DataCheck:
    """All that is found, nothing printed but progress and nothing written."""
    from kmine.data.quality import examine
    from kmine.data.quality import mask_alignment as pairing

    scan = _scan(source, terminal)
    sides, split_problem = _sides(cfg, source, scan)
    groups = {sample_id: ref.group_id for sample_id, ref in scan.refs.items()}
    terminal.log("comparing images")
    duplicates, search = examine.find_duplicates(scan.stats, groups, cfg.data.duplicate_distance)
    alignment = _measure_alignment(source, scan, terminal)
    allow = cfg.data.allow_leaks
    findings: list[Finding] = [
        *(Finding("refused", "fault", f"kmine.loop would stop: {text}") for text in refusals),
        *check_report.damage_findings(scan.damaged, cfg.data.on_error),
        *examine.check_masks(scan.stats, scan.refs, len(source.class_names)),
        *examine.check_classes(scan.stats, source.class_names),
        *examine.check_identical_masks(scan.stats, groups, duplicates),
        *examine.check_groups(scan.refs.values(), sides, allow_leaks=allow),
        *examine.check_duplicates(duplicates, sides, allow_leaks=allow),
        *check_report.truncation_findings(search, cfg.data.duplicate_distance),
        *pairing.check_alignment(alignment),
        *pairing.check_shifted_runs(pairing.find_shifted_runs(scan.alignment_scores), alignment),
        *([Finding("splits", "fault", f"kmine.loop would stop: {split_problem}")] if split_problem else []),
        *check_report.left_out_findings(source.skipped),
    ]
    return DataCheck(scan, sides, duplicates, alignment, findings)


def _open(cfg: DataConfig) -> tuple[Source, list[str]]:
    """The source, damage listed and not stopped at, and what it stops at as the settings are."""
    try:
        return open_source(cfg), []
    except UserError as error:
        if cfg.on_error == "skip":
            raise
        return open_source(replace(cfg, on_error="skip")), [str(error)]


def _scan(source: Source, terminal: cli.Terminal) -> DatasetScan:
    """Read every sample once, each thread one at a time; only counts are kept."""
    from kmine.data.quality.examine import compute_stats
    from kmine.data.quality.mask_alignment import NeighbourAlignment, edges, outline

    refs = source.refs()

    def read(ref: SampleRef) -> _ScannedSample:
        try:
            image = source.image(ref.sample_id)
        except SampleError as error:
            return _ScannedSample(damaged=Skipped(ref.sample_id, error.path, error.problem))
        try:
            mask = source.mask(ref.sample_id) if ref.has_mask else None
        except SampleError as error:
            damaged = Skipped(ref.sample_id, error.path, error.problem)
            return _ScannedSample(compute_stats(ref.sample_id, image, None), damaged, edges(image))
        return _ScannedSample(
            compute_stats(ref.sample_id, image, mask), None, edges(image), None if mask is None else outline(mask)
        )

    stats, damaged, neighbours = [], [], NeighbourAlignment()
    terminal.start(f"{source.name}: reading", len(refs))
    for done, (ref, sample) in enumerate(zip(refs, _in_order(read, refs), strict=True), start=1):
        stats += [sample.stats] if sample.stats else []
        damaged += [sample.damaged] if sample.damaged else []
        neighbours.add(ref.sample_id, sample.edges, sample.outline)
        terminal.advance(done)
    terminal.stop()
    return DatasetScan({ref.sample_id: ref for ref in refs}, stats, damaged, neighbours.finish())


def _in_order(work: Callable[[ItemT], ResultT], items: Iterable[ItemT]) -> Iterator[ResultT]:
    """`map` on threads, at most `AHEAD` results waiting."""
    from kmine.io.threads import thread_pool

    rest = iter(items)
    with thread_pool() as threads:
        waiting = deque(threads.submit(work, item) for item in islice(rest, AHEAD))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(threads.submit(work, item) for item in islice(rest, 1))


def _sides(cfg: LoopConfig, source: Source, scan: DatasetScan) -> tuple[dict[str, str], str]:
    """train, val or test by sample id, and why the loop could not draw its splits, if so.

    The split of data.split_file, or the data set's own where every sample has one; what that lacks, and else
    everything, as the loop draws it.
    """
    from kmine.data.split_file import read_split, resolve_splits

    refs = [scan.refs[item.sample_id] for item in scan.stats]
    try:
        given_split = read_split(cfg.data.split_file, source)
    except UserError as error:
        return {}, str(error)
    own = given_split.sides if given_split else {ref.sample_id: ref.split for ref in refs if ref.split in SIDES}
    sides = own if given_split or len(own) == len(refs) else {}
    hashes = {item.sample_id: item.image_hash for item in scan.stats}
    try:
        drawn: Splits = resolve_splits(cfg.data, cfg.seed, refs, hashes, given_split)
    except UserError as error:
        return sides, str(error)
    named = {sample_id: name for sample_id, _, name in drawn.rows()}
    return sides | {i: name if name in ("val", "test") else "train" for i, name in named.items()}, ""


def _measure_alignment(source: Source, scan: DatasetScan, terminal: cli.Terminal) -> MaskAlignment:
    """Read some masked images again, and hold their masks against each other's images."""
    from kmine.data.quality.mask_alignment import edges, measure_alignment, outline

    def read(sample_id: str) -> tuple[Any, Any]:
        return edges(source.image(sample_id)), outline(source.mask(sample_id))

    filled = [item.sample_id for item in scan.stats if item.mask is not None and 0 < item.mask.foreground_share < 1]
    sampled = list(_runs(filled))
    terminal.start("masks against images", len(sampled))
    images, outlines = [], []
    for done, (image, at) in enumerate(_in_order(read, sampled), start=1):
        images.append(image)
        outlines.append(at)
        terminal.advance(done)
    terminal.stop()
    return measure_alignment(images, outlines)


def _runs(ids: Sequence[str]) -> Iterator[str]:
    """`NUM_ALIGNED` ids in evenly spaced runs of `RUN` neighbours; all where there are no more."""
    if len(ids) <= NUM_ALIGNED:
        yield from ids
        return
    num_runs = NUM_ALIGNED // RUN
    for n in range(num_runs):
        start = n * (len(ids) - RUN) // (num_runs - 1)
        yield from ids[start : start + RUN]


def _sheet(source: Source, checked: DataCheck) -> bytes:
    """The contact sheet: samples taken in turn from every split, label state and class that there is."""
    from kmine.report.sheet import Tile, contact_sheet

    scan = checked.scan
    kinds: dict[tuple[str, str], list[str]] = defaultdict(list)
    for item in sorted(scan.stats, key=lambda item: derive_seed("contact sheet", item.sample_id)):
        kinds[stratum_of(item, scan.refs[item.sample_id], checked.sides)].append(item.sample_id)
    readable = {item.sample_id for item in scan.stats if item.mask is not None}
    in_turn = chain.from_iterable(zip_longest(*(kinds[kind] for kind in sorted(kinds))))
    words = {sample_id: ", ".join(kind) for kind, ids in kinds.items() for sample_id in ids}
    sampled = [sample_id for sample_id in in_turn if sample_id is not None][:NUM_TILES]
    sampled.sort(key=lambda sample_id: (words[sample_id], sample_id))
    return contact_sheet(
        [Tile(source.image(i), source.mask(i) if i in readable else None, i, words[i]) for i in sampled]
    )


def _write(folder: Path, report: Mapping[str, Any], sheet: bytes) -> None:
    from kmine.io.files import nan_to_none, write_atomic

    write_atomic(folder / "check.json", json.dumps(nan_to_none(report), indent=1, allow_nan=False).encode())
    write_atomic(folder / "check.png", sheet)


if __name__ == "__main__":
    sys.exit(main())

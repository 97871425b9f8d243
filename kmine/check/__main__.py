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
    Examined,
    Survey,
    kind_of,
    report_of,
    text_of,
)
from kmine.config import DataConfig, LoopConfig
from kmine.data import open_source
from kmine.errors import SampleError, UserError
from kmine.seeding import derive_seed
from kmine.types import Finding, SampleRef, Skipped

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kmine.data.quality.examine import Look
    from kmine.data.quality.mask_alignment import Pairing
    from kmine.data.source import Source
    from kmine.data.splits import Splits

DESCRIPTION = """Examine a data set: counts, sizes, masks, duplicates, leaks between splits, and whether masks belong to
their images. Writes check.json and check.png (samples with their masks) into the folder --out. Takes the settings of
kmine.loop; those of training are ignored. Exit code 1 where something would spoil a result."""

Given, Result = TypeVar("Given"), TypeVar("Result")

NUM_TILES = 24
NUM_PAIRED, RUN = 200, 20
"""Masked images whose pairing is tested, taken in runs of neighbours, so that masks off by one file are recognised."""
AHEAD = 64
"""Samples read ahead of the one that is counted: what waits in memory, however many there are and however long one
takes."""


@dataclass(frozen=True)
class _Read:
    """What one sample comes down to."""

    look: Look | None = None
    damaged: Skipped | None = None
    edges: NDArray[Any] | None = None
    outline: NDArray[Any] | None = None


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
    terminal = cli.Terminal()
    try:
        found = examine_source(cfg, source, refusals, terminal)
        report = report_of(cfg.data, source, found)
        _write(Path(cfg.out), report, _sheet(source, found))
    finally:
        terminal.stop()
    sys.stdout.write(text_of(report, Path(cfg.out)))
    return int(found.has_fault)


def examine_source(cfg: LoopConfig, source: Source, refusals: Sequence[str], terminal: cli.Terminal) -> Examined:
    """All that is found, nothing printed but progress and nothing written."""
    from kmine.data.quality import examine
    from kmine.data.quality import mask_alignment as pairing

    survey = _survey(source, terminal)
    sides, split_problem = _sides(cfg, source, survey)
    groups = {sample_id: ref.group_id for sample_id, ref in survey.refs.items()}
    terminal.say("comparing images")
    twins, search = examine.find_twins(survey.looks, groups, cfg.data.duplicate_distance)
    paired = _pairing(source, survey, terminal)
    allow = cfg.data.allow_leaks
    findings: list[Finding] = [
        *(Finding("refused", "fault", f"kmine.loop would stop: {text}") for text in refusals),
        *check_report.damage(survey.damaged, cfg.data.on_error),
        *examine.examine_masks(survey.looks, survey.refs, len(source.class_names)),
        *examine.examine_classes(survey.looks, source.class_names),
        *examine.examine_same_masks(survey.looks, groups, twins),
        *examine.examine_groups(survey.refs.values(), sides, allow_leaks=allow),
        *examine.examine_twins(twins, sides, allow_leaks=allow),
        *check_report.cut_short(search, cfg.data.duplicate_distance),
        *pairing.examine_pairing(paired),
        *pairing.examine_stretches(pairing.find_stretches(survey.fits), paired),
        *([Finding("splits", "fault", f"kmine.loop would stop: {split_problem}")] if split_problem else []),
        *check_report.left_out(source.skipped),
    ]
    return Examined(survey, sides, twins, paired, findings)


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
    from kmine.data.quality.examine import look
    from kmine.data.quality.mask_alignment import Neighbours, edges, outline

    refs = source.refs()

    def read(ref: SampleRef) -> _Read:
        try:
            image = source.image(ref.sample_id)
        except SampleError as error:
            return _Read(damaged=Skipped(ref.sample_id, error.path, error.problem))
        try:
            mask = source.mask(ref.sample_id) if ref.has_mask else None
        except SampleError as error:
            damaged = Skipped(ref.sample_id, error.path, error.problem)
            return _Read(look(ref.sample_id, image, None), damaged, edges(image))
        return _Read(look(ref.sample_id, image, mask), None, edges(image), None if mask is None else outline(mask))

    looks, damaged, neighbours = [], [], Neighbours()
    terminal.start(f"{source.name}: reading", len(refs))
    for done, (ref, seen) in enumerate(zip(refs, _in_order(read, refs), strict=True), start=1):
        looks += [seen.look] if seen.look else []
        damaged += [seen.damaged] if seen.damaged else []
        neighbours.add(ref.sample_id, seen.edges, seen.outline)
        terminal.advance(done)
    terminal.stop()
    return Survey({ref.sample_id: ref for ref in refs}, looks, damaged, neighbours.finish())


def _in_order(work: Callable[[Given], Result], given: Iterable[Given]) -> Iterator[Result]:
    """`map` on threads, at most `AHEAD` results waiting."""
    from kmine.io.threads import thread_pool

    rest = iter(given)
    with thread_pool() as threads:
        waiting = deque(threads.submit(work, one) for one in islice(rest, AHEAD))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(threads.submit(work, one) for one in islice(rest, 1))


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
    from kmine.data.quality.mask_alignment import edges, measure_pairing, outline

    def read(sample_id: str) -> tuple[Any, Any]:
        return edges(source.image(sample_id)), outline(source.mask(sample_id))

    filled = [item.sample_id for item in survey.looks if item.mask is not None and 0 < item.mask.foreground_share < 1]
    chosen = list(_runs(filled))
    terminal.start("masks against images", len(chosen))
    images, outlines = [], []
    for done, (image, at) in enumerate(_in_order(read, chosen), start=1):
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


def _sheet(source: Source, found: Examined) -> bytes:
    """The contact sheet: samples taken in turn from every split, label state and class that there is."""
    from kmine.report.sheet import Tile, contact_sheet

    survey = found.survey
    kinds: dict[tuple[str, str], list[str]] = defaultdict(list)
    for item in sorted(survey.looks, key=lambda item: derive_seed("contact sheet", item.sample_id)):
        kinds[kind_of(item, survey.refs[item.sample_id], found.sides)].append(item.sample_id)
    readable = {item.sample_id for item in survey.looks if item.mask is not None}
    in_turn = chain.from_iterable(zip_longest(*(kinds[kind] for kind in sorted(kinds))))
    words = {sample_id: ", ".join(kind) for kind, ids in kinds.items() for sample_id in ids}
    chosen = [sample_id for sample_id in in_turn if sample_id is not None][:NUM_TILES]
    chosen.sort(key=lambda sample_id: (words[sample_id], sample_id))
    return contact_sheet(
        [Tile(source.image(i), source.mask(i) if i in readable else None, i, words[i]) for i in chosen]
    )


def _write(folder: Path, report: Mapping[str, Any], sheet: bytes) -> None:
    from kmine.io.files import no_nan, write_atomic

    write_atomic(folder / "check.json", json.dumps(no_nan(report), indent=1, allow_nan=False).encode())
    write_atomic(folder / "check.png", sheet)


if __name__ == "__main__":
    sys.exit(main())

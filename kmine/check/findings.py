"""Read every image and mask of a data set and find what would spoil a result."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, TypeVar

from numpy.typing import NDArray

from kmine import cli
from kmine.config import DataConfig
from kmine.data import open_source
from kmine.data.quality import examine, mask_alignment
from kmine.data.quality.examine import MAX_NAMED, count
from kmine.data.quality.image_stats import ImageStats, compute_stats
from kmine.data.quality.mask_alignment import AlignmentScore, MaskAlignment, NeighbourAlignment, edges, outline
from kmine.data.quality.near_duplicates import DuplicatePair, DuplicateSearch, find_duplicates
from kmine.data.source import Source
from kmine.data.split_file import SIDES, read_split, resolve_splits
from kmine.errors import SampleError, UserError
from kmine.io.threads import thread_pool
from kmine.types import Finding, ProgressReporter, SampleRef, Severity, Skipped

ItemT, ResultT = TypeVar("ItemT"), TypeVar("ResultT")

NUM_ALIGNED, RUN = 200, 20
"""Masked images whose alignment is tested, in runs of neighbours, so that masks shifted by one file are recognized."""
AHEAD = 64
"""Samples read ahead of the one being counted; bounds the memory for any number of samples."""


@dataclass(frozen=True)
class DatasetScan:
    """Result of one pass over a data set."""

    refs: dict[str, SampleRef]
    stats: list[ImageStats]
    damaged: list[Skipped]
    """Images and masks that cannot be read."""
    alignment_scores: list[AlignmentScore]
    """Masks compared with the images beside them, in the order of the files."""


@dataclass(frozen=True)
class DataCheck:
    """Everything found about a data set."""

    scan: DatasetScan
    sides: Mapping[str, str]
    """train, val or test by sample id."""
    duplicates: Sequence[DuplicatePair]
    alignment: MaskAlignment
    findings: Sequence[Finding]

    @property
    def has_fault(self) -> bool:
        """Whether any finding would spoil a result."""
        return any(finding.severity == "fault" for finding in self.findings)


@dataclass(frozen=True)
class _ScannedSample:
    """Counts of one sample, and what the comparison with its neighbours needs."""

    stats: ImageStats | None = None
    damaged: Skipped | None = None
    edges: NDArray[Any] | None = None
    outline: NDArray[Any] | None = None


def check_dataset(data: DataConfig, *, seed: int = 0, progress: ProgressReporter | None = None) -> list[Finding]:
    """Find damaged files, leaks between splits, duplicates, and wrong, inverted or shifted masks.

    Reads every image and mask, those of the test split included. Writes nothing.

    Args:
        data: settings of the data set, as in `kmine loop`.
        seed: draws the splits where the data set has none, as `--seed` of `kmine loop`.
        progress: receives the progress; None is silent.

    Returns:
        Findings, faults first: a `fault` would spoil a result, a `note` would not.

    Raises:
        UserError: a data set that cannot be opened.

    >>> [finding.code for finding in check_dataset(DataConfig(num_samples=40, size=64))]
    ['few_cases', 'pairing']
    """
    source, refusals = open_despite_damage(data)
    checked = examine_source(data, seed, source, refusals, progress or cli.Terminal(quiet=True))
    return sorted(checked.findings, key=lambda finding: finding.severity)


def open_despite_damage(data: DataConfig) -> tuple[Source, list[str]]:
    """The source with damaged files listed, and the error that stops `kmine loop` with these settings, if any."""
    try:
        return open_source(data), []
    except UserError as error:
        if data.on_error == "skip":
            raise
        return open_source(replace(data, on_error="skip")), [str(error)]


def examine_source(
    data: DataConfig, seed: int, source: Source, refusals: Sequence[str], progress: ProgressReporter
) -> DataCheck:
    """Scan an open source; `refusals` are errors that stop `kmine loop`."""
    scan = _scan(source, progress)
    sides, split_problem = _sides(data, seed, source, scan)
    groups = {sample_id: ref.group_id for sample_id, ref in scan.refs.items()}
    progress.log("comparing images")
    duplicates, search = find_duplicates(scan.stats, groups, data.duplicate_distance)
    alignment = _measure_alignment(source, scan, progress)
    runs = mask_alignment.find_shifted_runs(scan.alignment_scores)
    findings: list[Finding] = [
        *(Finding("refused", "fault", f"kmine.loop would stop: {text}") for text in refusals),
        *_file_findings("damaged", "note" if data.on_error == "skip" else "fault", "damaged or unfit", scan.damaged),
        *examine.check_masks(scan.stats, scan.refs, len(source.class_names)),
        *examine.check_classes(scan.stats, source.class_names),
        *examine.check_palettes(source),
        *examine.check_identical_masks(scan.stats, groups, duplicates),
        *examine.check_numbers(data, scan.refs.values(), sides),
        *examine.check_groups(scan.refs.values(), sides, allow_leaks=data.allow_leaks),
        *examine.check_duplicates(duplicates, sides, allow_leaks=data.allow_leaks),
        *_truncation_findings(search, data.duplicate_distance),
        *mask_alignment.check_alignment(alignment),
        *mask_alignment.check_shifted_runs(runs, alignment),
        *([Finding("splits", "fault", f"kmine.loop would stop: {split_problem}")] if split_problem else []),
        *(Finding("files", "note", text) for text in getattr(source, "notes", ())),
        *_file_findings("left_out", "note", "left out", source.skipped),
    ]
    return DataCheck(scan, sides, duplicates, alignment, findings)


def _scan(source: Source, progress: ProgressReporter) -> DatasetScan:
    """Read every sample once, on threads; only counts are kept."""
    refs = source.refs()

    def read(ref: SampleRef) -> _ScannedSample:
        image = mask = damaged = None
        try:
            image = source.image(ref.sample_id)
            mask = source.mask(ref.sample_id) if ref.has_mask else None
        except SampleError as error:
            damaged = Skipped(ref.sample_id, error.path, error.problem)
        if image is None:
            return _ScannedSample(damaged=damaged)
        stats = compute_stats(ref.sample_id, image, mask)
        return _ScannedSample(stats, damaged, edges(image), None if mask is None else outline(mask))

    stats, damaged, neighbours = [], [], NeighbourAlignment()
    progress.start(f"{source.name}: reading", len(refs))
    for done, (ref, sample) in enumerate(zip(refs, _in_order(read, refs), strict=True), start=1):
        stats += [sample.stats] if sample.stats else []
        damaged += [sample.damaged] if sample.damaged else []
        neighbours.add(ref.sample_id, sample.edges, sample.outline)
        progress.advance(done)
    return DatasetScan({ref.sample_id: ref for ref in refs}, stats, damaged, neighbours.finish())


def _in_order(work: Callable[[ItemT], ResultT], items: Iterable[ItemT]) -> Iterator[ResultT]:
    """`map` on threads, with at most `AHEAD` waiting results."""
    rest = iter(items)
    with thread_pool() as threads:
        waiting = deque(threads.submit(work, item) for item in islice(rest, AHEAD))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(threads.submit(work, item) for item in islice(rest, 1))


def _sides(data: DataConfig, seed: int, source: Source, scan: DatasetScan) -> tuple[dict[str, str], str]:
    """train, val or test by sample id, and the error that keeps `kmine loop` from drawing splits, empty if none.

    The split of data.split_file, or the data set's own if every sample has one; the rest as drawn by `kmine loop`.
    """
    refs = [scan.refs[item.sample_id] for item in scan.stats]
    try:
        given_split = read_split(data.split_file, source)
    except UserError as error:
        return {}, str(error)
    own = given_split.sides if given_split else {ref.sample_id: ref.split for ref in refs if ref.split in SIDES}
    sides = own if given_split or len(own) == len(refs) else {}
    hashes = {item.sample_id: item.image_hash for item in scan.stats}
    try:
        drawn = resolve_splits(data.of_all_masks(), seed, refs, hashes, given_split)
    except UserError as error:
        return sides, str(error)
    named = {sample_id: name for sample_id, _, name in drawn.rows()}
    return sides | {i: name if name in ("val", "test") else "train" for i, name in named.items()}, ""


def _measure_alignment(source: Source, scan: DatasetScan, progress: ProgressReporter) -> MaskAlignment:
    """Read some masked images again and compare their masks with each other's images."""

    def read(sample_id: str) -> tuple[Any, Any]:
        return edges(source.image(sample_id)), outline(source.mask(sample_id))

    filled = [item.sample_id for item in scan.stats if item.mask is not None and 0 < item.mask.foreground_share < 1]
    sampled = list(_runs(filled))
    progress.start("masks against images", len(sampled))
    pairs = []
    for done, pair in enumerate(_in_order(read, sampled), start=1):
        pairs.append(pair)
        progress.advance(done)
    return mask_alignment.measure_alignment([image for image, _ in pairs], [at for _, at in pairs])


def _runs(ids: Sequence[str]) -> Iterator[str]:
    """`NUM_ALIGNED` ids in evenly spaced runs of `RUN` neighbours; all ids if there are no more."""
    if len(ids) <= NUM_ALIGNED:
        yield from ids
        return
    for n in range(NUM_ALIGNED // RUN):
        start = n * (len(ids) - RUN) // (NUM_ALIGNED // RUN - 1)
        yield from ids[start : start + RUN]


def _file_findings(code: str, severity: Severity, what: str, files: Sequence[Skipped]) -> Iterator[Finding]:
    if files:
        text = f"{count(files, 'file')} {what}; the first: {files[0].path}: {files[0].problem}"
        yield Finding(code, severity, text, tuple(file.sample_id for file in files[:MAX_NAMED]))


def _truncation_findings(search: DuplicateSearch, distance: int) -> Iterator[Finding]:
    """A note if near duplicates were not searched, or not among all similar images."""
    if distance < 0:
        yield Finding("near_unsearched", "note", "data.duplicate_distance -1: near duplicates were not searched")
    elif not search.complete:
        text = f"many images are similar: the {search.num_compared} most similar pairs were compared, others were not"
        yield Finding("near_cut_short", "note", text)

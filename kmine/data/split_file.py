"""Splits given by the user (`data.split_file`); the format is detected by content.

- `splits.csv` of a run (sample_id,group_id,split): used unchanged, labeled images included.
- A table of sample_id,split with train, val or test, or lists of ids with the side in the file name, as published for
  Kvasir-SEG: replaces an official split (see `make_splits`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kmine.config import DataConfig
from kmine.data.datasets.folder_index import split_suffix
from kmine.data.io.find_files import named
from kmine.data.source import Source, csv_rows, table_text
from kmine.data.splits import Splits, make_splits, merge_duplicates, side_of
from kmine.errors import UserError
from kmine.io.errors import expanded
from kmine.types import SPLIT_NAMES, SampleRef

SIDES = ("train", "val", "test")
RUN_COLUMNS, TABLE_COLUMNS = ("sample_id", "group_id", "split"), ("sample_id", "split")
GIVE = "give the splits.csv of a run, a table of sample_id,split, or a folder with train.txt, val.txt or test.txt"


@dataclass(frozen=True)
class GivenSplit:
    """A split read from files; all its samples are in the data set."""

    sides: dict[str, str]
    """train, val or test by sample id; other samples are not used."""
    rows: tuple[tuple[str, str, str], ...] | None
    """For splits.csv of a run: sample_id, group_id and labeled, unlabeled, val or test."""
    fingerprint: str
    """SHA-256 (hex) of the content, independent of order and white space."""


@dataclass(frozen=True)
class _Entry:
    """One line of a file."""

    where: str
    sample_id: str
    split: str
    group_id: str = ""


def read_split(setting: str | None, source: Source) -> GivenSplit | None:
    """Read `data.split_file`; no pixel is read.

    Tables and lists accept ids with the suffix of the image, and group ids (of a volume) for all samples of the group.
    If they have no train side, all other samples are train. Entries for samples in `source.skipped` are ignored.

    `setting`: a file, a folder with lists, or lists separated by commas; None returns None.

    Raises:
        UserError: with file and line, for a file that is missing, empty, no text or of another format, for an unknown
            split, an unknown or repeated id, a group on two sides, and a split without training samples.
    """
    if setting is None:
        return None
    path = Path(setting)
    if path.is_dir():
        return _of_lists([file for side in SIDES if (file := path / f"{side}.txt").exists()] or _no_lists(path), source)
    if "," in setting and not path.exists():
        return _of_lists([expanded(part.strip()) for part in setting.split(",")], source)
    text = _text(path)
    first = {cell.strip(' "').lower() for cell in re.split("[,;\t]", text.lstrip().splitlines()[0])}
    if first & {*RUN_COLUMNS} or path.suffix.lower() == ".csv":
        return _of_table(path, source)
    return _of_lists([path], source)


def resolve_splits(
    cfg: DataConfig, seed: int, refs: Sequence[SampleRef], hashes: Mapping[str, int], given_split: GivenSplit | None
) -> Splits:
    """Splits of a run: those of an earlier run, or drawn by `make_splits` with near-duplicates in one group.

    Args:
        cfg: fractions, split_seed, duplicate_distance.
        seed: draws the labeled images.
        refs: samples with a readable image.
        hashes: perceptual hash by sample id, of all that have one.
        given_split: replaces the official split of the data set.
    """
    if cfg.num_runs > 1:
        raise UserError("data.fold: expected one of the folds for a single run, got null; kmine loop makes all of them")
    if given_split is not None and given_split.rows is not None:
        readable = {ref.sample_id for ref in refs}
        return Splits.from_rows(row for row in given_split.rows if row[0] in readable)
    if given_split is not None:
        sides = given_split.sides
        refs = [replace(ref, split=sides[ref.sample_id]) for ref in refs if ref.sample_id in sides]
    return make_splits(
        merge_duplicates(refs, hashes, cfg.duplicate_distance),
        label_fraction=cfg.label_fraction,
        val_fraction=cfg.val_fraction,
        test_fraction=cfg.test_fraction,
        split_seed=cfg.split_seed,
        seed=seed,
        fine_groups=cfg.fine_groups,
        fold=None if cfg.folds is None else (cfg.fold, cfg.folds),
    )


def _text(path: Path) -> str:
    """Text of a file; refuses an empty one."""
    try:
        text = table_text(path, "data.split_file", "a text file")
    except UserError as error:
        raise UserError(f"{error}; {GIVE}") from error
    if not text.strip():
        raise UserError(f"{path}: expected sample ids, got an empty file; fill it, or leave it out")
    return text


def _no_lists(folder: Path) -> list[Path]:
    tables = sorted(path.name for path in folder.glob("*.csv"))
    cure = f"pass --data.split_file {folder / tables[0]}" if len(tables) == 1 else "rename the lists"
    raise UserError(f"data.split_file: expected train.txt, val.txt or test.txt in {folder}, found none; {cure}")


def _listed(path: Path) -> Iterator[_Entry]:
    """Ids of a list, one per line; the file name gives the side."""
    named_sides = [side for side in SIDES if side in re.split(r"[^a-z]+", path.stem.lower())]
    if len(named_sides) != 1:
        raise UserError(
            f"{path}: expected a list of ids with train, val or test in its file name, or a table with the header "
            f"sample_id,split, got neither; rename the file (test.txt), or add that header"
        )
    # Not `splitlines`: a name may hold what Unicode takes for a line end.
    for number, line in enumerate(re.split(r"\r\n|\r|\n", _text(path)), start=1):
        if line.strip():
            yield _Entry(f"{path}, line {number}", line.strip(), named_sides[0])


def _rows(path: Path) -> tuple[tuple[str, ...], list[_Entry]]:
    """Sorted columns and rows of a table."""
    rows = csv_rows(path, "data.split_file", exact=True)
    first, names = next(rows, (1, []))
    header = [name.strip().lower() for name in names]
    if tuple(sorted(header)) not in (tuple(sorted(RUN_COLUMNS)), TABLE_COLUMNS):
        raise UserError(
            f"{path}, line {first}: expected the header {','.join(TABLE_COLUMNS)}, or {','.join(RUN_COLUMNS)} of a "
            f"run's splits.csv, got {','.join(header)!r}; mend that line, and remove other columns"
        )
    entries = []
    for line, row in rows:
        where = f"{path}, line {line}"
        if len(row) != len(header):
            raise UserError(
                f"{where}: expected {len(header)} values ({','.join(header)}), got {len(row)}; mend that line, "
                "with quotes around values that hold commas"
            )
        entries.append(_Entry(where, **dict(zip(header, row, strict=True))))
    if not entries:
        raise UserError(f"{path}: expected rows of {','.join(header)}, got none below the header; fill it in")
    return tuple(sorted(header)), entries


def _of_table(path: Path, source: Source) -> GivenSplit:
    columns, entries = _rows(path)
    of_a_run = columns != TABLE_COLUMNS
    allowed = SPLIT_NAMES if of_a_run else SIDES
    exact = {ref.sample_id for ref in source.refs()}  # a file name may begin or end with white space
    entries = [_stripped(entry, exact, is_lower=not of_a_run) for entry in entries]
    for entry in entries:
        if not entry.sample_id or (of_a_run and not entry.group_id):
            raise UserError(f"{entry.where}: expected a value in every column, got none; mend or remove that line")
        if entry.split not in allowed:
            where = "with a column group_id, as in a run's splits.csv" if of_a_run else "without a column group_id"
            raise UserError(
                f"{entry.where}: expected the split {', '.join(allowed)} ({where}), got {entry.split!r}; mend that line"
            )
    return _of_a_run(path, entries, source) if of_a_run else _of_sides(entries, source)


def _stripped(entry: _Entry, exact: Collection[str], *, is_lower: bool) -> _Entry:
    """Without white space around values, but for the ids in `exact`."""
    sample_id = entry.sample_id if entry.sample_id in exact else entry.sample_id.strip()
    split = entry.split.strip().lower() if is_lower else entry.split.strip()
    return replace(entry, sample_id=sample_id, group_id=entry.group_id.strip(), split=split)


def _of_lists(paths: Sequence[Path], source: Source) -> GivenSplit:
    return _of_sides([entry for path in paths for entry in _listed(path)], source)


def _of_a_run(path: Path, entries: Sequence[_Entry], source: Source) -> GivenSplit:
    """Splits of a run, unchanged; ids must match exactly."""
    refs = {ref.sample_id: ref for ref in source.refs()}
    _each_once(entries, lambda name: [name], {name: [name] for name in refs}, _left_out(source))
    rows = tuple((entry.sample_id, entry.group_id, entry.split) for entry in entries)
    try:
        splits = Splits.from_rows(rows)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    for name in ("labeled", "val"):
        if not getattr(splits, name):
            raise UserError(f"{path}: expected samples of every split that is needed, got none of {name}; add some")
    needed = [refs[e.sample_id] for e in entries if e.split != "unlabeled" and e.sample_id in refs]
    maskless = [ref.sample_id for ref in needed if not ref.has_mask]
    if maskless:
        raise UserError(
            f"{path}: expected masks for labeled, val and test, found none for {named(maskless)}; "
            "restore the masks, or make these samples unlabeled"
        )
    sides = {sample_id: side_of(split) for sample_id, _, split in rows if sample_id in refs}
    return GivenSplit(sides, rows, _fingerprint("run", rows))


def _of_sides(entries: Sequence[_Entry], source: Source) -> GivenSplit:
    """Sides of samples, or of whole groups."""
    refs = source.refs()
    members: dict[str, list[str]] = defaultdict(list)
    for ref in refs:
        members[ref.group_id].append(ref.sample_id)
    members |= {ref.sample_id: [ref.sample_id] for ref in refs}  # a sample takes precedence over a group of its name
    sides = _each_once(entries, lambda name: [name, split_suffix(name)[0]], members, _left_out(source))
    fingerprint = _fingerprint("sides", sides.items())
    if all(entry.split != "train" for entry in entries):
        sides = {ref.sample_id: "train" for ref in refs} | sides
    if "train" not in sides.values():
        places = sorted({entry.where.rpartition(", line ")[0] for entry in entries})
        raise UserError(f"{', '.join(places)}: expected samples to train on, got none; name fewer for val and test")
    return GivenSplit(sides, None, fingerprint)


def _each_once(
    entries: Sequence[_Entry],
    spellings: Callable[[str], list[str]],
    members: Mapping[str, Sequence[str]],
    left_out: set[str],
) -> dict[str, str]:
    """Split by sample id.

    `spellings`: candidate names of an entry, the most likely first. `members`: sample ids by name of a sample or group.
    `left_out`: samples and volumes that the index left out; entries for them are ignored.
    """
    entry_of: dict[str, _Entry] = {}
    unknown: list[_Entry] = []
    for entry in entries:
        names = spellings(entry.sample_id)
        match = next((name for name in names if name in members), None)
        if match is None and not left_out & {*names, entry.sample_id.rpartition("/")[0]}:
            unknown.append(entry)
        for sample_id in members[match] if match is not None else ():
            other = entry_of.setdefault(sample_id, entry)
            if other is not entry:
                raise UserError(
                    f"{entry.where}: expected each sample once, got {sample_id} ({entry.split}) again, as in "
                    f"{other.where} ({other.split}); remove one of the two"
                )
    if unknown:
        raise UserError(
            f"{unknown[0].where}: expected sample ids of the data set, got {len(unknown)} that it does not have: "
            f"{named(entry.sample_id for entry in unknown)}; remove them, or check the settings data.*"
        )
    return {sample_id: entry.split for sample_id, entry in entry_of.items()}


def _left_out(source: Source) -> set[str]:
    return {skipped.sample_id for skipped in source.skipped}


def _fingerprint(kind: str, rows: Iterable[tuple[str, ...]]) -> str:
    return hashlib.sha256(json.dumps([kind, sorted(rows)]).encode()).hexdigest()

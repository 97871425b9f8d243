"""Takes what a person said of the masks into the run: verdicts.json and corrected/ID.png, checked and signed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kmine.audit.evidence import Opened
from kmine.data.io.volume_masks import place_of, read_volume
from kmine.errors import UserError
from kmine.feedback.corrections import Known, read_corrections
from kmine.feedback.verdict_effects import read_mask
from kmine.feedback.verdicts import (
    ACCEPTED,
    FILE,
    FOLDER,
    WORDS,
    Verdict,
    Verdicts,
    mask_signature,
    read_verdicts,
    to_json,
)
from kmine.io.files import encode_png, safe_name, sign, write_atomic

SHOWN = 5
"""Of ids in a message."""


def take_in(opened: Opened, verdicts: Path | None, corrected: Path | None, say: Callable[[str], None]) -> Verdicts:
    """Check and store. What was said earlier stays, but for a mask that is judged or corrected anew.

    Raises:
        UserError: verdicts of another run, on images that it does not have, or in another format; corrected masks that
            do not fit. Nothing is stored then.
    """
    store = opened.store
    kept = store.root / FILE
    before = read_verdicts(kept) if kept.exists() else Verdicts("", "", ())
    given = read_verdicts(verdicts) if verdicts is not None else Verdicts("", "", ())
    where = verdicts or kept
    _refuse_unknown(opened, given, where)
    current, stale = _split(opened, given)
    if given.all and not current and given.run_signature not in ("", opened.signature):
        raise UserError(
            f"{where}: expected verdicts on masks of {store.root}, got those of another run "
            f"({given.run or 'unnamed'}): none is on a mask that is there"
        )
    masks = dict(before.corrected)
    if corrected is not None:
        masks |= _store_corrected(opened, corrected, say)
    latest = {one.sample_id: one for one in (*before.all, *current)}
    said = tuple(latest[sample_id] for sample_id in sorted(latest))
    accepted = _store_accepted(opened, before, current)
    accepted = {one.sample_id: accepted[one.sample_id] for one in said if one.sample_id in accepted}
    taken = replace(given, run=opened.name, run_signature=opened.signature, all=said, corrected=masks, masks=accepted)
    entries = _entries(masks, FOLDER)
    value = to_json(taken, entries, _entries(accepted, ACCEPTED))
    store.save_json(kept, value, sign("verdicts", value["verdicts"], value["corrected"], value["accepted"]))
    if stale:
        more = " ..." if len(stale) > SHOWN else ""
        say(
            f"warning: {len(stale)} verdicts are on masks that have changed since, or teach no more, and are left out: "
            f"{', '.join(stale[:SHOWN])}{more}; look at these again"
        )
    counts = Counter(one.verdict for one in said)
    say(f"{kept}: {', '.join(f'{counts[word]} {word}' for word in WORDS)}, {len(entries)} corrected masks")
    return taken


def _entries(masks: Mapping[str, Path], folder: str) -> dict[str, dict[str, str]]:
    return {
        name: {"file": f"{folder}/{path.name}", "mask_signature": mask_signature(read_mask(path))}
        for name, path in sorted(masks.items())
    }


def _store_accepted(opened: Opened, before: Verdicts, current: Sequence[Verdict]) -> dict[str, Path]:
    """Accepted pseudo masks, kept as they are now: the next run must teach with what a person has seen."""
    said = {one.sample_id: one.verdict for one in current if one.kind == "pseudo"}
    out = {name: path for name, path in before.masks.items() if said.get(name, "accept") == "accept"}
    for name in (name for name, verdict in said.items() if verdict == "accept"):
        mask = opened.read("pseudo")(name)
        out[name] = opened.store.root / ACCEPTED / f"{safe_name(name)}.png"
        write_atomic(out[name], encode_png(mask, mask_signature(mask), opened.this.round_idx))
    return out


def _refuse_unknown(opened: Opened, given: Verdicts, path: Path) -> None:
    known = {"pseudo": set(opened.task.unlabeled.ids), "labeled": set(opened.task.labeled.ids)}
    unknown = [f"{one.sample_id} ({one.kind})" for one in given.all if one.sample_id not in known[one.kind]]
    if unknown:
        more = f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else ""
        raise UserError(
            f"{path}: expected verdicts on images of {opened.store.root}, got {', '.join(unknown[:SHOWN])}{more}, "
            "which it does not have; is it the file of another run?"
        )


def _split(opened: Opened, given: Verdicts) -> tuple[list[Verdict], list[str]]:
    """Verdicts on masks as they are, and ids of those on masks that have changed.

    A changed mask is no error: when the loop goes on, most masks change, and what was said of the others must not be
    lost with them. But a verdict never passes over to a mask that nobody looked at.
    """
    teaching = set(opened.this.teaching)
    current: list[Verdict] = []
    stale: list[str] = []
    for one in given.all:
        there = one.kind == "labeled" or one.sample_id in teaching
        same = there and one.mask_signature in ("", mask_signature(opened.read(one.kind)(one.sample_id)))
        if same:
            current.append(one)
        else:
            stale.append(one.sample_id)
    return current, stale


def _store_corrected(opened: Opened, path: Path, say: Callable[[str], None]) -> dict[str, Path]:
    task, store, teaching = opened.task, opened.store, set(opened.this.teaching)
    pools = {i: pool for pool in (task.labeled, task.unlabeled) for i in pool.ids}
    scans: dict[str, tuple[Path, dict[int, str]]] = {}
    for sample_id in pools:
        place = place_of(opened.source, sample_id)
        if place is not None:
            scans.setdefault(safe_name(place[0]), (place[1], {}))[1][place[2]] = sample_id

    def volumes(name: str, file: Path) -> Iterator[tuple[str, NDArray[np.uint8]]] | None:
        if name not in scans:
            return None
        scan, ids = scans[name]
        return ((ids.get(number, ""), mask) for number, mask in read_volume(file, scan))

    known = Known({i: pool.native_shape(i) for i, pool in pools.items()}, opened.source.class_names, volumes)
    # All of them are read once before any is stored: half a set of corrections is none.
    for _ in read_corrections(path, known):
        pass
    out, same = {}, 0
    for sample_id, mask in read_corrections(path, known):
        kind = "labeled" if sample_id in task.labeled.ids else "pseudo"
        there = kind == "labeled" or sample_id in teaching
        if there and (opened.read(kind)(sample_id) == mask).all():
            same += 1
            continue
        out[sample_id] = store.root / FOLDER / f"{safe_name(sample_id)}.png"
        write_atomic(out[sample_id], encode_png(mask, mask_signature(mask), opened.this.round_idx))
    if same:
        say(f"{same} masks are as they were, and no corrections")
    return out

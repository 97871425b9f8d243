"""Import of a reviewer's verdicts and corrected masks into the run folder, checked and signed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kmine.audit.rounds import AuditedRun
from kmine.data.datasets.folder_index import file_kind
from kmine.data.io.dicom_seg import pair_segs, read_seg_mask
from kmine.data.io.mask_palettes import MaskPalettes
from kmine.data.io.pictures import read_mask_picture
from kmine.data.io.volume_masks import read_mask_volume
from kmine.errors import UserError, first_names
from kmine.feedback import verdicts as stored
from kmine.feedback.corrections import read_corrections
from kmine.feedback.expected import ExpectedMasks
from kmine.feedback.verdicts import ACCEPTED, FOLDER, Verdict, Verdicts, mask_signature
from kmine.io.files import encode_png, read_png, safe_name, sign, write_atomic
from kmine.ops.masks import from_rle
from kmine.types import IGNORE_INDEX


def import_verdicts(
    audited: AuditedRun, verdicts: Path | None, corrected: Path | None, log: Callable[[str], None]
) -> Verdicts:
    """Check verdicts and corrected masks, merge them with earlier ones, and store all in the run folder.

    Raises:
        UserError: verdicts of another run, on unknown images or in another format; corrected masks that do not fit.
            Nothing is stored then.
    """
    target = audited.store.root / stored.FILE
    previous = stored.read_verdicts(target) if target.exists() else Verdicts("", "", ())
    incoming = stored.read_verdicts(verdicts) if verdicts is not None else Verdicts("", "", ())
    origin = verdicts or target
    _refuse_unknown(audited, incoming, origin)
    current, stale = _split_stale(audited, incoming)
    if incoming.all and not current and incoming.run_signature not in ("", audited.signature):
        raise UserError(
            f"{origin}: expected verdicts on masks of {audited.store.root}, got those of another run "
            f"({incoming.run or 'unnamed'}); import them into that run"
        )
    mended = _mended_masks(audited, current, origin)
    withdrawn = {v.sample_id for v in previous.all if v.mended} & {v.sample_id for v in current if not v.mended}
    masks = {name: path for name, path in previous.corrected.items() if name not in withdrawn}
    masks |= _store_corrected(audited, corrected, log) if corrected is not None else {}
    masks |= {name: _store(audited, FOLDER, name, mask) for name, mask in mended.items()}
    latest = {verdict.sample_id: verdict for verdict in (*previous.all, *current)}
    merged = tuple(latest[sample_id] for sample_id in sorted(latest))
    accepted = _store_accepted(audited, previous, current)
    accepted = {verdict.sample_id: accepted[verdict.sample_id] for verdict in merged if verdict.sample_id in accepted}
    result = replace(
        incoming, run=audited.name, run_signature=audited.signature, all=merged, corrected=masks, masks=accepted
    )
    entries = _entries(masks, FOLDER)
    value = stored.to_json(result, entries, _entries(accepted, ACCEPTED))
    audited.store.save_json(target, value, sign("verdicts", value["verdicts"], value["corrected"], value["accepted"]))
    if stale:
        log(
            f"warning: {len(stale)} verdicts on masks that have changed or are no longer used were left out: "
            f"{first_names(stale)}; review these again"
        )
    counts = Counter(verdict.verdict for verdict in merged)
    log(f"{target}: {', '.join(f'{counts[word]} {word}' for word in stored.VERDICTS)}, {len(entries)} corrected masks")
    return result


def _entries(masks: Mapping[str, Path], folder: str) -> dict[str, dict[str, str]]:
    return {
        name: {"file": f"{folder}/{path.name}", "mask_signature": mask_signature(read_png(path))}
        for name, path in sorted(masks.items())
    }


def _mended_masks(audited: AuditedRun, current: Sequence[Verdict], path: Path) -> dict[str, NDArray[np.uint8]]:
    """Masks that the reviewer changed on the page, (H, W) class ids and 255, by sample id."""
    out, num_classes = {}, len(audited.source.class_names)
    for verdict in (verdict for verdict in current if verdict.mended):
        mask = np.zeros(audited.pool(verdict.kind).native_shape(verdict.sample_id), np.uint8)
        for class_id, runs in verdict.mended:
            if not 0 < class_id < num_classes and class_id != IGNORE_INDEX:
                expected = f"mended masks of the classes 1 to {num_classes - 1} and {IGNORE_INDEX}"
                raise UserError(f"{path}: {verdict.sample_id}: expected {expected}, got {class_id}; {stored.CURE}")
            try:
                mask[from_rle(runs, *mask.shape)] = class_id
            except ValueError as error:
                raise UserError(f"{path}: {verdict.sample_id}: {error}; {stored.CURE}") from error
        out[verdict.sample_id] = mask
    return out


def _store(audited: AuditedRun, folder: str, name: str, mask: NDArray[np.uint8]) -> Path:
    path = audited.store.root / folder / f"{safe_name(name)}.png"
    write_atomic(path, encode_png(mask, mask_signature(mask), audited.audited_round.round_idx))
    return path


def _store_accepted(audited: AuditedRun, previous: Verdicts, current: Sequence[Verdict]) -> dict[str, Path]:
    """Keep accepted pseudo masks as they are now: the next run must train on the reviewed masks."""
    verdict_of = {verdict.sample_id: verdict.verdict for verdict in current if verdict.kind == "pseudo"}
    out = {name: path for name, path in previous.masks.items() if verdict_of.get(name, "accept") == "accept"}
    for name in (name for name, verdict in verdict_of.items() if verdict == "accept"):
        out[name] = _store(audited, ACCEPTED, name, audited.read("pseudo")(name))
    return out


def _refuse_unknown(audited: AuditedRun, incoming: Verdicts, path: Path) -> None:
    known_ids = {"pseudo": set(audited.task.unlabeled.ids), "labeled": set(audited.task.labeled.ids)}
    unknown = [f"{v.sample_id} ({v.kind})" for v in incoming.all if v.sample_id not in known_ids[v.kind]]
    if unknown:
        raise UserError(
            f"{path}: expected verdicts on images of {audited.store.root}, got {first_names(unknown)}, which it does "
            "not have; is it the file of another run?"
        )


def _split_stale(audited: AuditedRun, incoming: Verdicts) -> tuple[list[Verdict], list[str]]:
    """Verdicts on unchanged masks, and the ids of those on changed masks.

    A changed mask is not an error: later rounds change most masks, and verdicts on the others must not be lost. But a
    verdict is never transferred to a mask that was not reviewed.
    """
    pseudo_labeled = set(audited.audited_round.pseudo_labeled)

    def is_current(verdict: Verdict) -> bool:
        if verdict.kind == "pseudo" and verdict.sample_id not in pseudo_labeled:
            return False
        return verdict.mask_signature in ("", mask_signature(audited.read(verdict.kind)(verdict.sample_id)))

    current = [verdict for verdict in incoming.all if is_current(verdict)]
    return current, [verdict.sample_id for verdict in incoming.all if verdict not in current]


def _store_corrected(audited: AuditedRun, path: Path, log: Callable[[str], None]) -> dict[str, Path]:
    task, store, pseudo_labeled = audited.task, audited.store, set(audited.audited_round.pseudo_labeled)
    pools = {i: pool for pool in (task.labeled, task.unlabeled) for i in pool.ids}
    scans: dict[str, tuple[Path, dict[int, str]]] = {}
    for sample_id in pools:
        location = audited.source.slice_location(sample_id)
        if location is not None:
            scans.setdefault(safe_name(location[0]), (location[1], {}))[1][location[2]] = sample_id

    def volumes(name: str, file: Path) -> Iterator[tuple[str, NDArray[np.uint8]]] | None:
        if name not in scans:
            return None
        scan, ids = scans[name]
        return ((ids.get(number, ""), mask) for number, mask in read_mask_volume(file, scan))

    shapes = {i: pool.native_shape(i) for i, pool in pools.items()}
    names, palettes = audited.source.class_names, getattr(audited.source, "palettes", None)

    def pictures(paths: Sequence[Path]) -> Callable[[Path], NDArray[np.uint8]]:
        return partial(read_mask_picture, class_names=names, palettes=MaskPalettes(paths, palettes))

    expected = ExpectedMasks(shapes, names, volumes, pictures)
    # Read all once before storing any: corrections are stored completely or not at all.
    segs = _dicom_files(path)
    read = partial(_read_segs, audited, expected, segs) if segs else partial(read_corrections, expected=expected)
    for _ in read(path):
        pass
    out, num_unchanged, empty = {}, 0, []
    for sample_id, mask in read(path):
        kind = "labeled" if sample_id in task.labeled else "pseudo"
        exists = kind == "labeled" or sample_id in pseudo_labeled
        if exists and (audited.read(kind)(sample_id) == mask).all():
            num_unchanged += 1
            continue
        empty += [sample_id] if not mask.any() else []
        out[sample_id] = _store(audited, FOLDER, sample_id, mask)
    if num_unchanged:
        log(f"{num_unchanged} masks are unchanged and no corrections")
    if empty:
        log(
            f"warning: {len(empty)} of {len(out)} corrected masks are empty, labels without any object: "
            f"{first_names(empty)}; if these were only not drawn yet, remove them from {path} and from {store.root}"
        )
    return out


def _dicom_files(path: Path) -> dict[str, Path]:
    """A DICOM file, or those of a folder without masks of another kind, numbered."""
    files = sorted(file for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())
    kinds = [file_kind(file) for file in files]
    return {str(n): files[n] for n, kind in enumerate(kinds) if kind == "dicom" and not {"picture", "nifti"} & {*kinds}}


def _read_segs(
    audited: AuditedRun, expected: ExpectedMasks, segs: Mapping[str, Path], path: Path
) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """(sample id, mask) of each image of the run that a DICOM segmentation covers; wholly ignored ones are left out.

    Raises:
        UserError: images of another kind, segmentations of other images, damaged ones; highdicom is not installed.
    """
    locate = getattr(audited.source, "dicom_frame", lambda sample_id: None)
    places = {sample_id: place for sample_id in expected.shapes if (place := locate(sample_id))}
    if not places:
        cure = "give masks as PNG, NIfTI or COCO, or of Label Studio"
        raise UserError(f"{path}: expected masks of images that are not DICOM, got DICOM files; {cure}")
    by_image = pair_segs({f"of {file}": file for file, _ in places.values()}, segs)
    if by_image.keys() <= segs.keys():
        raise UserError(f"{path}: expected DICOM segmentations, got other DICOM files; give the masks, not the images")
    for sample_id, (file, frame) in places.items():
        if (seg := by_image.get(f"of {file}")) is not None:
            mask = read_seg_mask(seg, file, frame, expected.class_names)
            if (mask != IGNORE_INDEX).any():
                yield expected.check(str(seg), sample_id, mask)

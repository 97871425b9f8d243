"""Which unlabeled images to label next: those of a finished run from whose masks it would learn most."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kmine.audit.evidence import BATCH_SIZE, load_round_model
from kmine.audit.export import ExportedMask, write_coco, write_label_studio
from kmine.audit.history import write_picture
from kmine.audit.rounds import AuditedRun
from kmine.errors import UserError
from kmine.feedback.expected import picture_name
from kmine.feedback.verdicts import FILE, read_verdicts
from kmine.io.files import write_atomic, write_csv
from kmine.models.base import LocalModel
from kmine.ops.coverage import choose_covering
from kmine.ops.metrics import dice, nanmean
from kmine.report.sheet import Tile, contact_sheet
from kmine.setup.resolve import TTA_OF_FLIPS
from kmine.store.artifacts import CURE
from kmine.store.tables import MaskName, class_map
from kmine.training.inference import image_tensor, predict_resized, resized_batches
from kmine.training.task import Task
from kmine.types import IGNORE_INDEX, LESION_FREE, Bool, most_probable

NEAR_SLICES = 8
"""Slices of a volume that count as one image; own choice."""
FORMATS = {"labelstudio": "labelstudio.json", "cvat": "coco.json"}
"""Files of the tasks, in the folder of next.csv; CVAT reads COCO."""


class NextImage(NamedTuple):
    """An image to label, in the order of choice; fields are columns of next.csv. Unknown numbers are NaN."""

    rank: int
    sample_id: str
    group_id: str
    gain: float
    """What the label is expected to teach, [0, 1]: mean of the known ones of 1 - `estimated_dice` and the two below."""
    estimated_dice: float
    """Mean over the objects found in the image, dropped ones included."""
    disagreement: float
    """1 - Dice of the kept local model and the segmenter."""
    flips: float
    """Doubt by test-time flips: twice the mean standard deviation of the probability inside the local model's mask."""
    stands_for: int
    """Dropped and doubtful images that are nearest to this one among the chosen, itself included."""
    reason: str
    """The gate's reasons, as in decisions.parquet."""


def choose_next(audited: AuditedRun, count: int) -> list[NextImage]:
    """The `count` images to label next, among those that the audited round dropped or doubts.

    Of the images with the highest gain (see `NextImage`) those are chosen that stand for most others, by the local
    model's pooled features (`kmine.ops.coverage`); near-duplicates count as one image. The gain of an image in which
    nothing was found is the share of such validation images that have an object, or 1 where its label reports one.

    Raises:
        UserError: no such image, or fewer than `count`; weights that are missing.
    """
    ids, group_of, locate = dropped_or_doubtful(audited), audited.task.unlabeled.group_of, audited.source.slice_location
    groups = [f"{at[0]} {at[2] // NEAR_SLICES}" if (at := locate(i)) else group_of(i) for i in ids]
    where, available = f"round {audited.audited_round.round_idx} of {audited.store.root}", len({*groups})
    if not ids:
        found = f"found none among {len(audited.task.unlabeled)} unlabeled ones"
        raise UserError(f"expected images that {where} dropped or doubts, {found}; check its masks with kmine audit")
    if count > available:
        alike = f", {available} without near-duplicates" if available < len(ids) else ""
        why = f"{where} dropped or doubts {len(ids)} images{alike}"
        raise UserError(f"-n {count}: expected at most {available}, as {why}; choose -n {available}")
    doubts, features = zip(*_doubts(audited, ids), strict=True)
    gains = np.array([gain for gain, *_ in doubts])
    rows, out = audited.audited_round.decisions, []
    for rank, (n, number) in enumerate(choose_covering(gains, np.stack(features), groups, count), start=1):
        reasons = dict.fromkeys(row.reason for row in rows.get(ids[n], []))
        out.append(NextImage(rank, ids[n], group_of(ids[n]), *doubts[n], number, " ".join(reasons)))
    return out


def dropped_or_doubtful(audited: AuditedRun) -> list[str]:
    """Unlabeled images without a pseudo mask in the audited round, or with a doubtful one.

    Doubtful is a mask that a reviewer rejected, one with a dropped object, or one whose mean estimated Dice is below
    the gate's target. Images that are known to be free of lesions, or have a mask that a reviewer accepted or drew, are
    left out.
    """
    file, mined, pool = audited.store.root / FILE, audited.audited_round, audited.task.unlabeled
    verdicts = read_verdicts(file) if file.exists() else None
    done, rejected = ({*verdicts.accepted, *verdicts.corrected}, verdicts.rejected) if verdicts else (set(), set())

    def is_wanted(sample_id: str) -> bool:
        rows = mined.decisions.get(sample_id, [])
        settled = {"accepted", LESION_FREE}.intersection(row.reason for row in rows)
        if sample_id in done or settled or pool.image_label(sample_id) == 0:
            return False
        is_doubtful = mined.mean_estimate(sample_id) < audited.task.cfg.gate.target_dice if rows else True
        return sample_id in rejected or is_doubtful or not all(row.kept for row in rows)

    return [sample_id for sample_id in pool.ids if is_wanted(sample_id)]


def _doubts(
    audited: AuditedRun, ids: Sequence[str]
) -> Iterator[tuple[tuple[float, float, float, float], NDArray[np.float32]]]:
    """Of each image (gain, estimated Dice, disagreement, flips) and the (C,) features of the kept local model."""
    task, mined, kept = audited.task, audited.audited_round, int(audited.info.get("adopted_round", 0))
    model = load_round_model(task, number=kept)
    if model is None:
        raise UserError(f"{task.run.round_dir(kept)}: expected the weights of the kept model, found none; {CURE}")
    segmented = task.unlabeled.with_masks(ids, partial(mask_of_round, audited, of="segmenter"))
    tta, done, missed = TTA_OF_FLIPS[task.cfg.fit.flips], 0, _missed_share(task, model)
    task.progress.start("images to label next", len(ids))
    for batch, images in resized_batches(task.unlabeled, ids, BATCH_SIZE):
        probs, std = predict_resized(model, images, tta, task.fabric.device)
        features = model.pooled_features(image_tensor(images, task.fabric.device)).cpu().numpy()
        for sample_id, p, s, vector in zip(batch, probs, std, features, strict=True):
            local, other = _foreground(most_probable(p)), _foreground(segmented.mask_resized(sample_id))
            estimate = nanmean([row.estimated_dice for row in mined.decisions.get(sample_id, [])])
            flips = min(1.0, 2 * float(s[0][local].mean())) if local.any() and tta != "none" else math.nan
            disagreement = 1 - dice(local, other)
            known = nanmean([1 - estimate, disagreement, flips])
            silent = 1.0 if task.unlabeled.image_label(sample_id) else missed
            yield (silent if math.isnan(known) else known, estimate, disagreement, flips), vector
        task.progress.advance(done := done + len(batch))


def _missed_share(task: Task, model: LocalModel) -> float:
    """Share with an object of the validation images in which the model finds nothing.

    The share of labeled images with an object counts as one more such image, and alone where the model is never silent.
    """
    truth = [float(_foreground(task.labeled.mask_resized(i)).any()) for i in task.labeled.ids]
    found = [float(np.mean(truth))]
    for batch, images in resized_batches(task.val, task.val.ids, BATCH_SIZE):
        probs, _ = predict_resized(model, images, "none", task.fabric.device)
        silent = [i for i, p in zip(batch, probs, strict=True) if not most_probable(p).any()]
        found += [float(_foreground(task.val.mask_resized(i)).any()) for i in silent]
    return float(np.mean(found))


def mask_of_round(audited: AuditedRun, sample_id: str, of: MaskName = "used") -> NDArray[np.uint8]:
    """(H, W) class ids of all objects that the round found in an image, dropped ones included; nothing is ignored."""
    objects = audited.audited_round.objects(sample_id) if sample_id in audited.audited_round.decisions else []
    return class_map(objects, audited.task.unlabeled.native_shape(sample_id), of)


def _foreground(mask: NDArray[np.uint8]) -> Bool:
    return (mask != 0) & (mask != IGNORE_INDEX)


def write_next(audited: AuditedRun, chosen: Sequence[NextImage], out: Path, formats: Sequence[str]) -> list[Path]:
    """Write next.csv, next.png, pictures and the tasks of `formats` below `out`; returns table, sheet and tasks.

    A task holds the mask of the round, dropped objects included, as a prediction to be corrected.
    """
    rows = [[round(v, 4) if isinstance(v, float) else v for v in image] for image in chosen]
    write_csv(out / "next.csv", NextImage._fields, ([None if v != v else v for v in row] for row in rows))
    pool, mined, exported, tiles = audited.task.unlabeled, audited.audited_round, [], []
    for image in chosen:
        mask, picture = mask_of_round(audited, image.sample_id), f"pictures/{picture_name(image.sample_id)}.jpg"
        write_picture(out / picture, pool, image.sample_id)
        origin = (round(image.gain, 4), image.rank, mined.signature, mined.round_idx)
        exported.append(ExportedMask(image.sample_id, "pseudo", mask, picture, *origin))
        text = f"gain {image.gain:.2f}, Dice {image.estimated_dice:.2f}, {image.reason}"
        tiles.append(Tile(pool.sample(image.sample_id).image, mask, f"{image.rank}. {image.sample_id}", text))
    write_atomic(out / "next.png", contact_sheet(tiles))
    names = audited.source.class_names
    if "labelstudio" in formats:
        write_label_studio(out / FORMATS["labelstudio"], exported, names)
    if "cvat" in formats:
        write_coco(out / FORMATS["cvat"], exported, names, f"kmine next of {audited.name}")
    return [out / "next.csv", out / "next.png", *(out / FORMATS[name] for name in formats)]

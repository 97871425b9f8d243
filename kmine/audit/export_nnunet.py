"""Export of a run as a data set of nnU-Net v2: given masks and pseudo masks, doubtful pixels as its ignore label.

nnU-Net so trains its own model on what was mined. https://github.com/MIC-DKFZ/nnUNet, documentation/dataset_format.md
and ignore_label.md. The test split is left out, and so are unlabeled images without a pseudo mask.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kmine.audit.rounds import AuditedRun
from kmine.data.datasets.nnunet import Nnunet
from kmine.data.datasets.nnunet_index import CT, IGNORE
from kmine.data.io.nifti_header import is_gzip
from kmine.data.io.volume_masks import write_mask_volume
from kmine.data.pool import Pool
from kmine.data.source import Source
from kmine.errors import UserError
from kmine.feedback.expected import picture_name
from kmine.io.errors import user_errors
from kmine.io.files import atomic_open, write_atomic
from kmine.types import IGNORE_INDEX

NUMBER = 501
"""nnU-Net tells data sets apart by their numbers; its documentation leaves those above 500 to users' own."""


def export_nnunet(audited: AuditedRun, out: Path) -> Path:
    """Write the folder DatasetNNN_NAME into `out`/nnunet, to be moved into nnUNet_raw; returns it.

    NIfTI volumes are copied as they are, slices without a mask are ignored; images are written as kmine reads them.
    Beside dataset.json lies splits_final.json, for the data set's folder in nnUNet_preprocessed: its only fold has the
    run's validation images as validation.

    Raises:
        UserError: images and volumes in one run, or a folder that cannot be written.
    """
    name = re.sub(r"[^A-Za-z0-9]+", "", audited.name) or "kmine"
    folder, source = out / "nnunet" / f"Dataset{NUMBER}_{name}", audited.source
    cases = _cases(audited)
    is_volume = {source.slice_location(ids[0]) is not None for ids in cases.values()}
    if len(is_volume) > 1:
        raise UserError(f"{audited.name}: nnU-Net takes images or volumes, got both in one run; train them apart")
    write = _write_volume if is_volume == {True} else _write_picture
    with user_errors(folder):
        for part in ("imagesTr", "labelsTr"):
            shutil.rmtree(folder / part, ignore_errors=True)  # of an earlier export
        has_ignored = [write(folder, case, ids, audited) for case, ids in cases.items()]
    _write_dataset_json(folder, source, cases, ending=_ENDINGS[write], ignores=any(has_ignored))
    val = {*audited.task.val.ids}
    of_val = [case for case, ids in cases.items() if ids[0] in val]
    split = {"train": [case for case, ids in cases.items() if ids[0] not in val], "val": of_val}
    write_atomic(folder / "splits_final.json", json.dumps([split], indent=1).encode())
    return folder


def _cases(audited: AuditedRun) -> dict[str, list[str]]:
    """Sample ids by name of the case: slices of a volume together."""
    task, cases = audited.task, dict[str, list[str]]()
    for sample_id in sorted((*task.labeled.ids, *task.val.ids, *audited.audited_round.pseudo_labeled)):
        place = audited.source.slice_location(sample_id)
        cases.setdefault(picture_name(place.volume if place else sample_id), []).append(sample_id)
    return cases


def _pool_and_mask(audited: AuditedRun, sample_id: str) -> tuple[Pool, NDArray[np.uint8]]:
    """The pool of a sample, and its (H, W) class ids and 255."""
    for pool in (audited.task.labeled, audited.task.val):
        if sample_id in pool:
            mask = pool.sample(sample_id).mask
            assert mask is not None, "opened with masks"
            return pool, mask
    return audited.task.unlabeled, audited.read("pseudo")(sample_id)


def _write_picture(folder: Path, case: str, ids: Sequence[str], audited: AuditedRun) -> bool:
    """One image as RGB, and its label; returns whether pixels are ignored."""
    pool, mask = _pool_and_mask(audited, ids[0])
    stored, ignored = _labels(mask, audited.source)
    for path, pixels in (
        (folder / "imagesTr" / f"{case}_0000.png", pool.sample(ids[0]).image),
        (folder / "labelsTr" / f"{case}.png", stored),
    ):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "png")
        write_atomic(path, buffer.getvalue())
    return ignored


def _write_volume(folder: Path, case: str, ids: Sequence[str], audited: AuditedRun) -> bool:
    """A volume with the labels of its slices; returns whether voxels are ignored."""
    source, slices = audited.source, dict[int, NDArray[np.uint8]]()
    for sample_id in ids:
        place = source.slice_location(sample_id)
        assert place is not None, "slices of one volume"
        scan, slices[place.number] = place.path, _pool_and_mask(audited, sample_id)[1]
    channels = source.channel_files(ids[0]) if isinstance(source, Nnunet) else (scan,)
    for number, path in enumerate(channels):
        with atomic_open(folder / "imagesTr" / f"{case}_{number:04}.nii.gz") as target, path.open("rb") as stored:
            if is_gzip(path):
                shutil.copyfileobj(stored, target)
            else:
                with gzip.GzipFile("", "wb", 1, target, mtime=0) as packed:
                    shutil.copyfileobj(stored, packed)
    ignore = len(source.class_names)
    target = folder / "labelsTr" / f"{case}.nii.gz"
    depth = write_mask_volume(target, scan, {n: _labels(m, source)[0] for n, m in slices.items()}, fill=ignore)
    return depth > len(slices) or any((mask == IGNORE_INDEX).any() for mask in slices.values())


def _labels(mask: NDArray[np.uint8], source: Source) -> tuple[NDArray[np.uint8], bool]:
    """The mask with the ignore label in place of 255, and whether it has any."""
    ignored = mask == IGNORE_INDEX
    return np.where(ignored, np.uint8(len(source.class_names)), mask), bool(ignored.any())


def _write_dataset_json(
    folder: Path, source: Source, cases: Mapping[str, object], *, ending: str, ignores: bool
) -> None:
    """Channels have the names by which nnU-Net chooses their normalization: CT by the data set's values, others each
    by its own."""
    of_volumes = source.channel_names if isinstance(source, Nnunet) else (CT if source.name == "lits" else "image",)
    names = of_volumes if ending == ".nii.gz" else ("R", "G", "B")
    labels = {name: number for number, name in enumerate(source.class_names)}
    value = {
        "channel_names": {str(number): name for number, name in enumerate(names)},
        "labels": labels | ({IGNORE: len(labels)} if ignores else {}),
        "numTraining": len(cases),
        "file_ending": ending,
    }
    write_atomic(folder / "dataset.json", json.dumps(value, indent=1).encode())


_ENDINGS = {_write_picture: ".png", _write_volume: ".nii.gz"}

"""Export of masks for other tools: COCO, PNG and NIfTI files, Label Studio; read by `kmine.feedback.corrections`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kmine.audit.evidence import class_masks
from kmine.audit.export_dicom_seg import write_dicom_segs
from kmine.audit.export_nnunet import export_nnunet
from kmine.audit.history import write_picture
from kmine.audit.reports import MaskReport
from kmine.audit.rounds import AuditedRun
from kmine.data.io.volume_masks import write_mask_volume
from kmine.data.source import Source
from kmine.feedback import label_studio_rle
from kmine.feedback.expected import IGNORED, picture_name
from kmine.io.errors import user_errors
from kmine.io.files import atomic_open, encode_png, safe_name, write_atomic
from kmine.ops.masks import tight_box, to_rle
from kmine.types import IGNORE_INDEX


class ExportedMask(NamedTuple):
    """One mask to export."""

    sample_id: str
    kind: str
    mask: NDArray[np.uint8]
    """(H, W) class ids and 255."""
    picture: str
    """Path of the image, relative to the exported file."""
    suspicion: float
    rank: int
    signature: str
    round_idx: int


def export_masks(audited: AuditedRun, what: str, out: Path, sets: Sequence[Sequence[MaskReport]]) -> Path:
    """Write the reported masks below `out` as `what` (see `kmine audit --help`); returns the file or folder."""
    names, mined = audited.source.class_names, audited.audited_round

    def masks() -> Iterator[ExportedMask]:
        # Slices of a volume in sequence; a report at a time, as all would fill the memory.
        places = sorted((own[n].sample_id, kind, n) for kind, own in enumerate(sets) for n in range(len(own)))
        for report in (sets[kind][n] for _, kind, n in places):
            mask, suspicion = audited.read(report.kind)(report.sample_id), round(report.suspicion, 4)
            picture = f"pictures/{picture_name(report.sample_id)}.jpg"
            if what in ("coco", "labelstudio"):  # whose files name the pictures; the page shows but some
                write_picture(out / picture, audited.pool(report.kind), report.sample_id)
            signature, number = (mined.signature, mined.round_idx) if report.kind == "pseudo" else ("", 0)
            yield ExportedMask(report.sample_id, report.kind, mask, picture, suspicion, report.rank, signature, number)

    if what == "coco":
        return write_coco(out / "coco.json", masks(), names, f"kmine audit of {audited.store.root.name}")
    if what == "dicomseg":
        return write_dicom_segs(out / "dicomseg", ((e.sample_id, e.mask) for e in masks()), audited.source)
    if what == "nnunet":
        return export_nnunet(audited, out)
    if what == "labelstudio":
        return write_label_studio(out / "labelstudio.json", masks(), names)
    return write_masks(out / "masks", masks(), audited.source)


def write_coco(path: Path, masks: Iterable[ExportedMask], class_names: Sequence[str], description: str) -> Path:
    """Write a COCO file: one annotation per class of an image, as lossless run lengths.

    An image without annotations has an empty mask. Ignored pixels are a category of their own, as a crowd. Images have
    the extra keys `sample_id`, `kind`, `suspicion` and `rank`.
    """
    names = {**{n: name for n, name in enumerate(class_names) if n}, IGNORE_INDEX: IGNORED}
    categories = [{"id": n, "name": name} for n, name in names.items()]
    annotations: list[str] = []  # as text, since thousands of dicts would fill the memory
    with atomic_open(path, "w") as file:
        file.write(f'{{"info": {json.dumps({"description": description})},\n"categories": {json.dumps(categories)},\n')
        file.write('"images": [')
        for number, exported in enumerate(masks, start=1):
            height, width = exported.mask.shape
            extra = {name: getattr(exported, name) for name in ("sample_id", "kind", "suspicion", "rank")}
            image = {"id": number, "file_name": exported.picture, "height": height, "width": width, **extra}
            file.write(f"{',' * (number > 1)}\n{json.dumps(image)}")
            for class_id, region in class_masks(exported.mask):
                annotations.append(json.dumps(_annotation(len(annotations) + 1, number, class_id, region)))
        file.write('],\n"annotations": [\n' + ",\n".join(annotations) + "]}\n")
    return path


def _annotation(number: int, image_id: int, class_id: int, region: NDArray[np.bool_]) -> dict[str, Any]:
    x0, y0, x1, y1 = map(int, tight_box(region))
    return {
        "id": number,
        "image_id": image_id,
        "category_id": class_id,
        "segmentation": {"size": list(region.shape), "counts": to_rle(region)},
        "area": int(region.sum()),
        "bbox": [x0, y0, x1 - x0 + 1, y1 - y0 + 1],
        "iscrowd": int(class_id == IGNORE_INDEX),
    }


def write_masks(folder: Path, masks: Iterable[ExportedMask], source: Source) -> Path:
    """Write ID.png of class ids and 255; slices of a volume together as NAME.nii.gz in the geometry of the scan.

    Slices without a mask are ignored (255) as a whole. The masks of a volume must be in sequence.
    """
    located = ((source.slice_location(exported.sample_id), exported) for exported in masks)
    for volume, parts in groupby(located, key=lambda pair: pair[0] and pair[0][:2]):
        if volume is None:
            for _, exported in parts:
                data = encode_png(exported.mask, exported.signature, exported.round_idx, palette=True)
                write_atomic(folder / f"{safe_name(exported.sample_id)}.png", data)
            continue
        name, scan = volume
        with user_errors(folder):
            write_mask_volume(folder / f"{safe_name(name)}.nii.gz", scan, {at[2]: mined.mask for at, mined in parts})
    return folder


def write_label_studio(path: Path, masks: Iterable[ExportedMask], class_names: Sequence[str]) -> Path:
    """Write tasks with one prediction each: a brush stroke per class, encoded by `kmine.feedback.label_studio_rle`.

    `data.image` is the path of the picture relative to the file; replace it by the URL at which Label Studio finds it.
    Labels of `<BrushLabels name="tag" toName="image">` are the class names and `ignored`.
    """
    names = {**{n: name for n, name in enumerate(class_names) if n}, IGNORE_INDEX: IGNORED}
    with atomic_open(path, "w") as file:
        file.write("[")
        for number, exported in enumerate(masks):
            file.write(",\n" if number else "\n")
            json.dump(_task(exported, names), file)
        file.write("\n]\n")
    return path


def _task(exported: ExportedMask, names: dict[int, str]) -> dict[str, Any]:
    height, width = exported.mask.shape
    fixed = {"type": "brushlabels", "from_name": "tag", "to_name": "image", "origin": "manual", "image_rotation": 0}
    fixed |= {"original_width": width, "original_height": height}
    values = {
        class_id: {"format": "rle", "rle": label_studio_rle.encode(region), "brushlabels": [names[class_id]]}
        for class_id, region in class_masks(exported.mask)
    }
    strokes = [{"id": f"class{class_id}", **fixed, "value": value} for class_id, value in values.items()]
    keys = {name: getattr(exported, name) for name in ("sample_id", "kind", "suspicion")}
    score = {"model_version": exported.signature or "given", "score": round(1 - exported.suspicion, 4)}
    return {"data": {"image": exported.picture, **keys}, "predictions": [{**score, "result": strokes}]}

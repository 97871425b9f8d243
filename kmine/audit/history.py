"""The history of each mask over the rounds, as rows of audit.csv and as items of the page."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from kmine.audit.evidence import class_masks
from kmine.audit.ranking import WEIGHTS
from kmine.audit.reports import MaskReport
from kmine.audit.rounds import AuditedRun, MinedRound, read_mask_of
from kmine.data.pool import Pool
from kmine.feedback.expected import picture_name
from kmine.io.files import write_atomic
from kmine.mining.crossfit import unlabeled_parts
from kmine.ops import metrics
from kmine.ops.masks import from_rle, to_rle
from kmine.report.audit.page import AuditItem, Layer
from kmine.report.panels import encode_picture
from kmine.store.tables import DecisionRow
from kmine.types import EVIDENCE_COLUMNS, IGNORE_INDEX

SCORES = (*EVIDENCE_COLUMNS, "estimated_dice", "estimated_segmenter", "estimated_local")
"""Scores of an object, from decisions.parquet; in audit.csv the mean over the kept objects."""
COLUMNS = (
    *("sample_id", "kind", "rank", "suspicion", "causes", "group_id", "image_label", "classes", "height", "width"),
    *("area", "ignored", "round", "entered", "rounds_taught", "num_objects", "num_kept", "reason", "source", *SCORES),
    *("dice_with_round_before", *(f"signal_{name}" for name in WEIGHTS), "otherwise", "outside", "asked_models"),
    *("asked_by", "made_by", "model_signature", "model_sha256", "segmenter", "segmenter_sha256", "mask_signature"),
    "withheld_dice",
)
"""Columns of audit.csv, which has one row per mask."""
PAGE_COLUMNS = (
    *("group_id", "image_label", "classes", "area", "ignored", "entered", "rounds_taught", "num_objects", "reason"),
    *("source", "estimated_dice", "agreement_iou", "jitter_dice", "predicted_iou", "stability_score"),
    *("dice_with_round_before", "withheld_dice"),
    *(f"signal_{name}" for name in WEIGHTS),
)
"""Columns shown on the page."""
REPORTED_SCORES = ("predicted_iou", "stability_score", "agreement_iou", "jitter_dice", "tta_std", "estimated_dice")
"""Scores in a line of the history."""
SHARED_FIELDS = ("sample_id", "kind", "rank", "suspicion", "explanations", "height", "width")
"""Fields that an item of the page has from the report on its mask."""
Truth = Mapping[str, float]
"""Dice with the withheld mask by sample id."""


class MaskHistory:
    """Rows, history lines and page items of the masks of an audited run."""

    def __init__(self, audited: AuditedRun) -> None:
        self._audited, self._round = audited, audited.audited_round
        self._class_names = audited.source.class_names
        self._segmenter = str(audited.info.get("segmenter", "the segmenter"))
        self._rounds_so_far = [mined for mined in audited.rounds if mined.round_idx <= self._round.round_idx]
        parts = enumerate(unlabeled_parts(audited.task))
        self._part_dirs = {sample_id: f"part_{part}" for part, ids in parts for sample_id in ids}
        self._weights = cache(lambda folder: audited.store.weights_signature(folder / "model.safetensors"))

    def row(self, report: MaskReport, truth: Truth | None = None) -> dict[str, Any]:
        """Values by the names of `COLUMNS`; None if unknown."""
        pool = self._audited.pool(report.kind)
        values = {
            **{name: getattr(report, name) for name in ("sample_id", "kind", "rank", "suspicion")},
            "causes": "; ".join(report.explanations),
            "group_id": pool.group_of(report.sample_id),
            "image_label": pool.image_label(report.sample_id),
            "classes": " ".join(self._class_names[k] for k in report.classes),
            **{name: getattr(report, name) for name in ("height", "width", "area", "ignored")},
            **{f"signal_{name}": report.signals.get(name) for name in WEIGHTS},
            "otherwise": report.conflict and report.conflict.mislabeled,
            "outside": report.conflict and report.conflict.missed,
            "asked_models": " ".join(report.model_names),
            "mask_signature": report.signature,
            "withheld_dice": (truth or {}).get(report.sample_id),
        }
        values |= self._mined_values(report.sample_id) if report.kind == "pseudo" else {}
        return {name: _csv_value(values.get(name)) for name in COLUMNS}

    def _mined_values(self, sample_id: str) -> dict[str, Any]:
        mined, kept = self._round, self._round.kept_objects(sample_id)
        training_rounds = [p for p in self._rounds_so_far if p.has_pseudo_mask(sample_id)]
        method_dir, signature, sha256 = self._prompting_model(mined, sample_id)
        scores = [row.to_arrow() for row in kept]
        return {
            "round": mined.round_idx,
            "entered": training_rounds[0].round_idx,
            "rounds_taught": " ".join(str(p.round_idx) for p in training_rounds),
            "num_objects": len(mined.objects(sample_id)),
            "num_kept": len(kept),
            "reason": " ".join(dict.fromkeys(row.reason for row in kept)) or mined.decisions[sample_id][0].reason,
            "source": " ".join(dict.fromkeys(str(row.source) for row in kept)),
            **{name: metrics.nanmean([row[name] for row in scores]) for name in SCORES},
            "dice_with_round_before": self._dice_with_previous(sample_id, mined),
            "asked_by": f"{method_dir}/round_{mined.prompting_round:02}".lstrip("/"),
            "made_by": mined.signature,
            "model_signature": signature,
            "model_sha256": sha256,
            "segmenter": self._segmenter,
            "segmenter_sha256": str(self._audited.info.get("segmenter_sha256", "")),
        }

    def _prompting_model(self, mined: MinedRound, sample_id: str) -> tuple[str, str, str]:
        """Folder (empty: the loop's own), signature and SHA-256 of the weights that prompted an image."""
        method_dir = self._part_dirs.get(sample_id, "") if mined.prompting_round else ""
        return method_dir, *self._weights(self._audited.store.round_dir(mined.prompting_round, method_dir))

    def _dice_with_previous(self, sample_id: str, mined: MinedRound) -> float:
        """Dice of a pseudo mask with that of the previous round; NaN without either."""
        before = (p for p in self._audited.rounds if p.round_idx == mined.round_idx - 1)
        pair = [p for p in (*before, mined) if p.has_pseudo_mask(sample_id)]
        if len(pair) < 2:
            return math.nan
        masks = (self._audited.task.pseudo_mask(p.round_idx, sample_id) for p in pair)
        return metrics.dice(*((mask != 0) & (mask != IGNORE_INDEX) for mask in masks))

    def lines(self, report: MaskReport) -> tuple[str, ...]:
        """One line per round for a pseudo mask; the models compared with for a given mask."""
        if report.kind != "pseudo":
            return (f"given; compared with: {', '.join(report.model_names) or 'no model, all were trained on it'}",)
        return tuple(self._line(p, report.sample_id) for p in self._rounds_so_far if report.sample_id in p.decisions)

    def _line(self, mined: MinedRound, sample_id: str) -> str:
        method_dir, signature, sha256 = self._prompting_model(mined, sample_id)
        rows, prompts = mined.objects(sample_id), mined.prompts.get(sample_id, [])
        by_person = sum(row.origin == "person" for row in prompts)
        drawn = f", {by_person} from prompts of a person, the others" if by_person else ""
        parts = [
            f"round {mined.round_idx}: {len(prompts)} prompted object(s){drawn} by the model of round "
            f"{mined.prompting_round} "
            f"({method_dir}{method_dir and ', '}{signature[:8]}, weights {sha256[:8]}), segmenter {self._segmenter}",
            *([self._object_text(row) for row in rows] or [mined.decisions[sample_id][0].reason]),
            "used in training" if mined.has_pseudo_mask(sample_id) else "not used in training",
        ]
        dice = self._dice_with_previous(sample_id, mined)
        if not math.isnan(dice):
            parts.append("mask unchanged" if dice == 1 else f"Dice {dice:.2f} with the mask of the previous round")
        return "; ".join(parts)

    def _object_text(self, row: DecisionRow) -> str:
        values = row.to_arrow()
        known = [name for name in REPORTED_SCORES if not math.isnan(metrics.nanmean([values[name]]))]
        scores = ", ".join(f"{name.replace('_', ' ')} {values[name]:.2f}" for name in known)
        owner = {"local": "the local model", "segmenter": "the segmenter"}.get(str(row.source)) if row.kept else ""
        used = f", mask of {owner}" if owner else ""
        return f"object {row.object_idx} ({self._class_names[row.class_id]}): {row.reason}{used} ({scores})"

    def items(
        self, reports: Sequence[MaskReport], folder: Path, truth: Truth | None, withheld: Pool | None
    ) -> Iterator[AuditItem]:
        """Items of the page, one image in memory at a time; pictures that `folder` lacks are written."""
        for report in reports:
            picture = f"pictures/{picture_name(report.sample_id)}.jpg"
            write_picture(folder / picture, self._audited.pool(report.kind), report.sample_id)
            facts = self.row(report, truth)
            prompts = self._round.prompts.get(report.sample_id, []) if report.kind == "pseudo" else []
            yield AuditItem(
                **{name: getattr(report, name) for name in SHARED_FIELDS},
                picture=picture,
                layers=tuple(self._layers(report, withheld)),
                prompts=tuple(row.to_prompts() for row in prompts),
                facts={name: facts[name] for name in PAGE_COLUMNS},
                history=self.lines(report),
                mask_signature=report.signature,
            )

    def _layers(self, report: MaskReport, withheld: Pool | None) -> Iterator[Layer]:
        mined = report.kind == "pseudo"
        yield from _mask_layers("pseudo" if mined else "given", self._audited.read(report.kind)(report.sample_id))
        if mined:
            rows = self._round.objects(report.sample_id)
            yield from (*_object_layers("local", rows), *_object_layers("segmenter", rows))
        size = self._audited.task.cfg.data.size
        for class_id, rle in report.predicted_rle.items():
            small = from_rle(rle, size, size).astype(np.uint8)
            resized = cv2.resize(small, (report.width, report.height), interpolation=cv2.INTER_NEAREST_EXACT)
            yield Layer("model", class_id, to_rle(resized.astype(bool)))
        if withheld is not None and mined and report.sample_id in withheld:
            yield from _mask_layers("withheld", read_mask_of(withheld, report.sample_id))


def _mask_layers(name: str, mask: NDArray[np.uint8]) -> Iterator[Layer]:
    yield from (Layer(name, class_id, to_rle(region)) for class_id, region in class_masks(mask))


def _object_layers(name: Literal["local", "segmenter"], rows: Sequence[DecisionRow]) -> Iterator[Layer]:
    """The union of the objects of each class; a single object is passed on undecoded."""
    for class_id in dict.fromkeys(row.class_id for row in rows):
        own = [row for row in rows if row.class_id == class_id]
        single = own[0].local_rle if name == "local" else own[0].segmenter_rle
        rle = single if len(own) == 1 else to_rle(np.any([row.mask(name) for row in own], axis=0))
        yield Layer(name, class_id, rle)


def write_picture(path: Path, pool: Pool, sample_id: str) -> None:
    """Write the image of a sample as a JPEG file, unless it is there."""
    if not path.exists():
        write_atomic(path, encode_picture(pool.sample(sample_id).image, ".jpg", (cv2.IMWRITE_JPEG_QUALITY, 90)))


def _csv_value(value: Any) -> Any:
    """Four decimals; None for NaN, infinity and empty text."""
    if isinstance(value, float):
        return round(value, 4) if math.isfinite(value) else None
    return None if value == "" else value

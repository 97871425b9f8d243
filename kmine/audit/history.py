"""The story of each mask, round by round: as rows of audit.csv, and as items of the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from kmine.audit.evidence import MaskReport, MinedRound, Row
from kmine.audit.ranking import WEIGHTS
from kmine.data.pool import Pool
from kmine.feedback.corrections import picture_name
from kmine.io.files import write_atomic
from kmine.ops import metrics
from kmine.ops.masks import from_rle, to_rle
from kmine.report.audit.page import AuditItem, Layer
from kmine.store.run_folder import RunFolder
from kmine.training.task import Task
from kmine.types import IGNORE_INDEX, Prompts

SCORES = (
    *("predicted_iou", "stability_score", "agreement_iou", "jitter_dice", "confidence_inside", "confidence_outside"),
    *("area_ratio", "tta_std", "witness_dice", "estimated_dice", "estimated_segmenter", "estimated_local"),
)
"""Of an object, from the table of decisions; in audit.csv the mean over the objects that were kept."""
COLUMNS = (
    *("sample_id", "kind", "rank", "suspicion", "causes", "group_id", "image_label", "classes", "height", "width"),
    *("area", "ignored", "round", "entered", "rounds_taught", "num_objects", "num_kept", "reason", "source", *SCORES),
    *("dice_with_round_before", *(f"signal_{name}" for name in WEIGHTS), "otherwise", "outside", "asked_models"),
    *("asked_by", "made_by", "model_signature", "model_sha256", "segmenter", "segmenter_sha256", "mask_signature"),
    "withheld_dice",
)
"""Of audit.csv, one row a mask."""
PAGE_COLUMNS = ("group_id", "image_label", "classes", "area", "ignored", "entered", "rounds_taught", "num_objects", "reason",
         "source", "estimated_dice", "agreement_iou", "jitter_dice", "predicted_iou", "stability_score",
         "dice_with_round_before", "withheld_dice")  # fmt: skip
"""Columns that the page shows beside the signals."""
Truth = Mapping[str, float]
"""True Dice by sample, where the withheld masks were opened."""


@dataclass(frozen=True)
class MaskHistory:
    """What it takes to tell the story of any mask of a run."""

    task: Task
    store: RunFolder
    rounds: Sequence[MinedRound]
    audited_round: MinedRound
    class_names: Sequence[str]
    segmenter: str
    segmenter_sha256: str
    models: Mapping[int, tuple[str, str]]
    """By round: signature of its training, and SHA-256 of its weights file."""

    def training_rounds(self, sample_id: str) -> list[MinedRound]:
        """The rounds up to the audited one in which an image taught."""
        return [p for p in self.rounds if p.round_idx <= self.audited_round.round_idx and _in_training(p, sample_id)]

    def row(self, report: MaskReport, truth: Truth | None = None) -> dict[str, Any]:
        """By the names of `COLUMNS`; None where there is nothing to say."""
        pool = self.task.unlabeled if report.kind == "pseudo" else self.task.labeled
        values = {
            "sample_id": report.sample_id,
            "kind": report.kind,
            "rank": report.rank,
            "suspicion": report.suspicion,
            "causes": "; ".join(report.explanations),
            "group_id": pool.group_of(report.sample_id),
            "image_label": pool.image_label(report.sample_id),
            "classes": " ".join(self.class_names[k] for k in report.classes),
            **{name: getattr(report, name) for name in ("height", "width", "area", "ignored")},
            **{f"signal_{name}": report.signals.get(name) for name in WEIGHTS},
            "otherwise": report.conflict and report.conflict.mislabeled,
            "outside": report.conflict and report.conflict.missed,
            "asked_models": " ".join(report.model_names),
            "mask_signature": report.signature,
            "withheld_dice": (truth or {}).get(report.sample_id),
        }
        values |= self._mined(report) if report.kind == "pseudo" else {}
        return {name: _plain(values.get(name)) for name in COLUMNS}

    def _mined(self, report: MaskReport) -> dict[str, Any]:
        rows = [row for row in self.audited_round.decisions[report.sample_id] if row["object_idx"] >= 0]
        kept, used_in = [row for row in rows if row["kept"]], self.training_rounds(report.sample_id)
        signature, sha256 = self.models.get(self.audited_round.prompting_round, ("", ""))
        return {
            "round": self.audited_round.round_idx,
            "entered": used_in[0].round_idx,
            "rounds_taught": " ".join(str(p.round_idx) for p in used_in),
            "num_objects": len(rows),
            "num_kept": len(kept),
            "reason": " ".join(dict.fromkeys(row["reason"] for row in kept)) or self._first_reason(report),
            "source": " ".join(dict.fromkeys(str(row["source"]) for row in kept)),
            **{name: _mean([row[name] for row in kept]) for name in SCORES},
            "dice_with_round_before": self._dice_with_previous(report.sample_id, self.audited_round),
            "asked_by": f"round_{self.audited_round.prompting_round:02}",
            "made_by": self.audited_round.signature,
            "model_signature": signature,
            "model_sha256": sha256,
            "segmenter": self.segmenter,
            "segmenter_sha256": self.segmenter_sha256,
        }

    def _first_reason(self, report: MaskReport) -> str:
        return str(self.audited_round.decisions[report.sample_id][0]["reason"])

    def _dice_with_previous(self, sample_id: str, mined_round: MinedRound) -> float:
        """Dice of a pseudo mask with that of the round before; NaN where there was none."""
        previous = next(
            (p for p in self.rounds if p.round_idx == mined_round.round_idx - 1 and _in_training(p, sample_id)), None
        )
        if previous is None or not _in_training(mined_round, sample_id):
            return math.nan
        pair = [self.store.pseudo_mask(p.round_idx, sample_id) for p in (previous, mined_round)]
        return metrics.dice(*((mask != 0) & (mask != IGNORE_INDEX) for mask in pair))

    def history(self, report: MaskReport) -> tuple[str, ...]:
        """One line a round for a pseudo mask; for a given mask who was asked about it."""
        if report.kind != "pseudo":
            return (f"given; asked about it: {', '.join(report.model_names) or 'no model, for all learned it'}",)
        return tuple(
            self._line(p, report.sample_id)
            for p in self.rounds
            if p.round_idx <= self.audited_round.round_idx and report.sample_id in p.decisions
        )

    def _line(self, mined_round: MinedRound, sample_id: str) -> str:
        signature, sha256 = self.models.get(mined_round.prompting_round, ("", ""))
        rows = [row for row in mined_round.decisions[sample_id] if row["object_idx"] >= 0]
        prompts = mined_round.prompts.get(sample_id, [])
        by = f"model of round {mined_round.prompting_round} ({signature[:8]}, weights {sha256[:8]})"
        parts = [f"round {mined_round.round_idx}: {by} asked {self.segmenter} about {len(prompts)} object(s)"]
        for row in rows:
            scores = ", ".join(
                f"{name.replace('_', ' ')} {row[name]:.2f}"
                for name in SCORES
                if _is_number(row[name]) and name in REPORTED_SCORES
            )
            mask_source = {"local": ", the local model's mask is used", "segmenter": ", the segmenter's mask is used"}
            used = mask_source.get(str(row["source"]), "") if row["kept"] else ""
            parts.append(
                f"object {row['object_idx']} ({self.class_names[row['class_id']]}): {row['reason']}{used} ({scores})"
            )
        if not rows:
            parts.append(str(mined_round.decisions[sample_id][0]["reason"]))
        parts.append("taught" if _in_training(mined_round, sample_id) else "did not teach")
        dice = self._dice_with_previous(sample_id, mined_round)
        if not math.isnan(dice):
            parts.append(
                "mask as in the round before" if dice == 1 else f"Dice {dice:.2f} with the mask of the round before"
            )
        return "; ".join(parts)

    def items(
        self,
        reports: Sequence[MaskReport],
        read: Mapping[str, Callable[[str], NDArray[np.uint8]]],
        folder: Path,
        truth: Truth | None,
        withheld: Pool | None,
    ) -> Iterator[AuditItem]:
        """For the page, one image at a time; pictures are written below `folder`, those that are there stay.

        `read`: by kind, the reader of a mask.
        """  # fmt: skip
        for report in reports:
            pool = self.task.unlabeled if report.kind == "pseudo" else self.task.labeled
            picture = f"pictures/{picture_name(report.sample_id)}.jpg"
            _write_picture(folder / picture, pool, report.sample_id)
            row = self.row(report, truth)
            mined = report.kind == "pseudo"
            yield AuditItem(
                sample_id=report.sample_id,
                kind=report.kind,  # type: ignore[arg-type]
                rank=report.rank,
                suspicion=report.suspicion,
                explanations=report.explanations,
                picture=picture,
                height=report.height,
                width=report.width,
                layers=tuple(self._layers(report, read[report.kind](report.sample_id), withheld)),
                prompts=tuple(_prompts(p) for p in self.audited_round.prompts.get(report.sample_id, ()))
                if mined
                else (),
                facts={name: row[name] for name in (*PAGE_COLUMNS, *(f"signal_{n}" for n in WEIGHTS))},
                history=self.history(report),
                mask_signature=report.signature,
            )

    def _layers(self, report: MaskReport, mask: NDArray[np.uint8], withheld: Pool | None) -> Iterator[Layer]:
        yield from _of_mask("pseudo" if report.kind == "pseudo" else "given", mask)
        if report.kind == "pseudo":
            rows = [row for row in self.audited_round.decisions[report.sample_id] if row["object_idx"] >= 0]
            for name in ("local", "segmenter"):
                yield from _of_objects(name, rows)
        size = self.task.cfg.data.size
        for class_id, rle in report.predicted_rle.items():
            small = from_rle(rle, size, size).astype(np.uint8)
            resized = cv2.resize(small, (report.width, report.height), interpolation=cv2.INTER_NEAREST_EXACT)
            yield Layer("model", class_id, to_rle(resized.astype(bool)))
        if withheld is not None and report.kind == "pseudo" and report.sample_id in withheld.ids:
            truth = withheld.sample(report.sample_id).mask
            assert truth is not None, "opened with masks"
            yield from _of_mask("withheld", truth)


REPORTED_SCORES = ("predicted_iou", "stability_score", "agreement_iou", "jitter_dice", "tta_std", "estimated_dice")


def _of_mask(name: str, mask: NDArray[np.uint8]) -> Iterator[Layer]:
    for class_id in np.unique(mask).tolist():
        if class_id:
            yield Layer(name, class_id, to_rle(mask == class_id))


def _of_objects(name: str, rows: Sequence[Row]) -> Iterator[Layer]:
    """The objects of each class united; nothing is unpacked where there is but one."""
    for class_id in dict.fromkeys(row["class_id"] for row in rows):
        own = [row for row in rows if row["class_id"] == class_id]
        if len(own) == 1:
            yield Layer(name, class_id, own[0][f"{name}_rle"])
            continue
        masks = [from_rle(row[f"{name}_rle"], row["height"], row["width"]) for row in own]
        yield Layer(name, class_id, to_rle(np.any(masks, axis=0)))


def _write_picture(path: Path, pool: Pool, sample_id: str) -> None:
    if path.exists():
        return
    image = pool.sample(sample_id).image
    done, data = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 90])
    assert done, "8 bits, three channels"
    write_atomic(path, data.tobytes())


def _prompts(row: Row) -> Prompts:
    def array(name: str, dtype: Any) -> Any:
        return None if row[name] is None else np.array(row[name], dtype)

    return Prompts(
        class_id=row["class_id"],
        box=array("box", np.float32),
        point_coords=array("point_coords", np.float32),
        point_labels=array("point_labels", np.int64),
        jittered_boxes=np.array(row["jittered_boxes"] or [], np.float32).reshape(-1, 4),
    )


def _in_training(mined_round: MinedRound, sample_id: str) -> bool:
    rows = mined_round.decisions.get(sample_id)
    return bool(rows and rows[0]["in_training"])


def _is_number(value: Any) -> bool:
    return value is not None and not math.isnan(value)


def _mean(values: Sequence[Any]) -> float:
    known = [value for value in values if _is_number(value)]
    return float(np.mean(known)) if known else math.nan


def _plain(value: Any) -> Any:
    """As the page and the table show it: four digits, None where there is no number."""
    if isinstance(value, float):
        return round(value, 4) if math.isfinite(value) else None
    return None if value == "" else value

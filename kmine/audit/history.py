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

from kmine.audit.evidence import Found, Past, Row
from kmine.audit.ranking import WEIGHTS
from kmine.data.pool import Pool
from kmine.feedback.corrections import picture_name
from kmine.io.files import write_atomic
from kmine.ops import metrics
from kmine.ops.masks import from_rle, to_rle
from kmine.report.audit_inputs import AuditItem, Layer
from kmine.store.run_folder import RunStore
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
SHOWN = ("group_id", "image_label", "classes", "area", "ignored", "entered", "rounds_taught", "num_objects", "reason",
         "source", "estimated_dice", "agreement_iou", "jitter_dice", "predicted_iou", "stability_score",
         "dice_with_round_before", "withheld_dice")  # fmt: skip
"""Columns that the page shows beside the signals."""
Truth = Mapping[str, float]
"""True Dice by sample, where the withheld masks were opened."""


@dataclass(frozen=True)
class Teller:
    """What it takes to tell the story of any mask of a run."""

    task: Task
    store: RunStore
    past: Sequence[Past]
    this: Past
    class_names: Sequence[str]
    segmenter: str
    segmenter_sha256: str
    models: Mapping[int, tuple[str, str]]
    """By round: signature of its training, and SHA-256 of its weights file."""

    def rounds_of(self, sample_id: str) -> list[Past]:
        """The rounds up to the audited one in which an image taught."""
        return [p for p in self.past if p.round_idx <= self.this.round_idx and _teaches(p, sample_id)]

    def row(self, one: Found, truth: Truth | None = None) -> dict[str, Any]:
        """By the names of `COLUMNS`; None where there is nothing to say."""
        pool = self.task.unlabeled if one.kind == "pseudo" else self.task.labeled
        about = {
            "sample_id": one.sample_id,
            "kind": one.kind,
            "rank": one.rank,
            "suspicion": one.suspicion,
            "causes": "; ".join(one.causes),
            "group_id": pool.group_of(one.sample_id),
            "image_label": pool.image_label(one.sample_id),
            "classes": " ".join(self.class_names[k] for k in one.classes),
            **{name: getattr(one, name) for name in ("height", "width", "area", "ignored")},
            **{f"signal_{name}": one.signals.get(name) for name in WEIGHTS},
            "otherwise": one.conflict and one.conflict.otherwise,
            "outside": one.conflict and one.conflict.outside,
            "asked_models": " ".join(one.witnesses),
            "mask_signature": one.signature,
            "withheld_dice": (truth or {}).get(one.sample_id),
        }
        about |= self._mined(one) if one.kind == "pseudo" else {}
        return {name: _plain(about.get(name)) for name in COLUMNS}

    def _mined(self, one: Found) -> dict[str, Any]:
        rows = [row for row in self.this.decisions[one.sample_id] if row["object_idx"] >= 0]
        kept, taught = [row for row in rows if row["kept"]], self.rounds_of(one.sample_id)
        signature, digest = self.models.get(self.this.asked_by, ("", ""))
        return {
            "round": self.this.round_idx,
            "entered": taught[0].round_idx,
            "rounds_taught": " ".join(str(p.round_idx) for p in taught),
            "num_objects": len(rows),
            "num_kept": len(kept),
            "reason": " ".join(dict.fromkeys(row["reason"] for row in kept)) or self._first_reason(one),
            "source": " ".join(dict.fromkeys(str(row["source"]) for row in kept)),
            **{name: _mean([row[name] for row in kept]) for name in SCORES},
            "dice_with_round_before": self._like_before(one.sample_id, self.this),
            "asked_by": f"round_{self.this.asked_by:02}",
            "made_by": self.this.made_by,
            "model_signature": signature,
            "model_sha256": digest,
            "segmenter": self.segmenter,
            "segmenter_sha256": self.segmenter_sha256,
        }

    def _first_reason(self, one: Found) -> str:
        return str(self.this.decisions[one.sample_id][0]["reason"])

    def _like_before(self, sample_id: str, this: Past) -> float:
        """Dice of a pseudo mask with that of the round before; NaN where there was none."""
        before = next((p for p in self.past if p.round_idx == this.round_idx - 1 and _teaches(p, sample_id)), None)
        if before is None or not _teaches(this, sample_id):
            return math.nan
        pair = [self.store.pseudo_mask(p.round_idx, sample_id) for p in (before, this)]
        return metrics.dice(*((mask != 0) & (mask != IGNORE_INDEX) for mask in pair))

    def story(self, one: Found) -> tuple[str, ...]:
        """One line a round for a pseudo mask; for a given mask who was asked about it."""
        if one.kind != "pseudo":
            return (f"given; asked about it: {', '.join(one.witnesses) or 'no model, for all learned it'}",)
        return tuple(
            self._line(p, one.sample_id)
            for p in self.past
            if p.round_idx <= self.this.round_idx and one.sample_id in p.decisions
        )

    def _line(self, past: Past, sample_id: str) -> str:
        signature, digest = self.models.get(past.asked_by, ("", ""))
        rows = [row for row in past.decisions[sample_id] if row["object_idx"] >= 0]
        asked = past.prompts.get(sample_id, [])
        by = f"model of round {past.asked_by} ({signature[:8]}, weights {digest[:8]})"
        parts = [f"round {past.round_idx}: {by} asked {self.segmenter} about {len(asked)} object(s)"]
        for row in rows:
            scores = ", ".join(
                f"{name.replace('_', ' ')} {row[name]:.2f}" for name in SCORES if _known(row[name]) and name in _TOLD
            )
            whose = {"local": ", the local model's mask is used", "segmenter": ", the segmenter's mask is used"}
            used = whose.get(str(row["source"]), "") if row["kept"] else ""
            parts.append(
                f"object {row['object_idx']} ({self.class_names[row['class_id']]}): {row['reason']}{used} ({scores})"
            )
        if not rows:
            parts.append(str(past.decisions[sample_id][0]["reason"]))
        parts.append("taught" if _teaches(past, sample_id) else "did not teach")
        like = self._like_before(sample_id, past)
        if not math.isnan(like):
            parts.append(
                "mask as in the round before" if like == 1 else f"Dice {like:.2f} with the mask of the round before"
            )
        return "; ".join(parts)

    def items(
        self,
        found: Sequence[Found],
        read: Mapping[str, Callable[[str], NDArray[np.uint8]]],
        folder: Path,
        truth: Truth | None,
        withheld: Pool | None,
    ) -> Iterator[AuditItem]:
        """For the page, one image at a time; pictures are written below `folder`, those that are there stay.

        `read`: by kind, the reader of a mask.
        """  # fmt: skip
        for one in found:
            pool = self.task.unlabeled if one.kind == "pseudo" else self.task.labeled
            picture = f"pictures/{picture_name(one.sample_id)}.jpg"
            _write_picture(folder / picture, pool, one.sample_id)
            row = self.row(one, truth)
            mined = one.kind == "pseudo"
            yield AuditItem(
                sample_id=one.sample_id,
                kind=one.kind,  # type: ignore[arg-type]
                rank=one.rank,
                suspicion=one.suspicion,
                causes=one.causes,
                picture=picture,
                height=one.height,
                width=one.width,
                layers=tuple(self._layers(one, read[one.kind](one.sample_id), withheld)),
                prompts=tuple(_prompts(p) for p in self.this.prompts.get(one.sample_id, ())) if mined else (),
                facts={name: row[name] for name in (*SHOWN, *(f"signal_{n}" for n in WEIGHTS))},
                story=self.story(one),
                mask_signature=one.signature,
            )

    def _layers(self, one: Found, mask: NDArray[np.uint8], withheld: Pool | None) -> Iterator[Layer]:
        yield from _of_mask("pseudo" if one.kind == "pseudo" else "given", mask)
        if one.kind == "pseudo":
            rows = [row for row in self.this.decisions[one.sample_id] if row["object_idx"] >= 0]
            for name in ("local", "segmenter"):
                yield from _of_objects(name, rows)
        size = self.task.cfg.data.size
        for class_id, rle in one.seen.items():
            small = from_rle(rle, size, size).astype(np.uint8)
            seen = cv2.resize(small, (one.width, one.height), interpolation=cv2.INTER_NEAREST_EXACT)
            yield Layer("model", class_id, to_rle(seen.astype(bool)))
        if withheld is not None and one.kind == "pseudo" and one.sample_id in withheld.ids:
            truth = withheld.sample(one.sample_id).mask
            assert truth is not None, "opened with masks"
            yield from _of_mask("withheld", truth)


_TOLD = ("predicted_iou", "stability_score", "agreement_iou", "jitter_dice", "tta_std", "estimated_dice")


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


def _teaches(past: Past, sample_id: str) -> bool:
    rows = past.decisions.get(sample_id)
    return bool(rows and rows[0]["in_training"])


def _known(value: Any) -> bool:
    return value is not None and not math.isnan(value)


def _mean(values: Sequence[Any]) -> float:
    known = [value for value in values if _known(value)]
    return float(np.mean(known)) if known else math.nan


def _plain(value: Any) -> Any:
    """As the page and the table show it: four digits, None where there is no number."""
    if isinstance(value, float):
        return round(value, 4) if math.isfinite(value) else None
    return None if value == "" else value

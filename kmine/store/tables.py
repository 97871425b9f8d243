"""Rows of the tables of a mining round: prompts.parquet, decisions.parquet, and those of the pseudo masks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, fields
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from kmine.errors import UserError
from kmine.io.files import MAX_PIXELS
from kmine.ops.masks import from_rle, to_rle
from kmine.store.artifacts import CURE
from kmine.types import EVIDENCE_COLUMNS, Bool, Evidence, Prompts, none_to_nan

MaskName = Literal["local", "segmenter", "used"]


class _Row:
    """A row whose columns are its fields."""

    def to_arrow(self) -> dict[str, Any]:
        """Values by column."""
        return vars(self)

    @classmethod
    def from_arrow(cls, values: Mapping[str, Any]) -> Any:
        """From values by column; a missing column is null."""
        return cls(**{f.name: values.get(f.name) for f in fields(cls)})


@dataclass(frozen=True)
class PromptRow(_Row):
    """The prompts of one object, as given to the segmenter last; fields are columns of prompts.parquet."""

    sample_id: str
    object_idx: int
    class_id: int
    box: list[float] | None
    """(4,) XYXY pixels."""
    point_coords: list[list[float]] | None
    """(P, 2) as (x, y)."""
    point_labels: list[int] | None
    has_mask_input: bool
    jittered_boxes: list[list[float]]
    """(J, 4) XYXY."""
    scaled_boxes: list[list[float]] | None = None
    """(B, 4) XYXY; None in older tables."""
    origin: str | None = None
    """`model` or `person`, as in `Prompts`; None in older tables."""

    @classmethod
    def from_prompts(cls, sample_id: str, object_idx: int, prompts: Prompts) -> PromptRow:
        """The row of an object's prompts; mask input and component are not kept."""
        arrays = (prompts.box, prompts.point_coords, prompts.point_labels)
        plain = [None if array is None else array.tolist() for array in arrays]
        boxes = (prompts.jittered_boxes.tolist(), prompts.scaled_boxes.tolist())
        own = prompts.mask_input is not None, *boxes, prompts.origin
        return cls(sample_id, object_idx, prompts.class_id, *plain, *own)

    def to_prompts(self) -> Prompts:
        """The prompts without mask input and component."""
        return Prompts(
            self.class_id,
            None if self.box is None else np.array(self.box, np.float32),
            None if self.point_coords is None else np.array(self.point_coords, np.float32),
            None if self.point_labels is None else np.array(self.point_labels, np.int64),
            jittered_boxes=np.array(self.jittered_boxes, np.float32).reshape(-1, 4),
            scaled_boxes=np.array(self.scaled_boxes or [], np.float32).reshape(-1, 4),
            origin="person" if self.origin == "person" else "model",
        )


@dataclass(frozen=True)
class DecisionRow:
    """The gate's decision on one object, or on an image without one; fields are columns of decisions.parquet."""

    sample_id: str
    object_idx: int
    """-1: no object was segmented in the image, and what follows `in_training` is None."""
    class_id: int
    kept: bool
    reason: str
    source: str | None = None
    """`both`, `segmenter` or `local`, as in `Decision`."""
    in_training: bool = False
    """Whether the image has a pseudo mask."""
    evidence: Evidence | None = None
    """A column per score, by the names of `EVIDENCE_COLUMNS`."""
    estimated_dice: float | None = None
    estimated_segmenter: float | None = None
    estimated_local: float | None = None
    height: int | None = None
    width: int | None = None
    local_rle: str | None = None
    """Run lengths of the local model's own mask; empty where it has no object there."""
    segmenter_rle: str | None = None
    """Run lengths of the segmenter's best mask."""

    @property
    def is_object(self) -> bool:
        """Whether the row is of an object, not of an image without one."""
        return self.object_idx >= 0

    def mask(self, of: MaskName) -> Bool:
        """(H, W) mask of the object; `used` is the one that the pseudo mask was made from.

        Raises:
            UserError: damaged or edited run lengths.
        """
        local = of == "local" or (of == "used" and self.source == "local")
        try:
            return from_rle(self.local_rle if local else self.segmenter_rle, self.height, self.width)
        except (AttributeError, TypeError, ValueError) as error:
            raise _damaged_row(self, f"a damaged mask ({error})") from error

    def to_arrow(self) -> dict[str, Any]:
        """Values by column, in the order of the table."""
        scores = astuple(self.evidence) if self.evidence else [None] * len(EVIDENCE_COLUMNS)
        columns = dict(zip(EVIDENCE_COLUMNS, scores, strict=True))
        values: dict[str, Any] = {}
        for name, value in vars(self).items():
            values |= columns if name == "evidence" else {name: value}
        return values

    @classmethod
    def from_arrow(cls, values: Mapping[str, Any]) -> DecisionRow:
        """From values by column; a missing column is null, and so is the evidence if all scores are."""
        scores = [values.get(name) for name in EVIDENCE_COLUMNS]
        evidence = None if scores == [None] * len(scores) else Evidence(*none_to_nan(scores))
        return cls(**{f.name: values.get(f.name) for f in fields(cls)} | {"evidence": evidence})


@dataclass(frozen=True)
class MaskRow(_Row):
    """A pseudo mask as run lengths; fields are columns of pseudo_masks/00000.parquet, 00001.parquet, ..."""

    sample_id: str
    height: int
    width: int
    class_ids: list[int]  # in the mask, 255 included, without 0
    rles: list[str]  # of the pixels of each

    @classmethod
    def from_mask(cls, sample_id: str, mask: NDArray[np.uint8]) -> MaskRow:
        """From (H, W) class ids and 255."""
        ids = [class_id for class_id in np.unique(mask).tolist() if class_id]
        return cls(sample_id, *mask.shape, ids, [to_rle(mask == class_id) for class_id in ids])

    def to_mask(self) -> NDArray[np.uint8]:
        """(H, W) class ids and 255: the inverse of `from_mask`. `ValueError` or `TypeError` for edited values."""
        if not 0 < self.height * self.width <= MAX_PIXELS:
            raise ValueError(f"{self.height} x {self.width} pixels")
        mask = np.zeros((self.height, self.width), np.uint8)
        for class_id, rle in zip(self.class_ids, self.rles, strict=True):
            mask[from_rle(rle, self.height, self.width)] = class_id
        return mask


R = TypeVar("R", PromptRow, DecisionRow, MaskRow)


def class_map(rows: Iterable[DecisionRow], shape: tuple[int, int], of: MaskName) -> NDArray[np.uint8]:
    """(H, W) class ids: the union of the objects' masks; where two overlap, the later one's class.

    Raises:
        UserError: damaged or edited run lengths, or a mask of another size.
    """
    out = np.zeros(shape, np.uint8)
    for row in rows:
        if (row.height, row.width) != shape:
            raise _damaged_row(row, f"a mask of {row.height} x {row.width} for an image of {shape[0]} x {shape[1]}")
        out[row.mask(of)] = row.class_id
    return out


def _damaged_row(row: DecisionRow, problem: str) -> UserError:
    return UserError(f"decisions.parquet: {problem} of {row.sample_id}; {CURE}")

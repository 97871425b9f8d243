"""What a mining round changed: the images in training, and how far their masks are from the local model's own.

Mining that only returns the local model's own masks is self-training under another name; these figures tell the two
apart. H, W: height and width of an image in its own frame, K: classes with background 0.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kmine.store.tables import DecisionRow, class_map
from kmine.types import IGNORE_INDEX, LESION_FREE, Floats

Mask = NDArray[np.uint8]
"""(H, W) class ids."""
MIN_CHANGED_SHARE = 0.001
"""Up to this share of the object pixels, a change is a pixel or two on an edge: the segmenter changed nothing."""
_KEYS = {
    "retained": "kept_on",
    "removed": "expelled",
    "num_mask_changed": "num_remasked",
    "changed_label_pixels": "taught_pixels",
}
"""Keys of changes.json that differ from the names of the fields."""


@dataclass(frozen=True)
class MaskComparison:
    """The pseudo mask of one image beside the masks that it was made from."""

    sample_id: str
    pseudo: Mask
    """`IGNORE_INDEX` where it trains nothing."""
    local: Mask
    """The local model's own mask: the union of its objects by class, kept and dropped ones."""
    local_kept: Mask
    """The same of the kept objects alone."""
    used_mask: Mask
    """The masks used for the kept objects: the segmenter's, or the local model's own where the gate chose that."""
    previous: Mask | None = None
    """Its pseudo mask of the round before; None where it had none."""
    lesion_free: bool = False
    """Whether an image-level label makes the mask empty; the image was not segmented."""

    @classmethod
    def from_rows(cls, rows: Sequence[DecisionRow], pseudo: Mask, previous: Mask | None = None) -> MaskComparison:
        """One image from its decisions (at least one), its pseudo mask, and that of the round before."""
        objects = [row for row in rows if row.is_object]
        kept = [row for row in objects if row.kept]
        return cls(
            rows[0].sample_id,
            pseudo,
            local=class_map(objects, pseudo.shape, "local"),
            local_kept=class_map(kept, pseudo.shape, "local"),
            used_mask=class_map(kept, pseudo.shape, "used"),
            previous=previous,
            lesion_free=rows[0].reason == LESION_FREE,
        )

    def counts(self, *, retained: bool) -> dict[str, int]:
        """Figures that are summed over a round; `retained`: the image had a pseudo mask in the round before."""
        objects, ignored = (self.local_kept != 0) | (self.used_mask != 0), self.pseudo == IGNORE_INDEX
        return {
            "num_mask_changed": int(retained and not np.array_equal(self.pseudo, self.previous)),
            "num_differing": int(not np.array_equal(self.pseudo, self.local)),
            "num_empty": int(self.lesion_free),
            "object_pixels": int(objects.sum()),
            "changed_pixels": int((self.local_kept != self.used_mask).sum()),
            "changed_label_pixels": int((objects & ~ignored & (self.pseudo != self.local)).sum()),
            "ignored_pixels": int(ignored.sum()),
            "pixels": self.pseudo.size,
        }


@dataclass(frozen=True)
class RoundChanges:
    """What one round changed. Shares are in [0, 1], NaN where there was no pixel to count."""

    num_unlabeled: int
    new: tuple[str, ...]
    """Images with their first pseudo mask."""
    retained: tuple[str, ...]
    """Images with a pseudo mask now and in the round before."""
    readmitted: tuple[str, ...]
    """Images with a pseudo mask now and in an earlier round, but not in the one before."""
    removed: tuple[str, ...]
    """Images with a pseudo mask in the round before, but not now."""
    num_mask_changed: int
    """Retained images whose pseudo mask differs from that of the round before."""
    num_differing: int
    """Images whose pseudo mask differs anywhere from the local model's own mask, ignored pixels included."""
    num_empty: int
    """Images with an empty mask because of their image-level label."""
    changed_pixels: float
    """Of the pixels that the local or the used mask of a kept object covers, the share on which the two differ.

    0 is self-training, 1 nothing in common. Where the gate chose the local model's mask, nothing differs."""
    changed_label_pixels: float
    """Of the same pixels, the share that the pseudo masks label otherwise than the local model's own mask. About 0 with
    `refine.ask_local`, which ignores what the segmenter changed."""
    ignored_pixels: float
    """Share of all pixels of the pseudo masks that is ignored."""
    labeled_shares: tuple[float, ...]
    """(K - 1,): by class, the share of the known pixels of an image that it covers, mean over the labeled images."""
    pseudo_shares: tuple[float, ...]
    """The same over the pseudo masks."""

    @property
    def pseudo_labeled(self) -> frozenset[str]:
        """Images in training with a pseudo mask."""
        return frozenset((*self.new, *self.retained, *self.readmitted))

    @property
    def segmenter_changed_nothing(self) -> bool:
        """Whether at most `MIN_CHANGED_SHARE` of the object pixels differ from the local model's own masks."""
        return bool(self.pseudo_labeled) and not self.changed_pixels > MIN_CHANGED_SHARE

    @property
    def training_set_unchanged(self) -> bool:
        """Whether images and masks are those of the round before."""
        return bool(self.retained) and not (self.new or self.readmitted or self.removed or self.num_mask_changed)

    @property
    def noop(self) -> bool:
        """Whether mining did nothing that training alone would not have done."""
        return self.segmenter_changed_nothing or self.training_set_unchanged

    def to_json(self) -> dict[str, Any]:
        """Content of changes.json: counts, flags, then every field; NaN is left to the writer, which makes it null."""
        flags = ("segmenter_changed_nothing", "training_set_unchanged", "noop")
        counted = ("new", "retained", "readmitted", "removed")
        return {
            "num_teaching": len(self.pseudo_labeled),
            **{f"num_{_KEYS.get(name, name)}": len(getattr(self, name)) for name in counted},
            **{name: getattr(self, name) for name in flags},
            **{_KEYS.get(name, name): value for name, value in asdict(self).items()},
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> RoundChanges:
        """The inverse of `to_json`, with or without a file between them."""

        def plain(entry: Any) -> Any:
            if isinstance(entry, list | tuple):
                return tuple(plain(item) for item in entry)
            return math.nan if entry is None else entry

        return cls(**{f.name: plain(value[_KEYS.get(f.name, f.name)]) for f in fields(cls)})


def compare_rounds(
    images: Iterable[MaskComparison],
    labeled: Iterable[Mask],
    earlier: Sequence[Collection[str]],
    *,
    num_unlabeled: int,
    num_classes: int,
) -> RoundChanges:
    """What a round changed; images and masks are read one by one, so that one is in memory at a time.

    Args:
        images: the pseudo-labeled images of this round, of the `num_unlabeled` that were mined.
        labeled: the given masks, at any size.
        earlier: ids of the pseudo-labeled images of each earlier round, first round first.
    """
    last, ever = set(earlier[-1]) if earlier else set(), {i for ids in earlier for i in ids}
    entered: dict[str, list[str]] = {"new": [], "retained": [], "readmitted": []}
    counts: Counter[str] = Counter()
    shares = []
    for image in images:
        name = image.sample_id
        entered["retained" if name in last else "readmitted" if name in ever else "new"].append(name)
        counts.update(image.counts(retained=name in last))
        shares.append(class_shares(image.pseudo, num_classes))
    return RoundChanges(
        num_unlabeled=num_unlabeled,
        **{name: tuple(ids) for name, ids in entered.items()},
        removed=tuple(sorted(last.difference(entered["retained"]))),
        **{name: counts[name] for name in ("num_mask_changed", "num_differing", "num_empty")},
        changed_pixels=_share(counts["changed_pixels"], counts["object_pixels"]),
        changed_label_pixels=_share(counts["changed_label_pixels"], counts["object_pixels"]),
        ignored_pixels=_share(counts["ignored_pixels"], counts["pixels"]),
        labeled_shares=_mean((class_shares(mask, num_classes) for mask in labeled), num_classes),
        pseudo_shares=_mean(shares, num_classes),
    )


def class_shares(mask: Mask, num_classes: int) -> Floats:
    """(K - 1,): the share of the known pixels that each class of a mask covers; NaN where none is known."""
    counts = np.array([np.count_nonzero(mask == class_id) for class_id in range(num_classes)])
    return counts[1:] / counts.sum() if counts.sum() else np.full(num_classes - 1, np.nan)


def summary_line(changes: RoundChanges, names: Sequence[str] = ()) -> str:
    """How many images have pseudo masks, what the segmenter changed, and the shares of the classes, in one line.

    `names`: of the classes by id, as far as known.
    """
    if not changes.pseudo_labeled:
        return f"0 of {changes.num_unlabeled} unlabeled images have a pseudo mask ({len(changes.removed)} removed)"
    numbers = {"retained": len(changes.retained), "readmitted": len(changes.readmitted)}
    numbers["lesion-free by label"] = changes.num_empty
    counts = [f"{len(changes.new)} new", *(f"{number} {name}" for name, number in numbers.items() if number)]
    out = [
        f"{len(changes.pseudo_labeled)} of {changes.num_unlabeled} unlabeled images have a pseudo mask "
        f"({', '.join(counts)})" + (f", {len(changes.removed)} removed" if changes.removed else "")
    ]
    if not math.isnan(changes.changed_pixels):
        out.append(
            f"the segmenter changed {_percent(changes.changed_pixels)} of the object pixels of the local masks, "
            f"{_percent(changes.changed_label_pixels)} are labeled otherwise"
        )
    shares = enumerate(zip(map(_percent, changes.pseudo_shares), map(_percent, changes.labeled_shares), strict=True), 1)
    classes = [f"{_class(n, names)} covers {own} of a pseudo mask, {given} of a label" for n, (own, given) in shares]
    return "; ".join([*out, ", ".join(classes)])


def warnings(changes: RoundChanges, names: Sequence[str] = ()) -> list[tuple[str, str]]:
    """Defects of a round with pseudo masks, each with its cure, the gravest first; empty for effective mining."""
    messages = []
    if changes.segmenter_changed_nothing:
        none_kept = math.isnan(changes.changed_pixels)
        reason = "all pseudo masks are empty by image-level labels" if none_kept else "this round is self-training"
        messages.append((f"the segmenter changed nothing: {reason}", "take another --segmenter.name"))
    if changes.training_set_unchanged:
        text = "mining changed nothing: images and pseudo masks are those of the round before"
        messages.append((text, "fewer --rounds give the same"))
    for n, (pseudo, labeled) in enumerate(zip(changes.pseudo_shares, changes.labeled_shares, strict=True), start=1):
        if pseudo == 0 and labeled > 0:
            cure = "label more images that show it"
            messages.append((f"no pseudo mask shows {_class(n, names)}, though labels do", cure))
        if pseudo > 0 and labeled == 0:
            cure = "check the classes of the given masks (kmine check)"
            messages.append((f"pseudo masks show {_class(n, names)}, which no label does", cure))
    return messages if changes.pseudo_labeled else []


def _class(number: int, names: Sequence[str]) -> str:
    return names[number] if number < len(names) else f"class {number}"


def explain_empty_round(rows: Sequence[DecisionRow]) -> str:
    """Why no image has a pseudo mask, from the decisions of a round: the gate's reasons, or the cure."""
    reasons = Counter(row.reason for row in rows)
    if set(reasons) <= {"no_component", "vetoed"}:
        vetoed = f" (the classifier vetoed {reasons['vetoed']} of {len(rows)})" if reasons["vetoed"] else ""
        remedy = "train it longer (--fit.steps) or begin with ImageNet weights (--model.encoder_weights hub)"
        return f"the local model found no object in any image{vetoed}: {remedy}"
    return "objects by the gate's reason: " + ", ".join(f"{name} {number}" for name, number in reasons.most_common())


def _share(count: int, total: int) -> float:
    return count / total if total else math.nan


def _mean(shares: Iterable[Floats], num_classes: int) -> tuple[float, ...]:
    """Mean by class over the images that have a number; one at a time, so that masks need not be held."""
    finite = [share for share in shares if not np.isnan(share).any()]
    mean = np.mean(finite, axis=0) if finite else np.full(num_classes - 1, np.nan)
    return tuple(float(value) for value in mean)


def _percent(share: float) -> str:
    return "–" if math.isnan(share) else f"{100 * share:.1f} %"

"""What a round of mining changed: which images teach now, and how far their masks are from the local model's own.

Mining that only hands the local model its own masks back is self-training under another name; the figures here tell
the two apart. H, W: height and width of an image in its own frame, K: classes with background 0.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kmine.ops.masks import from_rle
from kmine.types import IGNORE_INDEX

Mask = NDArray[np.uint8]
"""(H, W) class ids."""
MIN_CHANGED_SHARE = 0.001
"""Up to this share of the object pixels changed, the segmenter changed nothing: a pixel or two on an edge."""


@dataclass(frozen=True)
class PseudoLabel:
    """One image that teaches: its pseudo mask and what that was made of."""

    sample_id: str
    pseudo: Mask
    """`IGNORE_INDEX` where nothing is taught."""
    local: Mask
    """The local model's own mask: the union of its objects by class, kept and dropped ones."""
    local_kept: Mask
    """The same of the kept objects alone."""
    used_mask: Mask
    """The masks used for the kept objects: the segmenter's, or the local model's own where the gate took that."""
    previous: Mask | None = None
    """Its pseudo mask of the round before; None where it had none."""
    known_empty: bool = False
    """Whether an image-level label says that there is nothing: nobody was asked."""


@dataclass(frozen=True)
class RoundChanges:
    """What one round changed. Shares are in [0, 1], NaN where there was no pixel to count."""

    num_unlabeled: int
    new: tuple[str, ...]
    """Images that teach for the first time."""
    kept_on: tuple[str, ...]
    """Images that taught in the round before as well."""
    readmitted: tuple[str, ...]
    """Images that taught in an earlier round, but not in the one before."""
    expelled: tuple[str, ...]
    """Images that taught in the round before, and do not now."""
    num_remasked: int
    """Images kept on whose pseudo mask is another one now."""
    num_differing: int
    """Images whose pseudo mask differs anywhere from the local model's own mask, ignored pixels included."""
    num_empty: int
    """Images known to be empty by their image-level label."""
    changed_pixels: float
    """Of the pixels that the local or the used mask of a kept object covers, the share on which the two differ.

    0 is self-training, 1 nothing in common. Where the gate took the local model's mask, nothing differs."""
    taught_pixels: float
    """Of the same pixels, the share that the pseudo masks teach otherwise than the local model's own mask. Where the
    local model is asked too, what the segmenter changed is ignored, and this is about 0."""
    ignored_pixels: float
    """Share of all pixels of the pseudo masks that is ignored."""
    labeled_shares: tuple[float, ...]
    """(K - 1,): by class, the share of the known pixels of an image that it covers, mean over the labeled images."""
    pseudo_shares: tuple[float, ...]
    """The same over the pseudo masks."""

    @property
    def pseudo_labeled(self) -> frozenset[str]:
        """Images in training with a pseudo mask."""
        return frozenset((*self.new, *self.kept_on, *self.readmitted))

    @property
    def segmenter_changed_nothing(self) -> bool:
        """Whether what teaches is the local model's own opinion, but for at most `MIN_CHANGED_SHARE` of the object pixels."""
        return bool(self.pseudo_labeled) and not self.changed_pixels > MIN_CHANGED_SHARE

    @property
    def training_set_unchanged(self) -> bool:
        """Whether the round before taught with the same images and the same masks."""
        return bool(self.kept_on) and not (self.new or self.readmitted or self.expelled or self.num_remasked)

    @property
    def noop(self) -> bool:
        """Whether mining did nothing that training alone would not have done."""
        return self.segmenter_changed_nothing or self.training_set_unchanged

    def to_json(self) -> dict[str, Any]:
        """Every field, the counts and the flags; NaN stays for the writer to turn into null."""
        names = ("segmenter_changed_nothing", "training_set_unchanged", "noop")
        counts = {f"num_{name}": len(getattr(self, name)) for name in ("new", "kept_on", "readmitted", "expelled")}
        return {
            "num_teaching": len(self.pseudo_labeled),
            **counts,
            **{n: getattr(self, n) for n in names},
            **asdict(self),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> RoundChanges:
        """The inverse of `to_json`, before and after it was a file."""

        def plain(entry: Any) -> Any:
            if isinstance(entry, list | tuple):
                return tuple(plain(item) for item in entry)
            return math.nan if entry is None else entry

        return cls(**{f.name: plain(value[f.name]) for f in fields(cls)})


def class_map(objects: Iterable[Mapping[str, Any]], shape: tuple[int, int], column: str) -> Mask:
    """(H, W) class ids of objects as the table of decisions keeps them, united; of two on a pixel the later one's."""
    out = np.zeros(shape, np.uint8)
    for row in objects:
        out[from_rle(row[column], row["height"], row["width"])] = row["class_id"]
    return out


def pseudo_label_of(rows: Sequence[Mapping[str, Any]], pseudo: Mask, previous: Mask | None = None) -> PseudoLabel:
    """One image from its rows of the table of decisions (at least one) and its pseudo masks, now and before."""
    objects = [row for row in rows if row["object_idx"] >= 0]
    kept = [row for row in objects if row["kept"]]
    used = [row | {"used": row["local_rle" if row["source"] == "local" else "segmenter_rle"]} for row in kept]
    return PseudoLabel(
        sample_id=rows[0]["sample_id"],
        pseudo=pseudo,
        local=class_map(objects, pseudo.shape, "local_rle"),
        local_kept=class_map(kept, pseudo.shape, "local_rle"),
        used_mask=class_map(used, pseudo.shape, "used"),
        previous=previous,
        known_empty=rows[0]["reason"] == "lesion_free",
    )


def compare_rounds(
    images: Iterable[PseudoLabel],
    labeled: Iterable[Mask],
    earlier: Sequence[Collection[str]],
    *,
    num_unlabeled: int,
    num_classes: int,
) -> RoundChanges:
    """What a round changed; images and masks are looked at one by one, so that no more than one need be in memory.

    Args:
        images: all that teach in this round.
        labeled: the given masks, at any size.
        earlier: who taught in the rounds before, first round first; empty for the first.
        num_unlabeled: images that were mined.
        num_classes: with background.
    """
    last, ever = set(earlier[-1]) if earlier else set(), {i for ids in earlier for i in ids}
    entered: dict[str, list[str]] = {"new": [], "kept_on": [], "readmitted": []}
    mask_changed = differing = empty = 0
    objects = changed = otherwise = ignored = pixels = 0
    shares: list[NDArray[np.float64]] = []
    for image in images:
        name = image.sample_id
        entered["kept_on" if name in last else "readmitted" if name in ever else "new"].append(name)
        mask_changed += name in last and not (
            image.previous is not None and np.array_equal(image.pseudo, image.previous)
        )
        differing += not np.array_equal(image.pseudo, image.local)
        empty += image.known_empty
        of_objects = (image.local_kept != 0) | (image.used_mask != 0)
        unknown = image.pseudo == IGNORE_INDEX
        objects += int(of_objects.sum())
        changed += int((image.local_kept != image.used_mask).sum())
        otherwise += int((of_objects & ~unknown & (image.pseudo != image.local)).sum())
        ignored += int(unknown.sum())
        pixels += image.pseudo.size
        shares.append(class_shares(image.pseudo, num_classes))
    return RoundChanges(
        num_unlabeled=num_unlabeled,
        **{name: tuple(ids) for name, ids in entered.items()},
        expelled=tuple(sorted(last.difference(entered["kept_on"]))),
        num_remasked=mask_changed,
        num_differing=differing,
        num_empty=empty,
        changed_pixels=_share(changed, objects),
        taught_pixels=_share(otherwise, objects),
        ignored_pixels=_share(ignored, pixels),
        labeled_shares=_mean((class_shares(mask, num_classes) for mask in labeled), num_classes),
        pseudo_shares=_mean(shares, num_classes),
    )


def class_shares(mask: Mask, num_classes: int) -> NDArray[np.float64]:
    """(K - 1,): the share of the known pixels that each class of a mask covers; NaN where none is known."""
    counts = np.bincount(mask[mask != IGNORE_INDEX], minlength=num_classes)[:num_classes]
    return counts[1:] / counts.sum() if counts.sum() else np.full(num_classes - 1, np.nan)


def summary_line(changes: RoundChanges) -> str:
    """What teaches, what the segmenter changed and how the classes lie, in one line."""
    if not changes.pseudo_labeled:
        return (
            f"none of {changes.num_unlabeled} unlabeled images teaches ({len(changes.expelled)} did the round before)"
        )
    counts = [f"{len(changes.new)} new"]
    counts += [
        f"{len(ids)} {label}" for label, ids in (("kept on", changes.kept_on), ("again", changes.readmitted)) if ids
    ]
    counts += [f"{changes.num_empty} known to be empty"] if changes.num_empty else []
    out = [
        f"{len(changes.pseudo_labeled)} of {changes.num_unlabeled} unlabeled images teach ({', '.join(counts)})"
        + (f", {len(changes.expelled)} of the round before no more" if changes.expelled else "")
    ]
    if not math.isnan(changes.changed_pixels):
        out.append(
            f"the segmenter changed {_percent(changes.changed_pixels)} of the object pixels of the local masks, "
            f"{_percent(changes.taught_pixels)} are taught otherwise"
        )
    classes = zip(changes.pseudo_shares, changes.labeled_shares, strict=True)
    out.append(
        ", ".join(
            f"class {n} covers {_percent(pseudo)} of a pseudo mask, {_percent(labeled)} of a label"
            for n, (pseudo, labeled) in enumerate(classes, start=1)
        )
    )
    return "; ".join(out)


def warnings(changes: RoundChanges) -> list[str]:
    """What is wrong with a round that teaches, a plain sentence each; empty where it is a round of mining."""
    messages = []
    if changes.segmenter_changed_nothing:
        none_kept = math.isnan(changes.changed_pixels)
        reason = "only images known to be empty teach" if none_kept else "this round is self-training"
        messages.append(f"the segmenter changed nothing: {reason}")
    if changes.training_set_unchanged:
        messages.append("mining changed nothing: the same images with the same masks taught in the round before")
    for n, (pseudo, labeled) in enumerate(zip(changes.pseudo_shares, changes.labeled_shares, strict=True), start=1):
        if pseudo == 0 and labeled > 0:
            messages.append(f"no pseudo mask shows class {n}, though labels do")
        if pseudo > 0 and labeled == 0:
            messages.append(f"pseudo masks show class {n}, which no label does")
    return messages if changes.pseudo_labeled else []


def explain_empty_round(rows: Sequence[Mapping[str, Any]]) -> str:
    """Why no image got a pseudo mask, from the rows of the table of decisions: the gate's reasons, or the cure."""
    reasons = Counter(str(row["reason"]) for row in rows)
    if set(reasons) == {"no_component"}:
        return (
            "the local model found no object in any image: train it longer (--fit.steps) or begin with ImageNet "
            "weights (--model.encoder_weights hub)"
        )
    return "objects by the gate's reason: " + ", ".join(f"{name} {number}" for name, number in reasons.most_common())


def _share(count: int, total: int) -> float:
    return count / total if total else math.nan


def _mean(shares: Iterable[NDArray[np.float64]], num_classes: int) -> tuple[float, ...]:
    """Mean by class over the images that have a number; one at a time, so that masks need not be held."""
    finite = [share for share in shares if not np.isnan(share).any()]
    mean = np.mean(finite, axis=0) if finite else np.full(num_classes - 1, np.nan)
    return tuple(float(value) for value in mean)


def _percent(share: float) -> str:
    return "–" if math.isnan(share) else f"{100 * share:.1f} %"

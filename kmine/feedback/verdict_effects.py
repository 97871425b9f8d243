"""What a person's verdicts on one run mean for the next: who never teaches, who always does, what becomes a label."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kmine.errors import UserError
from kmine.feedback.verdicts import mask_signature, read_verdicts
from kmine.io.files import sign

MAX_NAMED = 5
"""Of ids in a message."""


@dataclass(frozen=True)
class VerdictEffects:
    """Of the images of one run."""

    rejected: frozenset[str]
    """Unlabeled images that never get a pseudo mask."""
    accepted: Mapping[str, Path]
    """Unlabeled images whose pseudo mask, this one, teaches in every round; PNG of (H, W) class ids and 255."""
    corrected: Mapping[str, Path]
    """Images whose mask a person drew: a label like any other, in the place of a given one where there is one."""
    dropped: frozenset[str]
    """Labeled images whose given mask was found wrong, and for which there is no other: labels no more."""
    elsewhere: tuple[str, ...]
    """Judged images that this run neither labels nor mines, so nothing comes of the verdict."""
    signature: str
    """Of all that, the masks' pixels included."""

    def __contains__(self, sample_id: object) -> bool:
        """Whether mining need not ask about an image: a person has."""
        return sample_id in self.rejected or sample_id in self.accepted

    def summary(self) -> dict[str, int]:
        """Counts by what was said."""
        names = ("accepted", "rejected", "corrected", "dropped", "elsewhere")
        return {name: len(getattr(self, name)) for name in names}


NO_VERDICTS = VerdictEffects(frozenset(), {}, {}, frozenset(), (), "")
"""No verdicts at all."""


def read_mask(path: Path) -> NDArray[np.uint8]:
    """(H, W) class ids, 255 for ignored pixels."""
    with Image.open(path) as image:
        return np.asarray(image, np.uint8).copy()


def resolve_verdicts(
    path: Path, labeled: Sequence[str], unlabeled: Sequence[str], other_ids: Collection[str]
) -> VerdictEffects:
    """Read verdicts, as a run keeps them, for a run with these images.

    Args:
        path: verdicts.json.
        labeled, unlabeled: the images of this run.
        other_ids: its validation and test images. Verdicts on them come to nothing: who validates or tests must not teach.

    Raises:
        UserError: verdicts that cannot be read, on images that the data set lacks, on none that this run labels or
            mines, or an accepted mask that is not beside them.
    """
    verdicts = read_verdicts(path)
    labeled_ids, unlabeled_ids = set(labeled), set(unlabeled)
    decided = {verdict.sample_id for verdict in verdicts.all if verdict.verdict != "unsure"} | set(verdicts.corrected)
    unknown = sorted(decided - labeled_ids - unlabeled_ids - set(other_ids))
    if unknown:
        more = f" and {len(unknown) - MAX_NAMED} more" if len(unknown) > MAX_NAMED else ""
        raise UserError(
            f"{path}: expected verdicts on images of this data set, got {', '.join(unknown[:MAX_NAMED])}{more}; is it the "
            "file of another data set?"
        )
    relevant = decided & (labeled_ids | unlabeled_ids)
    if decided and not relevant:
        raise UserError(
            f"{path}: none of its {len(decided)} verdicts is on an image that this run labels or mines; begin with the "
            f"same split: --data.split_file {path.parent / 'splits.csv'}"
        )
    corrected = {i: file for i, file in verdicts.corrected.items() if i in relevant}
    accepted = sorted(i for i in verdicts.accepted & unlabeled_ids if i not in corrected)
    missing = [i for i in accepted if i not in verdicts.masks]
    if missing:
        raise UserError(
            f"{path}: expected the accepted masks beside it, that of {missing[0]} is missing ({len(missing)} in all); take "
            "the file into its run first, with kmine audit RUN --verdicts FILE, and name RUN/verdicts.json here"
        )
    masks = {i: verdicts.masks[i] for i in accepted}
    rejected = frozenset(verdicts.rejected & unlabeled_ids - set(corrected))
    dropped = frozenset(verdicts.rejected & labeled_ids - set(corrected))
    pixels = [[(i, mask_signature(read_mask(file))) for i, file in sorted(of.items())] for of in (masks, corrected)]
    signature = sign("verdicts", sorted(rejected), sorted(dropped), pixels)
    return VerdictEffects(rejected, masks, corrected, dropped, tuple(sorted(decided - relevant)), signature)

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

SHOWN = 5
"""Of ids in a message."""


@dataclass(frozen=True)
class Judged:
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


NOBODY = Judged(frozenset(), {}, {}, frozenset(), (), "")
"""No verdicts at all."""


def read_mask(path: Path) -> NDArray[np.uint8]:
    """(H, W) class ids, 255 for ignored pixels."""
    with Image.open(path) as image:
        return np.asarray(image, np.uint8).copy()


def judge(path: Path, labeled: Sequence[str], unlabeled: Sequence[str], others: Collection[str]) -> Judged:
    """Read verdicts, as a run keeps them, for a run with these images.

    Args:
        path: verdicts.json.
        labeled, unlabeled: the images of this run.
        others: its validation and test images. Verdicts on them come to nothing: who validates or tests must not teach.

    Raises:
        UserError: verdicts that cannot be read, on images that the data set lacks, on none that this run labels or
            mines, or an accepted mask that is not beside them.
    """
    said = read_verdicts(path)
    given, mined = set(labeled), set(unlabeled)
    judged = {one.sample_id for one in said.all if one.verdict != "unsure"} | set(said.corrected)
    unknown = sorted(judged - given - mined - set(others))
    if unknown:
        more = f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else ""
        raise UserError(
            f"{path}: expected verdicts on images of this data set, got {', '.join(unknown[:SHOWN])}{more}; is it the "
            "file of another data set?"
        )
    known = judged & (given | mined)
    if judged and not known:
        raise UserError(
            f"{path}: none of its {len(judged)} verdicts is on an image that this run labels or mines; begin with the "
            f"same split: --data.split_file {path.parent / 'splits.csv'}"
        )
    corrected = {i: file for i, file in said.corrected.items() if i in known}
    accepted = sorted(i for i in said.accepted & mined if i not in corrected)
    lost = [i for i in accepted if i not in said.masks]
    if lost:
        raise UserError(
            f"{path}: expected the accepted masks beside it, that of {lost[0]} is missing ({len(lost)} in all); take "
            "the file into its run first, with kmine audit RUN --verdicts FILE, and name RUN/verdicts.json here"
        )
    masks = {i: said.masks[i] for i in accepted}
    rejected = frozenset(said.rejected & mined - set(corrected))
    dropped = frozenset(said.rejected & given - set(corrected))
    pixels = [[(i, mask_signature(read_mask(file))) for i, file in sorted(of.items())] for of in (masks, corrected)]
    signature = sign("verdicts", sorted(rejected), sorted(dropped), pixels)
    return Judged(rejected, masks, corrected, dropped, tuple(sorted(judged - known)), signature)

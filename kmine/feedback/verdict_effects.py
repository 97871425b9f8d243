"""Effects of a reviewer's verdicts on the next run: pseudo masks accepted or rejected, labels corrected or dropped."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kmine.errors import UserError, first_names
from kmine.feedback.verdicts import mask_signature, read_verdicts
from kmine.io.files import read_png, sign


@dataclass(frozen=True)
class VerdictEffects:
    """Effects on the images of one run."""

    rejected: frozenset[str]
    """Unlabeled images that never get a pseudo mask."""
    accepted: Mapping[str, Path]
    """Unlabeled images and the pseudo mask they have in every round; PNG of (H, W) class ids and 255."""
    corrected: Mapping[str, Path]
    """Images and the mask a reviewer drew: a label that replaces the given one, if any."""
    dropped_labels: frozenset[str]
    """Labeled images whose given mask was rejected without a correction; they are not used."""
    unmatched: tuple[str, ...]
    """Images with a verdict without effect: this run neither labels nor mines them, or the verdict is on the other kind
    of mask, as on a given mask of an image that this run mines."""
    signature: str
    """Signature of all effects, pixels of the masks included."""

    def __contains__(self, sample_id: object) -> bool:
        """Whether a pseudo mask was accepted or rejected; such images are not mined."""
        return sample_id in self.rejected or sample_id in self.accepted

    def summary(self) -> dict[str, int]:
        """Counts by the keys of run.json."""
        return {
            "accepted": len(self.accepted),
            "rejected": len(self.rejected),
            "corrected": len(self.corrected),
            "dropped": len(self.dropped_labels),
            "elsewhere": len(self.unmatched),
        }


NO_VERDICTS = VerdictEffects(frozenset(), {}, {}, frozenset(), (), "")


def resolve_verdicts(
    path: Path, labeled: Sequence[str], unlabeled: Sequence[str], other_ids: Collection[str]
) -> VerdictEffects:
    """Read the verdicts.json of a run folder and resolve its effects on a run with these images.

    `labeled` and `unlabeled` are sample ids of this run. Verdicts on `other_ids` (validation, test) are ignored,
    since they must not be trained on, and so are those on a mask that this run has not: a given mask of an image that
    it mines, a pseudo mask of one that it labels.

    Raises:
        UserError: verdicts that cannot be read, are on images that the data set lacks or on none that this run labels
            or mines; an accepted mask without its file.
    """
    verdicts = read_verdicts(path)
    labeled_ids, unlabeled_ids = set(labeled), set(unlabeled)
    decided = {verdict.sample_id for verdict in verdicts.all if verdict.verdict != "unsure"} | set(verdicts.corrected)
    unknown = sorted(decided - labeled_ids - unlabeled_ids - set(other_ids))
    if unknown:
        raise UserError(
            f"{path}: expected verdicts on images of this data set, got {first_names(unknown)}; is it the file of "
            "another data set?"
        )
    relevant = decided & (labeled_ids | unlabeled_ids)
    if decided and not relevant:
        raise UserError(
            f"{path}: none of its {len(decided)} verdicts is on an image that this run labels or mines; use the same "
            f"split: --data.split_file {path.parent / 'splits.csv'}"
        )
    given, pseudo = (
        ids & {verdict.sample_id for verdict in verdicts.all if verdict.kind == kind}
        for kind, ids in (("labeled", labeled_ids), ("pseudo", unlabeled_ids))
    )
    corrected = {i: file for i, file in verdicts.corrected.items() if i in relevant}
    accepted = sorted(verdicts.accepted & pseudo - set(corrected))
    missing = [i for i in accepted if i not in verdicts.masks]
    if missing:
        raise UserError(
            f"{path}: expected the accepted masks beside it, that of {missing[0]} is missing ({len(missing)} in all); "
            "first import the file with kmine audit RUN --verdicts FILE, then name RUN/verdicts.json here"
        )
    if lost := [v.sample_id for v in verdicts.all if v.mended and v.sample_id in relevant - set(corrected)]:
        raise UserError(
            f"{path}: expected the mended masks beside it, that of {lost[0]} is missing ({len(lost)} in all); first "
            "import the file with kmine audit RUN --verdicts FILE, then name RUN/verdicts.json here"
        )
    masks = {i: verdicts.masks[i] for i in accepted}
    rejected = frozenset(verdicts.rejected & pseudo - set(corrected))
    dropped_labels = frozenset(verdicts.rejected & given - set(corrected))
    unmatched = tuple(sorted(decided - given - pseudo - set(corrected)))
    pixels = [[(i, mask_signature(read_png(file))) for i, file in sorted(of.items())] for of in (masks, corrected)]
    signature = sign("verdicts", sorted(rejected), sorted(dropped_labels), pixels)
    return VerdictEffects(rejected, masks, corrected, dropped_labels, unmatched, signature)

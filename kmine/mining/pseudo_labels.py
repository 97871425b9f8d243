"""The pseudo-labels of a round: unlabeled images with the masks, weights and reasons that training uses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby

from kmine.feedback.verdict_effects import VerdictEffects
from kmine.io.files import read_png
from kmine.mining.refine import mean_estimate
from kmine.mining.round_changes import explain_empty_round
from kmine.mining.tables import reviewed_rows
from kmine.store.tables import DecisionRow
from kmine.training.task import Task, read_pseudo_mask
from kmine.types import LESION_FREE, PseudoLabel


class PseudoLabels(Mapping[str, PseudoLabel]):
    """Pseudo-labels by sample id, in the order of the unlabeled images; masks are read from the run folder when used.

    They are those of round `round_idx`, made from what `signature` says; `rows` are its decisions, `seconds` the
    durations of mining by stage.
    """

    def __init__(
        self, task: Task, round_idx: int, signature: str, rows: Sequence[DecisionRow], seconds: dict[str, float]
    ) -> None:
        self._task, self.round_idx, self.signature, self.seconds = task, round_idx, signature, seconds
        groups = groupby((row for row in rows if row.in_training), key=lambda row: row.sample_id)
        origins = {sample_id: _reason_and_weight(list(group)) for sample_id, group in groups}
        self._origins = {i: origins[i] for i in task.unlabeled.ids if i in origins}
        self.why_empty = "" if self._origins else explain_empty_round(rows)
        """The gate's reasons where there is no pseudo-label."""
        weights = {i: weight for i, (_, weight) in self._origins.items() if weight is not None}
        self.pool = task.unlabeled.with_masks(
            list(self),
            partial(read_pseudo_mask, task.run, task.unlabeled, task.num_classes, round_idx),
            weights=weights if task.cfg.fit.pseudo_weight == "estimated" else None,
            empty=[i for i, (reason, _) in self._origins.items() if reason == LESION_FREE],
        )
        """The images with their pseudo masks, for training batches."""

    def __getitem__(self, sample_id: str) -> PseudoLabel:
        reason, weight = self._origins[sample_id]
        mask = self._task.pseudo_mask(self.round_idx, sample_id)
        return PseudoLabel(mask, reason, weight, self.signature, self.round_idx)

    def __iter__(self) -> Iterator[str]:
        return iter(self._origins)

    def __len__(self) -> int:
        return len(self._origins)


def _reason_and_weight(rows: Sequence[DecisionRow]) -> tuple[str, float | None]:
    """Of one image from its decisions, as `kmine.mining.refine.refine` sets them."""
    kept = [row for row in rows if row.kept]
    return kept[0].reason, mean_estimate(row.estimated_dice for row in kept)


def reviewed_labels(
    review: VerdictEffects, ids: Sequence[str], signature: str, round_idx: int
) -> tuple[list[DecisionRow], dict[str, PseudoLabel]]:
    """Decisions and pseudo-labels of the images `ids` that have a reviewer's verdict; they are not segmented."""
    accepted = [i for i in ids if i in review.accepted]
    origin = {"reason": "accepted", "signature": signature, "round_idx": round_idx}
    labels = {i: PseudoLabel(read_png(review.accepted[i]), **origin) for i in accepted}
    return reviewed_rows([i for i in ids if i in review.rejected], accepted), labels

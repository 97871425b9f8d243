"""A finished run opened for an audit: its rounds of mining, its data, and readers of its masks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kmine.data.pool import MaskReader, Pool
from kmine.data.source import Source
from kmine.errors import UserError
from kmine.io.files import sign
from kmine.ops.metrics import nanmean
from kmine.setup.finished import final_run, open_finished_run
from kmine.setup.open import open_for_audit
from kmine.setup.preflight import preflight
from kmine.store.run_folder import NEEDS_WRITING, RunFolder
from kmine.store.table_files import RowsBySample
from kmine.store.tables import DecisionRow, PromptRow
from kmine.training.task import Task
from kmine.types import ProgressReporter


@dataclass(frozen=True)
class MinedRound:
    """One round of mining, read from the run folder."""

    round_idx: int
    signature: str
    """Signature of model, segmenter and settings."""
    prompting_round: int
    """Round of the model that prompted: the last adopted one before."""
    adopted: bool
    decisions: RowsBySample[DecisionRow]
    prompts: RowsBySample[PromptRow]
    pseudo_labeled: list[str]
    """Samples with a pseudo mask, in the order of the table."""

    def objects(self, sample_id: str) -> list[DecisionRow]:
        """Decisions on the objects of an image; empty if none was segmented."""
        return [row for row in self.decisions[sample_id] if row.is_object]

    def kept_objects(self, sample_id: str) -> list[DecisionRow]:
        """Decisions on the kept objects of an image."""
        return [row for row in self.objects(sample_id) if row.kept]

    def has_pseudo_mask(self, sample_id: str) -> bool:
        """Whether the image was trained on with a pseudo mask in this round."""
        rows = self.decisions.get(sample_id)
        return bool(rows and rows[0].in_training)

    def mean_estimate(self, sample_id: str) -> float:
        """Mean estimated Dice of the kept objects of an image; NaN if unknown."""
        return nanmean([row.estimated_dice for row in self.kept_objects(sample_id)])


@dataclass(frozen=True)
class AuditedRun:
    """A finished run with its data, and the round whose masks are audited."""

    store: RunFolder
    info: Mapping[str, Any]
    """Content of run.json."""
    source: Source
    task: Task
    rounds: list[MinedRound]
    audited_round: MinedRound

    @property
    def name(self) -> str:
        """Name of the run folder."""
        return self.store.root.resolve().name

    @property
    def signature(self) -> str:
        """Signature of the audited masks: of the data and of all rounds up to the audited one."""
        last = self.audited_round.round_idx
        signatures = [mined.signature for mined in self.rounds if mined.round_idx <= last]
        return sign("audit", self.info.get("data_fingerprint"), signatures)

    def pool(self, kind: str) -> Pool:
        """The images of the masks of a kind."""
        return self.task.unlabeled if kind == "pseudo" else self.task.labeled

    def read(self, kind: str) -> MaskReader:
        """Reader of the masks of a kind: sample id -> (H, W) class ids and 255, in the image's own frame."""
        if kind == "pseudo":
            return partial(self.task.pseudo_mask, self.audited_round.round_idx)
        return lambda sample_id: read_mask_of(self.task.labeled, sample_id)


@contextmanager
def open_audit(
    root: Path,
    progress: ProgressReporter,
    *,
    round_idx: int | None = None,
    device: str = "auto",
    data_root: str | None = None,
) -> Iterator[AuditedRun]:
    """Open the finished run in `root` and its data, with withheld masks closed; the folder is locked meanwhile.

    Of a folder of folds the run on all masks is opened. `round_idx`: the audited round, None: see `select_round`.
    `data_root`: where the data lie now, if they were moved.

    Raises:
        UserError: no finished run, no such round, missing pseudo masks, data that cannot be opened.
    """
    root = final_run(root)
    cfg = open_finished_run(root, device=device, data_root=data_root).cfg
    with closing(RunFolder(root, cure=NEEDS_WRITING)) as store:
        rounds = load_rounds(store)
        audited_round = select_round(rounds, round_idx, root, kept=store.run().get("adopted_round", 0))
        _require_masks(store, audited_round)
        source = preflight(cfg, mines=False)
        task = open_for_audit(cfg, source, store, progress)
        unknown = set(audited_round.pseudo_labeled).difference(task.unlabeled.ids)
        if unknown:
            raise UserError(
                f"{root}: round {audited_round.round_idx} mined {min(unknown)}, which is not an unlabeled image; "
                "restore splits.csv, or run kmine.loop again"
            )
        yield AuditedRun(store, store.run(), source, task, rounds, audited_round)


def load_rounds(store: RunFolder) -> list[MinedRound]:
    """All rounds of mining in the run folder, in order."""
    out: list[MinedRound] = []
    prompting_round = 0
    for number in range(1, 1000):
        decisions, prompts = store.by_sample(number)
        if not decisions:
            break
        pseudo_labeled = [name for name, in_training in decisions.firsts("in_training").items() if in_training]
        adopted = bool((store.read_json(store.round_dir(number) / "metrics.json") or {}).get("adopted"))
        signature = store.round_signature(number)
        out.append(MinedRound(number, signature, prompting_round, adopted, decisions, prompts, pseudo_labeled))
        prompting_round = number if adopted else prompting_round
    return out


def select_round(rounds: Sequence[MinedRound], round_idx: int | None, root: Path, kept: int = 0) -> MinedRound:
    """The audited round: number `round_idx`, else the one whose pseudo masks the model of round `kept` was trained on.

    That of a retrained model is the last with pseudo masks. Of round 0: the last adopted round with any, or the last.

    Raises:
        UserError: no mined round, or an unknown one; `root` opens the message.
    """
    if not rounds:
        raise UserError(
            f"{root}: expected a run that mined, found no pseudo masks; run kmine.loop with --rounds 1 or more"
        )
    by_idx = {mined.round_idx: mined for mined in rounds}
    if round_idx is not None and round_idx not in by_idx:
        raise UserError(f"--round {round_idx}: expected one of {', '.join(map(str, by_idx))}; the run mined no other")
    with_masks = [mined for mined in rounds if mined.pseudo_labeled]
    adopted = [mined for mined in with_masks if mined.adopted] or with_masks or rounds
    used = [mined for mined in with_masks if mined.round_idx <= kept] or adopted
    return by_idx[round_idx] if round_idx is not None else used[-1]


def read_mask_of(pool: Pool, sample_id: str) -> NDArray[np.uint8]:
    """(H, W) mask of a sample of a pool that was opened with masks."""
    mask = pool.sample(sample_id).mask
    assert mask is not None, "opened with masks"
    return mask


def _require_masks(store: RunFolder, mined: MinedRound) -> None:
    missing = store.masks(mined.round_idx).missing(mined.pseudo_labeled)
    if missing:
        raise UserError(
            f"{store.root}: expected {len(mined.pseudo_labeled)} pseudo masks, that of {missing[0]} is missing; run "
            "kmine.loop again"
        )

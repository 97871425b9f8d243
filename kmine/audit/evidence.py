"""From a finished run to what is known for and against each mask: the rounds, innocent models, and their evidence."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kmine.audit.label_issues import ConfidentDisagreement, ConfidentThresholds, confident_disagreement
from kmine.audit.ranking import (
    GIVEN_WEIGHTS,
    WEIGHTS,
    ReferenceModel,
    contradicts_image_label,
    explanations,
    held_out_models,
    label_issue_scores,
    outliers,
    rank_order,
    shape_features,
    uncertainty_of,
)
from kmine.data.pool import Pool
from kmine.data.quality import mask_alignment as pairing
from kmine.data.resize import resize_mask
from kmine.data.source import Source
from kmine.errors import UserError
from kmine.feedback.verdicts import mask_signature
from kmine.io.files import sign
from kmine.mining.crossfit import fold_model, folds
from kmine.models.base import LocalModel
from kmine.models.build import load_checkpoint
from kmine.ops.masks import to_rle
from kmine.store.run_folder import RunFolder
from kmine.store.tables import RowsBySample
from kmine.training.distributed import make_fabric
from kmine.training.inference import predict_resized
from kmine.training.task import Task
from kmine.types import IGNORE_INDEX

BATCH_SIZE = 16
"""Images that pass the models together."""

Row = dict[str, Any]
Reader = Callable[[str], NDArray[np.uint8]]
"""(H, W) class ids and 255 of a sample, in its own frame."""


class MinedRound(NamedTuple):
    """One round of mining, as the run folder has it."""

    round_idx: int
    signature: str
    """Signature of model, segmenter and settings."""
    prompting_round: int
    """The round whose model prompted: the last one adopted before."""
    adopted: bool
    decisions: RowsBySample
    prompts: RowsBySample
    pseudo_labeled: list[str]
    """Samples that had a pseudo mask, in order."""


@dataclass(frozen=True)
class ReferenceModels:
    """The models that may be asked, with what each learned; and what counts as sure."""

    references: list[ReferenceModel]
    models: list[LocalModel]
    thresholds: NDArray[np.float64]
    """(K,)"""


@dataclass(frozen=True, slots=True)
class MaskReport:
    """What is known for and against one mask; plain values, so that thousands can be held."""

    sample_id: str
    kind: str
    signature: str
    height: int
    width: int
    shape: tuple[float, ...]
    classes: tuple[int, ...]
    """Class ids that the mask shows."""
    area: float
    """Foreground, share of the image."""
    ignored: float
    """Share of the image that the mask leaves open."""
    signals: dict[str, float]
    conflict: ConfidentDisagreement | None
    model_names: tuple[str, ...]
    """Models that were asked: none of them learned this mask."""
    contradicted: bool
    predicted_rle: dict[int, str]
    """What they saw, at the size of training: run lengths by class."""
    rank: int = 0
    suspicion: float = math.nan
    explanations: tuple[str, ...] = ()


@dataclass(frozen=True)
class AuditedRun:
    """A finished run with its data, and the round whose masks are looked at."""

    store: RunFolder
    run: Mapping[str, Any]
    """What run.json holds."""
    source: Source
    task: Task
    rounds: list[MinedRound]
    audited_round: MinedRound

    @property
    def name(self) -> str:
        """Of the run folder."""
        return self.store.root.resolve().name

    @property
    def signature(self) -> str:
        """Of what the audited masks are: data and every round's makers."""
        signatures = [
            mined_round.signature
            for mined_round in self.rounds
            if mined_round.round_idx <= self.audited_round.round_idx
        ]
        return sign("audit", self.run.get("data_fingerprint"), signatures)

    def read(self, kind: str) -> Reader:
        """The reader of the masks of a kind."""
        if kind == "pseudo":
            return lambda sample_id: mined_mask(self.store, self.audited_round.round_idx, sample_id)
        return lambda sample_id: given_mask(self.task.labeled, sample_id)


def mined_mask(store: RunFolder, round_idx: int, sample_id: str) -> NDArray[np.uint8]:
    """(H, W) pseudo mask of a round. Raises `UserError` for a missing or damaged file."""
    try:
        return store.pseudo_mask(round_idx, sample_id)
    except (OSError, SyntaxError, ValueError) as error:  # Pillow's words for missing, truncated and damaged
        path = store.pseudo_path(round_idx, sample_id)
        raise UserError(f"{path}: expected a pseudo mask, cannot be read ({error}); run kmine.loop again") from error


def given_mask(pool: Pool, sample_id: str) -> NDArray[np.uint8]:
    """(H, W) of a pool that was opened with masks."""
    mask = pool.sample(sample_id).mask
    assert mask is not None, "opened with masks"
    return mask


def load_rounds(store: RunFolder) -> list[MinedRound]:
    """Every round that mined, first round first."""
    out: list[MinedRound] = []
    prompting_round = 0
    for number in range(1, 1000):
        decisions, prompts = store.by_sample(number)
        if not decisions:
            break
        pseudo_labeled = [name for name, in_training in decisions.firsts("in_training").items() if in_training]
        adopted = bool((store.read_json(store.round_dir(number) / "metrics.json") or {}).get("adopted"))
        out.append(
            MinedRound(
                number, store.round_signature(number), prompting_round, adopted, decisions, prompts, pseudo_labeled
            )
        )
        prompting_round = number if adopted else prompting_round
    return out


def select_round(rounds: Sequence[MinedRound], round_idx: int | None, root: object) -> MinedRound:
    """The round whose masks are looked at: the one asked for, else the last adopted one, else the last one.

    Raises:
        UserError: a round that never was, or one without any pseudo mask.
    """
    if not rounds:
        raise UserError(
            f"{root}: expected a run that mined, found no pseudo masks; run kmine.loop with --rounds 1 or more"
        )
    by_idx = {mined_round.round_idx: mined_round for mined_round in rounds}
    if round_idx is not None and round_idx not in by_idx:
        raise UserError(f"--round {round_idx}: expected one of {', '.join(map(str, by_idx))}; the run mined no other")
    with_masks = [mined_round for mined_round in rounds if mined_round.pseudo_labeled]
    adopted = [mined_round for mined_round in with_masks if mined_round.adopted] or with_masks
    selected = by_idx[round_idx] if round_idx is not None else adopted[-1] if adopted else rounds[-1]
    if not selected.pseudo_labeled:
        raise UserError(
            f"{root}: expected pseudo masks, round {selected.round_idx} kept none of {len(selected.decisions)} images; "
            "lower gate.target_dice, or train longer"
        )
    return selected


def rank_all_masks(
    task: Task,
    rounds: Sequence[MinedRound],
    audited_round: MinedRound,
    *,
    with_labeled: bool,
    labeled: Pool | None = None,
) -> tuple[list[MaskReport], list[MaskReport]]:
    """The pseudo masks of round `audited_round` and the given masks, each most suspicious first.

    `labeled`: the labeled images with their masks, where these are not those of the task.
    """
    labeled = labeled or task.labeled
    audited_ids = audited_round.pseudo_labeled
    references = load_reference_models(task, rounds, audited_ids, train_folds=with_labeled)
    labeled_reports = list(score_masks(task, references, "labeled", labeled, lambda i: given_mask(labeled, i), None))
    mined = task.unlabeled.subset(audited_ids)
    pseudo = list(
        score_masks(
            task, references, "pseudo", mined, lambda i: mined_mask(task.run, audited_round.round_idx, i), audited_round
        )
    )
    shapes = [report.shape for report in labeled_reports]
    return rank_masks(pseudo, shapes), rank_masks(
        labeled_reports, [report.shape for report in pseudo]
    ) if with_labeled else []


def load_reference_models(
    task: Task, rounds: Sequence[MinedRound], audited_ids: Sequence[str], *, train_folds: bool
) -> ReferenceModels:
    """Every model of the run that is innocent of anything wanted, and how sure they are where they are right.

    Models of the parts come first: they learned from no pseudo mask, asked for none, and each leaves out a part of the
    labels. Where the run has none, they are trained now if `train_folds`; a training that was stopped goes on.
    Probabilities that count as sure come from the validation images, which no model learned from.
    """
    loaded: list[tuple[ReferenceModel, LocalModel]] = []
    all_labeled = frozenset(task.labeled.ids)
    fold_ids = folds(task.labeled, task.cfg.adapt.folds, task.cfg.seed)
    for number, held_out in enumerate(fold_ids if len(fold_ids) > 1 else ()):
        model = _load(task, number=0, method_dir=f"fold_{number}")
        if model is None and train_folds:
            fabric = make_fabric(str(task.fabric.device), task.cfg.fit.precision)
            model = fold_model(replace(task, fabric=fabric), number, held_out)
        if model is not None:
            loaded.append((ReferenceModel(f"fold_{number}", all_labeled.difference(held_out), frozenset()), model))
    trained_on: dict[int, frozenset[str]] = {0: all_labeled}
    for mined_round in rounds:
        trained_on[mined_round.round_idx] = trained_on[mined_round.prompting_round] | frozenset(
            mined_round.pseudo_labeled
        )
    for number in trained_on:
        prompted_rounds = frozenset(
            later_round.round_idx for later_round in rounds if later_round.prompting_round == number
        )
        is_held_out = number == 0 or any(name not in trained_on[number] for name in audited_ids)
        model = _load(task, number=number) if is_held_out else None
        if model is not None:
            loaded.append((ReferenceModel(f"round_{number:02}", trained_on[number], prompted_rounds), model))
    references, models = [reference for reference, _ in loaded], [model for _, model in loaded]
    confident = ConfidentThresholds(task.num_classes)
    for sample_id, probs in mean_probabilities(task, models, task.val, task.val.ids):
        if probs is not None:
            confident.add(probs, task.val.mask_resized(sample_id))
    return ReferenceModels(references, models, confident.thresholds())


def _load(task: Task, *, number: int, method_dir: str = "") -> LocalModel | None:
    weights = task.run.load_tensors(task.run.round_dir(number, method_dir) / "model.safetensors", None)
    if weights is None:
        return None
    return load_checkpoint(task.cfg.model, task.num_classes, weights[0]).to(task.fabric.device)


def mean_probabilities(
    task: Task, models: Sequence[LocalModel], pool: Pool, ids: Sequence[str], tta: str = "none"
) -> Iterator[tuple[str, NDArray[np.float32] | None]]:
    """(id, (K, S, S) mean probabilities) at the size of training, a few images in memory; None without models."""
    for first in range(0, len(ids), BATCH_SIZE):
        batch_ids = ids[first : first + BATCH_SIZE]
        if not models:
            yield from ((sample_id, None) for sample_id in batch_ids)
            continue
        images = np.stack([pool.image_resized(i) for i in batch_ids])
        probs = [predict_resized(model, images, tta, task.fabric.device)[0] for model in models]
        yield from zip(batch_ids, np.mean(probs, axis=0), strict=True)


def score_masks(
    task: Task, references: ReferenceModels, kind: str, pool: Pool, read: Reader, mined_round: MinedRound | None
) -> Iterator[MaskReport]:
    """One mask after the other; `mined_round`: the round that mined them, None for given masks.

    A given mask is looked at by a single model, so that one sees each image flipped, too.
    """
    task.progress.start(f"audit: {'pseudo masks' if kind == 'pseudo' else 'given masks'}", len(pool))
    ids_by_models: dict[tuple[int, ...], list[str]] = {}
    for sample_id in pool.ids:
        model_indices = tuple(
            held_out_models(references.references, sample_id, mined_round.round_idx if mined_round else 0)
        )
        ids_by_models.setdefault(model_indices, []).append(sample_id)
    done = 0
    for model_indices, ids in ids_by_models.items():
        models, names = (
            [values[n] for n in model_indices]
            for values in (references.models, [w.name for w in references.references])
        )
        for sample_id, mean in mean_probabilities(task, models, pool, ids, "flips" if len(models) == 1 else "none"):
            yield _score_mask(task, references, kind, pool, sample_id, read(sample_id), mean, names, mined_round)
            done += 1
            task.progress.advance(done)


def _score_mask(
    task: Task,
    references: ReferenceModels,
    kind: str,
    pool: Pool,
    sample_id: str,
    mask: NDArray[np.uint8],
    mean: NDArray[np.float32] | None,
    names: Sequence[str],
    mined_round: MinedRound | None,
) -> MaskReport:
    resized = resize_mask(mask, task.cfg.data.size)
    conflict = None if mean is None else confident_disagreement(mean, resized, references.thresholds)
    signals = {} if conflict is None else {"conflict": conflict.conflict, "unlike": conflict.soft_dice_distance}
    signals["edge"] = _edge(pool.image_resized(sample_id), resized)
    rows = mined_round.decisions[sample_id] if mined_round else []
    signals |= uncertainty_of(row for row in rows if row["kept"] and row["object_idx"] >= 0) if mined_round else {}
    return MaskReport(
        sample_id=sample_id,
        kind=kind,
        signature=mask_signature(mask),
        height=mask.shape[0],
        width=mask.shape[1],
        shape=shape_features(resized),
        classes=tuple(int(k) for k in np.unique(mask) if k not in (0, IGNORE_INDEX)),
        area=float(((mask != 0) & (mask != IGNORE_INDEX)).mean()),
        ignored=float((mask == IGNORE_INDEX).mean()),
        signals=signals,
        conflict=conflict,
        model_names=tuple(names),
        contradicted=contradicts_image_label(mask, pool.image_label(sample_id), task.num_classes),
        predicted_rle={} if mean is None else _predicted_rle(mean),
    )


def rank_masks(reports: Sequence[MaskReport], other_shapes: Sequence[tuple[float, ...]]) -> list[MaskReport]:
    """The masks of one kind, most suspicious first; `other_shapes`: shapes of those of the other kind."""
    if not reports:
        return []
    shapes = np.array([report.shape for report in reports])
    references = [shapes, *([np.array(other_shapes)] if other_shapes else [])]
    outlier_scores = outliers(shapes, *references)
    signals = [
        report.signals | {name: float(values[n]) for name, values in outlier_scores.items()}
        for n, report in enumerate(reports)
    ]
    contradicted = [report.contradicted for report in reports]
    weights = WEIGHTS if reports[0].kind == "pseudo" else GIVEN_WEIGHTS
    values, signal_ranks = label_issue_scores(signals, contradicted, weights)
    out = []
    for rank, n in enumerate(rank_order(values, [report.sample_id for report in reports]), start=1):
        mask_ranks = {name: float(ranks[n]) for name, ranks in signal_ranks.items()}
        explanation = explanations(signals[n], mask_ranks, contradicted[n], reports[n].conflict, weights)
        out.append(
            replace(reports[n], signals=signals[n], rank=rank, suspicion=float(values[n]), explanations=explanation)
        )
    return out


def _edge(image: NDArray[np.uint8], mask: NDArray[np.uint8]) -> float:
    """Minus the log of how strong the image's edges are along the outline; NaN without one."""
    at = pairing.outline(mask)
    return -math.log(max(float(pairing.edges(image).ravel()[at].mean()), 1e-3)) if len(at) else math.nan


def _predicted_rle(probs: NDArray[np.float32]) -> dict[int, str]:
    predicted = probs.argmax(axis=0)
    return {k: to_rle(predicted == k) for k in range(1, len(probs)) if (predicted == k).any()}

"""Score the masks of a run: reference models of the run, their predictions, and a report on each mask."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from kmine.audit import ranking
from kmine.audit.label_issues import confident_disagreement, confident_thresholds
from kmine.audit.ranking import ReferenceModel
from kmine.audit.reports import MaskReport, MaskReports
from kmine.audit.rounds import MinedRound, read_mask_of
from kmine.data.pool import MaskReader, Pool
from kmine.data.quality import mask_alignment
from kmine.data.resize import Resizer
from kmine.errors import UserError
from kmine.feedback.verdicts import mask_signature
from kmine.mining.crossfit import fold_model, folds
from kmine.models.base import LocalModel
from kmine.models.build import load_checkpoint
from kmine.ops.masks import to_rle
from kmine.report.audit.page import Kind
from kmine.setup.resolve import TTA_OF_FLIPS
from kmine.store.artifacts import CURE, DamagedError, fitting
from kmine.training.distributed import make_fabric
from kmine.training.inference import predict_resized
from kmine.training.task import Task
from kmine.types import IGNORE_INDEX, most_probable

BATCH_SIZE = 16
"""Images per forward pass."""


@dataclass(frozen=True)
class ReferenceModels:
    """Models for comparison, and the confidence thresholds of their mean prediction."""

    references: list[ReferenceModel]
    models: list[LocalModel]
    thresholds: NDArray[np.float64]
    """(K,)"""

    def subset(self, indices: Sequence[int]) -> ReferenceModels:
        """Only the models at `indices`, with the same thresholds."""
        references, models = ([values[n] for n in indices] for values in (self.references, self.models))
        return ReferenceModels(references, models, self.thresholds)


@dataclass(frozen=True)
class MaskSet:
    """The masks of one kind, with their images."""

    kind: Kind
    pool: Pool
    read: MaskReader
    """Sample id -> (H, W) class ids and 255, in the image's own frame."""
    mined_round: MinedRound | None = None
    """The round of pseudo masks; None for given masks."""


def rank_all_masks(
    task: Task,
    rounds: Sequence[MinedRound],
    audited_round: MinedRound,
    *,
    with_labeled: bool,
    labeled: Pool | None = None,
) -> tuple[MaskReports, MaskReports]:
    """Reports on the pseudo masks of a round and on the given masks, each most suspicious first.

    With `with_labeled`, missing fold models are trained; without, there are no reports on given masks. `labeled`:
    labeled images with other masks than those of the task.
    """
    labeled = labeled or task.labeled
    references = load_reference_models(task, rounds, audited_round.pseudo_labeled, train_folds=with_labeled)
    given = MaskSet("labeled", labeled, lambda i: read_mask_of(labeled, i))
    mined = MaskSet(
        "pseudo",
        task.unlabeled.subset(audited_round.pseudo_labeled),
        partial(task.pseudo_mask, audited_round.round_idx),
        audited_round,
    )
    of_given, of_mined = (MaskReports(score_masks(task, references, masks)) for masks in (given, mined))
    return of_mined.ranked(of_given.shapes), of_given.ranked(of_mined.shapes) if with_labeled else MaskReports(())


def load_reference_models(
    task: Task, rounds: Sequence[MinedRound], audited_ids: Sequence[str], *, train_folds: bool
) -> ReferenceModels:
    """Load the models not trained on at least one audited mask, and their confidence thresholds on validation images.

    Fold models come first: each is trained on given masks without one fold, and has prompted no segmenter. Missing ones
    are trained now if `train_folds`, or their training is resumed.
    """
    loaded = [*_fold_models(task, train_folds=train_folds), *_round_models(task, rounds, audited_ids)]
    references, models = [reference for reference, _ in loaded], [model for _, model in loaded]
    validation = mean_probabilities(task, models, task.val, task.val.ids)
    pairs = ((probs, task.val.mask_resized(sample_id)) for sample_id, probs in validation if probs is not None)
    return ReferenceModels(references, models, confident_thresholds(pairs, task.num_classes))


def _fold_models(task: Task, *, train_folds: bool) -> Iterator[tuple[ReferenceModel, LocalModel]]:
    all_labeled = frozenset(task.labeled.ids)
    fold_ids = folds(task.labeled, task.cfg.adapt.folds, task.cfg.seed)
    for number, held_out in enumerate(fold_ids if len(fold_ids) > 1 else ()):
        try:
            model = load_round_model(task, number=0, method_dir=f"fold_{number}")
        except DamagedError as error:
            if not train_folds:
                path = task.run.round_dir(0, f"fold_{number}") / "model.safetensors"
                cure = "delete it, or audit without --no_labeled, which trains it anew"
                raise UserError(f"{path}: damaged weights; {cure}") from error
            model = None
        if model is None and train_folds:
            fabric = make_fabric(str(task.fabric.device), task.cfg.fit.precision)
            model = fold_model(replace(task, fabric=fabric), number, held_out)
        if model is not None:
            yield ReferenceModel(f"fold_{number}", all_labeled.difference(held_out), frozenset()), model


def _round_models(
    task: Task, rounds: Sequence[MinedRound], audited_ids: Sequence[str]
) -> Iterator[tuple[ReferenceModel, LocalModel]]:
    """Models of the rounds; that of round 0, and those not trained on at least one of `audited_ids`."""
    trained_on = {0: frozenset(task.labeled.ids)}
    for mined in rounds:
        trained_on[mined.round_idx] = trained_on[mined.prompting_round] | frozenset(mined.pseudo_labeled)
    trained = {0, *(mined.round_idx for mined in rounds if mined.pseudo_labeled)}
    for number, ids in trained_on.items():
        is_held_out = number == 0 or any(name not in ids for name in audited_ids)
        model = load_round_model(task, number=number) if is_held_out else None
        if model is None and is_held_out and number in trained:
            path = task.run.round_dir(number) / "model.safetensors"
            raise UserError(f"{path}: expected the weights of the round, found no such file; {CURE}")
        if model is not None:
            prompted_rounds = frozenset(later.round_idx for later in rounds if later.prompting_round == number)
            yield ReferenceModel(f"round_{number:02}", ids, prompted_rounds), model


def load_round_model(task: Task, *, number: int, method_dir: str = "") -> LocalModel | None:
    """The local model of a round in eval mode, on the task's device; None without weights."""
    path = task.run.round_dir(number, method_dir) / "model.safetensors"
    weights = task.run.load_tensors(path, None)
    if weights is None:
        return None
    with fitting(path):
        model = load_checkpoint(task.cfg.model, task.num_classes, weights[0])
    return model.with_patch(task.cfg.data.patch).to(task.fabric.device)


def mean_probabilities(
    task: Task, models: Sequence[LocalModel], pool: Pool, ids: Sequence[str], tta: str = "none"
) -> Iterator[tuple[str, NDArray[np.float32] | None]]:
    """(id, (K, S, S) mean probabilities of the models) at training size, batch by batch; None without models."""
    for first in range(0, len(ids), BATCH_SIZE):
        batch_ids = ids[first : first + BATCH_SIZE]
        if not models:
            yield from ((sample_id, None) for sample_id in batch_ids)
            continue
        images = np.stack([pool.image_resized(i) for i in batch_ids])
        probs = [predict_resized(model, images, tta, task.fabric.device)[0] for model in models]
        yield from zip(batch_ids, np.mean(probs, axis=0), strict=True)


def score_masks(task: Task, references: ReferenceModels, masks: MaskSet) -> Iterator[MaskReport]:
    """Compare each mask with its held-out models."""
    for sample_id, held_out, mean in held_out_predictions(task, references, masks):
        yield score_mask(task, held_out, masks, sample_id, mean)


def held_out_predictions(
    task: Task, references: ReferenceModels, masks: MaskSet
) -> Iterator[tuple[str, ReferenceModels, NDArray[np.float32] | None]]:
    """(id, held-out models, their (K, S, S) mean probabilities or None without any), grouped by the models.

    A single model predicts with test-time flips.
    """
    task.progress.start(f"audit: {'pseudo masks' if masks.kind == 'pseudo' else 'given masks'}", len(masks.pool))
    round_idx = masks.mined_round.round_idx if masks.mined_round else 0
    ids_by_models: dict[tuple[int, ...], list[str]] = {}
    for sample_id in masks.pool.ids:
        indices = tuple(ranking.held_out_models(references.references, sample_id, round_idx))
        ids_by_models.setdefault(indices, []).append(sample_id)
    done = 0
    for indices, ids in ids_by_models.items():
        held_out = references.subset(indices)
        tta = TTA_OF_FLIPS[task.cfg.fit.flips] if len(indices) == 1 else "none"
        for sample_id, mean in mean_probabilities(task, held_out.models, masks.pool, ids, tta):
            yield sample_id, held_out, mean
            done += 1
            task.progress.advance(done)


def score_mask(
    task: Task, held_out: ReferenceModels, masks: MaskSet, sample_id: str, mean: NDArray[np.float32] | None
) -> MaskReport:
    """Signals of one mask; `mean`: (K, S, S) mean probabilities of the held-out models, None without any."""
    mask = masks.read(sample_id)
    resized = Resizer.of(task.cfg.data).mask(mask)
    conflict = None if mean is None else confident_disagreement(mean, resized, held_out.thresholds)
    signals = {} if conflict is None else {"conflict": conflict.conflict, "unlike": conflict.soft_dice_distance}
    signals["edge"] = _edge(masks.pool.image_resized(sample_id), resized)
    signals |= ranking.uncertainty_of(masks.mined_round.kept_objects(sample_id)) if masks.mined_round else {}
    return MaskReport(
        sample_id=sample_id,
        kind=masks.kind,
        signature=mask_signature(mask),
        height=mask.shape[0],
        width=mask.shape[1],
        shape=ranking.shape_features(resized),
        classes=tuple(k for k, _ in class_masks(mask) if k != IGNORE_INDEX),
        area=float(((mask != 0) & (mask != IGNORE_INDEX)).mean()),
        ignored=float((mask == IGNORE_INDEX).mean()),
        signals=signals,
        conflict=conflict,
        model_names=tuple(reference.name for reference in held_out.references),
        contradicted=ranking.contradicts_image_label(mask, masks.pool.image_label(sample_id), task.num_classes),
        predicted_rle={} if mean is None else {k: to_rle(region) for k, region in class_masks(most_probable(mean))},
    )


def _edge(image: NDArray[np.uint8], mask: NDArray[np.uint8]) -> float:
    """Minus the log of the mean edge strength of the image along the outline; NaN without an outline."""
    at = mask_alignment.outline(mask)
    return -math.log(max(float(mask_alignment.edges(image).ravel()[at].mean()), 1e-3)) if len(at) else math.nan


def class_masks(mask: NDArray[np.integer]) -> Iterator[tuple[int, NDArray[np.bool_]]]:
    """(class id, its pixels) of the classes present in (H, W) class ids, ignored pixels (255) included."""
    yield from ((class_id, mask == class_id) for class_id in np.unique(mask).tolist() if class_id)

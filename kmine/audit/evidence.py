"""From a finished run to what is known for and against each mask: the rounds, innocent models, and their evidence."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kmine.audit.ranking import (
    GIVEN_WEIGHTS,
    WEIGHTS,
    Confidence,
    Conflict,
    Witness,
    causes,
    contradicts,
    doubt_of,
    find_conflict,
    innocent,
    order,
    outliers,
    shape_of,
    suspicion,
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
from kmine.models.build import build_model
from kmine.ops.masks import to_rle
from kmine.store.run_folder import RunStore
from kmine.store.tables import RowsBySample
from kmine.training.distributed import make_fabric
from kmine.training.inference import predict_small
from kmine.training.task import Task
from kmine.types import IGNORE_INDEX

BATCH = 16
"""Images that pass the models together."""

Row = dict[str, Any]
Reader = Callable[[str], NDArray[np.uint8]]
"""(H, W) class ids and 255 of a sample, in its own frame."""


class Past(NamedTuple):
    """One round of mining, as the run folder has it."""

    round_idx: int
    made_by: str
    """Signature of model, segmenter and settings."""
    asked_by: int
    """The round whose model prompted: the last one adopted before."""
    adopted: bool
    decisions: RowsBySample
    prompts: RowsBySample
    teaching: list[str]
    """Samples that had a pseudo mask, in order."""


@dataclass(frozen=True)
class Asked:
    """The models that may be asked, with what each learned; and what counts as sure."""

    witnesses: list[Witness]
    models: list[LocalModel]
    thresholds: NDArray[np.float64]
    """(K,)"""


@dataclass(frozen=True, slots=True)
class Found:
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
    conflict: Conflict | None
    witnesses: tuple[str, ...]
    """Models that were asked: none of them learned this mask."""
    contradicted: bool
    seen: dict[int, str]
    """What they saw, at the size of training: run lengths by class."""
    rank: int = 0
    suspicion: float = math.nan
    causes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Opened:
    """A finished run with its data, and the round whose masks are looked at."""

    store: RunStore
    run: Mapping[str, Any]
    """What run.json holds."""
    source: Source
    task: Task
    past: list[Past]
    this: Past

    @property
    def name(self) -> str:
        """Of the run folder."""
        return self.store.root.resolve().name

    @property
    def signature(self) -> str:
        """Of what the audited masks are: data and every round's makers."""
        made_by = [one.made_by for one in self.past if one.round_idx <= self.this.round_idx]
        return sign("audit", self.run.get("data_fingerprint"), made_by)

    def read(self, kind: str) -> Reader:
        """The reader of the masks of a kind."""
        if kind == "pseudo":
            return lambda sample_id: mined_mask(self.store, self.this.round_idx, sample_id)
        return lambda sample_id: given_mask(self.task.labeled, sample_id)


def mined_mask(store: RunStore, round_idx: int, sample_id: str) -> NDArray[np.uint8]:
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


def past_of(store: RunStore) -> list[Past]:
    """Every round that mined, first round first."""
    out: list[Past] = []
    asked_by = 0
    for number in range(1, 1000):
        decisions, prompts = store.by_sample(number)
        if not decisions:
            break
        teaching = [name for name, taught in decisions.firsts("in_training").items() if taught]
        adopted = bool((store.read_json(store.round_dir(number) / "metrics.json") or {}).get("adopted"))
        out.append(Past(number, store.mined_by(number), asked_by, adopted, decisions, prompts, teaching))
        asked_by = number if adopted else asked_by
    return out


def chosen(past: Sequence[Past], round_idx: int | None, root: object) -> Past:
    """The round whose masks are looked at: the one asked for, else the last adopted one, else the last one.

    Raises:
        UserError: a round that never was, or one without any pseudo mask.
    """
    if not past:
        raise UserError(
            f"{root}: expected a run that mined, found no pseudo masks; run kmine.loop with --rounds 1 or more"
        )
    known = {one.round_idx: one for one in past}
    if round_idx is not None and round_idx not in known:
        raise UserError(f"--round {round_idx}: expected one of {', '.join(map(str, known))}; the run mined no other")
    taught = [one for one in past if one.teaching]
    best = [one for one in taught if one.adopted] or taught
    found = known[round_idx] if round_idx is not None else best[-1] if best else past[-1]
    if not found.teaching:
        raise UserError(
            f"{root}: expected pseudo masks, round {found.round_idx} kept none of {len(found.decisions)} images; "
            "lower gate.target_dice, or train longer"
        )
    return found


def investigate(
    task: Task, store: RunStore, past: Sequence[Past], this: Past, *, with_labeled: bool, given: Pool | None = None
) -> tuple[list[Found], list[Found]]:
    """The pseudo masks of round `this` and the given masks, each most suspicious first.

    `given`: the labeled images with their masks, where these are not those of the task.
    """
    given = given or task.labeled
    wanted = this.teaching
    asked = ask_models(task, store, past, wanted, train_folds=with_labeled)
    labels = list(look(task, asked, "labeled", given, lambda i: given_mask(given, i), None))
    mined = task.unlabeled.subset(wanted)
    pseudo = list(look(task, asked, "pseudo", mined, lambda i: mined_mask(store, this.round_idx, i), this))
    shapes = [one.shape for one in labels]
    return ranked(pseudo, shapes), ranked(labels, [one.shape for one in pseudo]) if with_labeled else []


def ask_models(task: Task, store: RunStore, past: Sequence[Past], wanted: Sequence[str], *, train_folds: bool) -> Asked:
    """Every model of the run that is innocent of anything wanted, and how sure they are where they are right.

    Models of the parts come first: they learned from no pseudo mask, asked for none, and each leaves out a part of the
    labels. Where the run has none, they are trained now if `train_folds`; a training that was stopped goes on.
    Probabilities that count as sure come from the validation images, which no model learned from.
    """
    found: list[tuple[Witness, LocalModel]] = []
    everything = frozenset(task.labeled.ids)
    parts = folds(task.labeled, task.cfg.adapt.folds, task.cfg.seed)
    for number, part in enumerate(parts if len(parts) > 1 else ()):
        model = _load(task, store, number=0, arm=f"fold_{number}")
        if model is None and train_folds:
            fabric = make_fabric(str(task.fabric.device), task.cfg.fit.precision)
            model = fold_model(replace(task, fabric=fabric), store, number, part)
        if model is not None:
            found.append((Witness(f"fold_{number}", everything.difference(part), frozenset()), model))
    learned: dict[int, frozenset[str]] = {0: everything}
    for one in past:
        learned[one.round_idx] = learned[one.asked_by] | frozenset(one.teaching)
    for number in learned:
        asked_in = frozenset(one.round_idx for one in past if one.asked_by == number)
        helps = number == 0 or any(name not in learned[number] for name in wanted)
        model = _load(task, store, number=number) if helps else None
        if model is not None:
            found.append((Witness(f"round_{number:02}", learned[number], asked_in), model))
    witnesses, models = [one for one, _ in found], [model for _, model in found]
    sure = Confidence(task.num_classes)
    for sample_id, probs in predicted(task, models, task.val, task.val.ids):
        if probs is not None:
            sure.add(probs, task.val.mask_small(sample_id))
    return Asked(witnesses, models, sure.thresholds())


def _load(task: Task, store: RunStore, *, number: int, arm: str = "") -> LocalModel | None:
    weights = store.load_tensors(store.round_dir(number, arm) / "model.safetensors", None)
    if weights is None:
        return None
    # The weights are overwritten at once, so none are loaded or downloaded for them.
    model = build_model(replace(task.cfg.model, encoder_weights=None), task.num_classes, task.cfg.seed)
    model.load_state_dict(weights[0])
    return model.to(task.fabric.device).eval()


def predicted(
    task: Task, models: Sequence[LocalModel], pool: Pool, ids: Sequence[str], tta: str = "none"
) -> Iterator[tuple[str, NDArray[np.float32] | None]]:
    """(id, (K, S, S) mean probabilities) at the size of training, a few images in memory; None without models."""
    for first in range(0, len(ids), BATCH):
        some = ids[first : first + BATCH]
        if not models:
            yield from ((sample_id, None) for sample_id in some)
            continue
        images = np.stack([pool.image_small(i) for i in some])
        answers = [predict_small(model, images, tta, task.fabric.device)[0] for model in models]
        yield from zip(some, np.mean(answers, axis=0), strict=True)


def look(task: Task, asked: Asked, kind: str, pool: Pool, read: Reader, past: Past | None) -> Iterator[Found]:
    """One mask after the other; `past`: the round that mined them, None for given masks.

    A given mask is looked at by a single model, so that one sees each image flipped, too.
    """
    task.watcher.start(f"audit: {'pseudo masks' if kind == 'pseudo' else 'given masks'}", len(pool))
    of_models: dict[tuple[int, ...], list[str]] = {}
    for sample_id in pool.ids:
        speak = tuple(innocent(asked.witnesses, sample_id, past.round_idx if past else 0))
        of_models.setdefault(speak, []).append(sample_id)
    done = 0
    for speak, ids in of_models.items():
        models, names = ([values[n] for n in speak] for values in (asked.models, [w.name for w in asked.witnesses]))
        for sample_id, mean in predicted(task, models, pool, ids, "flips" if len(models) == 1 else "none"):
            yield _look_at(task, asked, kind, pool, sample_id, read(sample_id), mean, names, past)
            done += 1
            task.watcher.advance(done)


def _look_at(
    task: Task,
    asked: Asked,
    kind: str,
    pool: Pool,
    sample_id: str,
    mask: NDArray[np.uint8],
    mean: NDArray[np.float32] | None,
    names: Sequence[str],
    past: Past | None,
) -> Found:
    small = resize_mask(mask, task.cfg.data.size)
    against = None if mean is None else find_conflict(mean, small, asked.thresholds)
    signals = {} if against is None else {"conflict": against.conflict, "unlike": against.unlike}
    signals["edge"] = _edge(pool.image_small(sample_id), small)
    rows = past.decisions[sample_id] if past else []
    signals |= doubt_of(row for row in rows if row["kept"] and row["object_idx"] >= 0) if past else {}
    return Found(
        sample_id=sample_id,
        kind=kind,
        signature=mask_signature(mask),
        height=mask.shape[0],
        width=mask.shape[1],
        shape=shape_of(small),
        classes=tuple(int(k) for k in np.unique(mask) if k not in (0, IGNORE_INDEX)),
        area=float(((mask != 0) & (mask != IGNORE_INDEX)).mean()),
        ignored=float((mask == IGNORE_INDEX).mean()),
        signals=signals,
        conflict=against,
        witnesses=tuple(names),
        contradicted=contradicts(mask, pool.image_label(sample_id), task.num_classes),
        seen={} if mean is None else _seen(mean),
    )


def ranked(found: Sequence[Found], others: Sequence[tuple[float, ...]]) -> list[Found]:
    """The masks of one kind, most suspicious first; `others`: shapes of those of the other kind."""
    if not found:
        return []
    shapes = np.array([one.shape for one in found])
    references = [shapes, *([np.array(others)] if others else [])]
    odd = outliers(shapes, *references)
    signals = [one.signals | {name: float(values[n]) for name, values in odd.items()} for n, one in enumerate(found)]
    contradicted = [one.contradicted for one in found]
    weights = WEIGHTS if found[0].kind == "pseudo" else GIVEN_WEIGHTS
    values, placed = suspicion(signals, contradicted, weights)
    out = []
    for rank, n in enumerate(order(values, [one.sample_id for one in found]), start=1):
        places = {name: float(ranks[n]) for name, ranks in placed.items()}
        why = causes(signals[n], places, contradicted[n], found[n].conflict, weights)
        out.append(replace(found[n], signals=signals[n], rank=rank, suspicion=float(values[n]), causes=why))
    return out


def _edge(image: NDArray[np.uint8], mask: NDArray[np.uint8]) -> float:
    """Minus the log of how strong the image's edges are along the outline; NaN without one."""
    at = pairing.outline(mask)
    return -math.log(max(float(pairing.edges(image).ravel()[at].mean()), 1e-3)) if len(at) else math.nan


def _seen(probs: NDArray[np.float32]) -> dict[int, str]:
    best = probs.argmax(axis=0)
    return {k: to_rle(best == k) for k in range(1, len(probs)) if (best == k).any()}

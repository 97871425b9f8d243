"""Knowledge mining: the loop of the paper (arXiv 2503.06816), as read in docs/method.md.

The local model's predictions prompt the segmenter on the unlabeled images; what comes back is gated, refined, and
teaches the local model of the next round.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kmine.calibrator import Calibration, settled
from kmine.config import LoopConfig
from kmine.data.pool import Pool
from kmine.judged import read_mask
from kmine.masks import components, from_rle
from kmine.methods import Clock, Task, Trained, new_model, score, train, trained_witness
from kmine.models.local import LocalModel
from kmine.models.together import every_nth, leader_first
from kmine.records import ESTIMATED, Candidate, Decision, Probs, Prompts, RoundResult, Sample, derive_seed
from kmine.segmenters.base import Proposing, Segmenter, cannot_propose
from kmine.stages.calibrate import threshold_by_estimates
from kmine.stages.changes import Changes, Taught, find_changes, sentence, taught, warnings, why_none
from kmine.stages.gate import gate
from kmine.stages.infer import activations, infer
from kmine.stages.prompts import ask_about, ask_again, find_prompts, prompts_from_activation, remember
from kmine.stages.proposals import may_pick, pick
from kmine.stages.refine import refine
from kmine.stages.segment import Embedded, embed, segment, segment_twice
from kmine.stages.tabulate import EMPTY, judged_rows, rows_of
from kmine.store import RunStore, sign

Known = dict[str, list[tuple[int, Callable[[], NDArray[np.bool_]]]]]
"""Class id and mask, unpacked when it is wanted, of the objects of each sample."""
CHUNK = 16
"""Images mined together: what a kill can cost, and what memory holds."""
PILOT = 64
"""Unlabeled images that settle a round's threshold where the labels promise nothing: a few dozen estimates will do."""


class Asked(NamedTuple):
    """What is known of a chunk of images before the gate; one entry an image in each."""

    images: list[Sample]
    probs: list[Probs]
    prompts: list[list[Prompts]]
    candidates: list[list[Candidate]]
    witnessed: list[Probs | None]


def mine(task: Task, store: RunStore) -> Iterator[RoundResult]:
    """Round 0 on the labels alone; then, `rounds` times: mine the unlabeled images, fit on labels + pseudo masks.

    Every round starts from the last adopted one. Stops early where a round finds no pseudo mask at all: that
    round has the metrics of the one before, and is not adopted. Stops, too, after two refused rounds in a row: the
    next would start from the same model once more.
    """
    cfg, judged = task.cfg, task.judged
    model = new_model(task, store)
    current = train(task, store, model, round_idx=0)
    adopted = score(task, store, model, current, round_idx=0)
    yield adopted
    labeled_area = object_areas(task.labeled, task.num_classes)
    witness, witness_signature = trained_witness(task, store) or (None, "")
    mined_by: list[str] = []
    last_adopted = 0
    for round_idx in range(1, cfg.rounds + 1):
        made_by, clock = mining_signature(task, current, witness_signature), Clock()
        model.load_state_dict(current.best)
        asking = partial(
            ask_about_images, task, model, witness, answered_before(task, store, round_idx), round_idx, clock
        )
        parts = list(store.unmined(round_idx, made_by, task.unlabeled.ids, CHUNK))
        task.fabric.barrier()  # all have seen what there is to do before anyone does some of it
        with leader_first(task.fabric):
            calibration = settle(task, store, asking, labeled_area, round_idx, made_by) if parts else None
        task.watcher.start(f"round {round_idx}: mining", len(task.unlabeled))
        for part, ids in every_nth(parts, task.fabric):
            asked = asking([i for i in ids if i not in judged])
            decisions = gate_all(asked, labeled_area, cfg, calibration)
            clock.lap("gate")
            pseudo = [
                refine(*row, cfg.refine, image_label=image.image_label)
                for image, *row in zip(*asked[:4], decisions, strict=True)
            ]
            clock.lap("refine")
            tables, masks = rows_of(asked.images, asked.prompts, asked.candidates, decisions, pseudo)
            accepted = [i for i in ids if i in judged.accepted]
            tables["decisions"] += judged_rows([i for i in ids if i in judged.rejected], accepted)
            masks |= {i: read_mask(judged.accepted[i]) for i in accepted}
            store.save_mined(round_idx, made_by, part, tables, masks)
            clock.lap("store")
            task.watcher.advance(min((part + 1) * CHUNK, len(task.unlabeled)))
        task.fabric.barrier()
        mined_by.append(made_by)
        with leader_first(task.fabric):
            rows = store.finish_mining(round_idx, made_by, math.ceil(len(task.unlabeled) / CHUNK))
            note_changes(task, store, mined_by, rows)
        clock.lap("changes")
        pseudo_pool = trainable(task, store, round_idx, rows)
        if not len(pseudo_pool):
            nothing = "no pseudo mask was kept, so there is nothing to learn from; stopping"
            task.watcher.say(f"round {round_idx}: {nothing} ({why_none(rows)})")
            same = {"metrics": adopted.metrics, "final_metrics": adopted.final_metrics, "seconds": clock.seconds}
            yield RoundResult(round_idx, len(task.labeled), 0, adopted=False, reason="refused: no pseudo mask", **same)
            return
        fitted = train(
            task, store, model, round_idx=round_idx, start=current, pseudo=pseudo_pool, pseudo_signature=made_by
        )
        result = score(
            task,
            store,
            model,
            fitted,
            round_idx=round_idx,
            num_pseudo=len(pseudo_pool),
            before=adopted,
            seconds=clock.seconds,
        )
        yield result
        if result.adopted:
            current, adopted, last_adopted = fitted, result, round_idx
        elif round_idx - last_adopted == 2:
            return


def ask_about_images(
    task: Task,
    model: LocalModel,
    witness: LocalModel | None,
    known: Known,
    round_idx: int,
    clock: Clock,
    ids: Sequence[str],
) -> Asked:
    """Images -> probs -> prompts -> candidates, of a chunk of unlabeled images."""
    images = [task.unlabeled.sample(i) for i in ids]
    clock.lap("read")
    probs = list(infer(model, task.unlabeled, ids, device=task.fabric.device, **asdict(task.cfg.infer)))
    clock.lap("infer")
    prompts, embedded = prompts_for(task, task.segmenter, images, probs, round_idx)
    prompts = heed_labels(task, model, images, prompts, round_idx)
    prompts = [remember(asked, known.get(i, [])) for i, asked in zip(ids, prompts, strict=True)]
    clock.lap("prompts")
    prompts, candidates = ask(task, task.segmenter, images, prompts, round_idx, embedded)
    clock.lap("segment")
    seen = witnessed(task, witness, task.unlabeled, ids)
    clock.lap("infer")
    return Asked(images, probs, prompts, candidates, seen)


def settle(
    task: Task,
    store: RunStore,
    asking: Callable[[Sequence[str]], Asked],
    labeled_area: dict[int, float],
    round_idx: int,
    made_by: str,
) -> Calibration | None:
    """What the gate goes by in this round.

    Where the labels promise the target at a threshold, that one holds. Where they are too few for it, so many masks
    are kept that their mean estimate reaches the target, seen on at most `PILOT` unlabeled images.
    """
    given = task.calibration
    if given is None or given.promise.kept:
        return given
    path, signature = store.round_dir(round_idx) / "threshold.json", sign("threshold", PILOT, made_by)
    about = store.load_json(path, signature)
    if about is None:
        open_ids = [i for i in task.unlabeled.ids if i not in task.judged]
        order = np.random.default_rng(derive_seed(task.cfg.seed, round_idx, "pilot")).permutation(len(open_ids))
        ids = [open_ids[n] for n in sorted(order[:PILOT])]
        task.watcher.start(f"round {round_idx}: settling the gate", len(ids))
        estimates: list[float] = []
        for first in range(0, len(ids), CHUNK):
            decisions = gate_all(asking(ids[first : first + CHUNK]), labeled_area, task.cfg, given)
            estimates += [d.estimated_dice for some in decisions for d in some if d.reason in ESTIMATED]
            task.watcher.advance(min(first + CHUNK, len(ids)))
        found = threshold_by_estimates(estimates, task.cfg.gate.target_dice, given.promise.threshold)
        about = {**found._asdict(), "target": task.cfg.gate.target_dice, "num_images": len(ids)}
        store.save_json(path, about, signature)
    task.watcher.say(f"round {round_idx}: {settled(about)}")
    return replace(given, promise=replace(given.promise, threshold=about["threshold"]))


def prompts_for(
    task: Task, segmenter: Segmenter, images: Sequence[Sample], probs: Sequence[Probs], round_idx: int
) -> tuple[list[list[Prompts]], Embedded]:
    """What to ask about each image, and the embeddings that were made to find it out.

    The local model's own prompts; with `prompts.source auto` those of the masks that it picked among the segmenter's
    proposals. Nothing is proposed where it sees nothing, nor in images known to be free of the only thing sought.
    """
    cfg, seed = task.cfg.prompts, task.cfg.seed
    prompts = [find_prompts(p, cfg, seed=seed, round_idx=round_idx) for p in probs]
    if cfg.source != "auto":
        return prompts, {}
    if not isinstance(segmenter, Proposing):
        raise cannot_propose(segmenter.name)
    free = [image.image_label == 0 and task.num_classes == 2 for image in images]
    wanted = [n for n, p in enumerate(probs) if not free[n] and may_pick(p, prompts[n])]
    embedded = embed(segmenter, images, wanted)
    for n, proposals in zip(wanted, segmenter.propose([embedded[n] for n in wanted]), strict=True):
        key = (seed, round_idx, images[n].sample_id)
        prompts[n] = [
            one.asked if one.mask is None else ask_about(one.asked, one.mask, cfg, seed=derive_seed(*key, k))
            for k, one in enumerate(pick(probs[n], prompts[n], proposals, cfg))
        ]
    return prompts, embedded


def ask(
    task: Task,
    segmenter: Segmenter,
    images: Sequence[Sample],
    prompts: Sequence[list[Prompts]],
    round_idx: int,
    embedded: Embedded | None = None,
) -> tuple[list[list[Prompts]], list[list[Candidate]]]:
    """What the segmenter answers, and to which prompts: in one pass, or with its own answers in a second one.

    `embedded` are embeddings that are there already; these images are not encoded again.
    """
    cfg = task.cfg.prompts
    if cfg.passes == 1:
        return list(prompts), segment(segmenter, images, prompts, embedded)

    def again(image: int, number: int, asked: Prompts, answer: Candidate) -> Prompts:
        key = (task.cfg.seed, round_idx, images[image].sample_id, number, "second pass")
        return ask_again(asked, answer, cfg, seed=derive_seed(*key))

    return segment_twice(segmenter, images, prompts, again, embedded)


def answered_before(task: Task, store: RunStore, round_idx: int) -> Known:
    """The segmenter's masks of the round before, by sample, where the prompts are to remember them; else nothing."""
    known: Known = {}
    if task.cfg.prompts.source == "cascade" and round_idx > 1:
        for row in store.decisions(round_idx - 1):
            if row["object_idx"] >= 0:
                answer = partial(from_rle, row["segmenter_rle"], row["height"], row["width"])
                known.setdefault(row["sample_id"], []).append((row["class_id"], answer))
    return known


def heed_labels(
    task: Task, model: LocalModel, images: Sequence[Sample], prompts: Sequence[list[Prompts]], round_idx: int
) -> list[list[Prompts]]:
    """The prompts as the image-level labels leave them: none for lesions where there are none.

    Where there is one, but the model found none, the place where the classifier of sks looks is asked about.
    """
    cfg, lesion = task.cfg, task.num_classes - 1
    heeded = [
        [one for one in asked if image.image_label != 0 or one.class_id != lesion]
        for image, asked in zip(images, prompts, strict=True)
    ]
    if cfg.model.name != "sks" or not cfg.prompts.seed_from_activation:
        return heeded
    missed = {
        image.sample_id: asked
        for image, asked in zip(images, heeded, strict=True)
        if image.image_label == 1 and all(one.class_id != lesion for one in asked)
    }
    maps = activations(model, task.unlabeled, list(missed), batch_size=cfg.infer.batch_size, device=task.fabric.device)
    for sample_id, activation in maps:
        key = {"sample_id": sample_id, "seed": cfg.seed, "round_idx": round_idx}
        missed[sample_id] += prompts_from_activation(activation, lesion, cfg.prompts, **key)
    return heeded


def object_areas(labeled: Pool, num_classes: int) -> dict[int, float]:
    """Per class, the median share of the image that one labeled object covers; a class without objects has none."""
    areas: dict[int, list[float]] = {}
    for sample_id in labeled.ids:
        mask = labeled.mask_small(sample_id)
        for class_id in range(1, num_classes):
            areas.setdefault(class_id, []).extend(float(c.mean()) for c in components(mask == class_id))
    return {class_id: float(np.median(found)) for class_id, found in areas.items() if found}


def witnessed(task: Task, witness: LocalModel | None, pool: Pool, ids: Sequence[str]) -> list[Probs | None]:
    """What the second local model sees in each of the images; None where there is none."""
    if witness is None:
        return [None for _ in ids]
    return list(infer(witness, pool, ids, device=task.fabric.device, **asdict(task.cfg.infer)))


def mining_signature(task: Task, current: Trained, witness: str = "") -> str:
    """What the pseudo masks of a round are made from: model, segmenter, settings."""
    cfg = task.cfg
    settings = [asdict(part) for part in (cfg.infer, cfg.prompts, cfg.gate, cfg.refine)]
    gate_by = (task.calibration.to_json(), PILOT) if task.calibration else None
    judged = [task.judged.signature] if task.judged.signature else []
    return sign(current.signature, task.segmenter.signature, settings, gate_by, witness, *judged)


def gate_all(
    asked: Asked, labeled_area: dict[int, float], cfg: LoopConfig, calibration: Calibration | None = None
) -> list[list[Decision]]:
    """The gate's decision for each object of each image."""
    how = {"labeled_area": labeled_area, "cfg": cfg.gate, "calibration": calibration}
    return [
        [
            gate(p, prompt, answer, image_label=image.image_label, witness=seen, **how)
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        for image, p, prompts, answers, seen in zip(*asked, strict=True)
    ]


def trainable(task: Task, store: RunStore, round_idx: int, rows: Sequence[dict[str, Any]]) -> Pool:
    """The unlabeled images that have a pseudo mask, with that mask, its weight, and whether it is known to be empty."""
    kept = [row for row in rows if row["in_training"]]
    ids = {row["sample_id"] for row in kept}
    return task.unlabeled.with_masks(
        [i for i in task.unlabeled.ids if i in ids],
        lambda sample_id: store.pseudo_mask(round_idx, sample_id),
        weights=image_weights(kept) if task.cfg.fit.pseudo_weight == "estimated" else None,
        empty=[row["sample_id"] for row in kept if row["reason"] == EMPTY],
    )


def image_weights(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """By image, the mean estimated Dice of its kept objects, from rows of decisions; without any, it is left out."""
    estimates: dict[str, list[float]] = {}
    for row in rows:
        value = row["estimated_dice"] if row["kept"] and row["object_idx"] >= 0 else None
        if value is not None and not math.isnan(value):
            estimates.setdefault(row["sample_id"], []).append(min(max(value, 0.0), 1.0))
    return {sample_id: float(np.mean(values)) for sample_id, values in estimates.items()}


def note_changes(task: Task, store: RunStore, mined_by: Sequence[str], rows: Sequence[dict[str, Any]]) -> Changes:
    """What the last round of `mined_by` (signatures of rounds 1, 2, ...) changed: saved as changes.json, and said.

    `rows` are its decisions. It is told from the pseudo masks of this round and of the one before, image by image.
    """

    def saved(round_idx: int) -> Changes | None:
        value = store.load_json(paths[round_idx - 1], signatures[round_idx - 1])
        return Changes.from_json(value) if value else None

    last = len(mined_by)
    paths = [store.round_dir(n) / "changes.json" for n in range(1, last + 1)]
    signatures = [sign("changes", task.signature, mined_by[:n]) for n in range(1, last + 1)]
    found = saved(last)
    if found is None:
        earlier = [before.teaching for n in range(1, last) if (before := saved(n))]
        assert len(earlier) == last - 1, "each round before has saved its own"
        found = find_changes(
            teaching(store, last, rows, earlier[-1] if earlier else frozenset()),
            (task.labeled.mask_small(i) for i in task.labeled.ids),
            earlier,
            num_unlabeled=len(task.unlabeled),
            num_classes=task.num_classes,
        )
        store.save_json(paths[-1], found.to_json(), signatures[-1])
    task.watcher.say(f"round {last}: {sentence(found)}")
    for warning in warnings(found):
        task.watcher.say(f"round {last}: warning: {warning}")
    return found


def teaching(
    store: RunStore, round_idx: int, rows: Sequence[dict[str, Any]], before: frozenset[str]
) -> Iterator[Taught]:
    """The images of a round that teach, one at a time; `before`: those that have a pseudo mask of the round before."""
    kept = (row for row in rows if row["in_training"])
    for sample_id, group in groupby(kept, key=lambda row: row["sample_id"]):
        then = store.pseudo_mask(round_idx - 1, sample_id) if sample_id in before else None
        yield taught(list(group), store.pseudo_mask(round_idx, sample_id), then)

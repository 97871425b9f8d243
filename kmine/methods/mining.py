"""Knowledge mining: the loop of the paper (arXiv 2503.06816), as read in docs/method.md.

The local model's predictions prompt the segmenter on the unlabeled images; the gate and the refinement turn its
candidates into pseudo-labels, on which the local model of the next round is trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from kmine.mining.adaptation.step import adapt_segmenter
from kmine.mining.calibration.step import calibrate
from kmine.mining.crossfit import train_parts, unlabeled_parts
from kmine.mining.pipeline import mine_batches
from kmine.mining.pseudo_labels import PseudoLabels
from kmine.mining.ray_mining import mine_on_ray
from kmine.mining.round import close_round, open_round
from kmine.models.base import LocalModel
from kmine.training.checkpoints import Checkpoints
from kmine.training.distributed import rank_zero_first
from kmine.training.evaluation import evaluate_round
from kmine.training.model_setup import new_model
from kmine.training.rounds import kept_round, train_once, trained_auxiliary_model
from kmine.training.task import Task, single_process
from kmine.training.trainer import train
from kmine.types import RoundResult


def mine(task: Task) -> Iterator[RoundResult]:
    """Round 0 trains on labels; each of the `rounds` after it mines the unlabeled images, then trains on both.

    Every round starts from the last adopted one. With `crossfit`, images are predicted by models that were not trained
    on their pseudo masks; the student is trained on all. The loop stops early after a round without any pseudo mask,
    which repeats the metrics of the adopted one and is not adopted, and after two rejected rounds in a row, as the next
    one would start from the same model once more. With `retrain` a new model, trained once on the labels and the last
    pseudo masks, follows. The model that is kept is that of `kept_round`.
    """
    model = new_model(task)
    student = train(task, model, round_idx=0)  # labels alone
    best = evaluate_round(task, model, student, round_idx=0)
    yield best
    auxiliary = trained_auxiliary_model(task)  # with a model such as unetpp+unet
    rounds, inputs, rejected_in_a_row = [best], {}, 0
    parts = [student] * len(unlabeled_parts(task))  # the models that predict, each on images new to it
    for round_idx in range(1, task.cfg.rounds + 1):
        pseudo = pseudo_label(task, model, student, auxiliary, round_idx, parts)  # unlabeled -> pseudo-labeled
        if not pseudo:
            task.run.remove_training(round_idx)
            yield best.without_training(round_idx, pseudo.seconds)
            break
        inputs = {"pseudo": pseudo.pool, "pseudo_signature": pseudo.signature}
        candidate = train(task, model, round_idx=round_idx, start=student, **inputs)  # labels and pseudo-labels
        context = {"num_pseudo": len(pseudo), "reference": best, "seconds": pseudo.seconds}
        result = evaluate_round(task, model, candidate, round_idx=round_idx, **context)
        yield result
        rounds.append(result)
        if result.adopted:
            student, best, rejected_in_a_row = candidate, result, 0
            parts = train_parts(task, model, parts, pseudo, round_idx) if round_idx < task.cfg.rounds else parts
        elif (rejected_in_a_row := rejected_in_a_row + 1) == 2:
            break
    if inputs and task.cfg.retrain:
        yield train_once(task, len(rounds) - 1, round_idx=round_idx + 1, reference=kept_round(rounds), **inputs)


def pseudo_label(
    task: Task,
    model: LocalModel,
    student: Checkpoints,
    auxiliary: tuple[LocalModel, str] | None,
    round_idx: int,
    parts: Sequence[Checkpoints] = (),
) -> PseudoLabels:
    """One pass over the unlabeled images: probs -> prompts -> candidates -> decisions -> pseudo masks."""
    ctx = open_round(task, model, student, auxiliary, round_idx, parts)
    (mine_on_ray if task.cfg.backend == "ray" else mine_batches)(ctx)
    return close_round(ctx)


def prepare_and_mine(task: Task) -> Iterator[RoundResult]:
    """Mining after adaptation of the segmenter and calibration of the gate, which are done when this returns.

    run.json then names the segmenter that mines. Of several processes the first prepares, and the others read it.
    """
    fabric, base = task.fabric, task.segmenter
    if fabric.world_size > 1:
        train(task, new_model(task), round_idx=0)  # by all processes; the first one reads it below
    with rank_zero_first(fabric):
        prepared = replace(calibrate(adapt_segmenter(single_process(task)), base), fabric=fabric)
    if prepared.segmenter:
        prepared.run.update_run(segmenter=prepared.segmenter.name, segmenter_sha256=prepared.segmenter.signature)
    return mine(prepared)

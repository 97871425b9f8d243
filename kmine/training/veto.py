"""The verdict of the classifier of sks as a veto of false alarms, calibrated and chosen on the validation images.

Own choice. An image is vetoed where that raises its expected score (silence on a clean image 1, a false alarm 0):
where p / (1 - p) * r * loss < gain, with

- p, the probability of a lesion by the classifier alone: Platt scaling of its logit (Platt 1999, with his smoothed
  targets), fitted on the validation images, so that their prevalence replaces the one half of the training batches;
- r, how many times likelier the model finds something where there is a lesion than where there is none (Laplace's
  rule of succession in both counts); finding and logit are taken as independent given the truth;
- loss, the mean fall of the score if an image with a lesion is vetoed, and gain, the mean rise if a clean one is.

The fewer images, the nearer are p to the prevalence and the threshold to never. It is at most `MOST`, and is lowered
further until the vetoes do not lower the mean score of the validation images. Without `MIN_IMAGES` of each kind, or
where luck may have ordered the logits (Mann and Whitney's one-sided p above `MAX_P`), nothing is vetoed.

N validation images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kmine.data.pool import Pool
from kmine.models.base import LocalModel
from kmine.models.sks import NO_VETO, VETOED_LOGIT, SksModel
from kmine.ops.metrics import case_metrics
from kmine.training.checkpoints import Checkpointer
from kmine.training.classifier import image_logits
from kmine.training.inference import infer, predict_resized, resized_batches
from kmine.training.task import Task
from kmine.training.train_steps import FitResult
from kmine.types import Bool, Floats, Probs, Sample, most_probable

MIN_IMAGES = 5
"""Validation images with a lesion, and without one, that a veto needs."""
MAX_P = 0.01
MOST = 0.5
"""Highest threshold: a lesion that is likelier than not is kept, however poor its outline."""
BUFFER = "net.veto"
"""Its name in the state dict of the model."""


@dataclass(frozen=True)
class Veto:
    """Images with sigmoid(slope * logit + offset) below `threshold` have no lesion."""

    slope: float = NO_VETO[0]
    offset: float = NO_VETO[1]
    threshold: float = NO_VETO[2]
    num_clean: int = 0
    """Validation images without a lesion in which one was found, and that are vetoed."""
    num_lesions: int = 0
    """Validation images with a lesion that was found, and that are vetoed."""

    def tensor(self) -> Tensor:
        """The buffer of the model."""
        return Tensor([self.slope, self.offset, self.threshold])

    def summary(self) -> str:
        """What it does, in words."""
        if not self.threshold:
            return "none, as the validation images do not support one"
        return (
            f"images with a probability of a lesion below {self.threshold:.3f}; on validation {self.num_clean} false "
            f"alarms and {self.num_lesions} lesions found"
        )

    def probabilities(self, logits: Floats) -> Floats:
        """(N,) logits of the classifier -> (N,) calibrated probabilities of a lesion."""
        return 1 / (1 + np.exp(-np.clip(self.slope * logits + self.offset, -700, 700)))


def clear_veto(model: LocalModel) -> None:
    """Veto nothing: the veto of an earlier round would take part in validation, and would be learned from."""
    if isinstance(model, SksModel) and model.net.veto is not None:
        model.net.veto.copy_(Veto().tensor())


@contextmanager
def without_veto(model: LocalModel) -> Iterator[None]:
    """Within the block `model` vetoes nothing."""
    saved = model.net.veto.clone() if isinstance(model, SksModel) and model.net.veto is not None else None
    clear_veto(model)
    try:
        yield
    finally:
        if saved is not None:
            model.net.veto.copy_(saved)


def infer_by_labels(model: LocalModel, pool: Pool, images: Sequence[Sample], **settings: Any) -> list[Probs]:
    """Class probabilities of `images` of `pool`; those labeled with a lesion (`image_label` 1) are never vetoed.

    `settings` are those of `infer`.
    """
    labeled = [image.sample_id for image in images if image.image_label == 1 and vetoes(model)]
    others = [image.sample_id for image in images if image.sample_id not in labeled]
    found = {probs.sample_id: probs for probs in infer(model, pool, others, **settings)}
    with without_veto(model):
        found |= {probs.sample_id: probs for probs in infer(model, pool, labeled, **settings)}
    return [found[image.sample_id] for image in images]


def vetoes(model: LocalModel) -> bool:
    """Whether `model` may veto an image."""
    return isinstance(model, SksModel) and model.net.veto is not None and bool(model.net.veto[2] > 0)


def is_vetoed(model: LocalModel, probs: Probs) -> bool:
    """Whether `probs` are those of an image that `model` vetoed, in every flip: then a lesion has probability 0."""
    return vetoes(model) and not probs.probs[-1].any()


def choose_vetoes(task: Task, model: LocalModel, result: FitResult, checkpointer: Checkpointer) -> FitResult:
    """`result` with the veto of each of its checkpoints, recorded in veto.json; unchanged for models without one.

    Overwrites the weights of `model`.
    """
    if not isinstance(model, SksModel) or model.net.veto is None:
        return result
    chosen, weights = {}, {}
    for name in ("best", "final"):
        weights[name] = dict(getattr(result, name))
        model.load_state_dict(weights[name])
        chosen[name] = veto_of(task, model)
        weights[name][BUFFER] = chosen[name].tensor()
    model.load_state_dict(weights["best"])
    record = {name: asdict(veto) for name, veto in chosen.items()}
    task.run.save_json(checkpointer.folder / "veto.json", record, checkpointer.signature)
    task.progress.log(f"the classifier's veto: {chosen['best'].summary()}")
    return replace(result, **weights)


def veto_of(task: Task, model: SksModel) -> Veto:
    """The veto for the current weights of `model`, which are not to veto yet."""
    model.eval()
    pool, scores, logits = task.val, [], []
    for ids, images in resized_batches(pool, pool.ids, task.cfg.infer.batch_size):
        logits.append(image_logits(model.classifier, images, task.fabric.device))
        probs, _ = predict_resized(model, images, "none", task.fabric.device)
        scores += [
            _with_and_without(p, pool.mask_resized(i), task.num_classes) for i, p in zip(ids, probs, strict=True)
        ]
    kept, vetoed, has_lesion = map(np.array, zip(*scores, strict=True))
    return choose_veto(np.concatenate(logits).astype(float), has_lesion, kept, vetoed)


def _with_and_without(
    probs: NDArray[np.float32], truth: NDArray[np.uint8], num_classes: int
) -> tuple[float, float, bool]:
    """Score of an image as predicted, and if it is vetoed, and whether it has a lesion."""
    silent = probs.copy()
    silent[-1] = VETOED_LOGIT
    cases = [case_metrics("", most_probable(p), truth, num_classes, with_hd95=False) for p in (probs, silent)]
    return cases[0].score, cases[1].score, bool((truth == num_classes - 1).any())


def choose_veto(logits: Floats, has_lesion: Bool, kept: Floats, vetoed: Floats) -> Veto:
    """The veto by the rule of this module, from (N,) logits, truths, and scores without and with a veto of the image.

    A veto changes the score of those images alone in which the model finds a lesion.
    """
    from scipy.stats import mannwhitneyu

    change, found = vetoed - kept, vetoed != kept
    hits, alarms = found & has_lesion, found & ~has_lesion
    num_lesion, num_clean = int(has_lesion.sum()), int((~has_lesion).sum())
    if min(num_lesion, num_clean) < MIN_IMAGES or not hits.any():
        return Veto()
    if mannwhitneyu(logits[has_lesion], logits[~has_lesion], alternative="greater").pvalue > MAX_P:
        return Veto()
    veto = platt(logits, has_lesion)
    loss = max(-change[hits].mean(), 0.0)
    gain = change[alarms].mean() if alarms.any() else loss
    ratio = (hits.sum() + 1) / (num_lesion + 2) / ((alarms.sum() + 1) / (num_clean + 2))
    probs = veto.probabilities(logits)
    threshold = min(MOST, gain / (gain + ratio * loss)) if veto.slope > 0 else 0.0
    while threshold and change[probs < threshold].sum() < 0:
        threshold = float(probs[probs < threshold].max())
    return replace(
        veto,
        threshold=threshold,
        num_clean=int((alarms & (probs < threshold)).sum()),
        num_lesions=int((hits & (probs < threshold)).sum()),
    )


def platt(logits: Floats, labels: Bool) -> Veto:
    """Slope and offset of logistic regression on (N,) logits, by maximum likelihood with Platt's smoothed targets."""
    from scipy.optimize import minimize

    num, scale = labels.sum(), logits.std() or 1.0
    targets = np.where(labels, (num + 1) / (num + 2), 1 / (len(labels) - num + 2))
    x = (logits - logits.mean()) / scale

    def objective(w: Floats) -> tuple[float, Floats]:
        z = w[0] * x + w[1]
        error = 1 / (1 + np.exp(-np.clip(z, -700, 700))) - targets
        return float((np.logaddexp(0, z) - targets * z).sum()), np.array([error @ x, error.sum()])

    slope, offset = minimize(objective, np.zeros(2), jac=True, method="BFGS").x
    return Veto(float(slope / scale), float(offset - slope * logits.mean() / scale))

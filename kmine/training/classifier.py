"""Stage 1 of SKS: train the coarse branch of the local model on image-level labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from kmine.config import FitConfig
from kmine.data.batches import LabelBatch, LabelBatches
from kmine.data.pool import Pool
from kmine.models.sks import Classifier, SksModel
from kmine.training.train_steps import FitResult, FitState, train_steps

if TYPE_CHECKING:
    from lightning.fabric import Fabric  # a second to load, and 260 MB: where nothing is trained, it stays away

AT_ONCE = 16
"""Images of one forward pass in validation."""


def fit_classifier(
    model: SksModel,
    batches: LabelBatches,
    val: Pool,
    cfg: FitConfig,
    *,
    steps: int,
    fabric: Fabric,
    seed: int,
    resume: FitState | None = None,
    save: Callable[[FitState], None] | None = None,
    progress: Callable[[int, float, float], None] | None = None,
) -> FitResult:
    """Train the classifier inside `model` in place for `steps` optimizer steps of binary cross-entropy.

    The terms are those of `kmine.training.train_steps.train_steps`; its score is the AUC on the validation images. Where
    that is not a number, because these are not of both labels, it counts as 0 and the last checkpoint is taken.

    Args:
        model: the rest of it is left as it is, a frozen coarse branch is frozen again afterwards.
        batches: batch of each step, balanced between the labels.
        val: validation images with image-level labels; masks are not read.
        cfg: learning rate, weight decay, warm-up, interval of validation, workers.
        steps: the budget.
        fabric: device and precision.
        seed: for layers that draw numbers; with the step it fixes them.
        resume: go on from here; the result equals that of an undisturbed training.
        save: called with the state after every validation but the last.
        progress: called every tenth step with (step, loss, last validation AUC).

    Returns:
        Weights of the classifier alone: `model.classifier.load_state_dict(result.best)`.
    """

    def loss_fn(net: nn.Module, batch: LabelBatch) -> Tensor:
        labels = torch.from_numpy(batch.labels).to(fabric.device, non_blocking=True)
        return F.binary_cross_entropy_with_logits(net(_on(batch.images, fabric.device)).float(), labels)

    model.to(fabric.device)
    with model.unfrozen() as classifier:
        return train_steps(
            classifier,
            batches,
            loss_fn,
            cfg,
            steps=steps,
            fabric=fabric,
            seed=seed,
            validate=lambda module: image_auc(module, val, fabric.device),
            resume=resume,
            save=save,
            progress=progress,
        )


def image_auc(classifier: Classifier, pool: Pool, device: torch.device) -> float:
    """Area under the ROC curve over the images of `pool` that have a label; NaN unless both labels are there.

    The classifier should be in eval mode.
    """
    from sklearn.metrics import roc_auc_score

    labels = {i: label for i in pool.ids if (label := pool.image_label(i)) is not None}
    truth = np.array([label > 0 for label in labels.values()])
    if not truth.any() or truth.all():
        return float("nan")
    return float(roc_auc_score(truth, image_scores(classifier, pool, list(labels), device)))


@torch.inference_mode()
def image_scores(classifier: Classifier, pool: Pool, ids: Sequence[str], device: torch.device) -> NDArray[np.float32]:
    """The classifier's probability of a lesion, (N,), for the images `ids` at training size.

    It is that of a world in which every second image holds a lesion, for so are the batches of the training.

    Raises:
        FloatingPointError: the classifier gave NaN or infinite logits.
    """
    logits = torch.cat(
        [torch.zeros(0, device=device)]
        + [
            classifier(_on(np.stack([pool.image_resized(i) for i in ids[first : first + AT_ONCE]]), device)).float()
            for first in range(0, len(ids), AT_ONCE)
        ]
    )
    if not torch.isfinite(logits).all():
        raise FloatingPointError("the classifier gave NaN or infinite logits; lower fit.lr or use fit.precision 32")
    return logits.sigmoid().cpu().numpy()


def _on(images: NDArray[np.uint8], device: torch.device) -> Tensor:
    """(B, S, S, 3) -> (B, 3, S, S) on `device`."""
    return torch.from_numpy(images).to(device, non_blocking=True).permute(0, 3, 1, 2)

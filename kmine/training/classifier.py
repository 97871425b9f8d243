"""Stage 1 of SKS: training of the coarse branch of the local model on image-level labels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from kmine.config import FitConfig
from kmine.data.batches import LabelBatch, LabelBatches
from kmine.data.pool import Pool
from kmine.models.sks import Classifier, SksModel
from kmine.training.distributed import Fabric
from kmine.training.ema import EMA
from kmine.training.inference import image_tensor, resized_batches
from kmine.training.train_steps import Callbacks, FitResult, FitState, train_steps

EVAL_BATCH_SIZE = 16
"""Images per forward pass of `image_scores`."""


def fit_classifier(
    model: SksModel,
    batches: LabelBatches,
    cfg: FitConfig,
    *,
    fabric: Fabric,
    seed: int,
    callbacks: Callbacks[Classifier],
    resume: FitState | None = None,
) -> FitResult:
    """Train the classifier inside `model` in place with binary cross-entropy; other parts are unchanged.

    A frozen coarse branch is frozen again afterwards. The other arguments are those of
    `kmine.training.train_steps.train_steps`; the result has the weights of `model.classifier`.
    """

    def loss_fn(net: nn.Module, batch: LabelBatch, step: int, ema: EMA | None) -> Tensor:
        labels = torch.from_numpy(batch.labels).to(fabric.device, non_blocking=True)
        return F.binary_cross_entropy_with_logits(net(image_tensor(batch.images, fabric.device)).float(), labels)

    model.to(fabric.device)
    with model.unfrozen() as module:
        return train_steps(module, batches, loss_fn, cfg, fabric=fabric, seed=seed, callbacks=callbacks, resume=resume)


def has_stopped_rising(history: Sequence[tuple[int, float, float]], patience: int) -> bool:
    """Whether the last `patience` validations of (step, loss, score) stayed at or below an earlier score; 0: never.

    Nor does it end where the score is unknown, which counts as 0.
    """
    scores = [score for *_, score in history]
    return 0 < patience < len(scores) and 0 < max(scores) == max(scores[:-patience])


def image_auc(classifier: Classifier, pool: Pool, device: torch.device) -> float:
    """Area under the ROC curve over the labeled images of `pool`, in eval mode; NaN unless both labels occur."""
    from sklearn.metrics import roc_auc_score

    labels = {i: label for i in pool.ids if (label := pool.image_label(i)) is not None}
    truth = np.array([label > 0 for label in labels.values()])
    if not truth.any() or truth.all():
        return float("nan")
    return float(roc_auc_score(truth, image_scores(classifier, pool, list(labels), device)))


def image_scores(classifier: Classifier, pool: Pool, ids: Sequence[str], device: torch.device) -> NDArray[np.float32]:
    """Predicted probability of a lesion, (N,) in [0, 1], for the images `ids` at training size.

    Training batches are balanced, so it assumes a prevalence of one half.

    Raises:
        FloatingPointError: NaN or infinite logits.
    """
    logits = [image_logits(classifier, images, device) for _, images in resized_batches(pool, ids, EVAL_BATCH_SIZE)]
    return torch.from_numpy(np.concatenate([np.zeros(0, np.float32), *logits])).sigmoid().numpy()


@torch.inference_mode()
def image_logits(classifier: Classifier, images: NDArray[np.uint8], device: torch.device) -> NDArray[np.float32]:
    """(B, S, S, 3) uint8 RGB -> (B,) logits of a lesion. `FloatingPointError` for NaN or infinite ones."""
    logits = classifier(image_tensor(images, device)).float()
    if not torch.isfinite(logits).all():
        raise FloatingPointError("the classifier gave NaN or infinite logits; lower fit.lr or use fit.precision 32")
    return logits.cpu().numpy()

"""Fine-tune a segmenter on the labeled images, with prompts like those of mining.

Training prompts are boxes and mask inputs of local models that were not trained on the image, and true boxes jittered
as much as the local models' boxes are off. Each image is encoded once. Held-out images, unknown to all models, decide
when to stop and whether the adapted segmenter is used. (Ours: docs/method.md.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from kmine.config import AdaptConfig
from kmine.mining.calibration.fit import MIN_OVERLAP
from kmine.ops import masks, metrics
from kmine.ops.seeding import derive_seed
from kmine.segmenters.base import Embedding, FineTunable, PromptedExample, Segmenter
from kmine.types import Bool, Prompts, Sample

MIN_OBJECT = 20
"""Pixels of the smallest true object used."""
JITTER_RANGE = (0.05, 0.3)
"""Limits of the measured jitter, as a share of the box's side."""
LOCAL_SHARE = 0.5
"""Share of training examples with a prompt of the local model; the others have a jittered true box."""
WARMUP = 0.1
ENCODE_AT_ONCE = 8

Example = tuple[Sample, Sequence[Prompts]]
"""A labeled image and prompts of a local model that was not trained on it."""
Progress = Callable[[int, float, float], None]
"""Called after each step with (steps done, loss, held-out IoU or NaN where it was not measured)."""


@dataclass(frozen=True)
class Adaptation:
    """Result of `adapt`; IoU is the mean over the held-out objects."""

    segmenter: Segmenter
    """The adapted segmenter if it is better by `min_gain`, else the original one."""
    state: dict[str, Tensor] | None
    """The fine-tuned tensors; None where they are not used."""
    iou_before: float
    iou_after: float
    """At the best check, whether it is used or not."""
    best_step: int
    jitter: float
    """Jitter of true boxes, given or measured, as a share of the side."""
    num_objects: int
    """Objects of the training images."""
    num_held_out: int
    """Objects of the held-out images, prompted at every check."""
    held_out_prompts: str
    """`local`, or `shaken` (jittered true boxes) where the local model found none of the held-out objects."""
    history: tuple[tuple[int, float, float], ...]
    """(step, mean loss since the previous check, IoU) of every check."""

    @property
    def used(self) -> bool:
        """Whether the adapted segmenter is used."""
        return self.state is not None


@dataclass(frozen=True)
class _TrainImage:
    """One labeled image: its embedding, its true objects, and the local model's prompts with the matched objects."""

    embedding: Embedding
    objects: list[tuple[int, Bool]]
    """(class id, (H, W) mask)."""
    local: list[tuple[Prompts, Bool]]
    """Prompts and the matched true object; an empty mask for a false alarm."""


def adapt(
    segmenter: FineTunable,
    train: Sequence[Example],
    held_out: Sequence[Example],
    cfg: AdaptConfig,
    *,
    seed: int,
    jitter: float | None = None,
    progress: Progress = lambda done, loss, iou: None,
) -> Adaptation:
    """Fine-tune a copy of `segmenter` on the objects of `train`; keep it if it is better on `held_out`.

    Without an object on either side the segmenter stays as it is.

    Args:
        segmenter: not modified.
        train: labeled images.
        held_out: labeled images that neither the local model nor this training has seen.
        cfg: open settings are filled by the segmenter's `fine_tune_defaults`.
        seed: seed of objects, jitter and augmentation.
        jitter: largest shift of an edge of a true box, as a share of the side; None: measured on the local prompts.
        progress: see `Progress`.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    train_images, val_images = (_encode_images(segmenter, rows[: cfg.max_images]) for rows in (train, held_out))
    train_images = [image for image in train_images if image.objects]
    if jitter is None:
        jitter = measured_jitter([pair for image in train_images for pair in image.local])
    prompt_source, val_examples = _validation_prompts(val_images, jitter, seed)
    before = mean_iou(segmenter, val_examples)
    state, after, best_step, history = None, before, 0, []
    if train_images and val_examples:
        draw = partial(_sample_example, train_images, jitter)
        state, after, best_step, history = _optimize(segmenter, draw, val_examples, before, cfg, seed, progress)
    used = state is not None and after - before >= cfg.min_gain
    return Adaptation(
        segmenter=segmenter.with_weights(state) if used else segmenter,
        state=state if used else None,
        iou_before=before,
        iou_after=after,
        best_step=best_step,
        jitter=jitter,
        num_objects=sum(len(image.objects) for image in train_images),
        num_held_out=len(val_examples),
        held_out_prompts=prompt_source,
        history=tuple(history),
    )


def measured_jitter(pairs: Sequence[tuple[Prompts, Bool]]) -> float:
    """Jitter that moves the edges of true boxes as far as those of the local boxes lie off, as a share of the side.

    Uniform jitter in +-j moves an edge by j / 2 on average, so j is twice the mean distance. It is clipped to
    `JITTER_RANGE`, whose middle is used if nothing could be measured. `pairs` are prompts and the (H, W) mask of the
    matched object.
    """
    distances = []
    for prompts, truth in pairs:
        if prompts.box is None or not truth.any():
            continue
        true_box = masks.tight_box(truth)
        sides = np.maximum(true_box[2:] - true_box[:2], 1)
        distances.append(np.abs(prompts.box - true_box) / np.tile(sides, 2))
    # The median over objects ignores outliers, such as one box around two polyps.
    jitter = 2 * float(np.median([row.mean() for row in distances])) if distances else float(np.mean(JITTER_RANGE))
    return float(np.clip(jitter, *JITTER_RANGE))


def mean_iou(segmenter: Segmenter, examples: Sequence[PromptedExample]) -> float:
    """Mean IoU of the best masks with the true objects; NaN without examples."""
    if not examples:
        return float("nan")
    embeddings, prompts = [e.embedding for e in examples], [[e.prompts] for e in examples]
    pairs = zip(segmenter.decode(embeddings, prompts), examples, strict=True)
    return float(np.mean([metrics.iou(c.masks[c.best], example.mask) for (c,), example in pairs]))


def _optimize(
    segmenter: FineTunable,
    draw: Callable[[np.random.Generator], PromptedExample],
    val_examples: Sequence[PromptedExample],
    before: float,
    cfg: AdaptConfig,
    seed: int,
    progress: Progress,
) -> tuple[dict[str, Tensor] | None, float, int, list[tuple[int, float, float]]]:
    """Train with AdamW; state, IoU and step of the best check, and the history. No IoU above `before`: state None."""
    defaults = segmenter.fine_tune_defaults
    steps, size, peak = cfg.steps or defaults.steps, cfg.batch_size or defaults.batch_size, cfg.lr or defaults.lr
    tuner = segmenter.fine_tuner()
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=peak, weight_decay=0.01)
    best = (None, before, 0)
    history, losses = [(0, float("nan"), before)], []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = peak * min((step + 1) / (WARMUP * steps + 1), (steps - step) / steps)
        rng = np.random.default_rng(derive_seed(seed, "adapt", step))
        loss = tuner.loss([draw(rng) for _ in range(size)], int(rng.integers(2**62)))
        if not torch.isfinite(loss):
            raise FloatingPointError(f"step {step} of the adaptation: the loss is not finite; lower adapt.lr")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tuner.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        iou = float("nan")
        if (step + 1) % cfg.val_every == 0 or step + 1 == steps:
            state = tuner.state()
            iou = mean_iou(segmenter.with_weights(state), val_examples)
            history.append((step + 1, float(np.mean(losses)), iou))
            losses = []
            if iou > best[1]:
                best = (state, iou, step + 1)
        progress(step + 1, float(loss.detach()), iou)
    return *best, history


def _sample_example(train_images: Sequence[_TrainImage], jitter: float, rng: np.random.Generator) -> PromptedExample:
    """Draw an image, then a prompt of the local model or a jittered box of one of its objects."""
    image = train_images[int(rng.integers(len(train_images)))]
    if image.local and rng.random() < LOCAL_SHARE:
        return PromptedExample(image.embedding, *image.local[int(rng.integers(len(image.local)))])
    class_id, mask = image.objects[int(rng.integers(len(image.objects)))]
    return PromptedExample(image.embedding, _jittered_box(class_id, mask, jitter, rng), mask)


def _jittered_box(class_id: int, mask: Bool, jitter: float, rng: np.random.Generator) -> Prompts:
    """The object's box with every edge moved by up to `jitter` of its side."""
    # Half a pixel outwards, to the outer edges of the pixels: the box of a one-pixel object then has an area.
    box = masks.grow_box(masks.tight_box(mask), 0.0, *mask.shape, min_px=0.5)
    return Prompts(class_id, masks.jitter_boxes(box, 1, jitter, *mask.shape, rng, max_move=np.inf)[0])


def _validation_prompts(images: Sequence[_TrainImage], jitter: float, seed: int) -> tuple[str, list[PromptedExample]]:
    """`Adaptation.held_out_prompts` and the examples, the same at every check."""
    local = [PromptedExample(image.embedding, *pair) for image in images for pair in image.local if pair[1].any()]
    if local:
        return "local", local
    rng = np.random.default_rng(derive_seed(seed, "adapt", "exam"))
    return "shaken", [
        PromptedExample(image.embedding, _jittered_box(class_id, mask, jitter, rng), mask)
        for image in images
        for class_id, mask in image.objects
    ]


def _encode_images(segmenter: Segmenter, examples: Sequence[Example]) -> list[_TrainImage]:
    out = []
    for first in range(0, len(examples), ENCODE_AT_ONCE):
        batch = examples[first : first + ENCODE_AT_ONCE]
        embeddings = segmenter.encode([sample.image for sample, _ in batch])
        out += [_train_image(embedding, *example) for embedding, example in zip(embeddings, batch, strict=True)]
    return out


def _train_image(embedding: Embedding, sample: Sample, prompts: Sequence[Prompts]) -> _TrainImage:
    assert sample.mask is not None, "labeled images have masks"
    objects = [
        (int(class_id), component)
        for class_id in np.unique(sample.mask)
        if class_id not in (0, 255)
        for component in masks.components(sample.mask == class_id, MIN_OBJECT)
    ]
    return _TrainImage(embedding, objects, [(prompt, _matched_object(prompt, objects)) for prompt in prompts])


def _matched_object(prompts: Prompts, objects: Sequence[tuple[int, Bool]]) -> Bool:
    """The true object of the prompt's class with the highest IoU with its component; empty if below `MIN_OVERLAP`."""
    # A single object, as SAM was trained to segment one object per prompt. `true_dice` scores finished masks instead
    # and unites all objects that lie mostly in the region, since one mask may correctly cover several.
    component = prompts.component
    assert component is not None, "prompts of the local model have their component"
    same_class = [mask for class_id, mask in objects if class_id == prompts.class_id]
    best = max(same_class, key=lambda mask: metrics.iou(component, mask), default=None)
    return best if best is not None and metrics.iou(component, best) >= MIN_OVERLAP else np.zeros_like(component)

"""Adapt a segmenter to the labeled images, on prompts that look like those it will get.

What it is asked while it learns: boxes and hints of the local model on images that it was not trained on, and true
boxes shaken as much as the local model's boxes are off. Each image is encoded once. Images that nobody was trained on
decide when to stop, and whether the adapted segmenter is used at all. (Ours: docs/method.md.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kmine.config import AdaptConfig
from kmine.ops import masks, metrics
from kmine.seeding import derive_seed
from kmine.segmenters.base import Embedding, FineTunable, PromptedExample, Segmenter
from kmine.types import Prompts, Sample

MIN_OBJECT = 20
"""Pixels of the smallest true object that is taught."""
MIN_OVERLAP = 0.1
"""IoU of a local component with a true object from which on the prompt is taken to mean that object."""
JITTER_RANGE = (0.05, 0.3)
"""Limits of the measured jitter, as a share of the box's side."""
LOCAL_SHARE = 0.5
"""Of the lessons, those with a prompt of the local model; the others shake the true box."""
WARMUP = 0.1
ENCODE_AT_ONCE = 8

Example = tuple[Sample, Sequence[Prompts]]
"""A labeled image and the local model's prompts for it; the model must not have been trained on the image."""


@dataclass(frozen=True)
class Adaptation:
    """What came of it; IoU is the mean over the held-out objects."""

    segmenter: Segmenter
    """The adapted one where it is better by `min_gain`, else the one that was given."""
    state: dict[str, Tensor] | None
    """The learnt tensors; None where they are not used."""
    iou_before: float
    iou_after: float
    """At the best check, whether it is used or not."""
    best_step: int
    jitter: float
    """Given, or measured: shake of the local model's boxes, as a share of the side."""
    num_objects: int
    num_held_out: int
    """Objects asked for at every check."""
    held_out_prompts: str
    """`local`, or `shaken` where the local model found none of the held-out objects."""
    history: tuple[tuple[int, float, float], ...]
    """(step, mean loss since the check before, IoU) of every check."""

    @property
    def used(self) -> bool:
        """Whether the adapted segmenter won."""
        return self.state is not None


@dataclass(frozen=True)
class _TrainImage:
    """One labeled image: its embedding, its true objects, and the local model's prompts with what they mean."""

    embedding: Embedding
    objects: list[tuple[int, NDArray[np.bool_]]]
    """(class id, (H, W) mask)."""
    local: list[tuple[Prompts, NDArray[np.bool_]]]
    """Prompts and the true object; an empty mask for a false alarm."""


def adapt(
    segmenter: FineTunable,
    train: Sequence[Example],
    held_out: Sequence[Example],
    cfg: AdaptConfig,
    *,
    seed: int,
    jitter: float | None = None,
    progress: Callable[[int, float, float], None] = lambda done, loss, iou: None,
) -> Adaptation:
    """Teach a copy of `segmenter` the objects of `train`; `held_out` decides.

    Args:
        segmenter: stays as it is.
        train: labeled images.
        held_out: labeled images that neither the local model nor this training has seen.
        cfg: see `AdaptConfig`; what it leaves open, the segmenter's own plan says.
        seed: draws objects, shakes and augmentation.
        jitter: how far true boxes are shaken, as a share of the side; measured on the local prompts where not given.
        progress: called after each step with (steps done, loss, held-out IoU or NaN where it was not measured).

    Returns:
        See `Adaptation`. With no object on either side there is nothing to learn or to judge by: not used.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    train_images, val_images = (_encode_images(segmenter, rows[: cfg.max_images]) for rows in (train, held_out))
    train_images = [image for image in train_images if image.objects]
    if jitter is None:
        jitter = measured_jitter([pair for image in train_images for pair in image.local])
    prompt_source, val_examples = _validation_prompts(val_images, jitter, seed)
    before = mean_iou(segmenter, val_examples)
    num_objects = sum(len(image.objects) for image in train_images)
    if not train_images or not val_examples:
        return Adaptation(segmenter, None, before, before, 0, jitter, num_objects, len(val_examples), prompt_source, ())
    best, history = _optimize(segmenter, train_images, val_examples, before, jitter, cfg, seed, progress)
    state, after, step = best
    used = state is not None and after - before >= cfg.min_gain
    return Adaptation(
        segmenter=segmenter.with_weights(state) if used else segmenter,
        state=state if used else None,
        iou_before=before,
        iou_after=after,
        best_step=step,
        jitter=jitter,
        num_objects=num_objects,
        num_held_out=len(val_examples),
        held_out_prompts=prompt_source,
        history=tuple(history),
    )


def measured_jitter(pairs: Sequence[tuple[Prompts, NDArray[np.bool_]]]) -> float:
    """How far the edges of local boxes lie from those of the objects meant, as a share of the object's side.

    Uniform jitter in +-j moves an edge by j / 2 on average, so j is twice the mean; within `JITTER_RANGE`, and in its
    middle where nothing could be measured.
    """
    distances = []
    for prompts, truth in pairs:
        if prompts.box is None or not truth.any():
            continue
        true_box = masks.tight_box(truth)
        sides = np.maximum(true_box[2:] - true_box[:2], 1)
        distances.append(np.abs(prompts.box - true_box) / np.tile(sides, 2))
    # The median over objects: a box around two polyps at once is no shaken box.
    shake = 2 * float(np.median([row.mean() for row in distances])) if distances else float(np.mean(JITTER_RANGE))
    return float(np.clip(shake, *JITTER_RANGE))


def mean_iou(segmenter: Segmenter, examples: Sequence[PromptedExample]) -> float:
    """Mean IoU of the best masks with the true objects; NaN without lessons."""
    if not examples:
        return float("nan")
    candidates = segmenter.decode(
        [example.embedding for example in examples], [[example.prompts] for example in examples]
    )
    return float(
        np.mean(
            [metrics.iou(c.masks[c.best], example.mask) for (c,), example in zip(candidates, examples, strict=True)]
        )
    )


def _optimize(
    segmenter: FineTunable,
    train_images: Sequence[_TrainImage],
    val_examples: Sequence[PromptedExample],
    before: float,
    jitter: float,
    cfg: AdaptConfig,
    seed: int,
    progress: Callable[[int, float, float], None],
) -> tuple[tuple[dict[str, Tensor] | None, float, int], list[tuple[int, float, float]]]:
    """((best state, its IoU, its step), history); no state where no check was above `before`."""
    defaults = segmenter.fine_tune_defaults
    steps, size, peak = cfg.steps or defaults.steps, cfg.batch_size or defaults.batch_size, cfg.lr or defaults.lr
    tuner = segmenter.fine_tuner()
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=peak, weight_decay=0.01)
    best: tuple[dict[str, Tensor] | None, float, int] = (None, before, 0)
    history: list[tuple[int, float, float]] = [(0, float("nan"), before)]
    losses: list[float] = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = peak * min((step + 1) / (WARMUP * steps + 1), (steps - step) / steps)
        rng = np.random.default_rng(derive_seed(seed, "adapt", step))
        loss = tuner.loss([_sample_example(train_images, jitter, rng) for _ in range(size)], int(rng.integers(2**62)))
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
    return best, history


def _sample_example(train_images: Sequence[_TrainImage], jitter: float, rng: np.random.Generator) -> PromptedExample:
    """One lesson: an image, then one of its objects, asked for by the local model or by a shaken true box."""
    image = train_images[int(rng.integers(len(train_images)))]
    if image.local and rng.random() < LOCAL_SHARE:
        prompts, mask = image.local[int(rng.integers(len(image.local)))]
        return PromptedExample(image.embedding, prompts, mask)
    class_id, mask = image.objects[int(rng.integers(len(image.objects)))]
    return PromptedExample(image.embedding, _jittered_box(class_id, mask, jitter, rng), mask)


def _jittered_box(class_id: int, mask: NDArray[np.bool_], jitter: float, rng: np.random.Generator) -> Prompts:
    """The object's box with every edge moved by up to `jitter` of its side."""
    # Half a pixel to the pixels' outer edges: an object one pixel wide has a box with area, too.
    box = masks.grow_box(masks.tight_box(mask), 0.0, *mask.shape, min_px=0.5)
    return Prompts(class_id, masks.jitter_boxes(box, 1, jitter, *mask.shape, rng, max_move=np.inf)[0])


def _validation_prompts(
    val_images: Sequence[_TrainImage], jitter: float, seed: int
) -> tuple[str, list[PromptedExample]]:
    """The held-out questions, the same at every check: the local model's, or shaken boxes where it found nothing."""
    local = [
        PromptedExample(image.embedding, prompts, mask)
        for image in val_images
        for prompts, mask in image.local
        if mask.any()
    ]
    if local:
        return "local", local
    rng = np.random.default_rng(derive_seed(seed, "adapt", "exam"))
    return "shaken", [
        PromptedExample(image.embedding, _jittered_box(class_id, mask, jitter, rng), mask)
        for image in val_images
        for class_id, mask in image.objects
    ]


def _encode_images(segmenter: Segmenter, examples: Sequence[Example]) -> list[_TrainImage]:
    """Images encoded once each, a few at a time."""
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


def _matched_object(prompts: Prompts, objects: Sequence[tuple[int, NDArray[np.bool_]]]) -> NDArray[np.bool_]:
    """The true object of the prompt's class that its component covers best; an empty mask where there is none."""
    component = prompts.component
    assert component is not None, "prompts of the local model carry their component"
    same_class = [mask for class_id, mask in objects if class_id == prompts.class_id]
    best = max(same_class, key=lambda mask: metrics.iou(component, mask), default=None)
    return best if best is not None and metrics.iou(component, best) >= MIN_OVERLAP else np.zeros_like(component)


__all__ = ["Adaptation", "Example", "adapt", "mean_iou", "measured_jitter"]

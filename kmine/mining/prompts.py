"""Prompts from the local model's probabilities: one object per connected component.

Only this module converts (row, column) to boxes and points in (x, y).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from kmine.config import PromptsConfig
from kmine.ops import masks, metrics
from kmine.ops.seeding import derive_seed
from kmine.segmenters.base import MASK_INPUT_CLIP
from kmine.types import Bool, Probs, Prompts

CAM_THRESHOLD = 0.5
"""Share of its highest value above which an activation map is foreground."""
CERTAIN_BACKGROUND = 9e-4
"""Up to this probability, logits are below -`MASK_INPUT_CLIP`."""
MATCH_IOU = 0.3
"""Minimum IoU of two masks of the same object in consecutive rounds."""


def prompts_from_probs(probs: Probs, cfg: PromptsConfig, *, seed: int, round_idx: int) -> list[Prompts]:
    """Prompts for every object of the local model's mask, each with its component.

    Objects are the connected components of the most probable class, at most `cfg.max_objects` of each class; those
    under `cfg.min_area_px` or `cfg.min_area_fraction` of the image are dropped. Jitter is drawn from (seed, round,
    sample id, object).

    Returns:
        By class, largest component first; empty without foreground.
    """
    ids, min_area, prompts = probs.mask, min_object_area(cfg, probs.probs[0].size), []
    for class_id in range(1, len(probs.probs)):
        for component in masks.components(ids == class_id, min_area, cfg.max_objects):
            rng = np.random.default_rng(derive_seed(seed, round_idx, probs.sample_id, len(prompts)))
            prompts.append(_prompts(probs, class_id, component, cfg, rng))
    return prompts


def doubtful_prompts(
    probs: Probs, found: Sequence[tuple[int, Bool]], cfg: PromptsConfig, *, seed: int, round_idx: int
) -> list[Prompts]:
    """Prompts for places of middling probability, without component and mask input; none without `cfg.doubtful`.

    Such a place is a connected component of the pixels where a class reaches that probability, as large as an object
    must be, and without a pixel of an object of the class. `found` has class id and (H, W) mask of each object. (Own
    choice; the two levels are those of hysteresis thresholding, Canny 1986.)

    Returns:
        By class, largest place first.
    """
    prompts: list[Prompts] = []
    for class_id in range(1, len(probs.probs) if cfg.doubtful else 0):
        known = [mask for k, mask in found if k == class_id]
        likely, min_area = probs.probs[class_id] >= cfg.doubtful, min_object_area(cfg, probs.probs[0].size)
        for place in masks.components(likely, min_area, cfg.max_objects):
            if not any((place & mask).any() for mask in known):
                rng = np.random.default_rng(derive_seed(seed, round_idx, probs.sample_id, "doubtful", len(prompts)))
                prompts.append(replace(_prompts(None, class_id, place, cfg, rng), component=None))
    return prompts


def min_object_area(cfg: PromptsConfig, num_pixels: int) -> int:
    """Pixels of the smallest object that is prompted, in an image of `num_pixels`."""
    return int(np.ceil(max(cfg.min_area_px, cfg.min_area_fraction * num_pixels)))


def prompts_from_cam(
    cam: NDArray[np.float32], class_id: int, cfg: PromptsConfig, *, sample_id: str, seed: int, round_idx: int
) -> list[Prompts]:
    """A prompt from a class activation map: its largest component above half of the highest value.

    `cam` is (H, W) in [0, 1], highest at 1; `sample_id`, `seed` and `round_idx` determine the jitter. There is no mask
    input, as an activation map is not a mask. Empty if the component is too small.
    """
    components = masks.components(cam > CAM_THRESHOLD, min_object_area(cfg, cam.size))[:1]
    rng = np.random.default_rng(derive_seed(seed, round_idx, sample_id, "activation"))
    return [_prompts(None, class_id, component, cfg, rng) for component in components]


def prompts_from_mask(prompts: Prompts, mask: Bool, cfg: PromptsConfig, *, seed: int) -> Prompts:
    """The prompt of the same object from another (H, W) mask of it: box, points and mask input.

    Class and `component` stay: the gate compares with the local model's own. An empty mask leaves all unchanged.
    """
    if not mask.any():
        return prompts
    if prompts.origin == "person":  # no mask is a better place than what a person drew
        return replace(prompts, mask_input=_mask_input_of(mask) if cfg.mask_hint else None)
    reprompted = _prompts(None, prompts.class_id, mask, cfg, np.random.default_rng(seed))
    mask_input = _mask_input_of(mask) if cfg.mask_hint else None
    return replace(reprompted, mask_input=mask_input, component=prompts.component)


def prompts_with_person(
    probs: Probs, found: Sequence[Prompts], drawn: Sequence[Prompts], cfg: PromptsConfig, *, seed: int, round_idx: int
) -> list[Prompts]:
    """The prompts of an image with a person's first, in place of those of `found` for the same objects.

    A person's box is used as it is, with jittered copies; the local model's pixels within it (of points: its components
    there) are the component and the mask input, as for other objects. Points alone get that component's box, where
    there is one. A local object is the same if at least half of it lies there (own choice).
    """
    ids, out, covered = probs.mask, [], []
    for n, prompts in enumerate(drawn):
        place = place_of(prompts, ids)
        component = place & (ids == prompts.class_id)
        box, rng = prompts.box, np.random.default_rng(derive_seed(seed, round_idx, probs.sample_id, "person", n))
        if box is None and component.any() and cfg.box:
            box = _box(component, 1.0, cfg.box_margin)
        own = _mask_input(probs.probs[prompts.class_id], component) if cfg.mask_hint and component.any() else None
        count = cfg.num_jitters if box is not None else 0
        jittered = masks.jitter_boxes(box, count, cfg.jitter, *ids.shape, rng) if count else prompts.jittered_boxes
        settings = {"mask_input": own, "jittered_boxes": jittered, "component": component if component.any() else None}
        out.append(replace(prompts, box=box, **settings))
        covered.append((prompts.class_id, place))

    def is_drawn(prompts: Prompts) -> bool:
        mask = prompts.component
        return mask is not None and any(
            class_id == prompts.class_id and 2 * (mask & place).sum() >= mask.sum() for class_id, place in covered
        )

    return out + [prompts for prompts in found if not is_drawn(prompts)]


def place_of(prompts: Prompts, ids: NDArray[np.uint8]) -> Bool:
    """(H, W): pixels in the box of a prompt; without a box the components of its class in `ids` under its points."""
    place = np.zeros(ids.shape, np.bool_)
    if prompts.box is not None:
        x0, y0, x1, y1 = masks.clip_box(np.array([*np.floor(prompts.box[:2]), *np.ceil(prompts.box[2:])]), *ids.shape)
        place[int(y0) : int(y1) + 1, int(x0) : int(x1) + 1] = True
    elif prompts.point_coords is not None and prompts.point_labels is not None:
        inside = prompts.point_coords[prompts.point_labels == 1].round().astype(int)
        points = np.clip(inside, 0, (ids.shape[1] - 1, ids.shape[0] - 1))
        for component in masks.components(ids == prompts.class_id):
            place |= component & component[points[:, 1], points[:, 0]].any()
    return place


def blend_previous_mask(
    prompts: Sequence[Prompts], previous: Sequence[tuple[int, Callable[[], Bool]]]
) -> list[Prompts]:
    """Blend the segmenter's masks of the round before into the mask inputs of an image's prompts.

    Each prompt takes the mask of its class with the highest IoU with its component, if that is at least `MATCH_IOU`.
    Its mask input becomes the mean of its own logits (0 without a mask input) and those of that mask. `previous` has
    the class id and the (H, W) mask, decoded when called, of each object.
    """
    decoded = [(class_id, mask()) for class_id, mask in previous] if prompts else []
    return [_blend_mask(prompt, [mask for k, mask in decoded if k == prompt.class_id]) for prompt in prompts]


def _blend_mask(prompt: Prompts, previous: Sequence[Bool]) -> Prompts:
    if prompt.component is None or not previous:
        return prompt
    nearest = max(previous, key=lambda mask: metrics.iou(mask, prompt.component))
    if not metrics.iou(nearest, prompt.component) >= MATCH_IOU:
        return prompt
    own = 0.0 if prompt.mask_input is None else prompt.mask_input
    return replace(prompt, mask_input=((own + _mask_input_of(nearest)) / 2).astype(np.float32))


def _mask_input_of(mask: Bool) -> NDArray[np.float32]:
    """(H, W) logits of a certain mask: +-`MASK_INPUT_CLIP`."""
    return np.where(mask, MASK_INPUT_CLIP, -MASK_INPUT_CLIP).astype(np.float32)


def _prompts(probs: Probs | None, class_id: int, mask: Bool, cfg: PromptsConfig, rng: np.random.Generator) -> Prompts:
    height, width = mask.shape
    box, *scaled = (_box(mask, scale, cfg.box_margin) for scale in cfg.box_scales)
    coords, labels = _points(mask, box) if cfg.points else (None, None)
    return Prompts(
        class_id=class_id,
        box=box if cfg.box else None,
        point_coords=coords,
        point_labels=labels,
        mask_input=_mask_input(probs.probs[class_id], mask) if cfg.mask_hint and probs else None,
        jittered_boxes=masks.jitter_boxes(box, cfg.num_jitters if cfg.box else 0, cfg.jitter, height, width, rng),
        component=mask,
        scaled_boxes=np.array(scaled if cfg.box else [], np.float32).reshape(-1, 4),
    )


def _box(mask: Bool, scale: float, margin: float) -> NDArray[np.float32]:
    """(4,) the tight box of a mask, `scale` times as large about its centre, and grown by the margin."""
    return masks.grow_box(masks.grow_box(masks.tight_box(mask), (scale - 1) / 2, *mask.shape, 0.0), margin, *mask.shape)


def _points(component: Bool, box: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    inside, outside = masks.inner_point(component), masks.outer_point(component, box)
    if outside is None:
        return inside[None], np.array([1], np.int64)
    return np.stack([inside, outside]), np.array([1, 0], np.int64)


def _mask_input(prob: NDArray[np.float32], component: Bool) -> NDArray[np.float32]:
    """(H, W) logits of the class, limited to +-`MASK_INPUT_CLIP`; other components of the class count as background."""
    logits = np.full(prob.shape, -MASK_INPUT_CLIP, np.float32)
    place = masks.window(prob > CERTAIN_BACKGROUND)
    inside, open_logits = prob[place], logits[place]
    p = np.clip(inside, 1e-6, 1 - 1e-6)
    np.clip(np.log(p / (1 - p)), -MASK_INPUT_CLIP, MASK_INPUT_CLIP, out=open_logits)
    open_logits[(inside >= 0.5) & ~component[place]] = -MASK_INPUT_CLIP
    return logits

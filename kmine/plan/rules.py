"""Rules of a plan: from the fingerprint of the data and facts of the machine to settings, each with its reason.

docs/planning.md has the same rules as a table, with their sources.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from kmine.config import LoopConfig
from kmine.config.mining import ENCODING
from kmine.io.files import default_cache_dir
from kmine.models.encoder_hub import cached_weights, weights_name
from kmine.plan.fingerprint import Fingerprint
from kmine.plan.machine import Machine

SIZES = (96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 448, 512)
"""Sides of the local model's input, multiples of 32, the stride of the deepest encoders."""
USUAL = {False: 256, True: 352}
"""Largest side without need of more (CPU, GPU); 352 is usual for polyps since PraNet (arXiv 2006.11392)."""
OBJECT_PX = 8  # of a small object (10th percentile) at the input: fewer are lost at stride 4 of the decoder
SQUASH, MOST_PATCHES = 1.5, 4
"""Ratio of sides, of one image in ten, from which on images are not squashed; largest side in patches. Our choice."""
STEPS, PASSES, MAX_STEPS = {False: 600, True: 800}, 48, 6000
"""Fewest steps of round 0 (CPU, GPU), times that each label is seen at least, and most steps."""
MINUTES = {False: 20.0, True: 60.0}
PLANNED = (
    *("data.label_fraction", "data.val_fraction", "data.resize", "data.size", "data.patch", "model.encoder"),
    *("model.encoder_depth", "model.decoder_width", "fit.batch_size", "fit.precision", "fit.num_workers", "fit.steps"),
    *("fit.round_steps", "rounds", "segmenter.batch_size"),
)
"""Settings that a plan may choose, in the order of its table."""


@dataclass(frozen=True)
class Choice:
    """One setting of a plan, by dotted name; `by_machine`: another machine may get another value."""

    setting: str
    value: Any
    why: str
    by_machine: bool = False


def own_data_choices(cfg: LoopConfig) -> Iterator[Choice]:
    """How a user's own files are divided; before the fingerprint, which needs the splits."""
    if cfg.data.name in ("folder", "nnunet") and cfg.data.fine_groups is None:
        yield Choice("data.label_fraction", 1.0, "your own masks are all used; a share is for experiments")
        yield Choice("data.val_fraction", 0.2, "of few masks a tenth would be too few to validate on")


def network_choices(cfg: LoopConfig, data: Fingerprint, machine: Machine) -> Iterator[Choice]:
    """Network, batch, precision and workers."""
    is_sks, gpu, weights = "sks" in cfg.model.name, machine.is_gpu, cfg.model.encoder_weights
    if cfg.model.name in ("unet", "unetpp", "sks") and weights in (
        None,
        "none",
        "auto",
        "hub",
    ):  # a file is of one encoder
        small, large = ("mobilenetv2_100", "swinv2_tiny_window8_256") if is_sks else ("mobilenet_v2", "resnet34")
        folder, names = default_cache_dir(), [weights_name(cfg.model.name, name) for name in (large, small)]
        has = [weights == "auto" and gpu and cached_weights(name, folder) is not None for name in names]
        why = "fast on a CPU" if not gpu else "the field's usual encoder"
        why = "pretrained weights are here, which matter more than the encoder" if has == [False, True] else why
        yield Choice("model.encoder", large if gpu and has != [False, True] else small, why, True)
    if not is_sks and cfg.model.name != "dpt":
        why = "all stages of the encoder" if gpu else "small images have little left at stride 32"
        yield Choice("model.encoder_depth", 5 if gpu else 4, why, True)
    why = "widths of segmentation-models-pytorch" if gpu else "half of the usual width, where it costs most"
    yield Choice("model.decoder_width", 16 if gpu else 8, why, True)
    yield Choice("fit.batch_size", 16 if gpu else 8, "usual; halved where it does not fit the memory", True)
    yield Choice("fit.precision", machine.precision, "fastest of this device", True)
    workers = min(4, machine.cores - 1) if gpu else 0
    why = "more were no faster on an H100" if gpu else "training uses all cores; a thread reads ahead"
    yield Choice("fit.num_workers", workers, why, True)
    if cfg.segmenter.name.startswith(ENCODING):
        why = "1.3 times as fast as 1 on an H100" if gpu else "a CPU gains nothing from more"
        yield Choice("segmenter.batch_size", 8 if gpu else 1, why, True)


def step_choices(batch_size: int, data: Fingerprint, machine: Machine) -> Iterator[Choice]:
    """Steps and rounds."""
    floor = STEPS[machine.is_gpu]
    needed = math.ceil(PASSES * data.num_labeled / batch_size / 100) * 100
    steps = min(MAX_STEPS, max(floor, needed))
    why = f"{PASSES} passes over {data.num_labeled} labels" if steps > floor else "the usual number for few labels"
    yield Choice("fit.steps", steps, why)
    yield Choice("fit.round_steps", steps // 2, "half of round 0, from its weights")
    why = "the usual number" if data.num_unlabeled else "no image is unlabeled: nothing to mine"
    yield Choice("rounds", 2 if data.num_unlabeled else 0, why)


def sizes(data: Fingerprint, machine: Machine) -> tuple[list[int], str]:
    """Sides to choose from, largest first, and the reason of the largest."""
    usual, native = USUAL[machine.is_gpu], math.ceil(data.side / 32) * 32
    wanted = needed_side(data)
    largest, why = (usual, f"the usual {usual}") if wanted <= usual else (wanted, f"small objects need {wanted}")
    if native < largest:
        largest, why = native, f"images of {data.side} px hold no more"
    return [size for size in reversed(SIZES) if size <= largest] or [largest], why


def shape_choices(data: Fingerprint) -> Iterator[Choice]:
    """Whether the ratio of sides is kept."""
    ratio = max(data.aspect_high, 1 / data.aspect_low)
    why = "squashing would change shapes" if ratio >= SQUASH else "squashing is mild"
    yield Choice("data.resize", "letterbox" if ratio >= SQUASH else "squash", f"{why}: sides differ by {ratio:.2f}")


def patch_choices(cfg: LoopConfig, data: Fingerprint) -> Iterator[Choice]:
    """Patches of the size that the time allows, where small objects would vanish in the whole image of that size."""
    side, patch = math.floor(min(needed_side(data), data.side) / 32) * 32, cfg.data.size
    if side >= 1.5 * patch and "sks" not in cfg.model.name:
        yield Choice("data.patch", patch, f"small objects ({data.small_object_px:.0f} px) would vanish in whole images")
        yield Choice("data.size", min(side, MOST_PATCHES * patch), f"the side that keeps {OBJECT_PX} px of them", True)


def needed_side(data: Fingerprint) -> int:
    """Side at which a small object has `OBJECT_PX` pixels; 0 if objects are unknown."""
    if not data.small_object_px > 0:
        return 0
    return math.ceil(OBJECT_PX * data.side / data.small_object_px / 32) * 32


def cheaper(cfg: LoopConfig, given: Collection[str]) -> Iterator[list[Choice]]:
    """What a plan gives up where the smallest size is still too slow, in this order."""
    if cfg.rounds > 1 and "rounds" not in given:
        yield [Choice("rounds", 1, "the time budget allows one", True)]
    steps = {"fit.steps": cfg.fit.steps, "fit.round_steps": cfg.fit.round_steps}
    why = "half, for the time budget"
    yield [Choice(name, max(50, value // 2), why, True) for name, value in steps.items() if name not in given]

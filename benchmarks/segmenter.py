"""Seconds of SAM for an image in a first and in a later round, beside the official predictor on the same prompts.

    python benchmarks/segmenter.py [--name sam_vit_b] [--size 1024] [--repeats 1] [--before CLONE]

Both have the same random weights (those of relative and absolute positions are drawn, too) and decode the same prompts
in one process, in turn: one image, 4 components, 3 boxes each, with and without a mask input. The official side is the
loop of its documentation: `SamPredictor.set_image`, then one `predict` per box. All masks and logits are compared. CPU
seconds beside those of the clock are steadier on a busy machine.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from alternate import alternate, print_json
from segment_anything import SamPredictor
from segment_anything.modeling import Sam

from kmine.segmenters.base import Embedding
from kmine.segmenters.embedding_cache import EmbeddingCache
from kmine.segmenters.sam.build import ARCHITECTURES, build_sam
from kmine.segmenters.sam.segmenter import SamSegmenter
from kmine.types import Candidate, Prompts

CENTRES = ((180, 200), (200, 620), (480, 300), (500, 720))
NUM_BOXES = 3
FRAME = (700, 940)


def random_weights(name: str, size: int) -> Sam:
    torch.manual_seed(0)
    sam = build_sam(name, None, size)
    with torch.no_grad():
        for key, parameter in sam.image_encoder.named_parameters():
            if "rel_pos" in key or "pos_embed" in key:
                torch.nn.init.normal_(parameter, std=0.1)
    return sam


def prompted_image() -> tuple[np.ndarray, list[Prompts]]:
    """An image with four discs, and for each its jittered boxes without and with a mask input."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 90, (*FRAME, 3), dtype=np.uint8)
    rows, columns = np.mgrid[: FRAME[0], : FRAME[1]]
    prompts = []
    for row, column in CENTRES:
        radius = rng.uniform(60, 110)
        distance = np.hypot(rows - row, columns - column)
        image[distance < radius] += 120
        box = np.array([column - radius, row - radius, column + radius, row + radius])
        boxes = (box + rng.uniform(-15, 15, (NUM_BOXES, 4))).astype(np.float32)
        mask_input = ((radius - distance) / 10).clip(-6, 6).astype(np.float32)
        prompts += [Prompts(1, boxes[0], mask_input=m, jittered_boxes=boxes[1:]) for m in (None, mask_input)]
    return image, prompts


def official(sam: Sam, segmenter: SamSegmenter, image: np.ndarray, prompts: list[Prompts]) -> list[np.ndarray]:
    """(masks (N, H, W), logits (N, S, S)) of the official predictor, box by box, with the segmenter's mask inputs."""
    predictor, outputs = SamPredictor(sam), []
    predictor.set_image(image)
    for prompt in prompts:
        logits = prompt.mask_input
        mask_input = None if logits is None else segmenter.decoder.mask_input(logits).cpu().numpy()
        for box in (prompt.box, *prompt.jittered_boxes):
            masks, _, low_res = predictor.predict(box=box, mask_input=mask_input, multimask_output=False)
            outputs.append((masks[0], low_res[0]))
    return [np.stack(part) for part in zip(*outputs, strict=True)]


def timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """(what it returns, seconds of the clock, CPU seconds)."""
    clock, cpu = time.perf_counter(), time.process_time()
    value = work()
    return value, time.perf_counter() - clock, time.process_time() - cpu


def masks_of(candidates: list[Candidate]) -> np.ndarray:
    return np.concatenate([[a.masks[0], *a.jittered_masks] for a in candidates])


def compare(text: str, candidates: list[Candidate], masks: np.ndarray, logits: np.ndarray) -> None:
    """Largest differences from the official output; logits exist for each prompt's own box only."""
    ours = masks_of(candidates)
    iou = (ours & masks).sum((1, 2)) / np.maximum((ours | masks).sum((1, 2)), 1)
    off = np.abs(np.stack([a.low_res_logits[0] for a in candidates]) - logits[::NUM_BOXES]).max()
    print(
        f"  {text}: logits differ by at most {off:.1e} (their deviation is {logits.std():.2f}); "
        f"{np.mean(ours != masks):.1e} of the mask pixels differ, lowest IoU {iou.min():.4f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", choices=sorted(ARCHITECTURES), default="sam_vit_b")
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.before and not args.json:
        alternate(["--name", args.name, "--size", str(args.size)], args.before, args.repeats)
        return
    plain, (image, prompts) = random_weights(args.name, args.size), prompted_image()
    fast = copy.deepcopy(plain)
    print(f"{args.name}, random weights, {args.size} px, {torch.get_num_threads()} threads, torch {torch.__version__}")
    seconds: dict[str, list[tuple[float, float]]] = {"official": [], "first round": [], "later round": []}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(args.repeats):
            cache = EmbeddingCache(Path(folder) / str(repeat), 10**9, print)
            segmenter = SamSegmenter(fast, name=args.name, cache=cache)
            (masks, logits), *spent = timed(lambda s=segmenter: official(plain, s, image, prompts))
            seconds["official"].append(tuple(spent))
            for which in ("first round", "later round", "later round", "later round"):
                candidates, *spent = timed(lambda s=segmenter: s.decode(s.encode([image]), [prompts])[0])
                seconds[which].append(tuple(spent))
    if args.json:
        medians = {k: [statistics.median(part) for part in zip(*v, strict=True)] for k, v in seconds.items()}
        print_json(medians, hashlib.sha256(masks_of(candidates)).hexdigest())
        return
    compare("float32", candidates, masks, logits)
    (exact,) = segmenter.encode([image])
    half = Embedding(exact.size, exact.features.astype(np.float16))
    compare("float16", segmenter.decode([half], [prompts])[0], masks, logits)
    medians = {which: [statistics.median(part) for part in zip(*all_, strict=True)] for which, all_ in seconds.items()}
    for which, (clock, cpu) in medians.items():
        ratios = [a / b for a, b in zip(medians["official"], (clock, cpu), strict=True)]
        print(f"  {which:12} {clock:7.2f} s {ratios[0]:6.1f} x   CPU {cpu:7.2f} s {ratios[1]:6.1f} x")


if __name__ == "__main__":
    main()

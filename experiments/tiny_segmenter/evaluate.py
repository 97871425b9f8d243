"""How well boxes are answered on real images: `ellipse` against given weights of `tiny`. Measures; chooses nothing.

    KMINE_TEST_DATA=DATA python experiments/tiny_segmenter/evaluate.py OUT/tiny.safetensors --limit 100 --timing

Boxes are those of the true objects (connected components of at least 20 pixels), every edge moved uniformly by up to
5 % of its side. Printed for every set: objects, mean IoU of each segmenter, its gain over the ellipse (95 % interval,
images or volumes redrawn), in how many objects it is better, and Spearman's correlation of predicted and true IoU;
with `--timing` prompts a second at 512 x 512, for one thread and for as many as torch takes by itself.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from real_sets import SETS, Picture, data_root
from scipy.stats import spearmanr

from kmine.ops import metrics
from kmine.ops.masks import (
    components,
    grow_box,
    jitter_boxes,
    tight_box,
)
from kmine.ops.seeding import derive_seed
from kmine.segmenters.base import Segmenter
from kmine.segmenters.ellipse import Ellipse
from kmine.segmenters.tiny.segmenter import open_tiny
from kmine.types import Prompts

JITTER = 0.05
MIN_AREA = 20
RESAMPLES = 4000


@dataclass(frozen=True)
class Scores:
    """One row an object."""

    images: list[str]
    groups: list[str]
    true: NDArray[np.float64]
    """(objects, segmenters) IoU."""
    predicted: NDArray[np.float64]
    """Likewise, as the segmenter estimates it; NaN where it has no opinion."""


def score(segmenters: Sequence[Segmenter], pictures: Sequence[Picture]) -> Scores:
    """Every object of every picture, asked with the same box each time; pictures are read one by one."""
    images, groups, true, predicted = [], [], [], []
    for picture in pictures:
        sample = picture.read()
        parts = components(sample.mask > 0, MIN_AREA)
        asked = [[Prompts(1, _box(part, derive_seed(0, picture.name, index))) for index, part in enumerate(parts)]]
        answers = [segmenter.decode(segmenter.encode([sample.image]), asked)[0] for segmenter in segmenters]
        for part, *own in zip(parts, *answers, strict=True):
            images.append(picture.name)
            groups.append(picture.group)
            true.append([metrics.iou(c.masks[c.best], part) for c in own])
            predicted.append([c.predicted_iou[c.best] for c in own])
    return Scores(images, groups, np.array(true, np.float64), np.array(predicted, np.float64))


def interval(
    gains: NDArray[np.float64], groups: Sequence[str], runs: Sequence[int] | None = None
) -> tuple[float, float]:
    """95 % bootstrap interval of the mean gain over objects.

    Whole groups (images, volumes) are drawn, not single objects, and whole runs (seeds), where there are several.
    """
    group_of = np.unique(groups, return_inverse=True)[1]
    run_of = np.unique(np.zeros(len(gains)) if runs is None else runs, return_inverse=True)[1]
    sums, counts = np.zeros((2, run_of.max() + 1, group_of.max() + 1))
    np.add.at(sums, (run_of, group_of), gains)
    np.add.at(counts, (run_of, group_of), 1)
    rng = np.random.default_rng(0)
    drawn = [rng.multinomial(n, np.full(n, 1 / n), RESAMPLES).astype(np.float64) for n in counts.shape]
    total, size = (np.einsum("br,rg,bg->b", drawn[0], table, drawn[1], optimize=True) for table in (sums, counts))
    # Few volumes and seeds can be drawn so that none of these volumes was tested with any of these seeds.
    low, high = np.percentile(total[size > 0] / size[size > 0], [2.5, 97.5])
    return float(low), float(high)


def _box(part: NDArray[np.bool_], seed: int) -> NDArray[np.float32]:
    """The box around an object's pixels, every edge moved by up to `JITTER` of its side."""
    tight = grow_box(tight_box(part), 0.0, *part.shape, min_px=0.5)
    return jitter_boxes(tight, 1, JITTER, *part.shape, np.random.default_rng(seed), max_move=np.inf)[0]


def timing(segmenter: Segmenter, seconds: float = 5.0) -> float:
    """Prompts a second on noise of 512 x 512, eight boxes an image, masks in the image's frame included."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (512, 512, 3), dtype=np.uint8)
    corners, sides = rng.uniform(0, 300, (8, 2)), rng.uniform(30, 210, (8, 2))
    asked = [Prompts(1, box) for box in np.concatenate([corners, corners + sides], 1).astype(np.float32)]
    segmenter.decode(segmenter.encode([image]), [asked])
    count, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        segmenter.decode(segmenter.encode([image]), [asked])
        count += len(asked)
    return count / (time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", type=Path, nargs="*")
    parser.add_argument("--limit", type=int, help="images of each set, at most")
    parser.add_argument("--timing", action="store_true")
    args = parser.parse_args()
    root = data_root()
    ours = [open_tiny(path, name=f"tiny:{path.parent.name}") for path in args.weights]
    segmenters = [Ellipse(), *ours]
    print(f"| set | objects | {' | '.join(s.name for s in segmenters)} |")
    print("|---" * (2 + len(segmenters)) + "|")
    for name, pictures_of in SETS.items():
        scores = score(segmenters, pictures_of(root)[: args.limit])
        floor = scores.true[:, 0]
        cells = [f"{floor.mean():.3f}"]
        for index in range(1, len(segmenters)):
            true = scores.true[:, index]
            correlation = spearmanr(scores.predicted[:, index], true).statistic
            low, high = interval(true - floor, scores.groups)
            gain = f"{np.mean(true - floor):+.3f} [{low:+.3f}, {high:+.3f}]"
            share = f"better in {np.mean(true > floor):.0%}"
            cells.append(f"{true.mean():.3f} ({gain}, {share}, rank {correlation:+.2f})")
        print(f"| {name} | {len(floor)} | {' | '.join(cells)} |", flush=True)
    if args.timing:
        default = torch.get_num_threads()
        for threads in sorted({1, default}):
            torch.set_num_threads(threads)
            kind = "the default here" if threads == default else f"the default here is {default}"
            for segmenter in segmenters:
                speed = timing(segmenter)
                print(f"{segmenter.name}: {speed:.0f} prompts/s at 512 x 512, threads: {threads} ({kind})")


if __name__ == "__main__":
    main()

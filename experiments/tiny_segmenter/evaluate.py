"""How well boxes are answered on real images: `ellipse` against given weights of `tiny`. Measures; chooses nothing.

    KMINE_TEST_DATA=DATA python experiments/tiny_segmenter/evaluate.py OUT/tiny.safetensors --limit 100 --timing

Boxes are those of the true objects (connected components of at least 20 pixels), every edge moved uniformly by up to
5 % of its side. Printed for every set: objects, mean IoU of each segmenter, its gain over the ellipse (95 % interval,
images or volumes redrawn), in how many objects it is better, and Spearman's correlation of predicted and true IoU;
with `--timing` prompts a second at 512 x 512.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr

from kmine.masks import components, grow_box, jitter_boxes, tight_box
from kmine.records import Prompts, derive_seed
from kmine.segmenters.base import Segmenter
from kmine.segmenters.ellipse import Ellipse
from kmine.segmenters.tiny import open_tiny

JITTER = 0.05
MIN_AREA = 20
WINDOW_HU = (-160.0, 240.0)
TUMOUR = 2
Pair = tuple[str, str, NDArray[np.uint8], NDArray[np.bool_]]
"""Name, what it belongs to (image or volume), (H, W, 3) uint8 RGB, (H, W) bool."""


def kvasir(root: Path, side: int) -> Iterator[Pair]:
    """Polyps at native resolution, or with the longer side reduced to `side` where that is not 0."""
    for path in sorted((root / "kvasir_seg/Kvasir-SEG/images").glob("*.jpg")):
        image = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
        mask = (cv2.imread(str(path.parent.parent / "masks" / path.name), cv2.IMREAD_GRAYSCALE) > 127).astype(np.uint8)
        if side:
            factor = side / max(mask.shape)
            image = cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
            mask = cv2.resize(mask, image.shape[1::-1], interpolation=cv2.INTER_NEAREST)
        yield path.stem, path.stem, image, mask > 0


def lits_tumours(root: Path) -> Iterator[Pair]:
    """Axial slices with a tumour; the two files of a volume are paired by number and must agree in shape."""
    import nibabel

    for path in sorted((root / "lits").rglob("volume-*.nii.gz")):
        volume = np.asarray(nibabel.load(path).dataobj, np.float32)
        truth = np.asarray(nibabel.load(path.with_name(path.name.replace("volume", "segmentation"))).dataobj).round()
        if volume.shape != truth.shape:
            raise SystemExit(f"{path}: its segmentation has shape {truth.shape}, expected {volume.shape}")
        grey = np.clip((volume - WINDOW_HU[0]) / (WINDOW_HU[1] - WINDOW_HU[0]), 0, 1) * 255
        for index in range(volume.shape[2]):
            mask = truth[..., index] == TUMOUR
            if mask.any():
                plane = grey[..., index].round().astype(np.uint8)
                yield f"{path.name}_{index}", path.name, np.repeat(plane[..., None], 3, axis=2), mask


def chest(root: Path, part: str, kind: str) -> Iterator[Pair]:
    """X-rays of one part of the COVID-QU-Ex layout with their `kind` masks; empty masks are left out."""
    for path in sorted((root / "covid_qu_ex" / f"{part} Segmentation Data").rglob("images/*.png")):
        mask = cv2.imread(str(path.parent.parent / kind / path.name), cv2.IMREAD_GRAYSCALE)
        if mask is not None and (mask > 127).any():
            image = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
            name = "/".join(path.parts[-4:])
            yield name, path.name, image, mask > 127


def sets(root: Path) -> dict[str, Iterator[Pair]]:
    """Every set by its name in the table."""
    return {
        "kvasir_seg polyps": kvasir(root, 0),
        "kvasir_seg polyps, long side 256": kvasir(root, 256),
        "lits tumours": lits_tumours(root),
        "covid layout, lungs": chest(root, "Lung", "lung masks"),
        "covid layout, infections": chest(root, "Infection", "infection masks"),
    }


def iou(left: NDArray[np.bool_], right: NDArray[np.bool_]) -> float:
    return np.count_nonzero(left & right) / max(np.count_nonzero(left | right), 1)


def score(
    segmenters: list[Segmenter], pairs: Iterator[Pair], limit: int | None
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """(objects, segmenters, 2): true and predicted IoU; (objects,): number of the image or volume of each."""
    rows, owners = [], []
    for number, (name, owner, image, mask) in enumerate(pairs):
        if number == limit:
            break
        parts = components(mask, MIN_AREA)
        boxes = [_box(part, derive_seed(0, name, index)) for index, part in enumerate(parts)]
        asked = [[Prompts(1, box) for box in boxes]]
        answers = [segmenter.decode(segmenter.encode([image]), asked)[0] for segmenter in segmenters]
        for index, part in enumerate(parts):
            own = [candidates[index] for candidates in answers]
            owners.append(owner)
            rows.append([(iou(c.masks[0], part), float(c.predicted_iou[0])) for c in own])
    return np.array(rows), np.unique(owners, return_inverse=True)[1]


def interval(gains: NDArray[np.float64], owners: NDArray[np.int64]) -> tuple[float, float]:
    """95 % bootstrap interval of the mean gain over objects; whole images or volumes are drawn, not single objects."""
    sums, counts = np.bincount(owners, gains), np.bincount(owners)
    drawn = np.random.default_rng(0).integers(len(sums), size=(4000, len(sums)))
    low, high = np.percentile(sums[drawn].sum(1) / counts[drawn].sum(1), [2.5, 97.5])
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
    root = os.environ.get("KMINE_TEST_DATA")
    if not root:
        raise SystemExit("KMINE_TEST_DATA: expected the folder with the real sets, it is not set")
    ours = [open_tiny(path, name=f"tiny:{path.parent.name}") for path in args.weights]
    segmenters = [Ellipse(), *ours]
    print(f"| set | objects | {' | '.join(s.name for s in segmenters)} |")
    print("|---" * (2 + len(segmenters)) + "|")
    for name, pairs in sets(Path(root)).items():
        rows, owners = score(segmenters, pairs, args.limit)
        floor, cells = rows[:, 0, 0], [f"{rows[:, 0, 0].mean():.3f}"]
        for index in range(1, len(segmenters)):
            true, predicted = rows[:, index].T
            correlation = spearmanr(predicted, true).statistic
            low, high = interval(true - floor, owners)
            gain = f"{np.mean(true - floor):+.3f} [{low:+.3f}, {high:+.3f}]"
            share = f"better in {np.mean(true > floor):.0%}"
            cells.append(f"{true.mean():.3f} ({gain}, {share}, rank {correlation:+.2f})")
        print(f"| {name} | {len(rows)} | {' | '.join(cells)} |", flush=True)
    if args.timing:
        for segmenter in segmenters:
            speed = timing(segmenter)
            print(f"{segmenter.name}: {speed:.0f} prompts/s at 512 x 512, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()

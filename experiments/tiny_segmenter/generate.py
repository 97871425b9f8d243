"""Draw the pool of training pairs: a view around one object, its mask, its box.

    python experiments/tiny_segmenter/generate.py POOL --pairs 20000 --workers 2

The pool is a folder of shards, `views_00000.npy` and `meta_00000.npy`; shards that are there are kept, so the command
continues where it was stopped, and every shard is fully determined by (seed, number). Shard 0 is for validation and
never trained on. Drawing costs more than training on what was drawn: a pool is drawn once and reused with
augmentation (`batches.py`).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from scenes import render_scene

from kmine.ops.masks import tight_box
from kmine.segmenters.tiny.window import MAX_ASPECT

VIEW = 128
"""Pixels of a view's side."""
REACH = 2.4
"""Side of a view over that of the box it shows: room for jittered boxes and their margins."""
PAIRS_PER_SHARD = 500
META = 10
"""Numbers a pair: box XYXY (first four), the picture's own limits XYXY (next four), both in view pixels with pixel
centres at integers; picture pixels per view pixel along x and y (last two)."""


def view_of(image: NDArray[np.uint8], mask: NDArray[np.bool_]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """A square view around one object.

    Args:
        image: (H, W, 3) uint8 RGB.
        mask: (H, W) bool, the object.

    Returns:
        (VIEW, VIEW, 4) uint8, RGB and the share of the object in a pixel times 255; (META,) float32. Beyond the
        picture's limits the view repeats its border.
    """
    x0, y0, x1, y1 = tight_box(mask).astype(float)
    width, height = max(x1 - x0 + 1, (y1 - y0 + 1) / MAX_ASPECT), max(y1 - y0 + 1, (x1 - x0 + 1) / MAX_ASPECT)
    half = np.array([width, height]) * REACH / 2
    low = np.floor((x0 + x1 + 1) / 2 - half[0]), np.floor((y0 + y1 + 1) / 2 - half[1])
    left, top = int(low[0]), int(low[1])
    right, bottom = left + int(np.ceil(2 * half[0])), top + int(np.ceil(2 * half[1]))
    rows, columns = image.shape[:2]
    stacked = np.dstack([image, mask.astype(np.uint8) * 255])
    pads = max(0, -top), max(0, bottom - rows), max(0, -left), max(0, right - columns)
    colours = cv2.copyMakeBorder(stacked[..., :3], *pads, cv2.BORDER_REPLICATE)
    shares = cv2.copyMakeBorder(stacked[..., 3], *pads, cv2.BORDER_CONSTANT, value=0)
    window = np.s_[top + pads[0] : bottom + pads[0], left + pads[2] : right + pads[2]]
    out = [_resized(plane[window]) for plane in (colours, shares)]
    scale = np.array([(right - left) / VIEW, (bottom - top) / VIEW])
    offset = np.array([left, top])
    corners = np.array([[x0, y0], [x1, y1], [0, 0], [columns - 1, rows - 1]])
    placed = (corners - offset + 0.5) / scale - 0.5
    return np.dstack(out), np.concatenate([placed.ravel(), scale]).astype(np.float32)


def _resized(plane: NDArray[np.uint8]) -> NDArray[np.uint8]:
    shrinks = min(plane.shape[:2]) > VIEW
    return cv2.resize(plane, (VIEW, VIEW), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def pairs(seed: int, shard: int) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.float32]]]:
    """All pairs of the scenes of one shard, without end."""
    number = 0
    while True:
        scene = render_scene(np.random.default_rng([seed, shard, number]))
        for mask in scene.masks:
            yield view_of(scene.image, mask)
        number += 1


def write_shard(pool: Path, seed: int, shard: int) -> float:
    """Draw one shard to disk and return the seconds it took; the last file's name appears only once all is written."""
    cv2.setNumThreads(1)
    begin = time.perf_counter()
    drawn = [pair for _, pair in zip(range(PAIRS_PER_SHARD), pairs(seed, shard), strict=False)]
    part = pool / f"part_{shard:05d}.npy"
    np.save(pool / f"meta_{shard:05d}.npy", np.stack([meta for _, meta in drawn]))
    np.save(part, np.stack([view for view, _ in drawn]))
    part.replace(pool / f"views_{shard:05d}.npy")
    return time.perf_counter() - begin


def commit() -> str:
    """The code's git commit, marked where files differ from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, check=False).stdout.strip()

    return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")


def claim(pool: Path, seed: int) -> None:
    """Make the folder and note seed and commit in its pool.json; a pool of another seed is refused."""
    pool.mkdir(parents=True, exist_ok=True)
    note = pool / "pool.json"
    if not note.exists():
        note.write_text(json.dumps({"pool_seed": seed, "pool_commit": commit()}) + "\n", "utf-8")
    came = json.loads(note.read_text("utf-8"))["pool_seed"]
    if came != seed:
        raise SystemExit(f"{pool}: expected a pool of seed {came}, got {seed}; name another folder")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pool", type=Path)
    parser.add_argument("--pairs", type=int, default=20000, help=f"rounded up to shards of {PAIRS_PER_SHARD}")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    claim(args.pool, args.seed)
    shards = range(-(-args.pairs // PAIRS_PER_SHARD))
    missing = [n for n in shards if not (args.pool / f"views_{n:05d}.npy").exists()]
    with ProcessPoolExecutor(args.workers) as executor:
        jobs = [executor.submit(write_shard, args.pool, args.seed, n) for n in missing]
        for done, job in enumerate(as_completed(jobs), len(shards) - len(missing) + 1):
            print(f"{done}/{len(shards)} shards, {1000 * job.result() / PAIRS_PER_SHARD:.1f} ms a pair", flush=True)


if __name__ == "__main__":
    main()

"""Images a second of a round of mining; with --before beside another clone, in turn, with a digest of all masks.

    python benchmarks/mining.py --images 48 --repeats 3 --before ../clone

A round (`kmine.methods.mining.pseudo_label`) on JPEG files of 700 x 940, each with an object that the local model, a
threshold of brightness, sees: so reading, prompts, segmenter, gate, refinement and saving are measured, not the local
model. `tiny`: the segmenter of that name. `sam`: ViT-B of random weights, whose embeddings are at hand, as in later
rounds.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import torch
from alternate import Spent, alternate, print_json

from kmine.config import DataConfig, GateConfig, LoopConfig, ModelConfig
from kmine.data import open_source
from kmine.methods.mining import pseudo_label
from kmine.models.base import LocalModel
from kmine.segmenters.embedding_cache import EmbeddingCache
from kmine.setup.open import open_task
from kmine.store.run_folder import RunFolder
from kmine.training.checkpoints import Checkpoints

HEIGHT, WIDTH = 700, 940


class Progress:
    def start(self, title: str, total: int) -> None: ...

    def advance(self, done: int, text: str = "") -> None: ...

    def log(self, text: str) -> None: ...


class Brightness(torch.nn.Module):
    """Logits of class 1 from the mean of the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.level = torch.nn.Parameter(torch.tensor(120.0))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = (images.float().mean(dim=1, keepdim=True) - self.level) / 8
        return torch.cat([torch.zeros_like(logits), logits], dim=1)


def draw(root: Path, count: int) -> None:
    """Pairs of image and mask in the folder layout."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for n in range(count):
        noise = rng.integers(0, 60, (HEIGHT // 4, WIDTH // 4, 3), dtype=np.uint8)
        image = cv2.resize(noise, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
        y, x, radius = rng.uniform(200, 500), rng.uniform(200, 700), rng.uniform(60, 150)
        mask = np.hypot(rows - y, columns - x) < radius
        image[mask] += 130
        cv2.imwrite(str(root / f"images/{n:04}.jpg"), image)
        cv2.imwrite(str(root / f"masks/{n:04}.png"), mask.astype(np.uint8) * 255)


def mined(root: Path, segmenter: str, count: int) -> tuple[list[float], str]:
    """Seconds of the clock and of the processor of a round, and the digest of what it wrote."""
    data = DataConfig(
        name="folder",
        images=str(root / "data/images"),
        masks=str(root / "data/masks"),
        size=96,
        label_fraction=4 / count,
        val_fraction=4 / count,
        cache_dir=str(root / "cache"),
        on_fault="warn",
    )
    cfg = LoopConfig(data=data, model=ModelConfig(encoder_weights=None), gate=GateConfig(mode="ranked", keep=1.0))
    run = RunFolder(root / f"run-{segmenter}")
    task = open_task(cfg, open_source(data), run, Progress())
    if segmenter == "sam":
        from segmenter import random_weights

        from kmine.segmenters.sam.segmenter import SamSegmenter

        sam = random_weights("sam_vit_b", 1024)
        cache = EmbeddingCache(root / "embeddings", 10**10, print)
        task = replace(task, segmenter=SamSegmenter(sam, name="sam", cache=cache, dtype="float16"))
        for sample_id in task.unlabeled.ids:  # as if a round before had encoded the images
            shape = sam.image_encoder.img_size // 16
            features = np.random.default_rng(0).normal(size=(256, shape, shape)).astype(np.float16)
            embedder = task.segmenter._embedder
            cache.put(embedder._key(task.unlabeled.sample(sample_id).image), features)
            if hasattr(task.unlabeled, "unread"):
                embedder._key(task.unlabeled.unread(sample_id))
    model = LocalModel(Brightness(), 2, 1, "half")
    model.prepare = lambda images: images
    student = Checkpoints("student", dict(model.state_dict()), {}, 0.0)
    clock, cpu = time.perf_counter(), time.process_time()
    labels = pseudo_label(task, model, student, None, 1)
    spent = [time.perf_counter() - clock, time.process_time() - cpu]
    digest = hashlib.sha256(repr([(i, hashlib.sha256(labels[i].mask).hexdigest()) for i in labels]).encode())
    digest.update(repr(list(run.decisions(1))).encode())
    assert len(labels) > len(task.unlabeled) // 2
    return spent, digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--segmenters", nargs="+", choices=("tiny", "sam"), default=["tiny"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    words = ["--images", str(args.images), "--segmenters", *args.segmenters]
    if args.before and not args.json:
        alternate(words, args.before, args.repeats)
        return
    spent: Spent = {}
    digests = []
    with tempfile.TemporaryDirectory() as folder:
        draw(Path(folder) / "data", args.images)
        for name in args.segmenters:
            spent[f"{name}, {args.images - 8} images"], digest = mined(Path(folder), name, args.images)
            digests.append(digest)
    if args.json:
        print_json(spent, " ".join(digests))
        return
    for name, (clock, cpu) in spent.items():
        print(f"{name}: {clock:.2f} s, processor {cpu:.2f} s")


if __name__ == "__main__":
    main()

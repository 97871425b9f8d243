"""The prompts that matter: boxes and hints of a U-Net++ trained on few polyps, answered on polyps it never saw.

    python experiments/tiny_segmenter/local_prompts.py OUT --data.root FOLDER_THAT_HOLDS_Kvasir-SEG --labels 30 60 \
        --seeds 0 1 2 [--encoder-weights FILE] [--weights TINY.safetensors]

For every number of labels and every seed: the loop's own first steps (U-Net++ on the labels, cross-fitted local
prompts, adaptation decided on the validation images), then every unlabeled image is prompted as in mining and answered
by `ellipse`, `tiny` and `tiny+adapted`. The withheld masks are opened at the very end, here alone, to measure. Prints
mean Dice per image of the local model's own masks and of the segmenters' answers united, over all unseen images (one
in which the local model finds nothing scores 0 for all), with paired 95 % intervals. Done cells are read back.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from kmine.cli import Terminal
from kmine.config import (
    DataConfig,
    FitConfig,
    LoopConfig,
    ModelConfig,
    SegmenterConfig,
)
from kmine.data import open_source
from kmine.data.pool import Pool
from kmine.mining.adaptation.step import adapt_segmenter
from kmine.mining.crossfit import out_of_fold, with_prompts
from kmine.ops import metrics
from kmine.ops.statistics import paired_difference, score_empty_cases
from kmine.segmenters import Segmenter, open_segmenter
from kmine.setup.open import open_cache, open_splits, open_task
from kmine.store.run_folder import RunFolder
from kmine.training.model_setup import new_model
from kmine.training.task import Task
from kmine.training.trainer import train

TRAINING_IMAGES = 195
"""Of the 300 pairs, 75 are test and 30 validation images."""


def config(args: argparse.Namespace, num_labels: int, seed: int) -> LoopConfig:
    """The settings of configs/kvasir_seg.yaml with an encoder of the user's."""
    return LoopConfig(
        seed=seed,
        out=str(args.out / f"labels_{num_labels}_seed_{seed}"),
        data=DataConfig(
            name="kvasir_seg",
            root=str(args.root),
            size=128,
            label_fraction=num_labels / TRAINING_IMAGES,
            cache_dir=args.cache,
        ),
        model=ModelConfig(encoder_weights=args.encoder_weights),
        fit=FitConfig(round_lr=3e-4),
        segmenter=SegmenterConfig(name="tiny", checkpoint=args.weights),
    )


def cell(cfg: LoopConfig, only_train: bool) -> pd.DataFrame | None:
    """One row per unseen image: Dice of the local model and of every segmenter prompted by it."""
    source = open_source(cfg.data)
    store = RunFolder(Path(cfg.out))
    path = store.root / "local_prompts.csv"
    if path.exists():
        return pd.read_csv(path)
    if only_train:
        cfg = replace(cfg, segmenter=SegmenterConfig(name="ellipse"))
    terminal = Terminal()
    task = open_task(cfg, source, store, terminal)
    model = new_model(task)
    model.load_state_dict(train(task, model, round_idx=0).best)
    if only_train:
        list(out_of_fold(task, task.labeled.ids))
        terminal.stop()
        return None
    asked = adapt_segmenter(task)
    segmenters = {"ellipse": open_segmenter(SegmenterConfig(name="ellipse"), device="cpu", offline=True)}
    segmenters |= {"tiny": task.segmenter, "tiny+adapted": asked.segmenter}
    rows = pd.DataFrame(answered(task, model, segmenters))
    rows.insert(0, "labels", len(task.labeled))
    rows.to_csv(path, index=False)
    terminal.stop()
    return rows


def answered(task: Task, model: object, segmenters: dict[str, Segmenter]) -> Iterator[dict[str, object]]:
    """Dice per unlabeled image; here, and only here, the withheld masks are read."""
    cache = open_cache(task.cfg, open_source(task.cfg.data))
    truths = Pool(cache, task.unlabeled.ids, open_splits(task.cfg, cache, task.run).groups, "true")
    for sample, prompts in with_prompts(task, model, task.unlabeled, task.unlabeled.ids):
        truth = truths.sample(sample.sample_id).mask == 1
        local = np.zeros(truth.shape, bool)
        for one in prompts:
            local |= one.component
        row = {"sample_id": sample.sample_id, "prompts": len(prompts), "local": metrics.dice(local, truth)}
        for name, segmenter in segmenters.items():
            (answers,) = segmenter.decode(segmenter.encode([sample.image]), [prompts])
            union = np.zeros(truth.shape, bool)
            for answer in answers:
                union |= answer.masks[answer.best]
            row[name] = metrics.dice(union, truth)
        yield row


def table(cells: dict[int, list[pd.DataFrame]]) -> str:
    """Markdown; seeds draw other labeled images, so pairs are formed over (seed, image) cells, NaN where labeled."""
    names = ["local", "ellipse", "tiny", "tiny+adapted"]
    for frame in (frame for frames in cells.values() for frame in frames):
        frame[names] = score_empty_cases(frame[names].to_numpy(float))
    lines = ["| labels | unseen images | " + " | ".join(names) + " | tiny+adapted - local | tiny+adapted - ellipse |"]
    lines.append("|---" * (len(names) + 4) + "|")
    for labels, frames in cells.items():
        ids = sorted(set().union(*(frame["sample_id"] for frame in frames)))
        scores = {name: np.stack([f.set_index("sample_id")[name].reindex(ids) for f in frames]) for name in names}
        means = [f"{np.nanmean(scores[name]):.3f}" for name in names]
        gains = [paired_difference(scores[other], scores["tiny+adapted"], seed=0) for other in ("local", "ellipse")]
        cells_of = [f"{g.difference:+.3f} [{g.low:+.3f}, {g.high:+.3f}]" for g in gains]
        count = " ".join(str(len(frame)) for frame in frames)
        lines.append(f"| {labels} | {count} | " + " | ".join(means + cells_of) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--data.root", dest="root", type=Path, required=True)
    parser.add_argument("--labels", type=int, nargs="+", default=[30, 60])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--encoder-weights", help="ImageNet weights of MobileNetV2; none: from scratch")
    parser.add_argument("--weights", help="of tiny; default: those that ship")
    parser.add_argument("--cache", help="folder of the decode cache")
    parser.add_argument("--only-train", action="store_true", help="train the local models and stop")
    args = parser.parse_args()
    found = {n: [cell(config(args, n, seed), args.only_train) for seed in args.seeds] for n in args.labels}
    if not args.only_train:
        print(table(found))


if __name__ == "__main__":
    main()

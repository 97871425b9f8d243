"""How far `kmine predict`'s estimated Dice can be trusted on images of another source than those of training.

    python experiments/new_source/run.py OUT --data.root COVID_QU_EX --weights MOBILENET_V2
    python experiments/new_source/run.py OUT_OR_CSV --table

The layout of COVID-QU-Ex with lung masks. Of the images of Normal and Non-COVID, 44 with their masks and 12 without go
to `kmine loop`, as a folder of one's own; 24 others are new images of the same source, all of COVID-19 are new images
of another one. The loop calibrates the estimates by models of parts, as ever; nothing is mined that would teach (one
step of round 1, segmenter `ellipse`). Then `kmine predict` masks all new images and estimates their Dice, and only now
their masks are read. Each seed draws other images. OUT/cells/SEED-lungs.csv has a row an image; what is there is not
repeated, and several processes can share OUT.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from scipy.stats import spearmanr

sys.path.append(str(Path(__file__).resolve().parents[1]))
from folds import read_cells, t_interval, write_cells
from own_folder.run import kmine

from kmine.mining.calibration.fit import reliability
from kmine.ops.metrics import dice

NUM_MASKS, NUM_UNLABELED, NUM_SAME = 44, 12, 24
SOURCES = {"same": ("Normal", "Non-COVID"), "other": ("COVID-19",)}
NUM_BINS = 5


def pairs(root: Path, classes: Sequence[str]) -> list[tuple[Path, Path]]:
    """Images of classes with their lung masks."""
    images = [p for name in classes for p in sorted(root.glob(f"Lung*/**/{name}/images/*.png"))]
    return [(p, p.parents[1] / "lung masks" / p.name) for p in images]


def copy(files: Sequence[Path], folder: Path) -> None:
    """Under names of their own, as classes may share some."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in files:
        shutil.copyfile(path, folder / f"{path.parents[1].name}_{path.name}")


def cell(args: argparse.Namespace, seed: int) -> pd.DataFrame:
    """Train, predict, and hold estimates against truth."""
    folder, same, other = args.out / "runs" / str(seed), *(pairs(args.root, SOURCES[name]) for name in SOURCES)
    random.Random(seed).shuffle(same)
    known, new = same[: NUM_MASKS + NUM_UNLABELED], {"same": same[-NUM_SAME:], "other": other}
    copy([image for image, _ in known], folder / "images")
    copy([mask for _, mask in known[:NUM_MASKS]], folder / "masks")
    log = folder / "log.txt"
    data = ["--data.name", "folder", "--data.images", folder / "images", "--data.masks", folder / "masks"]
    data += ["--data.size", 128, "--data.label_fraction", 1, "--data.val_fraction", 0.25, "--data.test_fraction", 0]
    data += ["--data.cache_dir", folder / "cache"]
    fit = ["--plan", "false", "--model.encoder", "mobilenet_v2", "--model.encoder_weights", args.weights, "--device"]
    fit += ["cpu", "--fit.steps", args.steps, "--fit.round_steps", 1, "--rounds", 1, "--retrain", "false"]
    fit += ["--baseline", "false", "--crossfit", 1, "--segmenter.name", "ellipse", "--adapt.folds", 3, "--seed", seed]
    kmine("loop", [*data, *fit, "--out", folder / "run"], log, os.environ)
    for name, files in new.items():
        copy([image for image, _ in files], folder / name)
        flags = [folder / "run", folder / name, "--out", folder / f"predicted_{name}", "--round", 0]
        kmine("predict", flags, log, os.environ)
    return pd.DataFrame([row for name, files in new.items() for row in _scored(folder, name, files, seed)])


def _scored(folder: Path, name: str, files: Sequence[tuple[Path, Path]], seed: int) -> Iterator[dict[str, object]]:
    table = pd.read_csv(folder / f"predicted_{name}" / "predictions.csv")
    estimates = dict(zip(table["file"].map(lambda file: Path(file).name), table["estimated_dice"], strict=True))
    for _, mask in files:
        image_name = f"{mask.parents[1].name}_{mask.name}"
        predicted = np.asarray(Image.open(folder / f"predicted_{name}" / "masks" / image_name))  # class ids, palette
        found = dice(np.asarray(Image.open(mask).convert("L")) > 127, predicted > 0)
        about = {"seed": seed, "source": name, "sample_id": image_name}
        yield about | {"estimate": estimates[image_name], "dice": found}


def table(source: Path) -> str:
    """Markdown: figures by source, means over seeds with intervals, and the reliability curve of all."""
    rows = read_cells(source)
    columns = ("source", "images", "without estimate", "mean Dice", "mean estimate", "estimate − Dice",
               "mean absolute error", "rank correlation")  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name in SOURCES:
        own, figures = rows[rows["source"] == name], []
        for _, of_seed in own.dropna().groupby("seed"):
            gaps = of_seed["estimate"] - of_seed["dice"]
            rank = spearmanr(of_seed["estimate"], of_seed["dice"]).statistic
            figures.append((of_seed["dice"].mean(), of_seed["estimate"].mean(), gaps.mean(), gaps.abs().mean(), rank))
        means = np.array(figures).T
        texts = [f"{m.mean():+.3f}" if n == 2 else f"{m.mean():.3f}" for n, m in enumerate(means)]
        texts = [f"{t} [{t_interval(m)[0]:.3f}, {t_interval(m)[1]:.3f}]" for t, m in zip(texts, means, strict=True)]
        lines.append(f"| {name} | {len(own)} | {own['estimate'].isna().sum()} | {' | '.join(texts)} |")
    lines += ["", f"| source | {' | '.join(f'fifth {n + 1}: estimate, Dice' for n in range(NUM_BINS))} |"]
    lines += ["|---" * (NUM_BINS + 1) + "|"]
    for name in SOURCES:
        own = rows[rows["source"] == name].dropna()
        curve = reliability(own["estimate"].to_numpy(), own["dice"].to_numpy(), NUM_BINS)
        lines.append(f"| {name} | {' | '.join(f'{estimate:.3f}, {true:.3f}' for estimate, true, _ in curve)} |")
    return "\n".join(lines)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder; with --table also a CSV")
    parser.add_argument("--data.root", dest="root", type=Path, help="folder of COVID-QU-Ex with the lung masks")
    parser.add_argument("--weights", help="MobileNetV2 encoder weights (.safetensors)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--table", action="store_true", help="print the table of a folder or CSV; trains nothing")
    args = parser.parse_args()
    if args.table:
        return print(table(args.out))
    return write_cells(args.out, args.seeds, ["lungs"], lambda seed, _: cell(args, seed))


if __name__ == "__main__":
    main()

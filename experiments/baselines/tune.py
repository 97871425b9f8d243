"""Tunes mining and what it is compared with, three trials each, on the validation split alone.

    python experiments/baselines/tune.py OUT --data.root FOLDER --weights mobilenet_v2_imagenet.safetensors

Each trial is a sweep of one cell (`kmine.sweep`), 25 % of the labels, a seed that the comparison itself does not use.
No test split is opened. Prints the trials as Markdown and writes OUT/trials.csv; what is done is not done again.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from kmine.sweep import __main__ as sweep

STRONG = ("fit.strong_augment=true", "fit.cutmix=0.5")
TRIALS: dict[str, tuple[tuple[str, ...], ...]] = {
    "mining": ((), ("gate.target_dice=0.75",), STRONG),
    "self_training": ((), ("gate.target_dice=0.75",), STRONG),
    "mean_teacher": ((), ("teacher.weight=10",), ("teacher.weight=0.1",)),
    "fixmatch": ((), ("fixmatch.threshold=0.8",), ("fixmatch.weight=0.3",)),
    "unimatch": ((), ("unimatch.threshold=0.8",), ("unimatch.weight=0.3",)),
}
"""Method -> settings that a trial changes; the first of each are the defaults."""


def common(args: argparse.Namespace) -> list[str]:
    """Settings of every trial, and of the comparison they are for."""
    settings = {
        "plan": "false",
        "data.name": "kvasir_seg",
        "data.root": args.root,
        "data.size": args.size,
        "data.duplicate_distance": 6,
        "data.cache_dir": args.cache,
        "model.encoder": "mobilenet_v2",
        "model.encoder_weights": args.weights,
        "segmenter.name": args.segmenter,
        "rounds": 2,
        "fit.steps": args.steps,
        "fit.round_steps": args.round_steps,
        "fit.round_lr": args.round_lr,
    }
    return [f"--{name}={value}" for name, value in settings.items() if value is not None]


def table(out: Path) -> pd.DataFrame:
    """One row a finished trial, the best of each method marked."""
    rows = []
    for method, trials in TRIALS.items():
        for number, changed in enumerate(trials):
            path = out / f"{method}-{number}" / "sweep.csv"
            if path.exists():
                (cell,) = pd.read_csv(path).to_dict("records")
                name = ", ".join(changed) or "defaults"
                figures = {key: cell.get(key, cell["val_dice"]) for key in ("val_dice", "val_score")}
                rows.append({"method": method, "trial": name, "status": cell["status"], **figures})
    found = pd.DataFrame(rows)
    # The score counts silence on a clean image 1 and a false alarm 0.
    found["chosen"] = found.groupby("method")["val_score"].transform("max") == found["val_score"]
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--data.root", dest="root", required=True, help="folder that holds Kvasir-SEG")
    parser.add_argument("--weights", help="ImageNet weights of MobileNetV2, .safetensors; none: from scratch")
    parser.add_argument("--fraction", type=float, default=0.25)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--round-steps", type=int, default=200)
    parser.add_argument("--round-lr", type=float, default=1e-3)
    parser.add_argument("--segmenter", default="tiny")
    parser.add_argument("--cache")
    args = parser.parse_args(argv)
    for method, trials in TRIALS.items():
        for number, changed in enumerate(trials):
            where = [f"--out={args.out / f'{method}-{number}'}", "--fractions", f"{args.fraction}"]
            which = ["--seeds", f"{args.seed}", "--methods", method]
            own = ["--set", *(f"{method}.{setting}" for setting in changed)] if changed else []
            sweep.main([*common(args), *where, *which, *own])
    found = table(args.out)
    found.to_csv(args.out / "trials.csv", index=False)
    print("| method | trial | validation Dice | chosen |\n|---|---|---|---|")
    for row in found.itertuples():
        print(f"| `{row.method}` | {row.trial} | {row.val_dice:.3f} | {'yes' if row.chosen else ''} |")


if __name__ == "__main__":
    main()

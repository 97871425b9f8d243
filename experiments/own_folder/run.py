"""README's own folder as a new user has it: 80 images, masks for a dozen or two of them, no GPU.

    python experiments/own_folder/run.py OUT --source KVASIR_SEG --starts scratch weights --weights FILE
    python experiments/own_folder/run.py OUT --table     # OUT/results.csv and a table

KVASIR_SEG holds `images` and `masks` of equal names; `phantom` draws polyps instead. A cell is (masks, start, with or
without --data.folds 5, seed): the command of README in a process of its own, on a folder of 80 images of which only
`masks` have one. It records the minutes, the pseudo masks, the sentence at the end, and Dice before (round 0), of the
baseline and after (the kept model): as `kmine compare` gives it, and of the final model on `--held_out` other images
of the data set, whose masks kmine never sees. Cells that are done are not repeated, a stopped one goes on. Flags after
`--` go to `kmine loop`.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image

from kmine.compare.evaluation import _rounds_to_evaluate
from kmine.compare.runs import find_runs
from kmine.config import DataConfig
from kmine.config.sweep import MINING
from kmine.data import open_source
from kmine.data.cache.sample_cache import SampleCache
from kmine.data.datasets.phantom.dataset import PhantomSource
from kmine.data.pool import Pool
from kmine.data.resize import Resizer
from kmine.models.build import build_model
from kmine.ops.statistics import paired_change
from kmine.setup.finished import final_run
from kmine.store.run_folder import RunFolder
from kmine.training.distributed import SingleDevice
from kmine.training.evaluation import evaluate_checkpoint
from kmine.types import ROUND_0, Metrics

NUM_IMAGES, PHANTOM_SIZE = 80, 128
SUFFIXES = (".jpg", ".jpeg", ".png")


def copy_pairs(source: str, seed: int, num_masks: int, held_out: int, folder: Path) -> None:
    """`images` (80) and `masks` (the first `num_masks`) in `folder`, and `held_out/` with pairs of other images."""
    if folder.is_dir():
        return
    unfinished = folder.with_name(folder.name + ".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    pairs = list(_pairs(source, NUM_IMAGES + held_out))
    random.Random(seed).shuffle(pairs)
    for number, (name, image, mask) in enumerate(pairs[: NUM_IMAGES + held_out]):
        target = unfinished if number < NUM_IMAGES else unfinished / "held_out"
        for kind, file in (("images", image), ("masks", mask)):
            if kind == "images" or number >= NUM_IMAGES or number < num_masks:
                (target / kind).mkdir(parents=True, exist_ok=True)
                if isinstance(file, Path):
                    shutil.copyfile(file, target / kind / file.name)
                else:
                    Image.fromarray(file).save(target / kind / f"{name}.png")
    unfinished.rename(folder)


def _pairs(source: str, count: int) -> Iterator[tuple[str, Any, Any]]:
    """Name, image and mask: files, or arrays of the phantom."""
    if source == "phantom":
        phantom = PhantomSource("polyp", count, PHANTOM_SIZE)
        for ref in phantom.refs():
            yield ref.sample_id, phantom.image(ref.sample_id), phantom.mask(ref.sample_id) * 255
        return
    masks = {path.stem: path for path in sorted((Path(source) / "masks").iterdir()) if path.suffix in SUFFIXES}
    for image in sorted((Path(source) / "images").iterdir()):
        if image.stem in masks:
            yield image.stem, image, masks[image.stem]


def run_cell(args: argparse.Namespace, masks: int, start: str, folds: bool, seed: int) -> dict[str, Any]:
    """Run README's command and score it; the row of results.csv."""
    cell = args.out / f"{masks}-{start}-{'folds' if folds else 'single'}-{seed}"
    if (cell / "row.json").is_file():
        return json.loads((cell / "row.json").read_text())
    data, run = args.out / "data" / f"{seed}-{masks}", cell / "run"
    copy_pairs(args.source, seed, masks, args.held_out, data)
    own = ["--data.name", "folder", "--data.images", data / "images", "--data.masks", data / "masks", "--out", run]
    own += ["--model.encoder_weights", args.weights if start == "weights" else "none", "--seed", seed]
    own += ["--data.folds", 5] * folds + args.flags
    cell.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"KMINE_CACHE": str(args.out / "cache")}
    began = time.perf_counter()
    try:
        kmine("loop", own, cell / "log.txt", environment)
    finally:
        _add_minutes(cell, (time.perf_counter() - began) / 60)
    if not folds:  # with folds the loop ends with this table
        kmine("compare", [run], cell / "log.txt", environment)
    final = final_run(run)
    info = json.loads((final / "run.json").read_text())
    said = [line for line in (cell / "log.txt").read_text().splitlines() if "; next: " in line]
    row = {"masks": masks, "start": start, "folds": folds, "seed": seed, "minutes": _minutes(cell)}
    row |= {"pseudo": _num_pseudo(final), "adopted": info["adopted_round"], "stopped_by": info["stopped_by"]}
    tested, baseline = _tested(run)
    row |= {"next": said[-1] if said else "", "baseline": baseline, **tested}
    row |= _held_out(final, baseline, data / "held_out", args.out / "cache")
    (cell / "row.json").write_text(json.dumps(row, indent=1))
    return row


def kmine(command: str, flags: Sequence[object], log: Path, environment: Mapping[str, str]) -> None:
    """Run a command of kmine in a process of its own; its output is appended to `log`."""
    words = [sys.executable, "-m", "kmine", command, *map(str, flags)]
    with log.open("a") as file:
        code = subprocess.run(words, stdout=file, stderr=file, env=environment, check=False).returncode
    if code:
        raise SystemExit(f"kmine {command} ended with {code}; see {log}")


def _minutes(cell: Path) -> float:
    """Of the loop, over all attempts."""
    path = cell / "minutes.json"
    return float(json.loads(path.read_text())) if path.is_file() else 0.0


def _add_minutes(cell: Path, minutes: float) -> None:
    (cell / "minutes.json").write_text(json.dumps(_minutes(cell) + minutes))


def _num_pseudo(run: Path) -> int:
    """Pseudo masks of the last round that mined."""
    with (run / "results.csv").open(newline="") as file:
        return int(list(csv.DictReader(file))[-1]["num_pseudo"] or 0)


def _tested(run: Path) -> tuple[dict[str, Any], str]:
    """Dice on the test images of `kmine compare`, mining's difference to the baseline, and the name of the latter."""
    table = pd.read_csv(run / "test_table.csv").set_index("method")
    mining = next(name for name in table.index if name.startswith(MINING))
    baseline = table.index[table["is_baseline"]][0]
    row = {f"test {name}": float(table.loc[mining, name]) for name in ("difference", "low", "high")}
    methods = {"before": ROUND_0, "baseline": baseline, "after": mining}
    return row | {f"test {name}": float(table.loc[method, "dice"]) for name, method in methods.items()}, baseline


def _held_out(run: Path, baseline: str, folder: Path, cache: Path) -> dict[str, Any]:
    """Dice on images that kmine never saw, and the difference of mining to `baseline` (its name in the table)."""
    (compared,), _ = find_runs([run], "cpu", None)
    cfg, store = compared.cfg, RunFolder(run, follows=True)
    data = DataConfig(name="folder", images=str(folder / "images"), masks=str(folder / "masks"), size=cfg.data.size)
    samples = SampleCache(open_source(data), Resizer.of(cfg.data), str(cache), "stop")
    ids = [ref.sample_id for ref in samples.refs]
    samples.decode_masks(ids)
    pool, fabric = Pool(samples, ids, {i: i for i in ids}, "true"), SingleDevice(torch.device("cpu"))
    model = build_model(cfg.model.split()[0], 2, cfg.seed, pretrained=False).with_patch(cfg.data.patch)
    found: dict[str, Metrics] = {}
    for method, (round_idx, method_dir) in _rounds_to_evaluate(store, compared).items():
        weights, _ = store.load_tensors(store.round_dir(round_idx, method_dir) / "model.safetensors", None)
        found[method] = evaluate_checkpoint(pool, model, weights, batch_size=8, fabric=fabric)
    # A run that kept no mask has no other model than that of round 0.
    used = {"before": ROUND_0, "baseline": baseline, "after": MINING}
    metrics = {name: found.get(method, found[ROUND_0]) for name, method in used.items()}
    scores = [[case.score for case in metrics[name].cases] for name in ("baseline", "after")]
    gap = paired_change(*scores, confidence=0.95)
    row = {f"held out {name}": value.dice for name, value in metrics.items()}
    return row | {f"held out {name}": getattr(gap, name) for name in ("difference", "low", "high")}


def table(rows: pd.DataFrame) -> str:
    """A line a cell, as Markdown."""
    lines = ["| masks | start | folds | min | pseudo | test: before, baseline, after | held out: the same | next |"]
    lines.append("|---" * 8 + "|")
    for row in rows.to_dict("records"):
        dice = [
            ", ".join(f"{row.get(f'{where} {name}', np.nan):.3f}" for name in ("before", "baseline", "after"))
            + f" ({row[f'{where} difference']:+.3f} [{row[f'{where} low']:+.3f}, {row[f'{where} high']:+.3f}])"
            for where in ("test", "held out")
        ]
        head = [row["masks"], row["start"], "5" if row["folds"] else "none", f"{row['minutes']:.1f}"]
        lines.append("| " + " | ".join(map(str, [*head, row["pseudo"], *dice, row["next"]])) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run the wanted cells, or print the table of those that are done."""
    own, flags = sys.argv[1:], []
    if "--" in own:
        own, flags = own[: own.index("--")], own[own.index("--") + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--source", help="folder with images and masks, or phantom")
    parser.add_argument("--masks", type=int, nargs="+", default=[12, 16, 20])
    parser.add_argument("--starts", nargs="+", default=["scratch"], choices=["scratch", "weights"])
    parser.add_argument("--weights", help="encoder weights (.safetensors), for the start weights")
    parser.add_argument("--folds", nargs="+", default=["none", "5"], choices=["none", "5"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--held_out", type=int, default=200)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args(own)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the minutes until then are kept
    args.flags, args.out = flags, args.out.absolute()
    if not args.table:
        if not args.source or ("weights" in args.starts and not args.weights):
            raise SystemExit("expected --source, and --weights FILE for the start weights")
        for masks, start, folds, seed in product(args.masks, args.starts, args.folds, args.seeds):
            print(json.dumps(run_cell(args, masks, start, folds == "5", seed)), flush=True)
    rows = pd.DataFrame([json.loads(path.read_text()) for path in sorted(args.out.glob("*/row.json"))])
    rows.to_csv(args.out / "results.csv", index=False, float_format="%.4f")
    print(table(rows))


if __name__ == "__main__":
    main()

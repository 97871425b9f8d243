"""What adapting `tiny` to a few labeled images is worth on the real sets: `ellipse`, `tiny`, `tiny+adapted`.

    DATA=...; export KMINE_TEST_DATA=$DATA OMP_NUM_THREADS=1
    python experiments/tiny_segmenter/adaptation.py OUT                          # all of it; the same command resumes
    python experiments/tiny_segmenter/adaptation.py OUT --shard 0/2              # half of it, 1/2 in another process
    python experiments/tiny_segmenter/adaptation.py OUT --table                  # the table of what is there
    python experiments/tiny_segmenter/adaptation.py WEIGHTS DEV --dev --lr 1e-4  # settings, tried on 60 polyps
    python experiments/tiny_segmenter/adaptation.py WEIGHTS OUT --timing         # 60 native polyps, default settings

Without WEIGHTS the packaged `tiny` is measured. A cell is one set, number of labeled images and seed; the seed draws
the labeled images, of which a fifth decides when to stop and whether the adapted segmenter is used. Tested is what is
left, in groups (see `real_sets.py`): nothing tested shares a group with what was adapted on. LiTS labels come from one
half of the volumes and tested is the other. Boxes of the tested objects are those of `evaluate.py`. An adapted
segmenter that is not used counts as `tiny`.

Settings are chosen with `--dev`, on 60 polyps that are in no other cell: half of them adapts, half is tested.
OUT receives one JSON file a cell, with one row an object.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from hashlib import sha256
from itertools import chain, product, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from evaluate import JITTER, interval, score
from generate import commit
from numpy.typing import NDArray
from real_sets import POLYPS, SETS, TUMOURS, Picture, data_root
from scipy.stats import spearmanr

from kmine.config import AdaptConfig, SegmenterConfig
from kmine.io.files import write_atomic
from kmine.mining.adaptation.finetune import Adaptation, adapt
from kmine.ops.seeding import derive_seed
from kmine.segmenters import open_segmenter
from kmine.segmenters.base import FineTunable
from kmine.segmenters.ellipse import Ellipse
from kmine.segmenters.tiny.segmenter import open_tiny

NUM_DEV = 60
HELD_OUT = 0.2
MIN_HELD_OUT = 3
MIN_TEST = 10
"""A cell that leaves fewer images to test is left out."""
TABLE_SETS = [name for name in SETS if "long side" not in name]
ARMS = ("ellipse", "tiny", "tiny+adapted")


class Drawn(NamedTuple):
    train: list[Picture]
    held_out: list[Picture]
    test: list[Picture]


def allowed(name: str, pictures: Sequence[Picture], dev: bool) -> list[Picture]:
    """The pictures of a set that may be used: the polyps that chose the settings measure nothing, and the reverse."""
    if name != POLYPS:
        return list(pictures)
    chosen = sorted(pictures, key=lambda picture: sha256(picture.name.encode()).hexdigest())[:NUM_DEV]
    if dev:
        return chosen
    near = {picture.group for picture in chosen}
    return [picture for picture in pictures if picture.group not in near]


def draw(pictures: Sequence[Picture], labels: int, seed: int, *, by_volume: bool) -> Drawn:
    """`labels` images to adapt on, a fifth of them to decide, and the rest to test; no group on two sides.

    By volume, one half of the volumes gives the labels, each volume in turn, or fewer where there are no more.
    """
    by_group: dict[str, list[Picture]] = defaultdict(list)
    for picture in sorted(pictures, key=lambda picture: derive_seed(seed, "picture", picture.name)):
        by_group[picture.group].append(picture)
    order = sorted(by_group.values(), key=lambda group: derive_seed(seed, "group", group[0].group))
    source = order[: len(order) // 2] if by_volume else order
    num_held_out = max(MIN_HELD_OUT, round(HELD_OUT * labels))
    cut = 1 + int(np.searchsorted(np.cumsum([len(group) for group in source]), num_held_out))
    held_out, train = (_flat(part, in_turn=by_volume) for part in (source[:cut], source[cut:]))
    held_out, train = held_out[:num_held_out], train[: labels - num_held_out]
    taken = {p.group for p in (chain(*source) if by_volume else chain(*source[:cut], train))}
    return Drawn(train, held_out, [picture for picture in pictures if picture.group not in taken])


def _flat(groups: Sequence[Sequence[Picture]], *, in_turn: bool) -> list[Picture]:
    """Group by group, or the first of each group, then the second of each, and so on."""
    rows = zip_longest(*groups) if in_turn else groups
    return [picture for row in rows for picture in row if picture is not None]


def adapted_on(
    segmenter: FineTunable, drawn: Drawn, cfg: AdaptConfig, seed: int
) -> tuple[Adaptation, dict[str, float | int]]:
    """The adaptation and what it cost. No local model prompts it: true boxes are shaken as those that are tested."""
    train, held_out = ([(picture.read(), ()) for picture in part] for part in (drawn.train, drawn.held_out))
    begin = time.perf_counter(), time.process_time()
    found = adapt(segmenter, train, held_out, cfg, seed=seed, jitter=JITTER)
    # On a machine with other work, CPU seconds of one thread say what it would take alone.
    seconds, cpu = time.perf_counter() - begin[0], time.process_time() - begin[1]
    return found, {"seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1), "threads": torch.get_num_threads()}


def measure(segmenter: FineTunable, drawn: Drawn, cfg: AdaptConfig, seed: int) -> dict[str, Any]:
    """One cell: how the adaptation went, the means over the tested objects, and the objects themselves."""
    found, cost = adapted_on(segmenter, drawn, cfg, seed)
    scores = score([Ellipse(), segmenter, *([found.segmenter] if found.used else [])], drawn.test)
    columns = [0, 1, 2 if found.used else 1]
    true, predicted = scores.true[:, columns], scores.predicted[:, columns]
    about = {k: v for k, v in vars(found).items() if k not in ("segmenter", "state")}
    return {
        "train": [picture.name for picture in drawn.train],
        "held_out": [picture.name for picture in drawn.held_out],
        "cost": cost,
        "used": found.used,
        "adaptation": about,
        "iou": dict(zip(ARMS, true.mean(0).tolist(), strict=True)),
        "rank": {arm: rank(predicted[:, i], true[:, i]) for i, arm in enumerate(ARMS) if i},
        "objects": {
            "image": scores.images,
            "group": scores.groups,
            **{f"iou {arm}": true[:, i].round(5).tolist() for i, arm in enumerate(ARMS)},
            **{f"predicted {arm}": predicted[:, i].round(5).tolist() for i, arm in enumerate(ARMS) if i},
        },
    }


def rank(predicted: NDArray[np.float64], true: NDArray[np.float64]) -> float:
    return float(spearmanr(predicted, true).statistic)


def run(segmenter: FineTunable, cells: Sequence[tuple[str, int, int]], out: Path, cfg: AdaptConfig, dev: bool) -> None:
    """Measures every cell that is not there yet."""
    settings = {
        "tiny": segmenter.signature,
        "dev": dev,
        "plan": asdict(segmenter.fine_tune_defaults),
        "adapt": asdict(cfg),
    }
    pools: dict[str, list[Picture]] = {}
    for name, labels, seed in cells:
        path = out / f"{re.sub(r'[^a-z]+', '_', name)}-{labels}-{seed}.json"
        if path.exists():
            if json.loads(path.read_text())["settings"] != settings:
                raise SystemExit(f"{path}: made with other weights or settings; name another OUT")
            continue
        if name not in pools:
            pools[name] = allowed(name, SETS[name](data_root()), dev)
        cell = {"set": name, "labels": labels, "seed": seed, "settings": settings, "pictures": len(pools[name])}
        drawn = draw(pools[name], labels, seed, by_volume=name == TUMOURS)
        if len(drawn.test) >= MIN_TEST:
            cell |= measure(segmenter, drawn, cfg, seed)
        cell |= {"commit": commit(), "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
        write_atomic(path, json.dumps(cell).encode())
        print(f"{name}, {labels} labels, seed {seed}: {_sentence(cell)}", flush=True)


def _sentence(cell: dict[str, Any]) -> str:
    if "objects" not in cell:
        return f"left out, only {cell['pictures']} images"
    about = cell["adaptation"]
    return (
        f"{'  '.join(f'{arm} {iou:.3f}' for arm, iou in cell['iou'].items())}; held out {about['iou_before']:.3f} -> "
        f"{about['iou_after']:.3f} at step {about['best_step']}, {'used' if cell['used'] else 'not used'}; "
        f"{cell['cost']['seconds']:.0f} s ({cell['cost']['cpu_seconds']:.0f} s CPU)"
    )


def print_table(out: Path) -> None:
    """Markdown, one row a set and number of labels; seeds are pooled object by object for the gains."""
    rows: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for path in sorted(out.glob("*-*-*.json")):
        cell = json.loads(path.read_text())
        rows[cell["set"], cell["labels"]].append(cell)
    gains = ("`tiny` over `ellipse`", "adapted over `tiny`")
    ranks = ("rank correlation `tiny`", "rank correlation adapted")
    heads = ["set", "labeled images", "seeds", "objects tested", *(f"`{arm}`" for arm in ARMS), *gains, *ranks]
    heads += ["adapted used", "seconds", "CPU seconds"]
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for name, labels in sorted(rows, key=lambda key: (list(SETS).index(key[0]), key[1])):
        print(f"| {' | '.join(_row(name, labels, rows[name, labels]))} |")


def _row(name: str, labels: int, cells: Sequence[dict[str, Any]]) -> list[str]:
    if any("objects" not in cell for cell in cells):
        return [name, str(labels), f"not measured: the set has {cells[0]['pictures']} images"]
    objects = [cell["objects"] for cell in cells]
    runs = np.repeat([cell["seed"] for cell in cells], [len(one["group"]) for one in objects])
    groups = list(chain.from_iterable(one["group"] for one in objects))
    iou = {arm: np.concatenate([one[f"iou {arm}"] for one in objects]) for arm in ARMS}

    def gain(of: str, over: str) -> str:
        gains = iou[of] - iou[over]
        low, high = interval(gains, groups, runs)
        return f"{gains.mean():+.3f} [{low:+.3f}, {high:+.3f}]"

    def means(key: str, arm: str) -> str:
        values = [cell[key][arm] for cell in cells]
        spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
        return f"{np.mean(values):.3f}{spread}"

    real = [len(cell["train"]) + len(cell["held_out"]) for cell in cells]
    return [
        name,
        str(labels) if set(real) == {labels} else f"{labels} (there were {', '.join(map(str, real))})",
        str(len(cells)),
        _range([len(one["group"]) for one in objects]),
        *(means("iou", arm) for arm in ARMS),
        gain("tiny", "ellipse"),
        gain("tiny+adapted", "tiny"),
        *(f"{np.mean([cell['rank'][arm] for cell in cells]):.2f}" for arm in ARMS[1:]),
        f"{sum(cell['used'] for cell in cells)} of {len(cells)}",
        *(_range([round(cell["cost"][kind]) for cell in cells]) for kind in ("seconds", "cpu_seconds")),
    ]


def _range(values: Sequence[int]) -> str:
    return "-".join(str(value) for value in sorted({min(values), max(values)}))


def time_one(segmenter: FineTunable, out: Path) -> None:
    """One adaptation on the 60 polyps that measure nothing else, settings as they are by default."""
    drawn = draw(allowed(POLYPS, SETS[POLYPS](data_root()), dev=True), NUM_DEV, 0, by_volume=False)
    found, cost = adapted_on(segmenter, drawn, AdaptConfig(), 0)
    about = {
        "images": NUM_DEV,
        "objects": found.num_objects,
        "held_out_objects": found.num_held_out,
        **asdict(segmenter.fine_tune_defaults),
        **cost,
    }
    write_atomic(out / "timing.json", json.dumps(about).encode())
    print(f"{segmenter.name}, one adaptation on native polyps: {', '.join(f'{k} {v}' for k, v in about.items())}")


def opened(weights: Path | None) -> FineTunable:
    if weights is None:
        segmenter = open_segmenter(SegmenterConfig(name="tiny"), device="cpu", offline=True)
    else:
        segmenter = open_tiny(weights)
    if not isinstance(segmenter, FineTunable):
        raise SystemExit(f"{segmenter.name}: expected a segmenter that can be adapted")
    return segmenter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", type=Path, nargs="?", help="default: the packaged `tiny`")
    parser.add_argument("out", type=Path)
    parser.add_argument("--sets", nargs="+", choices=TABLE_SETS, default=TABLE_SETS)
    parser.add_argument("--labels", type=int, nargs="+", default=[15, 30, 60], help="with --dev always 30")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th cell from the i-th on, counted from 0")
    parser.add_argument("--dev", action="store_true", help="only the 60 polyps that settings are chosen on")
    parser.add_argument("--table", action="store_true", help="print the table and measure nothing")
    parser.add_argument("--timing", action="store_true", help="time one adaptation and measure nothing else")
    args = parser.parse_args()
    cv2.setNumThreads(1)
    if args.table:
        print_table(args.out)
    elif args.timing:
        time_one(opened(args.weights), args.out)
    else:
        first, every = (int(part) for part in args.shard.split("/"))
        scope = ([POLYPS], [NUM_DEV // 2]) if args.dev else (args.sets, args.labels)
        cells = list(product(*scope, args.seeds))[first::every]
        cfg = AdaptConfig(steps=args.steps, batch_size=args.batch_size, lr=args.lr)
        run(opened(args.weights), cells, args.out, cfg, args.dev)


if __name__ == "__main__":
    main()

"""What the prompts are worth, without training anything: candidates of a run's round-0 model against the truth.

    python experiments/prompts/run.py OUT --runs RUN ... --segmenter simulated     # IoU .85, see --iou
    python experiments/prompts/run.py OUT --runs RUN ... --segmenter tiny
    python experiments/prompts/run.py OUT --table                    # of what is there

RUN is a folder of `kmine loop`, of which nothing but settings, splits, round_00/model.safetensors and the adapted
segmenter, if that was used, is read. Its unlabeled images are prompted as in mining, by each arm; the withheld masks
are read for the measurement alone, and never the test split. OUT/SEGMENTER.csv has a row for each run, arm and image;
the table has, by arm,

- candidates an image and their mean Dice with the true objects that they cover (`true_dice`: 0 for a false alarm),
- the share of true objects with a candidate of IoU .5 or more,
- pixels of which the local model is wrong and the ungated mask right (corrected), and the reverse (newly broken), over
  all pixels of which the local model is wrong. The ungated mask is the local model's, with every object replaced by
  its candidate unless that is empty, and with the candidates that have no object,

and their differences to `one box`, with 95 % intervals by a paired bootstrap over groups of images (near-duplicates are
one group, and an image is the same in all runs). `local model` has the local components for candidates. For a
`simulated` segmenter, points and mask prompt change nothing by construction.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from helpers.simulated_segmenter import PUBLISHED_IOU, Simulated

from kmine.cli import Terminal
from kmine.config import SegmenterConfig
from kmine.data.pool import Pool
from kmine.mining.calibration.fit import true_dice
from kmine.mining.candidates import generate_prompts, median_object_area, predict_probs, segment_prompts
from kmine.mining.context import ImageBatch, RoundContext
from kmine.models.build import build_model
from kmine.ops import metrics
from kmine.ops.masks import components
from kmine.segmenters import open_segmenter
from kmine.segmenters.base import FineTunable, Segmenter
from kmine.segmenters.identity import IdentitySegmenter
from kmine.setup.finished import load_settings
from kmine.setup.open import open_task, open_truth
from kmine.setup.preflight import preflight
from kmine.store.run_folder import RunFolder
from kmine.training.task import Task
from kmine.types import Candidate, Probs, Prompts

PLAIN = {"source": "local", "passes": 1, "box": True, "points": False, "mask_hint": True, "doubtful": None,
         "box_scales": (1.0,)}  # fmt: skip
THREE = {"box_scales": (1.0, 1.2, 1.5)}
ARMS: dict[str, dict[str, Any]] = {
    "one box": {},
    "three boxes": THREE,
    "box and points": {"points": True},
    "no mask prompt": {"mask_hint": False},
    "three boxes, no mask prompt": {**THREE, "mask_hint": False},
    "doubtful": {"doubtful": 0.2},
    "three boxes, points, doubtful": {**THREE, "points": True, "doubtful": 0.2},
    "auto": {"source": "auto"},
    "auto, doubtful": {"source": "auto", "doubtful": 0.2},
}
"""Prompt settings that differ from `PLAIN`; those with proposals are for segmenters that make them."""
LOCAL, BASE = "local model", "one box"
MIN_OBJECT = 20
"""Pixels of the smallest true object that counts."""
RATIOS = {"Dice": ("dice", "candidates"), "objects found": ("found", "objects"), "corrected": ("corrected", "wrong"),
          "newly broken": ("broken", "wrong"), "corrected - broken": ("gained", "wrong")}  # fmt: skip
"""Columns of the table, each the ratio of two sums."""


def measure(run: Path, args: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """A row for each arm and image of a run; `folder` is empty."""
    shutil.copy(run / "splits.csv", folder)
    cfg = load_settings(run, device=args.device, data_root=args.root)
    cfg = replace(cfg, model=replace(cfg.model.split()[0], encoder_weights=None))  # those of the run are loaded below
    if args.cache:
        cfg = replace(cfg, data=replace(cfg.data, cache_dir=args.cache))
    source, store, terminal = preflight(cfg), RunFolder(folder), Terminal()
    task = open_task(cfg, source, store, terminal, mines=False)
    truth = open_truth(task, source)
    model = build_model(task.cfg.model, task.num_classes, cfg.seed, pretrained=False).with_patch(cfg.data.patch)
    model.load_state_dict(store.load_tensors(run / "round_00" / "model.safetensors", None)[0])
    model.to(task.fabric.device)
    segmenter = the_segmenter(args, run, task, truth)
    area_prior = median_object_area(task.labeled, task.num_classes)
    ctx = RoundContext(task, model, None, segmenter, task.unlabeled, area_prior, round_idx=1)
    arms = {name: ARMS[name] for name in args.arms if "auto" not in name or hasattr(segmenter, "propose")}
    ids = list(truth.ids)[: args.images]
    terminal.start(f"{run.name}: {segmenter.name}", len(ids))
    for first in range(0, len(ids), 8):
        batch = ImageBatch([task.unlabeled.sample(i) for i in ids[first : first + 8]])
        probs = predict_probs(ctx, batch)
        for arm, changes in {LOCAL: {}, **arms}.items():
            prompts_cfg = replace(task.cfg.prompts, **{**PLAIN, **changes})
            of_arm = replace(ctx, task=replace(task, cfg=replace(task.cfg, prompts=prompts_cfg)))
            of_arm = replace(of_arm, segmenter=IdentitySegmenter()) if arm == LOCAL else of_arm
            own = replace(batch, embedded={}) if arm == LOCAL else batch
            objects = segment_prompts(of_arm, own, generate_prompts(of_arm, own, probs))
            for image, p, *found in zip(batch.images, probs, *objects, strict=True):
                about = {"run": str(run), "segmenter": segmenter.name, "arm": arm, "sample_id": image.sample_id}
                yield about | {"group_id": image.group_id} | scores(truth.sample(image.sample_id).mask, p, *found)
        terminal.advance(min(first + 8, len(ids)))
    store.close()
    terminal.stop()


def the_segmenter(args: argparse.Namespace, run: Path, task: Task, truth: Pool) -> Segmenter:
    """The simulated one, or that of the name, adapted as in the run."""
    if args.segmenter == "simulated":
        return Simulated.from_pools([truth], args.iou, task.cfg.seed)
    settings = SegmenterConfig(name=args.segmenter, checkpoint=args.checkpoint)
    segmenter = open_segmenter(settings, device=str(task.fabric.device), offline=task.cfg.offline)
    record = run / "segmenter" / "adaptation.json"
    about = json.loads(record.read_text("utf-8")) if record.is_file() else {"used": False}
    if about["used"] and about["base"] == segmenter.name and isinstance(segmenter, FineTunable):
        return segmenter.with_weights(task.run.load_tensors(record.with_name("adapted.safetensors"), None)[0])
    return segmenter


def scores(
    truth: NDArray[np.uint8], probs: Probs, prompts: Sequence[Prompts], candidates: Sequence[Candidate]
) -> dict[str, float]:
    """Sums of one image; `truth` is (H, W) class ids with 255 for ignored pixels."""
    best = [candidate.masks[candidate.best] for candidate in candidates]
    pairs = list(zip(prompts, best, strict=True))
    objects = [(k, part) for k in range(1, len(probs.probs)) for part in components(truth == k, MIN_OBJECT)]
    found = [any(p.class_id == k and metrics.iou(mask, part) >= 0.5 for p, mask in pairs) for k, part in objects]
    change = metrics.correction(probs.mask, ungated(probs, pairs), truth)
    return {
        "candidates": len(pairs),
        "dice": sum(true_dice(mask, prompt, truth) for prompt, mask in pairs),
        "objects": len(objects),
        "found": sum(found),
        **change._asdict(),
        "gained": change.corrected - change.broken,
    }


def ungated(probs: Probs, pairs: Sequence[tuple[Prompts, NDArray[np.bool_]]]) -> NDArray[np.uint8]:
    """(H, W) class ids: the local model's, with each object replaced by its mask unless that is empty."""
    out = probs.mask
    for prompt, mask in pairs:
        if mask.any() and prompt.component is not None:
            out[prompt.component] = 0
    for prompt, mask in pairs:
        out[mask] = prompt.class_id
    return out


def table(rows: pd.DataFrame, num_draws: int = 4000) -> str:
    """Markdown of one segmenter, an arm a line."""
    columns = sorted({name for pair in RATIOS.values() for name in pair})
    sums = rows.groupby(["arm", "group_id"])[columns].sum()
    groups = rows["group_id"].unique()
    weights = np.random.default_rng(0).multinomial(len(groups), np.full(len(groups), 1 / len(groups)), num_draws)
    weights = np.concatenate([np.ones((1, len(groups)), int), weights])  # the first is the estimate itself

    def drawn(arm: str, ratio: tuple[str, str]) -> NDArray[np.float64]:
        top, bottom = (weights @ sums.loc[arm].reindex(groups)[name].to_numpy(float) for name in ratio)
        return np.divide(top, bottom, out=np.full(len(top), np.nan), where=bottom > 0)

    heads = ["arm", "candidates an image", *RATIOS]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for arm in [name for name in (LOCAL, *ARMS) if name in set(rows["arm"])]:
        of_arm = rows[rows["arm"] == arm]
        cells = [arm, f"{of_arm['candidates'].mean():.2f}"]
        for ratio in RATIOS.values():
            values = drawn(arm, ratio)
            gap = values - drawn(BASE, ratio)
            low, high = np.nanpercentile(gap[1:], [2.5, 97.5])
            known = arm not in (BASE, LOCAL)
            cells.append(f"{values[0]:.3f}" + f" ({gap[0]:+.3f} [{low:+.3f}, {high:+.3f}])" * known)
        lines.append(f"| {' | '.join(cells)} |")
    about = f"{rows['segmenter'].iloc[0]}: {rows['run'].nunique()} runs, {rows['sample_id'].nunique()} images"
    return "\n".join([about, "", *lines])


def main(argv: Sequence[str] | None = None) -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--runs", type=Path, nargs="+", default=[], help="folders of kmine loop, one a seed")
    parser.add_argument("--segmenter", default="simulated", help="simulated, or a name of segmenter.name")
    parser.add_argument("--checkpoint", help="its weights")
    parser.add_argument("--iou", type=float, default=PUBLISHED_IOU, help="of the simulated segmenter")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--images", type=int, help="at most so many unlabeled images; default: all")
    parser.add_argument("--data.root", dest="root", help="folder that holds the data set now")
    parser.add_argument("--cache", help="folder of decoded images; default: that of the run")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--table", action="store_true", help="print the tables of what is there")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if BASE not in args.arms:
        args.arms.insert(0, BASE)
    rows = []
    for run in [] if args.table else args.runs:
        with tempfile.TemporaryDirectory() as folder:
            rows += measure(run, args, Path(folder))
    if rows:
        pd.DataFrame(rows).to_csv(args.out / f"{rows[0]['segmenter']}.csv", index=False)
    for path in sorted(args.out.glob("*.csv")):
        print(table(pd.read_csv(path, dtype={"sample_id": str, "group_id": str})), end="\n\n")


if __name__ == "__main__":
    main()

"""Train the segmenter `tiny` on the pool; the same command continues where it was stopped.

    python experiments/tiny_segmenter/train.py POOL OUT --steps 40000 --minutes 60

OUT receives `checkpoint.safetensors` (about every minute, and at the end), `log.csv`, and `tiny.safetensors` with
`tiny.json`: the running average of the weights that did best so far on the validation shard, which is procedural too.
The learning rate is constant and falls to zero over the last two fifths of `--steps`: stop a run early by naming fewer.
All chance is derived from (seed, step), so a run that was interrupted continues as if it had not been.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import time
from pathlib import Path

import numpy as np
import torch
from batches import Pool, corrected, make_batch
from generate import commit
from safetensors.torch import load_file, safe_open, save_file
from scipy.stats import spearmanr
from torch import Tensor

from kmine.ops.seeding import derive_seed
from kmine.segmenters.tiny.finetune import iou_of, predict_masks, tiny_loss
from kmine.segmenters.tiny.network import (
    SIDE,
    NetworkInput,
    TinyNet,
    ellipse_logits,
)
from kmine.segmenters.tiny.weights import save_tiny

EMA = 0.998
SECOND_PASS_EVERY = 4
SAVE_SECONDS = 60
WARMUP = 300
FALL = 0.4
"""Share of the steps over which the learning rate falls."""
COLUMNS = ("step", "samples", "loss", "val_iou", "val_iou_ellipse", "val_rank_correlation", "samples_per_second")


@torch.inference_mode()
def validate(net: TinyNet, pool: Pool, device: str) -> tuple[float, float, float]:
    """Mean IoU of the network and of the ellipse, and the rank correlation of predicted and true IoU."""
    rng = torch.Generator(device).manual_seed(0)
    parts = []
    for start in range(0, len(pool), 50):
        views, meta = pool.gather(np.arange(start, min(start + 50, len(pool))), device)
        asked, truth = make_batch(views, meta, net.side, rng, train=False)
        logits, score = predict_masks(net, asked)
        floor = (ellipse_logits(asked.boxes, net.side, net.side) >= 0).float()
        parts.append(torch.stack([iou_of((logits > 0).float(), truth), iou_of(floor, truth), score]))
    iou, ellipse, score = torch.cat(parts, 1).cpu().numpy()
    return float(iou.mean()), float(ellipse.mean()), float(spearmanr(score, iou).statistic)


class Training:
    """Network, running average, optimizer and the step they have reached."""

    def __init__(self, device: str, lr: float, seed: int, side: int = SIDE) -> None:
        torch.manual_seed(seed)
        self.net = TinyNet(side=side).to(device, memory_format=torch.channels_last)
        self.average = copy.deepcopy(self.net).requires_grad_(False)
        self.lr = lr
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=lr, weight_decay=0.01)
        self.step, self.best = 0, 0.0

    def take_step(self, asked: NetworkInput, truth: Tensor, steps: int, rng: torch.Generator) -> float:
        """One step on a batch; every fourth one answers the question again after a correction."""
        left = (steps - self.step) / (FALL * steps)
        rate = self.lr * min(1.0, (self.step + 1) / WARMUP, max(left, 0.01))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.step % SECOND_PASS_EVERY == SECOND_PASS_EVERY - 1:
            with torch.no_grad():
                asked = corrected(asked, truth, predict_masks(self.net, asked)[0], rng)
        loss = tiny_loss(*predict_masks(self.net, asked), truth)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        keep = min(EMA, (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            for mean, now in zip(self.average.parameters(), self.net.parameters(), strict=True):
                mean.lerp_(now, 1 - keep)
        self.step += 1
        return float(loss.detach())

    def save(self, path: Path, settings: dict[str, str]) -> None:
        tensors = {f"net.{key}": value for key, value in self.net.state_dict().items()}
        tensors |= {f"average.{key}": value for key, value in self.average.state_dict().items()}
        for name, parameter in self.net.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{key}.{name}"] = value
        part = path.with_name(path.name + ".part")
        notes = {"step": str(self.step), "best": repr(self.best), **settings}
        save_file({key: value.contiguous().cpu() for key, value in tensors.items()}, part, metadata=notes)
        part.replace(path)

    def load(self, path: Path, settings: dict[str, str]) -> None:
        with safe_open(path, "pt") as stream:
            notes = stream.metadata()
        for key, value in settings.items():
            if notes[key] != value:
                raise SystemExit(
                    f"{path}: trained with --{key} {notes[key]}, got {value}; name another OUT to start anew"
                )
        self.step, self.best = int(notes["step"]), float(notes["best"])
        tensors = load_file(path)
        for prefix, module in (("net.", self.net), ("average.", self.average)):
            module.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        for name, parameter in self.net.named_parameters():
            moments = {key: tensors[f"optimizer.{key}.{name}"] for key in ("exp_avg", "exp_avg_sq")}
            state = {key: value.to(parameter.device).view_as(parameter) for key, value in moments.items()}
            self.optimizer.state[parameter] = {"step": tensors[f"optimizer.step.{name}"], **state}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pool", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=40000, help="of the whole training, earlier calls included")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="of this call, at most")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--side", type=int, default=SIDE, help="pixels of a crop's side")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return args


def main() -> None:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    pool, held_out = Pool(args.pool, first=1), Pool(args.pool, stop=1)
    settings = {key: str(getattr(args, key)) for key in ("seed", "batch", "lr", "side")}
    training, checkpoint = Training(args.device, args.lr, args.seed, args.side), args.out / "checkpoint.safetensors"
    if checkpoint.exists():
        training.load(checkpoint, settings)
    print(f"{len(pool)} pairs, device {args.device}, from step {training.step} to {args.steps}", flush=True)
    end, saved, losses = time.monotonic() + 60 * args.minutes, time.monotonic(), []
    while training.step < args.steps:
        rng = torch.Generator(args.device).manual_seed(derive_seed(args.seed, training.step))
        indices = np.random.default_rng([args.seed, training.step]).integers(len(pool), size=args.batch)
        asked, truth = make_batch(*pool.gather(indices, args.device), args.side, rng)
        losses.append(training.take_step(asked, truth, args.steps, rng))
        now = time.monotonic()
        if now - saved > SAVE_SECONDS or now > end or training.step == args.steps:
            report(training, held_out, args, float(np.mean(losses)), len(losses) * args.batch / (now - saved))
            training.save(checkpoint, settings)
            saved, losses = time.monotonic(), []
        if now > end:
            break


def report(training: Training, held_out: Pool, args: argparse.Namespace, loss: float, speed: float) -> None:
    """Validate the running average, print and log a line, keep the weights where they are the best so far."""
    row = (training.step, training.step * args.batch, loss, *validate(training.average, held_out, args.device), speed)
    line = dict(zip(COLUMNS, (round(float(value), 4) for value in row), strict=True))
    print(" ".join(f"{key} {value:g}" for key, value in line.items()), flush=True)
    path = args.out / "log.csv"
    fresh = not path.exists()
    with path.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        if fresh:
            writer.writeheader()
        writer.writerow(line)
    if line["val_iou"] > training.best:
        training.best = line["val_iou"]
        note = {"script": "experiments/tiny_segmenter/train.py", "commit": commit(), "planned_steps": args.steps}
        note |= {"seed": args.seed, "batch": args.batch, "lr": args.lr, "side": args.side, **line}
        note |= json.loads((args.pool / "pool.json").read_text("utf-8"))
        save_tiny(training.average, args.out / "tiny.safetensors", note)


if __name__ == "__main__":
    main()

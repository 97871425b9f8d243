"""A training step and the peak memory of SKS beside U-Net++, same encoder, at 256 px.

    OMP_NUM_THREADS=1 python benchmarks/sks_cost.py [--steps 20] [--size 256]

Times: in one process, the networks step by step in turn, so that whatever else the machine does hits all of them alike;
the median of each and its ratio to U-Net++. Memory: each network alone in a process of its own, peak resident memory of
the operating system. `sks, remembered` gets images that it has seen before: its frozen branch is not run again.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import torch

from kmine.config import ModelConfig
from kmine.models.base import LocalModel
from kmine.models.build import build_model
from kmine.training.loss import segmentation_loss

SKS = ModelConfig(name="sks", encoder="mobilenetv2_100")
ALONE = {"skip_feature_share": False, "skip_resolution": False, "skip_coarse": False}
MODELS = {
    "unetpp": ModelConfig(name="unetpp", encoder="mobilenet_v2"),
    "unet": ModelConfig(name="unet", encoder="mobilenet_v2"),
    "fine branch alone": replace(SKS, **ALONE),
    "sks": SKS,
    "sks, remembered": SKS,
    "sks, not frozen": replace(SKS, freeze_coarse=False),
}


def stepper(model: LocalModel, size: int, batch_size: int) -> Callable[[], None]:
    """A function that makes one optimizer step on a batch that stays the same."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch_size, 3, size, size), dtype=torch.uint8, generator=generator)
    masks = torch.randint(0, 2, (batch_size, size, size), generator=generator)
    weights = torch.ones(batch_size)
    optimizer = torch.optim.AdamW(model.parameters())
    model.train()

    def step() -> None:
        segmentation_loss(model(images), masks, weights, 1.0).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def seconds_a_step(names: list[str], steps: int, size: int, batch_size: int) -> dict[str, list[float]]:
    """Seconds of each step of each network, taken in turn; the first two steps are not counted."""
    times: dict[str, list[float]] = {name: [] for name in names}
    with ExitStack() as stack:
        models = {name: build_model(MODELS[name], 2, 0) for name in names}
        for name in names:
            stack.enter_context(models[name].caching_features(augmented=name != "sks, remembered"))
        step = {name: stepper(model, size, batch_size) for name, model in models.items()}
        for _ in range(steps + 2):
            for name in names:
                began = time.perf_counter()
                step[name]()
                times[name].append(time.perf_counter() - began)
    return {name: found[2:] for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--alone", choices=MODELS, help="a few steps of one network; prints its peak memory in MB")
    args = parser.parse_args()
    if args.alone:
        seconds_a_step([args.alone], 1, args.size, args.batch_size)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
        return
    # Before anything big runs here: a child starts with its parent's peak.
    peaks = {name: peak_mb(name, args.size, args.batch_size) for name in MODELS}
    times = seconds_a_step(list(MODELS), args.steps, args.size, args.batch_size)
    base = np.median(times["unetpp"])
    print(f"{args.size} px, batches of {args.batch_size}, {torch.get_num_threads()} thread(s), {args.steps} steps each")
    print("| network | parameters | seconds a step | to U-Net++ | peak memory |\n|---|---|---|---|---|")
    for name, found in times.items():
        count = sum(p.numel() for p in build_model(MODELS[name], 2, 0).parameters()) / 1e6
        seconds = np.median(found)
        print(f"| {name} | {count:.1f} M | {seconds:.2f} | {seconds / base:.2f} | {peaks[name]:,} MB |")


def peak_mb(name: str, size: int, batch_size: int) -> int:
    """Peak resident memory of a process that makes three steps of one network."""
    flags = ["--alone", name, "--size", str(size), "--batch-size", str(batch_size)]
    return int(subprocess.run([sys.executable, __file__, *flags], capture_output=True, check=True).stdout)


if __name__ == "__main__":
    main()

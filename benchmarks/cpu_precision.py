"""Seconds of a training step on a CPU in float32 and in bf16, by the instructions that oneDNN may use.

    python benchmarks/cpu_precision.py [--size 128] [--encoders mobilenet_v2 resnet34] [--steps 15] [--compile]

U-Net++ at the width of `kmine plan` on a CPU, batches of 8 in memory, channels last, AdamW; medians. Each set of
instructions is a process of its own, since oneDNN reads ONEDNN_MAX_CPU_ISA once. Sets that this CPU lacks are not
limits, so their rows repeat the row of the best that it has. `--compile` times torch.compile in addition, and its first
two steps. For an idle machine.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time

import torch

from kmine.config import ModelConfig
from kmine.models.build import build_model
from kmine.training.distributed import make_fabric
from kmine.training.loss import segmentation_loss

INSTRUCTIONS = ("AVX512_CORE_AMX", "AVX512_CORE_BF16", "AVX512_CORE", "AVX2")


def seconds_a_step(encoder: str, size: int, steps: int, precision: str, *, compiled: bool) -> tuple[float, float]:
    """Seconds of the first two steps, and the median of those that follow."""
    model = build_model(ModelConfig(encoder=encoder, encoder_weights="none", encoder_depth=4, decoder_width=8), 2, 0)
    model = model.to(memory_format=torch.channels_last).train()
    fabric = make_fabric("cpu", precision)
    module, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True))
    module = torch.compile(module) if compiled else module
    draw = torch.Generator().manual_seed(0)
    images = torch.rand(8, 3, size, size, generator=draw).contiguous(memory_format=torch.channels_last)
    masks, weights = torch.randint(2, (8, size, size), generator=draw), torch.ones(8)
    times = []
    for _ in range(steps + 2):
        began = time.perf_counter()
        optimizer.zero_grad()
        fabric.backward(segmentation_loss(module(images), masks, weights, 1.0))
        optimizer.step()
        times.append(time.perf_counter() - began)
    return sum(times[:2]), statistics.median(times[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--encoders", nargs="+", default=["mobilenet_v2", "resnet34"])
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    if "ONEDNN_MAX_CPU_ISA" not in os.environ:
        print(f"U-Net++, {args.size} px, {torch.get_num_threads()} threads, seconds a step", flush=True)
        for name in INSTRUCTIONS:
            subprocess.run([sys.executable, *sys.argv], env=os.environ | {"ONEDNN_MAX_CPU_ISA": name}, check=True)
        return
    for encoder in args.encoders:
        for compiled in (False, True) if args.compile else (False,):
            measured = {
                precision: seconds_a_step(encoder, args.size, args.steps, precision, compiled=compiled)
                for precision in ("32", "bf16")
            }
            (first, full), (first_half, half) = measured.values()
            way = f"compiled (first two steps {first:.0f} and {first_half:.0f} s)" if compiled else "eager"
            print(
                f"{os.environ['ONEDNN_MAX_CPU_ISA']:18} {encoder:14} {way}: float32 {full:.3f}, bf16 {half:.3f}, "
                f"ratio {full / half:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()

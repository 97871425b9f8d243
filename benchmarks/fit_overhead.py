"""Steps per second of `stages.fit` beside a bare loop of the same network on tensors already in memory.

    python benchmarks/fit_overhead.py [--steps 60] [--size 96] [--repeats 3] [--before CLONE]

Both run in one process, in turn, `--repeats` times; the ratio is taken pair by pair. The bare loop has neither data
reading, augmentation, validation nor learning-rate schedule: only forward, loss, backward and AdamW.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from alternate import alternate, print_json

from kmine.config import DataConfig, FitConfig, ModelConfig
from kmine.data import open_source
from kmine.data.augment import Augment
from kmine.data.batches import Batches, BatchPlan
from kmine.data.cache.sample_cache import SampleCache
from kmine.data.pool import Pool
from kmine.models.base import LocalModel
from kmine.models.build import build_model
from kmine.training.distributed import make_fabric
from kmine.training.fit import fit, to_device
from kmine.training.loss import segmentation_loss
from kmine.training.train_steps import Callbacks


def bare(model: LocalModel, batches: Batches, steps: int) -> float:
    """Seconds of `steps` plain steps on one batch held in memory."""
    fabric = make_fabric("auto", "auto")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer = fabric.setup(model, optimizer)
    model.train()
    images, masks, weights = to_device(batches[0], fabric.device)
    began = time.perf_counter()
    for _ in range(steps):
        fabric.backward(segmentation_loss(model(images), masks, weights, 1.0))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if fabric.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def fitted(model: LocalModel, batches: Batches, steps: int) -> float:
    """Seconds of `fit` for as many steps, reading and augmenting every image."""
    cfg = FitConfig(steps=steps, batch_size=batches.num_labeled, val_every=steps)
    fabric, callbacks = make_fabric("auto", "auto"), Callbacks(validate=lambda _: 0.0)
    began = time.perf_counter()
    fit(model, batches, cfg, fabric=fabric, seed=0, callbacks=callbacks)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.before and not args.json:
        alternate(["--steps", str(args.steps), "--size", str(args.size)], args.before, args.repeats)
        return
    with tempfile.TemporaryDirectory() as folder:
        source = open_source(DataConfig(num_samples=64, size=args.size))
        cache = SampleCache(source, args.size, Path(folder))
        ids = [ref.sample_id for ref in cache.refs]
        pool = Pool(cache, ids, {i: i for i in ids}, "true")
        batches = Batches(pool, None, BatchPlan(seed=0, round_idx=0, batch_size=8, augment=Augment(args.size)))
        model = build_model(ModelConfig(), 2, 0)
        bare(model, batches, 5)
        fitted(model, batches, 5)
        if args.json:
            spent = {}
            for name, way in (("fit", fitted), ("bare loop", bare)):
                model, cpu = build_model(ModelConfig(), 2, 0), time.process_time()
                spent[name] = [way(model, batches, args.steps), time.process_time() - cpu]
            values = [float(v.double().sum()) for v in model.state_dict().values()]
            print_json(spent, repr(values))
            return
        ratios = []
        for n in range(args.repeats):
            slow, fast = fitted(model, batches, args.steps), bare(model, batches, args.steps)
            ratios.append(fast / slow)
            print(
                f"{n}: fit {args.steps / slow:.2f} steps/s, bare {args.steps / fast:.2f}, ratio {ratios[-1]:.3f}",
                flush=True,
            )
        print(f"threads {torch.get_num_threads()}, {args.size} px: median ratio {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()

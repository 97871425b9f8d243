"""Seconds and memory by stage from 300 to 1,000,000 images: what grows faster than their number, or is held whole.

    OMP_NUM_THREADS=1 python benchmarks/scale.py --images 300 3000 30000
    OMP_NUM_THREADS=1 python benchmarks/scale.py --images 1000000 --folder FOLDER

Images of 32 x 32 are made from their number, so no file is read: a bright disc in noise. The local model is a threshold
of brightness and the segmenter `ellipse`, so the figures are those of everything around the networks. Each size is a
process of its own. Peak memory is the largest resident size within the stage, whatever was held before it.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SIDE = 32
MASKED, LABELED = 60, 0.5
"""Images with a mask, and the share of those not held out that is labeled."""


class Stages:
    """Prints seconds of clock and processor, peak memory, and both by image, of each stage."""

    def __init__(self, count: int) -> None:
        self._count = count

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        clock, cpu = time.perf_counter(), time.process_time()
        yield
        clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        peak = int(status["VmHWM"].split()[0]) / 1024
        each = 1e6 * cpu / self._count
        print(
            f"{self._count:>9,} {name:<8} {clock:9.1f} s  processor {cpu:8.1f} s = {each:7.0f} us an image  "
            f"peak {peak:6.0f} MB",
            flush=True,
        )


def generated(count: int) -> object:
    """A `Source` of `count` images; the first `MASKED` have masks."""
    import numpy as np

    from kmine.data.source import IndexedSource
    from kmine.types import SampleRef

    rows, columns = np.mgrid[:SIDE, :SIDE]

    class Generated(IndexedSource):
        name = "generated"
        class_names = ("background", "disc")
        skipped = ()
        _fingerprint = hashlib.sha256(f"generated {count}".encode()).hexdigest()

        def refs(self) -> tuple[SampleRef, ...]:
            if not hasattr(self, "_refs"):
                self._refs = tuple(SampleRef(f"{n:08}", f"{n:08}", n < MASKED) for n in range(count))
            return self._refs

        def mask(self, sample_id: str) -> np.ndarray:
            y, x, radius = np.random.default_rng(int(sample_id)).uniform((10, 10, 5), (22, 22, 9))
            return (np.hypot(rows - y, columns - x) < radius).astype(np.uint8)

        def image(self, sample_id: str) -> np.ndarray:
            noise = np.random.default_rng(2**32 + int(sample_id)).integers(0, 100, (SIDE, SIDE, 3), np.uint8)
            return noise + 130 * self.mask(sample_id)[:, :, None]

    return Generated()


class Silent:
    def start(self, title: str, total: int) -> None: ...

    def advance(self, done: int, text: str = "") -> None: ...

    def log(self, text: str) -> None: ...


def measure(count: int, folder: Path) -> None:
    """All stages on `count` images, in this process."""
    import torch

    from kmine import data as datasets
    from kmine.audit import evidence
    from kmine.audit.rounds import open_audit
    from kmine.audit.run import write_audit
    from kmine.config import DataConfig, GateConfig, LoopConfig, ModelConfig, SegmenterConfig
    from kmine.loop.summary import build_report, round_rows, write_results
    from kmine.methods.mining import pseudo_label
    from kmine.models.base import LocalModel
    from kmine.report.html import write_report
    from kmine.setup.open import begin_run, open_cache, open_splits
    from kmine.store.run_folder import RunFolder
    from kmine.training.checkpoints import Checkpointer, Checkpoints
    from kmine.training.evaluation import evaluate_round
    from kmine.training.train_steps import FitResult

    class Brightness(torch.nn.Module):
        """Logits of class 1 from the mean of the channels."""

        def __init__(self) -> None:
            super().__init__()
            self.level = torch.nn.Parameter(torch.tensor(115.0))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            logits = (images.float().mean(dim=1, keepdim=True) - self.level) / 8
            return torch.cat([torch.zeros_like(logits), logits], dim=1)

    def local_model(*_: object) -> LocalModel:
        model = LocalModel(Brightness(), 2, 1, "half")
        model.prepare = lambda images: images
        return model

    datasets.register_dataset("generated", lambda cfg: generated(count))
    evidence.load_checkpoint = local_model
    cfg = LoopConfig(
        rounds=1,
        out=str(folder / "run"),
        data=DataConfig(
            name="generated", size=SIDE, label_fraction=LABELED, val_fraction=0.5, test_fraction=0,
            cache_dir=str(folder / "cache"), on_fault="say",
        ),
        model=ModelConfig(encoder_weights=None),
        segmenter=SegmenterConfig("ellipse"),
        gate=GateConfig(mode="ranked", keep=1.0),
    )  # fmt: skip
    stages, progress = Stages(count), Silent()
    with stages.stage("index"):
        source = datasets.open_source(cfg.data)
        source.refs()
    with stages.stage("decode"):
        cache = open_cache(cfg, source)
    run = RunFolder(folder / "run")
    with stages.stage("splits"):
        open_splits(cfg, cache, run)
    del cache
    with stages.stage("open"):
        task = begin_run(cfg, source, run, progress)
    model = local_model()
    weights = dict(model.state_dict())
    fitted = FitResult(weights, 0, weights, [])
    trained = [Checkpointer(run, run.round_dir(n), f"round {n}").save(fitted, 0.0) for n in (0, 1)]
    first = evaluate_round(task, model, trained[0], round_idx=0)
    with stages.stage("mine"):
        labels = pseudo_label(task, model, Checkpoints("student", weights, {}, 0.0), None, 1)
    num_pseudo = len(labels)
    with stages.stage("train"):  # what training asks of the pool: every pseudo mask once, in random order
        order = torch.randperm(num_pseudo, generator=torch.Generator().manual_seed(0)).tolist()
        for n in order[:5000]:
            labels.pool.mask_resized(labels.pool.ids[n])
    known = {"num_pseudo": num_pseudo, "seconds": labels.seconds, "reference": first}
    results = [first, evaluate_round(task, model, trained[1], round_idx=1, **known)]
    with stages.stage("report"):
        rows = round_rows(task, results)
        write_results(run, rows)
        write_report(run.root / "report.html", build_report(task, rows, results))
    run.update_run(stopped_by="rounds", adopted_round=1, segmenter="ellipse", segmenter_sha256="none")
    run.close()
    del labels, task
    with stages.stage("audit"), open_audit(run.root, progress, device="cpu") as audited:
        out = run.root / "audit"
        write_audit(audited, out, progress.log, labeled=False, with_withheld=False, export="none")
    sizes, crowd = written(folder)
    print(
        f"{count:>9,} {num_pseudo:,} pseudo masks; MB written: {sizes}; most files in one folder: {crowd}", flush=True
    )


def written(folder: Path) -> tuple[str, str]:
    """Megabytes by part, and the folder with the most files."""
    parts: Counter[str] = Counter()
    most = (0, "")
    for place, _, names in os.walk(folder):
        inside = Path(place).relative_to(folder)
        most = max(most, (len(names), str(inside)))
        parts["/".join(inside.parts[:2]) or "."] += sum((Path(place) / name).stat().st_size for name in names)
    return ", ".join(f"{name} {size / 2**20:.1f}" for name, size in sorted(parts.items())), f"{most[0]:,} in {most[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[300, 3000, 30_000])
    parser.add_argument("--folder", type=Path, help="where run and cache are written, and stay; else a temporary one")
    parser.add_argument("--profile", type=Path, help="write a profile of one size there")
    args = parser.parse_args()
    if len(args.images) > 1:
        for count in args.images:
            subprocess.run([sys.executable, __file__, "--images", str(count)], check=True)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        if args.profile:
            import cProfile

            profile = cProfile.Profile()
            profile.runcall(measure, args.images[0], folder)
            profile.dump_stats(args.profile)
        else:
            measure(args.images[0], folder)


if __name__ == "__main__":
    main()

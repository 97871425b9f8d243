"""A short timed training and prediction of a candidate network, on sampled images, in the loop's own code."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from kmine.config import LoopConfig
from kmine.data.cache.sample_cache import SampleCache
from kmine.data.pool import Pool
from kmine.data.source import Source
from kmine.io.terminal import Terminal
from kmine.mining.adaptation.finetune import adapt
from kmine.models.build import build_model
from kmine.segmenters import open_segmenter
from kmine.segmenters.base import FineTunable
from kmine.setup.provenance import forget_peak_memory, peak_memory_mb
from kmine.store.run_folder import RunFolder
from kmine.training.distributed import make_fabric
from kmine.training.fit import fit
from kmine.training.inference import predict_resized
from kmine.training.task import Task
from kmine.training.train_steps import Callbacks
from kmine.training.trainer import training_batches
from kmine.types import Sample, SampleRef

IMAGES, WARM_UP, STEPS, SECONDS = 8, 2, 4, 8.0
"""Images, steps before and while the clock runs, and the longest probe."""
_NO_CALLBACKS: Callbacks[Any] = Callbacks(lambda module: 0.0)


@dataclass(frozen=True)
class Speed:
    """Measured cost of a network at a size and batch size."""

    size: int
    batch_size: int
    step: float
    """Seconds of an optimizer step, with reading and augmentation."""
    infer: float
    """Seconds of a forward pass, an image."""
    peak_gb: float
    """Peak memory: of the GPU, or of this process on a CPU."""

    def at(self, size: int) -> Speed:
        """The same at another size: time and activations grow with the pixels. An estimate; a probe is better."""
        factor = (size / self.size) ** 2
        return replace(self, size=size, step=self.step * factor, infer=self.infer * factor)


class _Sample:
    """Some samples of a source."""

    def __init__(self, source: Source, ids: Sequence[str]) -> None:
        self._source, self._ids = source, set(ids)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def refs(self) -> tuple[SampleRef, ...]:
        return tuple(ref for ref in self._source.refs() if ref.sample_id in self._ids)


class _Clock:
    """Batches with the time at which each was requested; ends early when the probe takes too long."""

    def __init__(self, batches: Any) -> None:
        self._batches, self.times = batches, list[float]()

    def stream(self, start: int, stop: int, num_workers: int) -> Iterator[Any]:
        for batch in self._batches.stream(start, stop, 0):
            yield batch
            self.times.append(time.perf_counter())  # after the step
            if len(self.times) > 1 and self.times[-1] - self.times[0] > SECONDS:
                return


def measure_network(cfg: LoopConfig, source: Source, ids: Sequence[str]) -> Speed:
    """Train the network of `cfg` for a few steps on labeled images `ids`, and predict with it; seconds.

    Encoder weights are random: nothing is downloaded.

    Raises:
        UserError: settings that the network refuses.
    """
    ids = ids[:IMAGES]
    model_cfg = cfg.model.split()[0]
    fabric = make_fabric(cfg.device, cfg.fit.precision, local=True)
    is_gpu = fabric.device.type == "cuda"
    with tempfile.TemporaryDirectory(prefix="kmine-plan-") as folder:
        cache = SampleCache(_Sample(source, ids), cfg.data.size, Path(folder), "skip")  # type: ignore[arg-type]
        pool = Pool(cache, [ref.sample_id for ref in cache.refs], {i: i for i in ids}, "true")
        model = build_model(model_cfg, len(source.class_names), 0, pretrained=False).to(fabric.device)
        run = RunFolder(Path(folder) / "run", follows=True)
        silent = Terminal(quiet=True)
        task = Task(cfg, len(source.class_names), pool, pool, pool, None, fabric, "", silent, run)
        clock = _Clock(training_batches(task, cfg.fit, 0))
        fit_cfg = replace(cfg.fit, steps=WARM_UP + STEPS + 1, val_every=WARM_UP + STEPS + 1)
        _reset_peak(is_gpu)
        fit(model, clock, fit_cfg, fabric=fabric, seed=0, callbacks=_NO_CALLBACKS)  # type: ignore[arg-type]
        peak = _peak_gb(is_gpu)
        images = np.stack([pool.image_resized(i) for i in pool.ids])
        model.eval()
        predict_resized(model, images, "none", fabric.device)  # warm-up
        began = time.perf_counter()
        predict_resized(model, images, "none", fabric.device)
        infer = (time.perf_counter() - began) / len(images)
    steps = np.diff(clock.times)[-STEPS:]
    return Speed(cfg.data.size, cfg.fit.batch_size, float(np.median(steps)), infer, peak)


def _reset_peak(is_gpu: bool) -> None:
    forget_peak_memory()
    if is_gpu:
        import torch

        torch.cuda.reset_peak_memory_stats()


def _peak_gb(is_gpu: bool) -> float:
    if not is_gpu:
        return peak_memory_mb() / 1024
    import torch

    return torch.cuda.max_memory_reserved() / 2**30


@dataclass(frozen=True)
class SegmenterSpeed:
    """Seconds of the segmenter; for SAM figures of benchmarks, since its weights may not be there."""

    encode: float
    """An image, once in a run; 0 where the prompt has it."""
    prompt: float
    """A prompt."""
    adapt_step: float = 0.0
    """A step of fine-tuning; 0: it cannot be fine-tuned."""
    adapt_steps: int = 0
    """Steps of fine-tuning by default."""


SAM_ON_CPU, SAM_ON_GPU = SegmenterSpeed(7.0, 0.1, 1.5, 200), SegmenterSpeed(0.05, 0.006, 0.26, 200)
"""ViT-B: two CPU cores (README), one H100 (benchmarks/gpu)."""


def measure_segmenter(cfg: LoopConfig, source: Source, ids: Sequence[str], device: str) -> SegmenterSpeed:
    """Fine-tune the segmenter for a few steps on objects of images `ids`; a second or two. Nothing is downloaded."""
    if cfg.rounds == 0:
        return SegmenterSpeed(0.0, 0.0)
    if not cfg.segmenter.name.startswith("tiny"):
        is_sam = cfg.segmenter.name.startswith("sam")
        return (SAM_ON_CPU if device == "cpu" else SAM_ON_GPU) if is_sam else SegmenterSpeed(0.0, 0.001)
    segmenter = open_segmenter(cfg.segmenter, device=device, offline=True)
    samples = [Sample(i, i, source.image(i), source.mask(i)) for i in ids[:IMAGES]]
    times: list[float] = []
    settings = replace(cfg.adapt, steps=STEPS, val_every=STEPS, max_images=IMAGES)
    examples = [(sample, ()) for sample in samples]
    assert isinstance(segmenter, FineTunable)
    result = adapt(
        segmenter, examples, examples, settings, seed=0, progress=lambda *_: times.append(time.perf_counter())
    )
    steps = segmenter.fine_tune_defaults.steps
    if len(times) < STEPS:  # no object in the sample
        return SegmenterSpeed(0.0, 0.05, 0.25, steps)
    took = np.diff(times)
    step = float(np.median(took[:-1]))
    return SegmenterSpeed(0.0, max(0.001, float(took[-1] - step) / result.num_held_out), step, steps)

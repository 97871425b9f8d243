"""A short timed training and prediction of a candidate network, on sampled images, in the loop's own code."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kmine.config import LoopConfig
from kmine.config.mining import ENCODING
from kmine.data.cache.sample_cache import SampleCache
from kmine.data.pool import Pool
from kmine.data.resize import Resizer
from kmine.data.source import Source
from kmine.errors import SampleError
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


@dataclass(frozen=True)
class Speed:
    """Measured seconds of an optimizer step and, an image, of a forward pass; peak memory (GPU, or this process).

    On a CPU the seconds are those of the computing thread, which other processes made last `busy` times as long.
    """

    size: int
    batch_size: int
    step: float
    infer: float
    peak_gb: float
    busy: float = 1.0

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
        self._batches, self.times, self.walls = batches, list[float](), list[float]()

    def stream(self, start: int, stop: int, num_workers: int) -> Iterator[Any]:
        for batch in self._batches.stream(start, stop, 0):
            yield batch
            self.walls.append(time.perf_counter())  # after the step
            self.times.append(time.thread_time())
            if len(self.times) > WARM_UP and self.times[-1] - self.times[0] > SECONDS:
                return


def measure_network(cfg: LoopConfig, source: Source, ids: Sequence[str]) -> Speed:
    """Train the network of `cfg` for a few steps on labeled images `ids`, and predict with it; seconds.

    Encoder weights are random: nothing is downloaded.

    Raises:
        UserError: settings that the network refuses.
    """
    ids = ids[:IMAGES]
    fabric = make_fabric(cfg.device, cfg.fit.precision, local=True)
    is_gpu = fabric.device.type == "cuda"
    with tempfile.TemporaryDirectory(prefix="kmine-plan-") as folder:
        cache = SampleCache(_Sample(source, ids), Resizer.of(cfg.data), Path(folder), "skip")  # type: ignore[arg-type]
        pool = Pool(cache, [ref.sample_id for ref in cache.refs], {i: i for i in ids}, "true")
        model = build_model(cfg.model.split()[0], len(source.class_names), 0, pretrained=False)
        model = model.with_patch(cfg.data.patch).to(fabric.device)
        run, silent = RunFolder(Path(folder) / "run", follows=True), Terminal(quiet=True)
        task = Task(cfg, len(source.class_names), pool, pool, pool, None, fabric, "", silent, run)
        clock = _Clock(training_batches(task, cfg.fit, 0))
        fit_cfg = replace(cfg.fit, steps=WARM_UP + STEPS + 1, val_every=WARM_UP + STEPS + 1)
        forget_peak_memory()
        if is_gpu:
            torch.cuda.reset_peak_memory_stats()
        fit(model, clock, fit_cfg, fabric=fabric, seed=0, callbacks=Callbacks(lambda _: 0.0))  # type: ignore[arg-type]
        peak = torch.cuda.max_memory_reserved() / 2**30 if is_gpu else peak_memory_mb() / 1024
        images = np.stack([pool.image_resized(i) for i in pool.ids])
        model.eval()
        predict_resized(model, images, "none", fabric.device)  # warm-up
        began, wall = time.thread_time(), time.perf_counter()
        predict_resized(model, images, "none", fabric.device)
        infer, wall = time.thread_time() - began, time.perf_counter() - wall
    step, wall_step = (float(np.median(np.diff(times)[-STEPS:])) for times in (clock.times, clock.walls))
    if is_gpu:  # the thread may sleep while the device works
        return Speed(cfg.data.size, cfg.fit.batch_size, wall_step, wall / len(images), peak)
    return Speed(cfg.data.size, cfg.fit.batch_size, step, infer / len(images), peak, max(1.0, wall_step / step))


@dataclass(frozen=True)
class SegmenterSpeed:
    """Seconds of the segmenter an image, a prompt and a step of fine-tuning (0: none), and the default of such steps.

    For SAM these are figures of benchmarks, since its weights may not be there.
    """

    encode: float
    prompt: float
    adapt_step: float = 0.0
    adapt_steps: int = 0


SAM_ON_CPU, SAM_ON_GPU = SegmenterSpeed(7.0, 0.1, 1.5, 200), SegmenterSpeed(0.05, 0.006, 0.26, 200)
"""ViT-B: two CPU cores (README), one H100 (benchmarks/gpu)."""


def measure_segmenter(cfg: LoopConfig, source: Source, ids: Sequence[str], device: str) -> SegmenterSpeed:
    """Fine-tune the segmenter for a few steps on objects of images `ids`; a second or two. Nothing is downloaded."""
    if cfg.rounds == 0:
        return SegmenterSpeed(0.0, 0.0)
    if not cfg.segmenter.name.startswith("tiny"):
        is_sam = cfg.segmenter.name.startswith(ENCODING)
        return (SAM_ON_CPU if device == "cpu" else SAM_ON_GPU) if is_sam else SegmenterSpeed(0.0, 0.001)
    segmenter = open_segmenter(cfg.segmenter, device=device, offline=True)
    samples = []
    for sample_id in ids[:IMAGES]:
        with suppress(SampleError):  # the loop reports or skips it
            samples.append(Sample(sample_id, sample_id, source.image(sample_id), source.mask(sample_id)))
    times, clock = list[float](), time.thread_time if device == "cpu" else time.perf_counter
    settings = replace(cfg.adapt, steps=STEPS, val_every=STEPS, max_images=IMAGES)
    examples = [(sample, ()) for sample in samples]
    assert isinstance(segmenter, FineTunable)
    result = adapt(segmenter, examples, examples, settings, seed=0, progress=lambda *_: times.append(clock()))
    steps = segmenter.fine_tune_defaults.steps
    if len(times) < STEPS:  # no object in the sample
        return SegmenterSpeed(0.0, 0.05, 0.25, steps)
    took = np.diff(times)
    step = float(np.median(took[:-1]))
    return SegmenterSpeed(0.0, max(0.001, float(took[-1] - step) / result.num_held_out), step, steps)

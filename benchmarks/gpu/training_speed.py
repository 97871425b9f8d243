"""Section fit: optimizer steps a second of kmine's training, of a bare loop, and of prototypes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cv2
import torch
from gpu_proto import Looks, Resident, TrainStep
from kit import SMALL_ENCODER, Kit, open_pool

from kmine.config import FitConfig, ModelConfig
from kmine.data.augment import Augment
from kmine.data.batches import Batches, BatchPlan
from kmine.models.build import build_model
from kmine.ops.seeding import derive_seed
from kmine.store.run_folder import RunFolder
from kmine.training.distributed import make_fabric
from kmine.training.fit import fit as train
from kmine.training.fit import to_device
from kmine.training.loss import segmentation_loss
from kmine.training.train_steps import Callbacks, FitState, _copy, _optimizer_state

MOBILENET = ModelConfig()
RESNET = ModelConfig(encoder="resnet34", encoder_depth=5, decoder_channels=256)
SMALL = ModelConfig(encoder=SMALL_ENCODER, encoder_depth=3, decoder_channels=8)
STEP_GFLOP = {"resnet34": 3329, "mobilenet_v2": 250, SMALL_ENCODER: 0}
"""Of a training step, batch 16 at 352 px; MobileNetV2's is an estimate, as the counter ignores groups backwards."""


@dataclass(frozen=True)
class Case:
    """A network, an image size and a batch size."""

    name: str
    model: ModelConfig
    size: int
    batch: int
    predicted: dict[str, str]
    """Steps a second of kmine's fit without workers, a bare loop, prototypes, and all on the device."""

    def __str__(self) -> str:
        return f"{self.name}, {self.size} px, batch {self.batch}"

    def guess(self, kind: str) -> str:
        """Predicted steps a second, or nothing."""
        return self.predicted.get(kind, "")

    @property
    def gflop(self) -> float:
        """Of a step."""
        return STEP_GFLOP[self.model.encoder] * (self.size / 352) ** 2 * self.batch / 16


def _predicted(*values: str) -> dict[str, str]:
    return dict(zip(("fit", "bare", "eager", "graph", "compile", "resident"), values, strict=True))


CASES = (
    Case("U-Net++ MobileNetV2", MOBILENET, 352, 16, _predicted("13-16", "50-65", "55-70", "75-100", "", "65-90")),
    Case("U-Net++ MobileNetV2", MOBILENET, 96, 8, _predicted("40-60", "60-75", "65-80", "200-300", "", "120-200")),
    Case("U-Net++ ResNet-34", RESNET, 352, 16, _predicted("12-15", "25-32", "27-34", "28-36", "40-48", "27-34")),
)
TINY_CASES = (Case("small", SMALL, 32, 4, {}),)


def fit(kit: Kit) -> None:
    """Every case in turn; then the cost of saving a training's state."""
    for case in TINY_CASES if kit.tiny else CASES:
        if kit.left() < 30:
            kit.put(str(case), "SKIPPED", note="out of time")
            continue
        CaseTimer(kit, case).run()
        if kit.on_gpu:
            torch.cuda.empty_cache()
    with kit.attempt("state"):
        _checkpoint(kit)


class CaseTimer:
    """Measurements of one case."""

    def __init__(self, kit: Kit, case: Case) -> None:
        self.kit, self.case, self.device = kit, case, torch.device(kit.device)
        self.steps = 10 if kit.tiny else 60 if case.size > 200 else 150
        self.pool = open_pool(kit, case.size, 64)
        augment = Augment(case.size)
        self.batches = Batches(self.pool, None, BatchPlan(seed=0, round_idx=0, batch_size=case.batch, augment=augment))

    def run(self) -> None:
        """All measurements; one that fails does not stop the others."""
        kit, case = self.kit, self.case
        cv2.setNumThreads(1)
        took = kit.seconds(lambda: self.batches[1], 3)
        cv2.setNumThreads(-1)
        note = f"{took * 1e3:.0f} ms a batch"
        name = f"{case}: one batch read and augmented, one core"
        kit.put(name, case.batch / took, "images/s a core", note=note)
        for workers in (0,) if kit.tiny else (0, 4):
            with kit.attempt(f"{case}: fit, {workers} workers"):
                self.put_fit(workers)
        with kit.attempt(f"{case}: bare"):
            name = f"{case}: bare loop on one batch (eager, bf16 autocast)"
            kit.put(name, self.bare(benchmark=False), "steps/s", case.guess("bare"))
            if not kit.tiny:
                kit.put(f"{case}: the same with cudnn.benchmark", self.bare(benchmark=True), "steps/s")
        torch.backends.cudnn.benchmark = False
        augmented = self.put_augmentation()
        kinds = ["eager"] + ["graph"] * kit.on_gpu + ["compile"] * (case.model is RESNET)
        for kind in kinds:
            if kind == "compile" and kit.left() < 75:
                continue
            with kit.attempt(f"{case}: {kind}"):
                self.put_step(kind, augmented)

    def put_fit(self, workers: int) -> None:
        """kmine's own training."""
        kit, case, marks = self.kit, self.case, list[float]()
        cfg = FitConfig(steps=self.steps, batch_size=case.batch, val_every=self.steps, num_workers=workers)
        callbacks = Callbacks(validate=lambda _: 0.0, progress=lambda *_: marks.append(time.perf_counter()))
        began = time.perf_counter()
        model = build_model(case.model, 2, 0).to(self.device)
        train(model, self.batches, cfg, fabric=make_fabric(kit.device, "auto"), seed=0, callbacks=callbacks)
        whole = time.perf_counter() - began
        # A mark every tenth step; the first ones hold the start of the workers.
        rate = 10 * (len(marks) - 2) / (marks[-1] - marks[1]) if len(marks) > 2 else self.steps / whole
        note = f"{whole:.1f} s for {self.steps} steps, start included; peak {kit.peak_gb():.1f} GB"
        kit.put(f"{case}: kmine fit, {workers} workers", rate, "steps/s", "" if workers else case.guess("fit"), note)

    def bare(self, *, benchmark: bool) -> float:
        """Steps a second of forward, loss, backward and AdamW on one batch in memory."""
        torch.backends.cudnn.benchmark = benchmark
        fabric, model = make_fabric(self.kit.device, "auto"), build_model(self.case.model, 2, 0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        module, optimizer = fabric.setup(model.to(self.device), optimizer)
        module.train()
        images, masks, weights = to_device(self.batches[0], self.device)
        steps = self.steps // 2

        def work() -> None:
            for _ in range(steps):
                fabric.backward(segmentation_loss(module(images), masks, weights, 1.0))
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

        return steps / self.kit.seconds(work, 2)

    def put_augmentation(self) -> Callable[[int], tuple[Any, Any]]:
        """Augmentation on the device; returns the augmented batch of a step."""
        kit, case, ids = self.kit, self.case, self.pool.ids
        resident, looks, count = Resident(self.pool, ids, self.device), Looks(), min(10, self.steps)

        def augmented(step: int) -> tuple[Any, Any]:
            slots = range(case.batch)
            places = [(step * case.batch + slot) % len(ids) for slot in slots]
            return looks(*resident.batch(places), [derive_seed(0, 0, step, slot) % 2**63 for slot in slots])

        with kit.attempt(f"{case}: looks"):
            took = kit.seconds(lambda: [augmented(step) for step in range(count)], 3) / count
            name, note = f"{case}: augmentation on the device (prototype)", f"{took * 1e3:.1f} ms a batch"
            kit.put(name, case.batch / took, "images/s", "6000-10000" if case.size > 200 else "", note)
        return augmented

    def put_step(self, kind: str, augmented: Callable[[int], tuple[Any, Any]]) -> None:
        """A prototype of the training step, on one batch and on augmented ones."""
        kit, case, steps = self.kit, self.case, self.steps // 2
        began = time.perf_counter()
        step = TrainStep(build_model(case.model, 2, 0), case.batch, case.size, self.device, kind)
        images, masks, _ = to_device(self.batches[0], self.device)
        step(images.float(), masks)
        kit.wait()
        start = time.perf_counter() - began
        took = kit.seconds(lambda: [step() for _ in range(steps)], 2) / steps
        label = {"eager": "fused AdamW", "graph": "CUDA graph of the step", "compile": "torch.compile"}[kind]
        note = f"start {start:.0f} s, {case.gflop / took / 1e3:.0f} TFLOP/s, peak {kit.peak_gb():.1f} GB"
        kit.put(f"{case}: {label}, one batch (prototype)", 1 / took, "steps/s", case.guess(kind), note)
        took = kit.seconds(lambda: [step(*augmented(n)) for n in range(steps)], 2) / steps
        predicted = case.guess("resident") if kind == "graph" else ""
        kit.put(f"{case}: {label}, data and augmentation on the device", 1 / took, "steps/s", predicted)


def _checkpoint(kit: Kit) -> None:
    """Cost of saving a training's state."""
    model = build_model(SMALL if kit.tiny else RESNET, 2, 0).to(kit.device)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    began = time.perf_counter()
    state = FitState(1, _copy(model), _optimizer_state(optimizer), _copy(model), 0.0, 1)
    copied = time.perf_counter() - began
    tensors, plain = state.to_tensors()
    store, path = RunFolder(kit.work / "state"), kit.work / "state" / "fit_state.safetensors"
    store.save_tensors(path, tensors, "x" * 64, **plain)
    store.close()
    whole = time.perf_counter() - began
    name = "fit_state.safetensors of U-Net++ ResNet-34, every val_every (100) steps"
    kit.put(name, whole, "s", "1-2", f"{path.stat().st_size / 1e6:.0f} MB, copies {copied:.2f} s")

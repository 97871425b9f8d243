"""Section equal: the same results on the GPU as on the CPU, for training, inference, `tiny` and SAM."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import numpy as np
import segmenter as sam_benchmark
import torch
from gpu_proto import FastEncoder
from kit import Kit, open_pool, prompted_objects, random_sam
from safetensors.torch import save_file

from kmine.config import FitConfig, ModelConfig
from kmine.data.augment import Augment
from kmine.data.batches import Batches, BatchPlan
from kmine.data.pool import Pool
from kmine.models.build import build_model
from kmine.ops.metrics import iou
from kmine.segmenters import create_segmenter
from kmine.segmenters.base import Embedding, PromptedExample
from kmine.segmenters.sam.segmenter import SamSegmenter
from kmine.training.distributed import make_fabric
from kmine.training.fit import fit
from kmine.training.inference import predict_resized
from kmine.training.train_steps import Callbacks, FitResult, FitState

FINETUNED = "finetuned_vit_b.safetensors"
"""In the work folder: SAM of random weights whose decoder was trained on boxes."""


def equal(kit: Kit) -> None:
    """CPU against GPU: loss curves, resuming, probabilities, masks of `tiny` and SAM."""
    size, steps = (32, 4) if kit.tiny else (96, 20)
    pool = open_pool(kit, size, 32)
    batches = Batches(pool, None, BatchPlan(seed=0, round_idx=0, batch_size=8, augment=Augment(size)))

    def trained(device: str, precision: str, save: Callable[[FitState], None] | None = None,
                resume: FitState | None = None) -> FitResult:  # fmt: skip
        cfg = FitConfig(steps=steps, val_every=1)
        callbacks = Callbacks(validate=lambda _: 0.0, save=save)
        model = build_model(ModelConfig(), 2, 0).to(device)
        fabric = make_fabric(device, precision)
        return fit(model, batches, cfg, fabric=fabric, seed=0, callbacks=callbacks, resume=resume)

    cpu = trained("cpu", "32")
    with kit.attempt("training, cpu against gpu"):
        _loss_curves(kit, trained, cpu, steps)
    with kit.attempt("a resumed training equals an undisturbed one"):
        states: list[FitState] = []
        whole = trained(kit.device, "auto", save=lambda state: states.append(copy.deepcopy(state)))
        again = trained(kit.device, "auto", resume=states[len(states) // 2])
        apart = max(float((whole.final[k].float() - again.final[k].float()).abs().max()) for k in whole.final)
        note = "resumed runs are equal on a CPU; cudnn and atomics are not deterministic"
        kit.put("resumed against undisturbed, largest difference of a weight", apart, "", "0 if deterministic", note)
    with kit.attempt("inference, cpu against gpu"):
        _inference(kit, pool, cpu)
    with kit.attempt("tiny, cpu against gpu"):
        _tiny(kit, pool)
    _sam(kit)


def _loss_curves(kit: Kit, trained: Callable[..., FitResult], cpu: FitResult, steps: int) -> None:
    def losses(result: FitResult) -> np.ndarray:
        return np.array([loss for _, loss, _ in result.history])

    expected = losses(cpu)
    torch.backends.cudnn.allow_tf32 = False
    curves = {"fp32, no TF32": losses(trained(kit.device, "32"))}
    torch.backends.cudnn.allow_tf32 = True
    curves["fp32, TF32 convolutions"] = losses(trained(kit.device, "32"))
    if kit.on_gpu:
        curves["bf16"] = losses(trained(kit.device, "bf16"))
    for name, curve in curves.items():
        off = np.abs(curve - expected) / expected
        first, mean = (0.02, 0.15) if name == "bf16" else (0.002, 0.05)
        kit.verdict(
            f"loss curve of {steps} steps, {name}",
            bool(off[0] < first and off.mean() < mean),
            f"first step off by {off[0]:.1e}, mean {off.mean():.1e}, last {off[-1]:.1e}; "
            f"loss {expected[0]:.3f} -> cpu {expected[-1]:.3f}, here {curve[-1]:.3f}",
        )


def _inference(kit: Kit, pool: Pool, cpu: FitResult) -> None:
    images = np.stack([pool.image_resized(i) for i in pool.ids[:8]])
    probs = []
    for device in ("cpu", kit.device):
        model = build_model(ModelConfig(), 2, 0)
        model.load_state_dict(cpu.best)
        probs.append(predict_resized(model.to(device).eval(), images, "flips", torch.device(device))[0])
    apart, agree = np.abs(probs[0] - probs[1]).max(), (probs[0].argmax(1) == probs[1].argmax(1)).mean()
    note = f"apart by {apart:.1e}, classes agree {agree:.5f}"
    kit.verdict("probabilities with flips", bool(apart < 0.02 and agree > 0.999), note)


def _tiny(kit: Kit, pool: Pool) -> None:
    objects = prompted_objects(pool, pool.ids[:8], 2)
    candidates = []
    for device in ("cpu", kit.device):
        segmenter = create_segmenter("tiny", device=device, offline=True)
        embeddings = segmenter.encode([sample.image for sample, _, _ in objects])
        candidates.append([c for (c,) in segmenter.decode(embeddings, [[prompts] for _, prompts, _ in objects])])
    lowest = min(iou(a.masks[0], b.masks[0]) for a, b in zip(*candidates, strict=True))
    kit.verdict("tiny: masks, cpu against gpu", lowest > 0.99, f"lowest IoU {lowest:.4f} of {len(objects)}")


def _sam(kit: Kit) -> None:
    """Masks against the official predictor's; then in lower precision, with a fine-tuned decoder."""
    plain = random_sam("sam_vit_b", 128 if kit.tiny else 1024, kit.device)
    segmenter = SamSegmenter(copy.deepcopy(plain), name="sam_vit_b", device=kit.device, batch_size=2)
    with kit.attempt("SAM, official against kmine"):
        image, prompts = sam_benchmark.prompted_image()
        masks, logits = sam_benchmark.official(plain, segmenter, image, prompts)
        candidates = segmenter.decode(segmenter.encode([image]), [prompts])[0]
        ours = sam_benchmark.masks_of(candidates)
        lowest = min(iou(a, b) for a, b in zip(ours, masks, strict=True))
        low_res = np.stack([candidate.low_res_logits[0] for candidate in candidates])
        off = np.abs(low_res - logits[:: sam_benchmark.NUM_BOXES]).max()
        note = f"lowest IoU {lowest:.5f} of {len(ours)}, logits off by {off:.1e} (deviation {logits.std():.2f})"
        kit.verdict("SAM ViT-B, random weights, fp32: masks against SamPredictor", lowest >= 0.995, note)
    with kit.attempt("SAM, fine-tuned"):
        finetuned = _fine_tune(kit, segmenter, 3 if kit.tiny else 200)
        if not kit.tiny:
            state = {key: tensor.contiguous().cpu() for key, tensor in finetuned.decoder.sam.state_dict().items()}
            save_file(state, kit.work / FINETUNED)
        _precisions(kit, finetuned, FastEncoder(plain, torch.bfloat16))


def _precisions(kit: Kit, segmenter: SamSegmenter, encoder: FastEncoder) -> None:
    """Masks of cheaper arithmetic against those of fp32."""
    pool = open_pool(kit, 32 if kit.tiny else 352, 64)
    objects = prompted_objects(pool, pool.ids[40:56] if len(pool.ids) > 56 else pool.ids[-4:], 3)
    images, prompts = [sample.image for sample, _, _ in objects], [[one] for _, one, _ in objects]
    exact = segmenter.decode(segmenter.encode(images), prompts)
    ious = [iou(candidates[0].masks[0], mask) for candidates, (_, _, mask) in zip(exact, objects, strict=True)]
    note = "random encoder: the decoder learns from the box only"
    kit.put("SAM fine-tuned on boxes: IoU with the true masks", float(np.mean(ious)), note=note)

    def autocast() -> AbstractContextManager:
        return torch.autocast(kit.device.split(":")[0], torch.bfloat16, enabled=kit.on_gpu)

    def compare(name: str, embeddings: list[Embedding], context: AbstractContextManager | None = None) -> None:
        with context or nullcontext():
            candidates = segmenter.decode(embeddings, prompts)
        pairs = [(a[0].masks[0], b[0].masks[0]) for a, b in zip(candidates, exact, strict=True)]
        ious = [iou(a, b) for a, b in pairs if a.any() or b.any()]
        name = f"SAM fine-tuned, {name}: masks against fp32"
        if len(ious) < len(pairs) / 2:
            kit.put(name, "VACUOUS", note="most masks are empty")
            return
        note = f"mean IoU {np.mean(ious):.5f}, lowest {min(ious):.4f} of {len(ious)}"
        kit.verdict(name, float(np.mean(ious)) >= 0.995, note)

    with kit.attempt("float16 embeddings"):
        half = [replace(e, features=e.features.astype(np.float16)) for e in segmenter.encode(images)]
        compare("float16 embeddings (the cache's default)", half)
    with kit.attempt("encoder under autocast"):
        with autocast():
            embeddings = segmenter.encode(images)
        compare("encoder under autocast bf16", embeddings)
    with kit.attempt("encoder in bf16"):
        features = [encoder([image]).float().cpu().numpy()[0] for image in images]
        embeddings = [Embedding(image.shape[:2], f) for image, f in zip(images, features, strict=True)]
        compare("encoder in bf16, resized on the GPU (prototype)", embeddings)
    with kit.attempt("decoder under autocast"):
        compare("encoder exact, decoder under autocast bf16", segmenter.encode(images), autocast())
    if kit.on_gpu:
        with kit.attempt("TF32"):
            torch.backends.cuda.matmul.allow_tf32 = True
            compare("TF32 products everywhere", segmenter.encode(images))
        torch.backends.cuda.matmul.allow_tf32 = False


def _fine_tune(kit: Kit, segmenter: SamSegmenter, steps: int) -> SamSegmenter:
    """The segmenter with a decoder trained on boxes: with random weights, masks would be mostly border."""
    pool = open_pool(kit, 32 if kit.tiny else 352, 64)
    objects = prompted_objects(pool, pool.ids[:3] if kit.tiny else pool.ids[:24], 8)
    embeddings = segmenter.encode([sample.image for sample, _, _ in objects])
    tuner = segmenter.fine_tuner()
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=5e-4)
    rng, began, done = np.random.default_rng(0), time.perf_counter(), 0
    loss = torch.zeros(())
    for step in range(steps):
        examples = []
        for n in rng.choice(len(objects), min(4, len(objects)), replace=False):
            _, prompts, mask = objects[n]
            box = prompts.jittered_boxes[rng.integers(len(prompts.jittered_boxes))]
            with_box = replace(prompts, box=box, jittered_boxes=prompts.jittered_boxes[:0])
            examples.append(PromptedExample(embeddings[n], with_box, mask))
        loss = tuner.loss(examples, step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        done = step + 1
        if kit.left() < (200 if kit.tiny else 45):
            break
    kit.wait()
    rate, note = done / (time.perf_counter() - began), f"loss at the end {float(loss.detach()):.3f}"
    kit.put("fine-tuning SAM's decoder", rate, "steps/s of 4 examples", "12-16", note)
    return segmenter.with_weights(tuner.state())

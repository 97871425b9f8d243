"""Sections sam, decoder, cache: images and prompts a second of SAM, as it is and as it could be."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gpu_proto import FastEncoder, decode_boxes
from kit import Kit, open_pool, pictures, prompted_objects, random_sam
from segment_anything import SamPredictor
from segment_anything.modeling import Sam
from segment_anything.utils.transforms import ResizeLongestSide

from kmine.ops.metrics import iou
from kmine.segmenters.base import Embedding
from kmine.segmenters.embedding_cache import EmbeddingCache
from kmine.segmenters.sam.segmenter import SamSegmenter
from kmine.types import Prompts

GFLOP = {"sam_vit_b": 972, "sam_vit_l": 2986, "sam_vit_h": 5961}
"""Of one image through the encoder at 1024 px, counted with torch's FlopCounterMode (a multiply-add is two)."""
KINDS = ("official", "one", "batch", "tf32", "autocast", "fast", "compiled")
PREDICTED = {  # images/s of each kind
    "sam_vit_b": (22, 28, 33, 55, 75, 120, 170),
    "sam_vit_l": (9, 10, 12, 26, 40, 70, 95),
    "sam_vit_h": (5, 6, 6.5, 15, 24, 42, 55),
}


@dataclass
class EncoderTimer:
    """Puts images a second of one encoder."""

    kit: Kit
    name: str
    images: list[np.ndarray]

    def put(self, what: str, kind: str, work: Callable[[], Any], count: int, note: str = "") -> None:
        """Time `work` on `count` images."""
        kit = self.kit
        with kit.attempt(f"{self.name}, {what}"):
            rate = count / kit.seconds(work, 2 if self.name == "sam_vit_b" else 1)
            share = f"{GFLOP[self.name] * rate / 1e3:.0f} TFLOP/s, peak {kit.peak_gb():.1f} GB"
            predicted = PREDICTED[self.name][KINDS.index(kind)]
            kit.put(f"{self.name}, {what}", rate, "images/s", predicted, f"{share}; {note}" if note else share)

    def put_prototype(self, model: Sam, what: str, kind: str, **options: Any) -> None:
        """Time a `FastEncoder`: from images to features on the device, and the network without preprocessing."""
        kit, images = self.kit, self.images
        with kit.attempt(f"{self.name}, {what}"):
            encoder = FastEncoder(model, torch.float32 if kit.tiny else torch.bfloat16, **options)
            began = time.perf_counter()
            encoder(images[:8])
            kit.wait()
            note = f"first call {time.perf_counter() - began:.0f} s"
            starts = range(0, len(images) - len(images) % 8 or len(images), 8)
            count = sum(len(images[n : n + 8]) for n in starts)
            self.put(what, kind, lambda: [encoder(images[n : n + 8]) for n in starts], count, note)
            if options.get("compiled"):
                return  # another batch size would be compiled again
            batch = encoder.pixels((images * 8)[: 4 if kit.tiny else 16])
            rate = len(batch) / kit.seconds(lambda: _forward(encoder, batch), 3)
            share = f"{GFLOP[self.name] * rate / 1e3:.0f} TFLOP/s"
            kit.put(f"{self.name}, {what}: network only, batch {len(batch)}", rate, "images/s", note=share)


def sam(kit: Kit) -> None:
    """Images a second through SAM's encoder: the official loop, kmine, and prototypes."""
    side = 128 if kit.tiny else 1024
    images = pictures(kit, 2 if kit.tiny else 32)
    resize = ResizeLongestSide(side)
    took = kit.seconds(lambda: [resize.apply_image(image) for image in images[:8]], 3) / min(8, len(images))
    kit.put("PIL resize to the encoder's side, one core", took * 1e3, "ms an image", "8-10")
    for name in ("sam_vit_b",) if kit.tiny else ("sam_vit_b", "sam_vit_h", "sam_vit_l"):
        if kit.left() < 25:
            kit.put(name, "SKIPPED", note="out of time")
            continue
        timer = EncoderTimer(kit, name, images[: {"sam_vit_b": 32, "sam_vit_l": 16, "sam_vit_h": 12}[name]])
        model = random_sam(name, side, kit.device)
        with torch.inference_mode():
            _encoders(timer, model)
        what = "bf16, batch 8, tables kept, resized on the GPU (prototype)"
        timer.put_prototype(model, what, "fast")
        if name == "sam_vit_b" and not kit.tiny:
            timer.put_prototype(model, "the same, FlexAttention", "compiled", flex=True)
        del model
        if kit.on_gpu:
            torch.cuda.empty_cache()
    # Last: compiling takes longest and matters least.
    if not kit.tiny and kit.left() >= 55:
        timer = EncoderTimer(kit, "sam_vit_b", images)
        model = random_sam("sam_vit_b", side, kit.device)
        timer.put_prototype(model, "bf16, batch 8, torch.compile (prototype)", "compiled", compiled="default")


def _encoders(timer: EncoderTimer, model: Sam) -> None:
    kit, name, images = timer.kit, timer.name, timer.images
    _official_encoder(timer, SamPredictor(copy.deepcopy(model)), images[: max(1, len(images) // 3)])
    one = SamSegmenter(model, name=name, device=kit.device, batch_size=1)
    note = "float32 features on the CPU"
    timer.put("kmine, batch 1 (the default)", "one", lambda: one.encode(images), len(images), note)
    eight = SamSegmenter(model, name=name, device=kit.device, batch_size=8)
    timer.put("kmine, batch 8", "batch", lambda: eight.encode(images), len(images))
    if kit.on_gpu and not kit.tiny:
        torch.backends.cuda.matmul.allow_tf32 = True
        timer.put("kmine, batch 8, TF32 products", "tf32", lambda: eight.encode(images), len(images))
        torch.backends.cuda.matmul.allow_tf32 = False
        with torch.autocast("cuda", torch.bfloat16):
            timer.put("kmine, batch 8, autocast bf16", "autocast", lambda: eight.encode(images), len(images))


def _official_encoder(timer: EncoderTimer, predictor: SamPredictor, images: Sequence[np.ndarray]) -> None:
    def work() -> None:
        for image in images:
            predictor.set_image(image)

    timer.put("official SamPredictor.set_image", "official", work, len(images))


def _forward(encoder: FastEncoder, batch: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return encoder.forward(batch)


def decoder(kit: Kit) -> None:
    """Prompts a second: the official predictor, kmine, and one batch for several images."""
    side = 128 if kit.tiny else 1024
    model = random_sam("sam_vit_b", side, kit.device)
    pool = open_pool(kit, 32 if kit.tiny else 352, 64)
    objects = prompted_objects(pool, pool.ids[: 3 if kit.tiny else 16], 3)
    images, prompts = [sample.image for sample, _, _ in objects], [[one] for _, one, _ in objects]
    segmenter = SamSegmenter(model, name="sam_vit_b", device=kit.device, batch_size=4)
    embeddings = segmenter.encode(images)
    boxes = [np.concatenate([one.box[None], one.jittered_boxes]) for (one,) in prompts]
    count = sum(map(len, boxes))
    with kit.attempt("official"):
        predictor = SamPredictor(model)
        rate = count / kit.seconds(lambda: _official(kit, predictor, images, embeddings, boxes), 2)
        kit.put("official, one box a call, masks in numpy", rate, "prompts/s", "90-120")
    with kit.attempt("kmine"):
        took = kit.seconds(lambda: segmenter.decode(embeddings, prompts), 3)
        note = f"{took / len(images) * 1e3:.1f} ms an image"
        kit.put("kmine, one image a batch (box + 3 jitters)", count / took, "prompts/s", "200-300", note)
    if kit.on_gpu:
        with kit.attempt("host waits"):
            _host_waits(kit, segmenter, embeddings, prompts, images)
    with kit.attempt("prototype"):
        _batched_decoder(kit, segmenter, embeddings, prompts, [image.shape[:2] for image in images])


def _official(
    kit: Kit,
    predictor: SamPredictor,
    images: Sequence[np.ndarray],
    embeddings: Sequence[Embedding],
    boxes: Sequence[np.ndarray],
) -> None:
    for image, embedding, of_image in zip(images, embeddings, boxes, strict=True):
        predictor.original_size, predictor.is_image_set = image.shape[:2], True
        side = predictor.transform.target_length
        predictor.input_size = predictor.transform.get_preprocess_shape(*image.shape[:2], side)
        predictor.features = torch.from_numpy(embedding.features).to(kit.device)[None]
        for box in of_image:
            predictor.predict(box=box, multimask_output=False)


def _host_waits(
    kit: Kit,
    segmenter: SamSegmenter,
    embeddings: Sequence[Embedding],
    prompts: Sequence[Sequence[Prompts]],
    images: Sequence[np.ndarray],
) -> None:
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        segmenter.decode(embeddings[:1], prompts[:1])
        decode = len(caught)
        segmenter._embedder._encode(images[:1])
        encode = len(caught) - decode
    torch.cuda.set_sync_debug_mode("default")
    kit.put("host waits for the device: decoding an image", decode, "", "13-16")
    kit.put("host waits for the device: encoding a batch (ViT-B)", encode, "", "26: 2 a block and 2")


def _batched_decoder(
    kit: Kit,
    segmenter: SamSegmenter,
    embeddings: Sequence[Embedding],
    prompts: Sequence[Sequence[Prompts]],
    sizes: Sequence[tuple[int, int]],
) -> None:
    boxes = [np.concatenate([one.box[None], one.jittered_boxes]) for (one,) in prompts]
    features = torch.from_numpy(np.stack([embedding.features for embedding in embeddings])).to(kit.device)
    of_image = torch.tensor([n for n, of_one in enumerate(boxes) for _ in of_one])
    flat = torch.from_numpy(np.concatenate(boxes))

    def work() -> list[np.ndarray]:
        return decode_boxes(segmenter.decoder.sam, features, of_image, flat, sizes)[0]

    name = "several images a batch, statistics on the GPU (prototype)"
    kit.put(name, len(flat) / kit.seconds(work, 3), "prompts/s", "700-1000")
    candidates = [candidate for (candidate,) in segmenter.decode(embeddings, prompts)]
    ours = [mask for candidate in candidates for mask in (candidate.masks[0], *candidate.jittered_masks)]
    lowest = min(iou(a, b) for a, b in zip(work(), ours, strict=True))
    kit.verdict("prototype's masks against kmine's", lowest >= 0.995, f"lowest IoU {lowest:.5f}")
    if kit.on_gpu:
        with torch.autocast("cuda", torch.bfloat16):
            kit.put("the same under autocast bf16", len(flat) / kit.seconds(work, 3), "prompts/s", "900-1300")


def cache(kit: Kit) -> None:
    """Embeddings a second to and from disk."""
    count, side = (2, 128) if kit.tiny else (48, 1024)
    images = pictures(kit, count)
    store = EmbeddingCache(kit.work / "embeddings", 10**10, print)
    features = np.random.default_rng(0).normal(size=(256, side // 16, side // 16)).astype(np.float16)
    keys = [f"{n:064x}" for n in range(count)]
    began = time.perf_counter()
    for key in keys:
        store.put(key, features)
    kit.put("EmbeddingCache.put", count / (time.perf_counter() - began), "a second", "250-400")
    took = kit.seconds(lambda: [store.get(key) for key in keys], 3)
    kit.put("EmbeddingCache.get", count / took, "a second", "450-700")
    model = random_sam("sam_vit_b", side, kit.device)
    segmenter = SamSegmenter(model, name="sam_vit_b", device=kit.device, batch_size=4, cache=store, dtype="float16")
    segmenter.encode(images)
    rate = count / kit.seconds(lambda: segmenter.encode(images), 2)
    note = "image hashed, file read and hashed, float32 on the CPU"
    kit.put("encode() with all images cached", rate, "images/s", "180-250", note)
    few = images[:8]
    took = kit.seconds(lambda: [segmenter.decoder.features(e) for e in segmenter.encode(few)], 2) / len(few)
    kit.put("the same, to the device", 1 / took, "images/s", "130-180")
    held = torch.from_numpy(np.stack([features] * count)).to(kit.device)
    took = kit.seconds(lambda: [held[n : n + 1].float() for n in range(count)], 3)
    note = "10,000 in float16 are 21 GB"
    kit.put("from the GPU's own memory (prototype)", count / took, "images/s", "> 20000", note)

"""SAM's image encoder with a cache: each image is encoded once, in batches that fit the GPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.segmenter_suite import count_encoded, disc, images, random_sam

from kmine.config import AdaptConfig
from kmine.errors import UserError
from kmine.mining.adaptation.finetune import adapt
from kmine.segmenters.embedding_cache import CachingSegmenter, EmbeddingCache
from kmine.segmenters.sam.segmenter import SamSegmenter
from kmine.types import Prompts, Sample


@pytest.fixture
def logged() -> list[str]:
    return []


@pytest.fixture
def cache(tmp_path, logged) -> EmbeddingCache:
    return EmbeddingCache(tmp_path / "e", 10**9, logged.append)


def disc_example(number: int) -> tuple[Sample, list[Prompts]]:
    """A bright disc on noise, prompted with its box."""
    rng = np.random.default_rng(number)
    centre, radius = rng.uniform(24, 40, 2), rng.uniform(9, 18)
    mask = disc((64, 96), *centre, radius)
    image = rng.integers(0, 80, (64, 96, 3), dtype=np.uint8)
    image[mask] += 150
    box = (*(centre[::-1] - radius).clip(0), *(centre[::-1] + radius))
    return Sample(f"s{number}", f"s{number}", image, mask.astype(np.uint8)), [
        Prompts(1, np.array(box, np.float32), component=mask)
    ]


def files(cache: EmbeddingCache) -> list[Path]:
    return sorted(path for path in cache.folder.rglob("*") if path.is_file())


def test_an_image_is_encoded_once_for_all_segmenters_and_processes(cache, monkeypatch) -> None:
    sam, pictures = random_sam(), images()
    counts = count_encoded(sam, monkeypatch)
    segmenter = SamSegmenter(sam, name="s", cache=cache)
    first = segmenter.encode(pictures)
    again = segmenter.encode(pictures[::-1])[::-1]
    twin = segmenter.with_weights(segmenter.fine_tuner().state()).encode(pictures[:1])
    assert counts == [3]
    for a, b in zip(first, again, strict=True):
        assert a.size == b.size
        np.testing.assert_array_equal(a.features, b.features)
        assert b.features.dtype == np.float32
    np.testing.assert_array_equal(twin[0].features, first[0].features)
    # A new process, and one new image among cached ones.
    new_process = random_sam()
    counts = count_encoded(new_process, monkeypatch)
    mixed = [pictures[0], images(seed=1)[0], pictures[1]]
    SamSegmenter(new_process, name="s", cache=cache).encode(mixed)
    assert counts == [1]


class Known:
    """An image in a file; counts how often it is decoded."""

    data_fingerprint = "data"

    def __init__(self, name: str, pixels: np.ndarray) -> None:
        self.sample_id, self.pixels, self.decoded = name, pixels, 0
        self.size = pixels.shape[:2]

    @property
    def image(self) -> np.ndarray:
        self.decoded += 1
        return self.pixels


def test_a_known_image_is_neither_decoded_nor_hashed_again(cache, monkeypatch) -> None:
    pictures = images()
    known = [Known(str(n), picture) for n, picture in enumerate(pictures)]
    sam = random_sam()
    counts = count_encoded(sam, monkeypatch)
    segmenter = SamSegmenter(sam, name="s", cache=cache)
    assert isinstance(segmenter, CachingSegmenter) and segmenter.stored(known) == [None] * 3
    assert f"0 of 3 images are in {cache.folder}" in segmenter.reserve(known)
    first = segmenter.encode([*known[:2], pictures[2]])
    assert [image.decoded > 0 for image in known] == [True, True, False]
    later = SamSegmenter(random_sam(), name="s", cache=cache)
    again = [Known(str(n), picture) for n, picture in enumerate(pictures)]
    stored = later.stored(again)
    assert [found is None for found in stored] == [False, False, True] and [i.decoded for i in again] == [0, 0, 0]
    assert "2 of 3 images are in" in later.reserve(again)
    for a, b, c in zip(first, stored[:2], later.encode(again), strict=False):
        assert a.size == b.size == c.size
        np.testing.assert_array_equal(a.features, b.features.astype(np.float32))
        np.testing.assert_array_equal(a.features, c.features)
    assert counts == [3] and [i.decoded for i in again] == [0, 0, 1], "the third is hashed, and found by its pixels"
    assert later.stored(again)[2] is not None
    other = [Known("0", pictures[0])]
    other[0].data_fingerprint = "changed files"
    assert later.stored(other) == [None]


def test_what_does_not_fit_the_cache_is_said(tmp_path, logged) -> None:
    known = [Known(str(n), picture) for n, picture in enumerate(images())]
    SamSegmenter(random_sam(), name="s", cache=EmbeddingCache(tmp_path, 10**9, logged.append)).encode(known[:1])
    (stored,) = tmp_path.rglob("*.emb")
    small = EmbeddingCache(tmp_path, 2 * stored.stat().st_size, logged.append)
    text = SamSegmenter(random_sam(), name="s", cache=small).reserve(known)
    assert "may hold 2; the others are encoded again in each round, unless --segmenter.cache_gb" in text
    assert "segmenter.cache_gb 0" in SamSegmenter(random_sam(), name="s").reserve(known)
    assert SamSegmenter(random_sam(), name="s").stored(known) == [None] * 3


@pytest.mark.parametrize("part", ["mask_decoder", "prompt_encoder", "image_encoder", "pixel_mean"])
def test_only_the_encoder_and_the_normalisation_are_part_of_the_key(cache, monkeypatch, part) -> None:
    SamSegmenter(random_sam(), name="s", cache=cache).encode(images())
    changed = random_sam()
    with torch.no_grad():
        # `pixel_mean` is not part of the state dict.
        tensor = changed.pixel_mean if part == "pixel_mean" else next(getattr(changed, part).parameters())
        tensor.view(-1)[0] += 1e-3
    counts = count_encoded(changed, monkeypatch)
    SamSegmenter(changed, name="s", cache=cache).encode(images())
    assert sum(counts) == (3 if part in ("image_encoder", "pixel_mean") else 0)


def test_precision_image_size_and_code_are_part_of_the_key(cache, monkeypatch) -> None:
    def keys(dtype: str = "float32", image_size: int = 256) -> str:
        return SamSegmenter(random_sam(image_size=image_size), name="s", dtype=dtype)._embedder.signature

    signatures = {keys(), keys("float16"), keys(image_size=512)}
    monkeypatch.setattr("kmine.segmenters.sam.embedder.VERSION", 99)
    signatures.add(keys())
    assert len(signatures) == 4


def test_the_shape_of_an_image_is_part_of_the_key(cache, monkeypatch) -> None:
    sam = random_sam()
    counts = count_encoded(sam, monkeypatch)
    (picture,) = images(sizes=[(40, 60)])
    SamSegmenter(sam, name="s", cache=cache).encode([picture, picture.reshape(60, 40, 3), picture[:, ::-1]])
    assert sum(counts) == 3


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_features_do_not_depend_on_the_cache(cache, dtype) -> None:
    pictures = images()[:1]
    with_cache, without = (SamSegmenter(random_sam(), name="s", cache=c, dtype=dtype) for c in (cache, None))
    made, read, plain = (s.encode(pictures)[0].features for s in (with_cache, with_cache, without))
    np.testing.assert_array_equal(made, read)
    np.testing.assert_array_equal(made, plain)
    assert (made == made.astype(np.float16)).all() == (dtype == "float16")


def test_a_damaged_embedding_is_encoded_again(cache, logged, monkeypatch) -> None:
    sam = random_sam()
    counts = count_encoded(sam, monkeypatch)
    segmenter = SamSegmenter(sam, name="s", cache=cache)
    (good,) = segmenter.encode(images()[:1])
    (path,) = files(cache)
    path.write_bytes(path.read_bytes()[:-5])
    for _ in range(2):
        np.testing.assert_array_equal(segmenter.encode(images()[:1])[0].features, good.features)
    assert counts == [1, 1]
    assert len(logged) == 1


def test_an_interruption_keeps_the_finished_batches(cache, monkeypatch) -> None:
    sam = random_sam()
    forward, calls = sam.image_encoder.forward, []

    def interrupted(pixels):
        calls.append(len(pixels))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forward(pixels)

    monkeypatch.setattr(sam.image_encoder, "forward", interrupted)
    segmenter = SamSegmenter(sam, name="s", batch_size=1, cache=cache)
    with pytest.raises(KeyboardInterrupt):
        segmenter.encode(images())
    segmenter.encode(images())
    assert calls == [1, 1, 1, 1]


def test_a_batch_too_large_for_the_gpu_is_halved_permanently(cache, logged, monkeypatch) -> None:
    sam = random_sam()
    forward, tried = sam.image_encoder.forward, []

    def small_gpu(pixels):
        tried.append(len(pixels))
        if len(pixels) > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return forward(pixels)

    plain = SamSegmenter(random_sam(), name="s").encode([*images(), *images(1)])
    monkeypatch.setattr(sam.image_encoder, "forward", small_gpu)
    segmenter = SamSegmenter(sam, name="s", batch_size=16, log=logged.append)
    found = segmenter.encode([*images(), *images(1)])
    assert tried == [6, 3, 1, 1, 1, 1, 1, 1]
    segmenter.with_weights(segmenter.fine_tuner().state()).encode(images()[:2])
    assert tried[8:] == [1, 1], "fine-tuned copies share the batch size"
    assert len(logged) == 2 and "6 images" in logged[0] and "continuing with 1" in logged[1]
    for a, b in zip(found, plain, strict=True):
        np.testing.assert_allclose(a.features, b.features, atol=1e-4)


def test_a_gpu_too_small_for_one_image_is_an_error_in_one_line(monkeypatch) -> None:
    sam = random_sam()

    def never(pixels):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(sam.image_encoder, "forward", never)
    with pytest.raises(UserError, match=r"memory for at least one image.*--device cpu"):
        SamSegmenter(sam, name="s").encode(images()[:1])


def test_masks_from_float16_embeddings_agree() -> None:
    """Random decoders give noise; one trained on discs gives stable masks, like a real one."""
    cfg = AdaptConfig(steps=24, batch_size=2, lr=1e-3, val_every=8, min_gain=0.0)
    exact = SamSegmenter(random_sam(), name="s")
    adapted = adapt(exact, [disc_example(0), disc_example(1)], [disc_example(2)], cfg, seed=0)
    assert adapted.iou_after > 0.5
    rounded = SamSegmenter(random_sam(), name="s", dtype="float16").with_weights(adapted.state)
    pictures, prompts = [disc_example(n)[0].image for n in range(6)], [disc_example(n)[1] for n in range(6)]
    for (a,), (b,) in zip(*(s.decode(s.encode(pictures), prompts) for s in (adapted.segmenter, rounded)), strict=True):
        assert not np.array_equal(a.low_res_logits, b.low_res_logits)
        assert (a.masks & b.masks).sum() >= 0.995 * (a.masks | b.masks).sum() > 0
        np.testing.assert_allclose(a.predicted_iou, b.predicted_iou, atol=5e-3)


def test_adaptation_and_mining_share_the_cache(cache, monkeypatch) -> None:
    sam = random_sam()
    counts = count_encoded(sam, monkeypatch)
    segmenter = SamSegmenter(sam, name="s", cache=cache)
    cfg = AdaptConfig(steps=2, batch_size=2, lr=1e-3, val_every=1, min_gain=0.0)
    for seed in (0, 1):
        adapted = adapt(segmenter, [disc_example(0), disc_example(1)], [disc_example(2)], cfg, seed=seed)
        adapted.segmenter.encode([disc_example(n)[0].image for n in range(3)])
    assert sum(counts) == 3

"""Perceptual hash: copies differ in few bits, other images in many; thumbnails for verification."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from kmine.data.perceptual_hash import SMALL, grey_of, hash_views, perceptual_hash


def frame(seed: int) -> np.ndarray:
    """Smooth noise, (240, 320, 3)."""
    noise = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return np.array(Image.fromarray(noise).resize((320, 240), Image.Resampling.BICUBIC)) // 2 + 80


def recompressed(image: np.ndarray, quality: int) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return np.array(Image.open(buffer))


def distance(a: np.ndarray, b: np.ndarray) -> int:
    return (perceptual_hash(a) ^ perceptual_hash(b)).bit_count()


def test_copies_are_near_and_other_images_far():
    for seed in range(8):
        image = frame(seed)
        framed = np.pad(image, ((12, 20), (30, 10), (0, 0)))
        for copy in (recompressed(image, 30), image[1:-2, 2:-1], image[::2, ::2], framed):
            assert distance(image, np.ascontiguousarray(copy)) <= 8
        assert distance(image, frame(seed + 100)) > 12


def test_blank_and_tiny_images_have_a_hash():
    for shape in ((1, 1, 3), (2, 500, 3), (40, 50, 3)):
        assert 0 <= perceptual_hash(np.zeros(shape, np.uint8)) < 2**64


def test_the_hash_does_not_depend_on_a_black_surround():
    image = frame(0)
    assert distance(image, np.pad(image, ((40, 40), (60, 60), (0, 0)))) <= 2


def test_views_are_the_hash_and_two_thumbnails():
    image = frame(1)
    image_hash, part, whole = hash_views(grey_of(image))
    assert image_hash == perceptual_hash(image)
    assert part.shape == whole.shape == (SMALL, SMALL) and part.dtype == whole.dtype == np.uint8
    assert not np.array_equal(part, whole)

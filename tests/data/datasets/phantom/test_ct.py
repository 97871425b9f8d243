"""Phantom CT: tumours slightly darker than the liver; a threshold does not find them."""

from __future__ import annotations

import cv2
import numpy as np

from kmine.data.datasets.phantom.ct import render_ct


def scene(seed: int, has_lesion: bool = True) -> tuple[np.ndarray, np.ndarray]:
    return render_ct(np.random.default_rng(seed), 96, has_lesion)


def test_a_slice_without_a_tumour_has_an_empty_mask():
    for seed in range(5):
        assert not scene(seed, has_lesion=False)[1].any()
        assert scene(seed)[1].any()


def test_tumours_are_darker_than_the_tissue_around_them():
    darker = []
    for seed in range(20):
        image, mask = scene(seed)
        around = cv2.dilate(mask, np.ones((9, 9), np.uint8)) - mask
        darker.append(float(image[..., 0][around == 1].mean() - image[..., 0][mask == 1].mean()))
    assert np.mean(np.array(darker) > 0) >= 0.9 and 3 < np.median(darker) < 80


def test_pixels_as_dark_as_the_tumour_lie_outside_it():
    for seed in range(5):
        image, mask = scene(seed)
        grey = image[..., 0].astype(float)
        tumour = grey[mask == 1]
        as_dark = np.abs(grey - tumour.mean()) <= tumour.std()
        assert (as_dark & (mask == 0)).sum() > (as_dark & (mask == 1)).sum()

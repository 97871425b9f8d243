"""Phantom endoscopy: polyps in view, in colours other than the mucosa around them."""

from __future__ import annotations

import numpy as np

from kmine.data.datasets.phantom.polyp import render_polyp


def scene(seed: int, size: int = 64) -> tuple[np.ndarray, np.ndarray]:
    return render_polyp(np.random.default_rng(seed), size)


def test_every_scene_shows_a_polyp_in_view():
    for seed in range(20):
        image, mask = scene(seed)
        assert mask.any() and image.shape == (64, 64, 3)
        assert image[mask == 1].mean() > 10, "the black frame covers no polyp"


def test_scenes_are_in_colour():
    assert all(np.ptp(scene(seed)[0].mean(axis=(0, 1))) > 5 for seed in range(10))


def test_a_polyp_differs_from_its_surroundings_but_not_by_a_threshold():
    differences = []
    for seed in range(30):
        image, mask = scene(seed)
        grey = image.astype(float).mean(axis=2)
        differences.append(grey[mask == 1].mean() - grey[(mask == 0) & (grey > 10)].mean())
    assert min(differences) < -5 and max(differences) > 5 and np.abs(differences).mean() > 5

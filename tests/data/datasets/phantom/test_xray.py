"""Phantom chest X-ray: opacities in the lungs, brighter than the air (darker where the film is inverted)."""

from __future__ import annotations

import numpy as np

from kmine.data.datasets.phantom.xray import render_xray


def scene(seed: int, has_lesion: bool = True) -> tuple[np.ndarray, np.ndarray]:
    return render_xray(np.random.default_rng(seed), 96, has_lesion)


def test_an_image_without_infection_has_an_empty_mask():
    for seed in range(5):
        assert not scene(seed, has_lesion=False)[1].any()
        assert scene(seed)[1].any()


def test_infections_lie_in_the_middle_of_the_image():
    total = np.sum([scene(seed)[1] for seed in range(20)], axis=0, dtype=int)
    assert total[20:76, 10:86].sum() > 0.9 * total.sum()


def test_an_infection_changes_the_lungs():
    changed = []
    for seed in range(10):
        image, mask = scene(seed)
        clear = scene(seed, has_lesion=False)[0]
        difference = np.abs(image.astype(float) - clear).mean(axis=2)
        changed.append(difference[mask == 1].mean() > 2)
    assert np.mean(changed) >= 0.9

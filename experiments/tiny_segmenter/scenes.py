"""Procedural scenes for a promptable segmenter: several objects a picture, each with its exact mask.

No real image, and nothing measured on one, goes in. One painter draws everything from the same layers, so that no
rule of thumb ("it is red", "it is brighter") holds throughout: a background of blotches, stripes, vessels and folds;
objects of many outlines, marked off by tone, texture, relief or a rim, sometimes hardly at all; light, gloss,
things lying in front; then blur, noise, exposure, JPEG.

Planes are (S, S) float32 in coordinates relative to the picture, see `kmine.data.datasets.phantom.texture`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from kmine.data.datasets.phantom.texture import (
    Blob,
    Picture,
    Plane,
    bell,
    blur,
    log_uniform,
    octave_noise,
    photograph,
    pixel_grid,
    ridges,
    slopes,
    smooth_noise,
    soft_step,
)

SIDE = 192
"""Pixels of a scene's side."""
MIN_AREA = 30
"""Pixels of the smallest object worth a pair."""
MIN_VISIBLE = 0.5
"""Share of an object that must show from behind what is drawn later."""
NESTED_SHARE = 0.9
"""A later object of which this share lies inside an earlier, larger one is part of that: a lesion in its organ."""

_FLESH = np.array([[0.84, 0.50, 0.45], [0.85, 0.48, 0.25], [0.66, 0.27, 0.22], [0.88, 0.68, 0.58], [0.5, 0.3, 0.2]])


@dataclass(frozen=True)
class Scene:
    """One picture and the objects in it."""

    image: NDArray[np.uint8]
    """(S, S, 3) RGB."""
    masks: tuple[NDArray[np.bool_], ...]
    """(S, S) each: what shows of an object, in the order in which they were painted."""


def render_scene(rng: np.random.Generator, size: int = SIDE) -> Scene:
    """Draw one scene; the generator alone decides it."""
    x, y = pixel_grid(size)
    grey = rng.random() < 0.45
    albedo, height = _background(rng, x, y, grey)
    strength = log_uniform(rng, 0.5, 1.8)
    depths = _outlines(rng, x, y)
    for depth in depths:
        _fill(rng, depth, albedo, height, strength, grey)
    picture = _light(rng, x, y, albedo, height)
    _in_front(rng, picture, x, y, grey)
    return Scene(_develop(rng, picture, x, y, grey), visible_masks(depths))


def visible_masks(depths: list[Plane]) -> tuple[NDArray[np.bool_], ...]:
    """What shows of each object; later ones hide earlier ones, unless they lie inside as a part of them."""
    full = [depth >= 0 for depth in depths]
    found = []
    for index, mask in enumerate(full):
        shown = mask.copy()
        for later in full[index + 1 :]:
            inside = np.count_nonzero(later & mask) >= NESTED_SHARE * np.count_nonzero(later)
            if not (inside and np.count_nonzero(later) < 0.5 * np.count_nonzero(mask)):
                shown &= ~later
        area = np.count_nonzero(shown)
        if area >= MIN_AREA and area >= MIN_VISIBLE * np.count_nonzero(mask):
            found.append(shown)
    return tuple(found)


def _colour(rng: np.random.Generator, grey: bool) -> NDArray[np.float32]:
    """(3,) RGB of a surface."""
    if grey:
        return np.full(3, rng.uniform(0.15, 0.8), np.float32)
    if rng.random() < 0.75:
        return (rng.dirichlet(np.full(len(_FLESH), 0.6)) @ _FLESH).astype(np.float32)
    return rng.uniform(0.1, 0.9, 3).astype(np.float32)


def _background(rng: np.random.Generator, x: Plane, y: Plane, grey: bool) -> tuple[Picture, Plane]:
    """Colour and relief of what the objects lie on."""
    size = x.shape[0]
    tone = log_uniform(rng, 0.02, 0.25) * octave_noise(
        rng, size, int(rng.integers(2, 7)), 4, gain=rng.uniform(0.4, 0.9)
    )
    if rng.random() < 0.4:  # regions with borders of their own, as neighbouring organs
        parts = smooth_noise(rng, size, int(rng.integers(3, 7)))
        tone += rng.uniform(0.05, 0.4) * soft_step(parts - rng.uniform(-0.5, 0.5), log_uniform(rng, 0.02, 0.3))
    if rng.random() < 0.25:  # stripes: ribs, folds, grain of a tissue
        angle, pitch = rng.uniform(0, math.pi), rng.uniform(3, 14)
        phase = pitch * (x * math.cos(angle) + y * math.sin(angle) + 0.05 * smooth_noise(rng, size, 4))
        tone += rng.uniform(0.03, 0.2) * np.cos(2 * math.pi * phase)
    albedo = np.exp(tone)[..., None] * _colour(rng, grey)
    if rng.random() < 0.4:  # vessels
        lines = ridges(octave_noise(rng, size, int(rng.integers(3, 9)), 3), rng.uniform(4, 10))
        shift = rng.uniform(-0.6, 0.4) * (np.ones(3) if grey else np.array([0.3, 1.0, 0.8]))
        albedo *= np.exp(lines[..., None] * shift.astype(np.float32))
    height = log_uniform(rng, 0.004, 0.03) * octave_noise(rng, size, 3, 3, gain=0.4)
    if rng.random() < 0.35:
        travel = np.hypot(x - rng.uniform(-0.2, 1.2), y - rng.uniform(-0.2, 1.2)) + 0.05 * octave_noise(rng, size, 3, 2)
        height += log_uniform(rng, 0.005, 0.04) * bell(np.sin(math.pi * rng.uniform(2, 6) * travel), 0.4)
    return albedo.astype(np.float32), height


def _outlines(rng: np.random.Generator, x: Plane, y: Plane) -> list[Plane]:
    """Depths of three to six objects, the largest first."""
    radii = sorted((log_uniform(rng, 0.03, 0.36) for _ in range(int(rng.integers(3, 7)))), reverse=True)
    free = np.ones(x.shape, np.float32)
    depths: list[Plane] = []
    for radius in radii:
        # The freest of a few places: things seldom lie on one another, but often touch.
        places = rng.uniform(0.02, 0.98, (int(rng.choice([1, 3, 6])), 2))
        rows, columns = (np.clip(places[:, axis] * x.shape[0], 0, x.shape[0] - 1).astype(int) for axis in (1, 0))
        at = places[int(cv2.blur(free, (2 * int(40 * radius) + 1,) * 2)[rows, columns].argmax())]
        depths.append(_outline(rng, x, y, *at.tolist(), radius))
        free[depths[-1] > -0.02] = 0
    return depths


def _outline(rng: np.random.Generator, x: Plane, y: Plane, at_x: float, at_y: float, radius: float) -> Plane:
    """Signed depth of one object, positive inside, about in units of the picture."""
    size, kind = x.shape[0], rng.random()
    blob = Blob.draw(rng, at_x, at_y, radius, rng.uniform(0.01, 0.14), max_aspect=rng.choice([1.3, 1.8, 2.8]))
    depth = blob.depth(x, y)
    if kind < 0.66:
        return depth
    if kind < 0.79:  # lobes
        for _ in range(int(rng.integers(1, 3))):
            near = blob.point(rng.uniform(0.5, 1.0), rng.uniform(0, 2 * math.pi))
            np.maximum(depth, Blob.draw(rng, *near, radius * rng.uniform(0.35, 0.8)).depth(x, y), out=depth)
        return depth
    if kind < 0.84:  # a bite taken out: crescents, a lung beside the heart
        near = blob.point(rng.uniform(0.8, 1.2), rng.uniform(0, 2 * math.pi))
        return np.minimum(depth, -Blob.draw(rng, *near, radius * rng.uniform(0.3, 0.8)).depth(x, y))
    if kind < 0.93:  # ragged
        cells = int(np.clip(rng.uniform(1, 3) / radius, 3, 48))
        return depth + radius * rng.uniform(0.1, 0.35) * octave_noise(rng, size, cells, 2)
    if kind < 0.98:  # squarish or pointed
        angle, power = rng.uniform(0, math.pi), log_uniform(rng, 1.1, 5)
        aspect = log_uniform(rng, 1, 2.2)
        u = np.abs((x - at_x) * math.cos(angle) + (y - at_y) * math.sin(angle)) / aspect
        v = np.abs((y - at_y) * math.cos(angle) - (x - at_x) * math.sin(angle))
        return radius - (u**power + v**power + 1e-9) ** (1 / power)
    return _tube(rng, size, at_x, at_y, radius)


def _tube(rng: np.random.Generator, size: int, at_x: float, at_y: float, radius: float) -> Plane:
    """A bent tube: a vessel, a gut, an instrument."""
    ends = np.array([at_x, at_y]) + rng.normal(0, 1.3 * radius, (3, 2))
    t = np.linspace(0, 1, 12)[:, None]
    path = (1 - t) ** 2 * ends[0] + 2 * t * (1 - t) * ends[1] + t**2 * ends[2]
    canvas = np.full((size, size), 255, np.uint8)
    cv2.polylines(canvas, [np.round(path * size).astype(np.int32)], False, 0, 1)
    distance = cv2.distanceTransform(canvas, cv2.DIST_L2, cv2.DIST_MASK_PRECISE) / size
    return max(radius * rng.uniform(0.15, 0.4), 2.5 / size) - distance


def _fill(rng: np.random.Generator, depth: Plane, albedo: Picture, height: Plane, strength: float, grey: bool) -> None:
    """Mark one object off in place: by tone, texture, relief and rim, each more or less, some not at all."""
    size = depth.shape[0]
    edge = max(log_uniform(rng, 0.002, 0.03), 0.5 / size)
    reach = max(float(depth.max()), 1e-3)
    alpha = soft_step(depth, min(edge, 0.5 * reach))
    shift = np.full(3, rng.normal(0, 0.4)) if grey else rng.normal(0, 0.14, 3) + rng.normal(0, 0.26)
    if rng.random() < 0.8:  # most can be told by their tone, if only just
        shift = shift * max(1.0, rng.uniform(0.1, 0.25) / (strength * float(np.abs(shift).max()) + 1e-6))
    skin = np.broadcast_to((strength * shift).astype(np.float32), albedo.shape).copy()
    if rng.random() < 0.5:
        grain = octave_noise(rng, size, int(rng.integers(4, 32)), 2)
        skin += (strength * log_uniform(rng, 0.02, 0.2) * grain)[..., None]
    if rng.random() < 0.4:  # a slope of tone across the object
        skin += (strength * rng.uniform(0.05, 0.3) * smooth_noise(rng, size, 2))[..., None]
    if rng.random() < 0.5:  # it covers what lay beneath
        cover = (alpha * rng.uniform(0.3, 1.0))[..., None]
        albedo += cover * (albedo.mean(axis=(0, 1)) - albedo)
    albedo *= np.exp(alpha[..., None] * skin)
    if rng.random() < 0.4:
        rim = strength * rng.normal(0, 0.3) * bell(depth + rng.uniform(-0.01, 0.01), log_uniform(rng, 0.006, 0.02))
        albedo *= np.exp(rim)[..., None]
    if rng.random() < 0.5:
        inner = np.clip(depth / reach, 0, 1)
        dome = 1 - (1 - inner) ** log_uniform(rng, 1.2, 3)
        height += rng.choice([1, 1, 1, -0.5]) * reach * strength * log_uniform(rng, 0.1, 0.7) * dome


def _light(rng: np.random.Generator, x: Plane, y: Plane, albedo: Picture, height: Plane) -> Picture:
    """Light the relief from a lamp near by, with gloss; one scene in three is flat, as a slice or a film is."""
    if rng.random() < 0.35:
        return albedo * (1 + rng.uniform(0, 0.3) * smooth_noise(rng, x.shape[0], 2))[..., None]
    lamp_x, lamp_y, lamp_z = rng.uniform(-0.2, 1.2), rng.uniform(-0.2, 1.2), rng.uniform(0.3, 1.2)
    slope_x, slope_y = slopes(blur(height, rng.uniform(0.003, 0.012)))
    to_x, to_y = lamp_x - x, lamp_y - y
    near = 1 / np.sqrt(to_x**2 + to_y**2 + lamp_z**2)
    facing = (lamp_z - slope_x * to_x - slope_y * to_y) * near / np.sqrt(slope_x**2 + slope_y**2 + 1)
    facing = np.clip(facing, 0, 1)
    ambient, falloff = rng.uniform(0.25, 0.7), rng.uniform(0, 1.3)
    shade = (ambient + (1 - ambient) * facing) / (1 + falloff * (to_x**2 + to_y**2))
    wet = soft_step(octave_noise(rng, x.shape[0], 8, 3, gain=0.8) + rng.uniform(-1, 0.8), 0.3)
    shine = rng.uniform(0, 0.7) * facing ** rng.uniform(20, 90) * wet**2
    return albedo * (1.2 * shade)[..., None] + shine[..., None]


def _in_front(rng: np.random.Generator, picture: Picture, x: Plane, y: Plane, grey: bool) -> None:
    """Small things over objects and background that belong to no mask: glints, bubbles, cables, stripes."""
    for _ in range(int(rng.integers(0, 7)) if rng.random() < 0.5 else 0):
        blob = Blob.draw(rng, *rng.uniform(0, 1, 2).tolist(), log_uniform(rng, 0.006, 0.03), max_aspect=4.0)
        glint = rng.uniform(0.3, 1.0) * soft_step(blob.depth(x, y), 0.004)
        picture += glint[..., None] * (rng.uniform(0.8, 1.1) - picture)
    for _ in range(int(rng.integers(1, 4)) if rng.random() < 0.25 else 0):
        start, lean, sway = rng.uniform(-0.3, 1.3), rng.uniform(-1.5, 1.5), rng.uniform(-0.1, 0.1)
        line = bell(x - start - lean * y - sway * np.sin(6 * y), log_uniform(rng, 0.004, 0.015))
        level = np.full(3, rng.uniform(0, 1)) if grey else rng.uniform(0, 1, 3)
        picture += (rng.uniform(0.2, 0.9) * line)[..., None] * (level.astype(np.float32) - picture)


def _develop(rng: np.random.Generator, picture: Picture, x: Plane, y: Plane, grey: bool) -> NDArray[np.uint8]:
    """Frame, blur, exposure, noise."""
    picture = blur(picture, log_uniform(rng, 0.001, 0.012))
    if rng.random() < 0.25:  # black corners or a black surround
        edge = np.abs(x - 0.5) + np.abs(y - 0.5) if rng.random() < 0.6 else np.hypot(x - 0.5, y - 0.5) + 0.2
        picture = picture * (edge < rng.uniform(0.75, 0.95))[..., None]
    low, high = np.percentile(picture, [2, 98])
    if rng.random() < 0.6:  # stretched, as windowed slices and films are
        black, white = rng.uniform(0, 0.35), rng.uniform(0.65, 1.05)
        picture = black + (picture - low) * ((white - black) / max(high - low, 0.05))
    picture = np.clip(picture, 0, 1.2).astype(np.float32) ** log_uniform(rng, 0.7, 1.4)
    if grey and rng.random() < 0.3:
        picture = 1.0 - picture
    plane = picture[..., 0] if grey else picture
    return photograph(rng, np.ascontiguousarray(plane), log_uniform(rng, 0.003, 0.05), log_uniform(rng, 0.0008, 0.006))

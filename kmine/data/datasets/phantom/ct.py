"""Phantom CT: a slice of the upper abdomen with tumours in a liver-like organ, which no threshold separates.

Body frame: origin in the middle of the trunk, u to the right, v to the spine, half the width of the trunk is 1.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from kmine.data.datasets.phantom import texture as tx
from kmine.data.datasets.phantom.texture import Blob, Mask, Plane


class _Tissue:
    """Grey values (1.0 is white), which depend on the window and the phase of the contrast medium."""

    def __init__(self, rng: np.random.Generator) -> None:
        phase, base = rng.uniform(0, 1), rng.uniform(0.4, 0.55)
        self.liver = base + rng.uniform(-0.04, 0.1) + 0.1 * phase
        self.fat = base - rng.uniform(0.2, 0.34)
        self.fluid = base - rng.uniform(0.04, 0.14)
        self.muscle = base + rng.uniform(-0.02, 0.03)
        self.spleen = self.liver + rng.uniform(-0.06, 0.1)
        self.kidney = base + 0.35 * phase + rng.uniform(-0.03, 0.05)
        self.vessel = base + 0.4 * phase + rng.uniform(-0.04, 0.03)
        self.bone = min(1.0, base + rng.uniform(0.35, 0.5))


def render_ct(rng: np.random.Generator, size: int, has_lesion: bool) -> tuple[NDArray[np.uint8], Mask]:
    """One slice: (S, S, 3) uint8 with three equal channels, and its mask, (S, S) uint8 in {0, 1}."""
    u, v, x, y = _body_frame(rng, size)
    tissue = _Tissue(rng)
    slice_, cavity = _trunk(rng, u, v, tissue)
    _gut(rng, slice_, u, v, cavity, tissue)
    _paired_organs(rng, slice_, u, v, cavity, tissue)
    lobe, liver_depth = _liver(rng, slice_, u, v, cavity, tissue)
    _spine_and_vessels(rng, slice_, u, v, tissue)
    _gall_bladder(rng, slice_, u, v, lobe, tissue)
    mask = np.zeros((size, size), np.uint8)
    if has_lesion:
        tumour_depth = _tumours(rng, slice_, u, v, lobe, liver_depth, tissue)
        mask = tx.mask_of(np.minimum(tumour_depth, liver_depth))
    _table(rng, slice_, x, y)
    return _scan(rng, slice_, v), mask


def _body_frame(rng: np.random.Generator, size: int) -> tuple[Plane, Plane, Plane, Plane]:
    """Coordinates (u, v) of the body and (x, y) of the image; orientation, zoom and tilt differ between scans."""
    x, y = tx.pixel_grid(size)
    if rng.random() < 0.25:
        y = 1 - y
    tilt, half_width = rng.uniform(-0.15, 0.15), rng.uniform(0.42, 0.54)
    shift_x, shift_y = rng.uniform(-0.05, 0.05, 2).tolist()
    along, across = (x - 0.5 - shift_x) / half_width, (y - 0.5 - shift_y) / half_width
    u = along * math.cos(tilt) + across * math.sin(tilt)
    v = across * math.cos(tilt) - along * math.sin(tilt)
    return u, v, x, y


def _trunk(rng: np.random.Generator, u: Plane, v: Plane, tissue: _Tissue) -> tuple[Plane, Plane]:
    """Skin, fat, muscle wall and ribs; returns the slice and the depth below the inner wall."""
    power, tall = rng.uniform(2.0, 2.8), rng.uniform(0.66, 0.86)
    fat, wall, count = tx.log_uniform(rng, 0.03, 0.2), rng.uniform(0.05, 0.1), int(rng.integers(9, 15))
    turn, bony = rng.uniform(0, 2 * math.pi), rng.uniform(0.2, 0.7)
    noise = tx.octave_noise(rng, u.shape[0], 4, 4, gain=0.8)
    depth = 1 - ((np.abs(u)) ** power + np.abs(v / tall) ** power) ** (1 / power)
    depth += 0.02 * tx.smooth_noise(rng, u.shape[0], 5)
    slice_ = np.zeros_like(u)
    tx.fill(slice_, tissue.muscle, depth, 0.006)
    tx.fill(slice_, tissue.fat + 0.02 * noise, depth - 0.012, 0.006)
    tx.fill(slice_, tissue.muscle + 0.03 * noise, depth - fat, 0.012)
    theta = np.arctan2(v, u)
    rib = tx.bell(depth - fat - wall / 2, wall / 3) * tx.soft_step(np.cos(count * theta + turn) - 1 + bony, 0.15)
    tx.paint(slice_, tissue.bone, rib)
    cavity = depth - fat - wall
    tx.fill(slice_, tissue.fat + 0.03 + 0.03 * noise, cavity, 0.012)
    return slice_, cavity


def _organ(slice_: Plane, depth: Plane, cavity: Plane, value: Plane | float, softness: float = 0.015) -> Plane:
    """Paint one organ inside the cavity; returns its depth there."""
    inside = np.minimum(depth, cavity - 0.01)
    tx.fill(slice_, value, inside, softness)
    return inside


def _gut(rng: np.random.Generator, slice_: Plane, u: Plane, v: Plane, cavity: Plane, tissue: _Tissue) -> None:
    """Stomach and loops of bowel: walls around fluid, food or gas."""
    for loop in range(int(rng.integers(4, 9))):
        place_u, place_v = rng.uniform(-0.35, 0.75), rng.uniform(-0.55, 0.2)
        radius = rng.uniform(0.2, 0.34) if loop == 0 else tx.log_uniform(rng, 0.06, 0.16)
        blob = Blob.draw(rng, place_u, place_v, radius, wobble=0.15, max_aspect=2.0)
        wall, content = tissue.muscle + rng.uniform(-0.05, 0.1), rng.random()
        level, speckle = rng.uniform(-0.3, 0.5), tx.octave_noise(rng, u.shape[0], 16, 2)
        depth = _organ(slice_, blob.depth(u, v), cavity, wall)
        inner = tissue.fluid + (0.06 * speckle if content < 0.4 else rng.uniform(-0.05, 0.05))
        tx.fill(slice_, inner, depth - 0.03, 0.015)
        if content > 0.6:  # gas rises to the front, for either orientation of the image
            gas = np.minimum(depth - 0.03, level * radius - (v - place_v))
            tx.fill(slice_, 0.0, gas, 0.01)


def _paired_organs(rng: np.random.Generator, slice_: Plane, u: Plane, v: Plane, cavity: Plane, tissue: _Tissue) -> None:
    """Spleen, kidneys and their cysts: dark round objects similar to tumours."""
    spleen = Blob.draw(rng, rng.uniform(0.55, 0.72), rng.uniform(-0.05, 0.25), rng.uniform(0.15, 0.28), 0.1, 2.0)
    organs = [(spleen, tissue.spleen)]
    for side in (-1, 1):
        place = side * rng.uniform(0.36, 0.5), rng.uniform(0.28, 0.42)
        kidney = Blob.draw(rng, *place, rng.uniform(0.11, 0.18), wobble=0.06, max_aspect=1.5)
        present, value = rng.random() < 0.65, tissue.kidney + rng.uniform(-0.02, 0.02)
        if present:
            organs.append((kidney, value))
    for blob, value in organs:
        depth = _organ(slice_, blob.depth(u, v), cavity, value)
        has_core, has_cyst = rng.random() < 0.5, rng.random() < 0.45
        core, darker = rng.uniform(0.4, 0.6) * blob.radius, rng.uniform(0.06, 0.25)
        place = blob.point(rng.uniform(0.2, 0.9), rng.uniform(0, 7))
        cyst = Blob.draw(rng, *place, tx.log_uniform(rng, 0.04, 0.12), 0.1)
        if has_core and blob is not spleen:
            tx.fill(slice_, tissue.fat + 0.1, depth - core, 0.02)
        if has_cyst:
            _organ(slice_, cyst.depth(u, v), cavity, value - darker)


def _liver(
    rng: np.random.Generator, slice_: Plane, u: Plane, v: Plane, cavity: Plane, tissue: _Tissue
) -> tuple[Blob, Plane]:
    """Right and left lobe with vessels and fissure; returns the right lobe and the depth below the surface."""
    size = u.shape[0]
    right = Blob.draw(rng, rng.uniform(-0.48, -0.36), rng.uniform(-0.12, 0.06), rng.uniform(0.36, 0.52), 0.08, 1.4)
    left = Blob.draw(rng, rng.uniform(-0.15, 0.1), rng.uniform(-0.4, -0.25), rng.uniform(0.1, 0.3), 0.12, 1.8)
    branches, calibre = tx.octave_noise(rng, size, int(rng.integers(3, 6)), 2), rng.uniform(5, 12)
    uneven, present, fissure = rng.uniform(0.005, 0.03), rng.uniform(0.1, 1.0), rng.uniform(0, 1)
    tone = tx.octave_noise(rng, size, 3, 5, gain=0.7)
    depth = np.maximum(right.depth(u, v), left.depth(u, v))
    depth = _organ(slice_, depth, cavity, tissue.liver + uneven * tone)
    tree = tx.ridges(branches, calibre) * tx.soft_step(depth - 0.06, 0.04)
    tx.paint(slice_, 0.5 * (tissue.vessel + tissue.liver), present * tree)
    cut = tx.bell(u - left.x + 0.1 + 0.4 * (v - left.y) + 0.03 * branches, 0.025)
    cut *= tx.soft_step(-0.05 - v, 0.05) * tx.soft_step(depth, 0.02)
    tx.paint(slice_, tissue.fat + 0.08, 0.5 * fissure * cut)
    for _ in range(int(rng.integers(0, 5))):
        place = right.point(rng.uniform(0, 0.8), rng.uniform(0, 2 * math.pi))
        stub = Blob.draw(rng, *place, rng.uniform(0.02, 0.045), 0.05, 2.5)
        _organ(slice_, stub.depth(u, v), depth, tissue.vessel)
    return right, depth


def _spine_and_vessels(rng: np.random.Generator, slice_: Plane, u: Plane, v: Plane, tissue: _Tissue) -> None:
    """Back muscles, vertebra with its canal, aorta and vena cava."""
    back, radius = rng.uniform(0.4, 0.5), rng.uniform(0.12, 0.17)
    speckle = tx.octave_noise(rng, u.shape[0], 16, 2)
    for side in (-1, 1):
        muscle = Blob.draw(rng, side * rng.uniform(0.2, 0.26), back + 0.08, rng.uniform(0.1, 0.15), 0.08)
        tx.fill(slice_, tissue.muscle + 0.02 * speckle, muscle.depth(u, v), 0.015)
    body = Blob(0.0, back, radius, 1.2, 0.0, ((3, 0.06, 0.3),)).depth(u, v)
    tx.fill(slice_, tissue.bone, body, 0.02)
    tx.fill(slice_, tissue.bone - 0.15 + 0.06 * speckle, body - 0.03, 0.02)
    process = 0.8 * tx.bell(u, 0.025) * tx.soft_step(v - back - radius, 0.02) * tx.soft_step(0.68 - v, 0.02)
    tx.paint(slice_, tissue.bone, process)
    tx.fill(slice_, tissue.fluid, 0.05 - np.hypot(u, v - back - radius - 0.02), 0.015)
    for place_u, place_v, calibre in ((0.04, -0.08, 0.07), (-0.16, -0.06, 0.08)):
        tube_u, tube_v = place_u + rng.uniform(-0.03, 0.03), back - radius + place_v + rng.uniform(-0.02, 0.04)
        tube = Blob.draw(rng, tube_u, tube_v, calibre * rng.uniform(0.8, 1.2), 0.03, 1.3)
        tx.fill(slice_, tissue.vessel + rng.uniform(-0.04, 0.02), tube.depth(u, v), 0.012)


def _gall_bladder(rng: np.random.Generator, slice_: Plane, u: Plane, v: Plane, lobe: Blob, tissue: _Tissue) -> None:
    """A dark object at the medial edge of the liver, distinguished from a tumour by its place only."""
    place = lobe.point(rng.uniform(0.95, 1.15), lobe.angle + rng.uniform(-0.5, 0.5))
    blob = Blob.draw(rng, *place, tx.log_uniform(rng, 0.06, 0.14), wobble=0.06, max_aspect=2.0)
    present, value = rng.random() < 0.3, tissue.fluid + rng.uniform(-0.05, 0.05)
    if present:
        tx.fill(slice_, value, blob.depth(u, v), 0.015)


def _tumours(
    rng: np.random.Generator, slice_: Plane, u: Plane, v: Plane, lobe: Blob, liver_depth: Plane, tissue: _Tissue
) -> Plane:
    """Paint one to five tumours into the liver, in place; returns the depth below their common surface."""
    size = u.shape[0]
    count = int(rng.choice([1, 2, 3, 5], p=[0.5, 0.25, 0.15, 0.1]))
    darker, softness = tx.log_uniform(rng, 0.13, 0.28), tx.log_uniform(rng, 0.012, 0.04)
    rim, core = rng.uniform(0, 0.08) * (rng.random() < 0.3), rng.uniform(0, 0.12) * (rng.random() < 0.3)
    uneven, wobble = rng.uniform(0, 0.04), rng.uniform(0.06, 0.18)
    tone = tx.octave_noise(rng, size, 10, 3, gain=0.8)
    together = np.full((size, size), -1.0, np.float32)
    for number in range(count):
        place = lobe.point(0.75 * math.sqrt(rng.random()), rng.uniform(0, 2 * math.pi))
        radius = tx.log_uniform(rng, 0.13, 0.36) if number == 0 else tx.log_uniform(rng, 0.08, 0.2)
        blob = Blob.draw(rng, *place, radius, wobble, max_aspect=1.7)
        np.maximum(together, blob.depth(u, v), out=together)
    inside = tx.soft_step(liver_depth, 0.015)
    change = -darker * tx.soft_step(together, softness) - core * tx.soft_step(together - 0.08, 0.04)
    change += rim * tx.bell(together + 0.01, 0.02) + uneven * tone * tx.soft_step(together, softness)
    slice_ += inside * change
    return together


def _table(rng: np.random.Generator, slice_: Plane, x: Plane, y: Plane) -> None:
    """Bright arc of the patient table below the back, outside the body."""
    present, level, bend = rng.random() < 0.6, rng.uniform(0.2, 0.7), rng.uniform(-0.3, 0.3)
    arc = level * tx.bell(y - rng.uniform(0.93, 1.0) + bend * (x - 0.5) ** 2, 0.008)
    if present:
        np.maximum(slice_, arc, out=slice_)


def _scan(rng: np.random.Generator, slice_: Plane, v: Plane) -> NDArray[np.uint8]:
    """Add streaks, blur, window and noise."""
    size = slice_.shape[0]
    streaky, hardness = rng.random() < 0.2, rng.uniform(0.01, 0.04)
    streaks = tx.smooth_noise(rng, size, 48, 3) * tx.bell(v - 0.2, 0.5)
    if streaky:
        slice_ = slice_ + hardness * streaks
    gain, level = tx.log_uniform(rng, 0.85, 1.5), rng.uniform(-0.08, 0.08)
    slice_ = (tx.blur(slice_, tx.log_uniform(rng, 0.002, 0.01)) - 0.5) * gain + 0.5 + level
    return tx.photograph(rng, slice_, tx.log_uniform(rng, 0.008, 0.035), rng.uniform(0.003, 0.008))

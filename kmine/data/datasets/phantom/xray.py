"""Phantom chest X-ray: hazy opacities in the lungs; haze outside the lungs is no infection.

Chest frame: origin in the middle of the image before zoom and tilt, u to the right, v down, both about [-1, 1].
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from kmine.data.datasets.phantom import texture as tx
from kmine.data.datasets.phantom.texture import Blob, Mask, Plane


def render_xray(rng: np.random.Generator, size: int, has_lesion: bool) -> tuple[NDArray[np.uint8], Mask]:
    """One frontal chest X-ray: (S, S, 3) uint8 with three equal channels, and its mask, (S, S) uint8 in {0, 1}."""
    u, v = _chest_frame(rng, size)
    film, torso = _torso(rng, u, v)
    lungs, heart = _lungs(rng, u, v)
    dark, edge = rng.uniform(0.35, 0.55), tx.log_uniform(rng, 0.03, 0.08)
    tone = tx.octave_noise(rng, size, 4, 5, gain=0.75)
    air = tx.soft_step(lungs, edge)
    film -= dark * air * (1 + rng.uniform(0.02, 0.08) * tone)
    _dullness(rng, film, u, v)
    _vessel_markings(rng, film, u, v, air)
    mask = np.zeros((size, size), np.uint8)
    if has_lesion:
        mask = tx.mask_of(np.minimum(_infection(rng, film, u, v, air, dark), lungs))
    _bones(rng, film, u, v, torso)
    film += rng.uniform(0.0, 0.15) * tx.soft_step(heart, 0.05)
    _devices(rng, film, u, v)
    return _expose(rng, film, torso), mask


def _chest_frame(rng: np.random.Generator, size: int) -> tuple[Plane, Plane]:
    """Coordinates (u, v) of the chest; zoom, tilt, centring and build differ between patients."""
    x, y = tx.pixel_grid(size)
    tilt, zoom, build = rng.uniform(-0.12, 0.12), rng.uniform(0.92, 1.25), rng.uniform(0.85, 1.15)
    shift_x, shift_y = rng.uniform(-0.08, 0.08), rng.uniform(-0.08, 0.1)
    along, across = (2 * x - 1) * zoom - shift_x, (2 * y - 1) * zoom - shift_y
    cos, sin = math.cos(tilt), math.sin(tilt)
    return (along * cos + across * sin) * build, across * cos - along * sin


def _torso(rng: np.random.Generator, u: Plane, v: Plane) -> tuple[Plane, Plane]:
    """Soft tissue, brighter downwards and in the middle; returns the film and the depth below the skin."""
    size = u.shape[0]
    base, belly, spine = rng.uniform(0.55, 0.75), rng.uniform(0.0, 0.2), rng.uniform(0.05, 0.25)
    shoulder, waist = rng.uniform(-0.95, -0.75), rng.uniform(0.86, 1.05)
    segments, blotch = rng.uniform(9, 13), tx.octave_noise(rng, size, 3, 4)
    wall = waist + 0.12 * tx.bell(v - shoulder - 0.4, 0.7)
    slope = v - shoulder + 0.5 - 0.5 * np.minimum(np.abs(u), 1.2) - 0.02 * blotch
    neck = 0.25 - np.abs(u)
    torso = np.minimum(wall - np.abs(u), np.maximum(slope, neck))
    film = base + belly * tx.soft_step(v - 0.5, 0.2) + 0.02 * blotch
    column = tx.bell(u + 0.03 * np.sin(2 * v), 0.16)
    film += spine * column * (0.85 + 0.15 * np.cos(math.pi * segments * v))
    film -= 0.7 * spine * tx.bell(u - 0.02, 0.06) * tx.soft_step(-0.25 - v, 0.1)  # air of the trachea
    return film, torso


def _lungs(rng: np.random.Generator, u: Plane, v: Plane) -> tuple[Plane, Plane]:
    """Depth below the surface of either lung, and of the heart, which hides part of the left one."""
    size = u.shape[0]
    lean, swell = rng.uniform(-0.05, 0.05), 0.02 * tx.smooth_noise(rng, size, 4)
    heart_radius, heart_u, heart_v = rng.uniform(0.22, 0.4), rng.uniform(0.06, 0.16), rng.uniform(0.25, 0.4)
    heart = Blob.draw(rng, heart_u, heart_v, heart_radius, wobble=0.05, max_aspect=1.4).depth(u, v)
    lungs = np.full((size, size), -2.0, np.float32)
    for side in (-1, 1):
        middle, half = side * rng.uniform(0.42, 0.48) + lean, rng.uniform(0.28, 0.36)
        top, bottom = rng.uniform(-0.85, -0.7), rng.uniform(0.45, 0.75)
        dome, narrow = rng.uniform(0.15, 0.45), rng.uniform(0.3, 0.55)
        centre = middle - side * narrow * 0.25 * np.clip(-v, -0.5, 1)
        width = half * (1 - narrow * np.clip((-0.1 - v) / 0.8, 0, 1) ** 2)
        flank = width - np.abs(u - centre)
        apex = 0.45 * ((v - top) * 2 - ((u - centre) / np.maximum(width, 0.05)) ** 2 * 0.5)
        floor = bottom - dome * ((np.abs(u - centre) / 0.35) ** 2) * 0.5 - v
        # The angle at the side reaches lower than the dome's middle.
        floor += 0.5 * np.clip(side * (u - middle), 0, 0.4)
        np.maximum(lungs, np.minimum(np.minimum(flank, apex), floor) + swell, out=lungs)
    return np.minimum(lungs, -heart), heart


def _dullness(rng: np.random.Generator, film: Plane, u: Plane, v: Plane) -> None:
    """Breasts, shoulder blades, folds of soft tissue: broad haze outside the lungs."""
    breasts, blades, high = rng.uniform(0, 0.1), rng.uniform(0, 0.08), rng.uniform(0.2, 0.4)
    for side in (-1, 1):
        breast = Blob.draw(rng, side * rng.uniform(0.45, 0.6), high, rng.uniform(0.28, 0.42), wobble=0.05)
        film += breasts * tx.soft_step(breast.depth(u, v), 0.04) * tx.bell(v - high - 0.2, 0.3)
        blade = Blob.draw(rng, side * rng.uniform(0.7, 0.85), -0.35, rng.uniform(0.15, 0.25), wobble=0.1, max_aspect=2)
        film += blades * tx.soft_step(blade.depth(u, v), 0.03)
    film += rng.uniform(0, 0.04) * tx.smooth_noise(rng, u.shape[0], 3)


def _vessel_markings(rng: np.random.Generator, film: Plane, u: Plane, v: Plane, air: Plane) -> None:
    """Vessels that branch out from the hila, finer and fainter outwards."""
    strength, hilum = rng.uniform(0.02, 0.08), rng.uniform(0.02, 0.1)
    noise = tx.octave_noise(rng, u.shape[0], 10, 3, gain=0.8)
    for side in (-1, 1):
        reach = np.hypot(u - side * 0.2, (v - 0.02) * 0.8)
        film += hilum * tx.bell(reach, rng.uniform(0.08, 0.14))
        film += strength * air * tx.bell(reach, 0.4) * noise


def _infection(rng: np.random.Generator, film: Plane, u: Plane, v: Plane, air: Plane, dark: float) -> Plane:
    """Add opacities to one lung or both, in place; returns the depth below their common outline."""
    size = u.shape[0]
    strength, softness = tx.log_uniform(rng, 0.6, 1.3), tx.log_uniform(rng, 0.02, 0.07)
    grainy, ragged, wobble = rng.uniform(0.1, 0.4), rng.uniform(0.005, 0.03), rng.uniform(0.08, 0.2)
    count, first_side = int(rng.integers(1, 6)), int(rng.choice([-1, 1]))
    both = rng.random() < 0.55
    clouds = tx.octave_noise(rng, size, 8, 4, gain=0.8)
    haze = np.full((size, size), -2.0, np.float32)
    for number in range(count):
        side = -first_side if both and number % 2 else first_side
        radius = tx.log_uniform(rng, 0.2, 0.45) if number == 0 else tx.log_uniform(rng, 0.12, 0.3)
        place = side * rng.uniform(0.42, 0.62), rng.uniform(-0.4, 0.35)
        np.maximum(haze, Blob.draw(rng, *place, radius, wobble, max_aspect=2.2).depth(u, v), out=haze)
    haze += ragged * np.clip(clouds, -2, 2)
    texture = np.clip(1 - grainy + grainy * clouds, 0.2, 1.4)
    film += dark * strength * tx.soft_step(haze, softness) * air * texture
    return haze


def _bones(rng: np.random.Generator, film: Plane, u: Plane, v: Plane, torso: Plane) -> None:
    """Ribs at the back and the front, and clavicles: bright bands across the lungs."""
    rear, front = rng.uniform(0.02, 0.08), rng.uniform(0.0, 0.04)
    pitch, offset, sag = rng.uniform(4.0, 5.5), rng.uniform(0, 2), rng.uniform(0.3, 0.6)
    side = np.abs(u)
    chest = tx.soft_step(torso - 0.06, 0.03) * tx.soft_step(side - 0.1, 0.05) * tx.soft_step(0.75 - v, 0.1)
    back_ribs = np.cos(math.pi * (pitch * (v - 0.25 * side + sag * side**2) + offset))
    front_ribs = np.cos(math.pi * (0.8 * pitch * (v + 0.9 * side - 0.5 * side**2) + offset * 1.7))
    film += chest * (rear * tx.soft_step(back_ribs - 0.3, 0.25) + front * tx.soft_step(front_ribs - 0.5, 0.2))
    film += chest * 0.5 * rear * tx.bell(back_ribs - 0.3, 0.2)  # the denser rim of a rib
    height, rise, level = rng.uniform(-0.72, -0.55), rng.uniform(0.05, 0.35), rng.uniform(0.04, 0.14)
    line = v - height + rise * (side - 0.4) - 0.04 * np.sin(6 * side)
    film += level * tx.bell(line, 0.035) * tx.soft_step(side - 0.08, 0.03) * tx.soft_step(0.8 - side, 0.04)


def _devices(rng: np.random.Generator, film: Plane, u: Plane, v: Plane) -> None:
    """Cables, round pads, a pacemaker, a side marker."""
    for _ in range(int(rng.integers(0, 4))):
        start, lean, sway = rng.uniform(-0.9, 0.9), rng.uniform(-0.7, 0.7), rng.uniform(-0.25, 0.25)
        pace, until = rng.uniform(1.5, 4), rng.uniform(-0.3, 1.2)
        path = u - start - lean * v - sway * np.sin(pace * v + start)
        film += rng.uniform(0.08, 0.35) * tx.bell(path, 0.012) * tx.soft_step(until - v, 0.02)
    for _ in range(int(rng.integers(0, 4)) if rng.random() < 0.35 else 0):
        pad_u, pad_v = rng.uniform(-0.8, 0.8), rng.uniform(-0.7, 0.6)
        distance = np.hypot(u - pad_u, v - pad_v)
        film += rng.uniform(0.06, 0.3) * tx.soft_step(rng.uniform(0.03, 0.07) - distance, 0.008)
    paced, box_u, box_v = rng.random() < 0.12, rng.uniform(-0.7, 0.7), rng.uniform(-0.6, -0.3)
    box = 0.12 - ((u - box_u) ** 4 + (1.4 * (v - box_v)) ** 4) ** 0.25
    tx.paint(film, 0.95, tx.soft_step(box, 0.008) * float(paced))
    marked, side = rng.random() < 0.4, float(rng.choice([-1, 1]))
    marker = np.minimum(0.05 - np.abs(u - side * 0.88), 0.08 - np.abs(v + 0.85))
    tx.paint(film, 0.95, tx.soft_step(marker, 0.01) * tx.bell(marker - 0.015, 0.015) * float(marked))


def _expose(rng: np.random.Generator, film: Plane, torso: Plane) -> NDArray[np.uint8]:
    """Add background, blur, exposure and noise."""
    black, level, gamma = rng.uniform(0.0, 0.15), rng.uniform(-0.12, 0.12), tx.log_uniform(rng, 0.7, 1.5)
    gain, cone = tx.log_uniform(rng, 0.75, 1.35), rng.uniform(-0.1, 0.1)
    inverted = rng.random() < 0.15
    tx.fill(film, black, -torso, 0.02)
    film = tx.blur(film, tx.log_uniform(rng, 0.002, 0.012))
    film = np.clip((film - 0.5) * gain + 0.5 + level, 0, 1.1) ** gamma
    if inverted:  # dark bones, as some stations display them: a rare appearance, scarce among few labels
        film = 1 - film
    film += cone * (np.linspace(-1, 1, film.shape[0], dtype=np.float32)[:, None])
    return tx.photograph(rng, film, tx.log_uniform(rng, 0.005, 0.03), rng.uniform(0.0, 0.005))

"""Phantom endoscopy: polyps, tinted domes on a folded height field; neither colour nor shading alone identifies one."""

from __future__ import annotations

import math

import cv2
import numpy as np
from numpy.typing import NDArray

from kmine.data.datasets.phantom import texture as tx
from kmine.data.datasets.phantom.texture import Blob, Mask, Picture, Plane

_MUCOSA = np.array([[0.84, 0.50, 0.45], [0.85, 0.48, 0.25], [0.66, 0.27, 0.22], [0.88, 0.68, 0.58], [0.72, 0.50, 0.33]])
"""Rows of RGB, mixed to the colour of the mucosa: pink, orange, deep red, pale, brownish."""
_TINTS = np.array([[0.15, -0.50, -0.40], [0.20, 0.35, 0.30], [-0.35, -0.50, -0.45], [0.10, 0.10, -0.25]])
"""Rows of log-RGB shifts: redder, paler, darker, yellower."""
_TINT_WEIGHTS = (0.45, 0.3, 0.3, 0.12)
"""Dirichlet weights of the tints: low ones make one tint dominate, so that opposite ones seldom cancel."""
_NARROW_BAND = np.array([[0.15, 0.05, 0.05], [0.75, 0.55, 0.15], [0.0, 0.45, 0.9]], np.float32)
"""From RGB in white light (rows) to narrow-band imaging: a rare appearance, scarce among few labels."""
_LOOKALIKES = (
    ((0.34, 0.28, 0.10), 0.4, 0.35, 1.8),  # stool: a rough brown lump
    ((0.10, 0.05, 0.04), -0.4, 0.05, 1.6),  # diverticulum: a dark pit
    ((0.45, 0.04, 0.04), 0.0, 0.10, 2.5),  # blood: flat and deep red
    ((0.12, 0.25, 0.50), 0.0, 0.25, 2.5),  # dye
    ((0.55, 0.57, 0.60), 0.3, 0.03, 9.0),  # instrument: a long grey shaft
    ((0.70, 0.66, 0.30), 0.05, 0.30, 3.0),  # mucus
)
"""Objects similar to a polyp: (RGB, rise of the dome, roughness, largest aspect)."""


def render_polyp(rng: np.random.Generator, size: int) -> tuple[NDArray[np.uint8], Mask]:
    """One scene with one to three polyps: (S, S, 3) uint8 RGB, and its mask, (S, S) uint8 in {0, 1}."""
    x, y = tx.pixel_grid(size)
    frame, inset = _frame(rng, x, y)
    height, lumen = _folds(rng, x, y)
    albedo = _mucosa(rng, size)
    _lookalikes(rng, height, albedo, x, y)
    depth = np.full((size, size), -1.0, np.float32)
    for blob in _polyp_outlines(rng, inset is not None):
        own = blob.depth(x, y)
        _grow(rng, blob, own, height, albedo)
        lumen *= 1 - 0.8 * tx.soft_step(own, 0.01)
        np.maximum(depth, own, out=depth)
    _residue(rng, albedo, size)
    picture = _light(rng, x, y, height, albedo, lumen)
    _bubbles(rng, picture, x, y)
    picture = tx.blur(picture, tx.log_uniform(rng, 0.002, 0.007))
    grade = np.array(rng.uniform(0.9, 1.1, 3), np.float32) * rng.uniform(0.8, 1.15)
    if rng.random() < 0.15:
        picture = picture @ _NARROW_BAND
    picture = np.clip(picture * grade, 0, 1.2) ** rng.uniform(0.8, 1.3)
    visible = frame if inset is None else frame & ~inset
    picture *= frame[..., None]
    if inset is not None:
        _show_inset(rng, picture, inset)
    return tx.photograph(rng, picture, tx.log_uniform(rng, 0.005, 0.02), 0.004), tx.mask_of(depth, visible)


def _frame(rng: np.random.Generator, x: Plane, y: Plane) -> tuple[NDArray[np.bool_], NDArray[np.bool_] | None]:
    """Field of view, (S, S) bool, and the inset at the lower left, or None."""
    kind, cut = rng.random(), rng.uniform(0.74, 0.9)
    with_inset, width, tall = rng.random() < 0.4, rng.uniform(0.26, 0.38), rng.uniform(0.26, 0.36)
    frame = np.ones(x.shape, bool)
    if kind < 0.45:
        frame = np.abs(x - 0.5) + np.abs(y - 0.5) < cut
    elif kind < 0.6:
        frame = np.hypot(x - 0.5, y - 0.5) < cut - 0.2
    return frame, ((x < width) & (y > 1 - tall) if with_inset else None)


def _show_inset(rng: np.random.Generator, picture: Picture, inset: NDArray[np.bool_]) -> None:
    """Draw the inset, in place: black, or the shape of the endoscope in green."""
    green, level = rng.random() < 0.5, rng.uniform(0.3, 0.8)
    line = tx.ridges(tx.smooth_noise(rng, picture.shape[0], 6), 4.0)
    colour = np.array([0.05, 0.9, 0.25], np.float32) * level
    picture[inset] = (0.15 + 0.85 * line[inset])[:, None] * colour if green else 0.01


def _folds(rng: np.random.Generator, x: Plane, y: Plane) -> tuple[Plane, Plane]:
    """Height of the bare mucosa, and the darkness of the lumen in [0, 1]."""
    size = x.shape[0]
    centre_x, centre_y = rng.uniform(-0.1, 1.1, 2).tolist()
    rings, angle = rng.random() < 0.65, rng.uniform(0, math.pi)
    squeeze, frequency, sharp = rng.uniform(0.7, 1.4), tx.log_uniform(rng, 1.5, 6.0), rng.uniform(1.5, 4.5)
    amount, swell = tx.log_uniform(rng, 0.005, 0.03), tx.log_uniform(rng, 0.005, 0.03)
    open_lumen, lumen_radius, lumen_edge = rng.random() < 0.6, rng.uniform(0.06, 0.24), rng.uniform(0.02, 0.08)
    warp = 0.06 * tx.octave_noise(rng, size, 3, 2)
    distance = np.hypot(x - centre_x, (y - centre_y) * squeeze) + warp
    travel = distance if rings else x * math.cos(angle) + y * math.sin(angle) + warp
    crest = tx.bell(np.sin(math.pi * frequency * travel), 1 / sharp)
    broken = tx.soft_step(tx.smooth_noise(rng, size, 4) + 0.2, 0.3)
    height = amount * crest * broken + swell * tx.octave_noise(rng, size, 3, 3, gain=0.35)
    return height, tx.soft_step(lumen_radius - distance, lumen_edge) * float(open_lumen)


def _mucosa(rng: np.random.Generator, size: int) -> Picture:
    """Colour of the bare mucosa with blotches and vessels."""
    mixture = rng.dirichlet(np.full(len(_MUCOSA), 0.6))
    colour = (mixture @ _MUCOSA).astype(np.float32)
    blotch, vessel = rng.uniform(0.03, 0.12), rng.uniform(0, 0.5) * (rng.random() < 0.7)
    lines = tx.ridges(tx.octave_noise(rng, size, int(rng.integers(4, 9)), 3), rng.uniform(4, 8))
    lines *= tx.soft_step(tx.smooth_noise(rng, size, 3), 0.5)
    tone = np.exp(blotch * tx.octave_noise(rng, size, 4, 4, gain=0.7))
    albedo = tone[..., None] * colour
    albedo *= np.exp(-vessel * lines[..., None] * np.array([0.3, 1.0, 0.8], np.float32))
    return albedo


def _tint(rng: np.random.Generator, strength: float) -> NDArray[np.float32]:
    """Log-RGB shift (3,), a mixture of the tints."""
    return (strength * rng.dirichlet(_TINT_WEIGHTS) @ _TINTS).astype(np.float32)


def _lookalikes(rng: np.random.Generator, height: Plane, albedo: Picture, x: Plane, y: Plane) -> None:
    """Add up to two objects with the outline of a polyp, in place; each kind is rare, so few labels miss some."""
    for _ in range(int(rng.integers(0, 3))):
        colour, rise, roughness, stretch = _LOOKALIKES[int(rng.integers(len(_LOOKALIKES)))]
        place, alpha = rng.uniform(0.05, 0.95, 2).tolist(), rng.uniform(0.7, 0.95)
        blob = Blob.draw(rng, *place, tx.log_uniform(rng, 0.06, 0.2), wobble=0.12, max_aspect=stretch)
        tone = np.exp(rng.uniform(-0.25, 0.25) + roughness * tx.octave_noise(rng, x.shape[0], 12, 3, gain=0.8))
        depth = blob.depth(x, y)
        cover = alpha * tx.soft_step(depth, tx.log_uniform(rng, 0.006, 0.02))
        albedo += cover[..., None] * (tone[..., None] * np.array(colour, np.float32) - albedo)
        inner = np.clip(depth / blob.radius, 0, 1)
        height += rise * blob.radius * (1 - (1 - inner) ** 2)


def _polyp_outlines(rng: np.random.Generator, with_inset: bool) -> list[Blob]:
    """One to three outlines; the centre of the first is in view, clear of corners and inset."""
    count = int(rng.choice([1, 2, 3], p=[0.72, 0.2, 0.08]))
    reach, theta = 0.42 * math.sqrt(rng.random()), rng.uniform(0, 2 * math.pi)
    centre_x, centre_y = 0.5 + reach * math.cos(theta), 0.5 + reach * math.sin(theta)
    if with_inset and centre_x < 0.42 and centre_y > 0.6:
        centre_x = 1 - centre_x
    wobble = rng.uniform(0.03, 0.13)
    blobs = [Blob.draw(rng, centre_x, centre_y, tx.log_uniform(rng, 0.12, 0.33), wobble, max_aspect=2.0)]
    for _ in range(count - 1):
        place = rng.uniform(0.05, 0.95, 2).tolist()
        blobs.append(Blob.draw(rng, *place, tx.log_uniform(rng, 0.09, 0.18), wobble, max_aspect=1.8))
    return blobs


def _grow(rng: np.random.Generator, blob: Blob, depth: Plane, height: Plane, albedo: Picture) -> None:
    """Add one polyp: dome, tint, pits and crease, in place."""
    size = depth.shape[0]
    softness, rise = tx.log_uniform(rng, 0.004, 0.02), tx.log_uniform(rng, 0.4, 1.1)
    strength = rng.uniform(0.3, 0.8) if rng.random() < 0.2 else rng.uniform(0.8, 1.6)
    tint, shade = _tint(rng, strength), rng.uniform(0.2, 0.6) * (rng.random() < 0.9)
    flatness = tx.log_uniform(rng, 1.2, 3.0)
    pits, lobes = rng.uniform(0, 0.12), rng.uniform(0, 0.25)
    inner = np.clip(depth / blob.radius, 0, 1)
    dome = 1 - (1 - inner) ** flatness
    dome *= 1 + lobes * tx.smooth_noise(rng, size, 12) * inner
    alpha = tx.soft_step(depth, softness)
    height += rise * blob.radius * 0.6 * dome - alpha * (height - float(height.mean())) * 0.5
    skin = tint + (pits * tx.octave_noise(rng, size, 16, 2))[..., None]
    crease = -shade * tx.bell(depth + 0.01, 0.02)
    albedo *= np.exp(alpha[..., None] * skin + crease[..., None])


def _residue(rng: np.random.Generator, albedo: Picture, size: int) -> None:
    """Patches of stool and mucus over everything, in one image of five, in place."""
    present, rarity, strength = rng.random() < 0.2, rng.uniform(1.2, 2.2), rng.uniform(0.3, 0.9)
    colour = np.array([0.62, 0.5, 0.16], np.float32) * rng.uniform(0.5, 1.3)
    patches = tx.octave_noise(rng, size, 5, 4, gain=0.6)
    if present:
        alpha = (strength * tx.soft_step(patches - rarity, 0.15))[..., None]
        albedo += alpha * (colour - albedo)


def _light(rng: np.random.Generator, x: Plane, y: Plane, height: Plane, albedo: Picture, lumen: Plane) -> Picture:
    """Light the height field from the tip of the endoscope: shade, fall-off, gloss, over-exposure."""
    lamp_x, lamp_y, lamp_z = rng.uniform(0.1, 0.9), rng.uniform(0.1, 0.9), rng.uniform(0.35, 1.0)
    ambient, falloff, gloss = rng.uniform(0.25, 0.5), rng.uniform(0.3, 1.3), rng.uniform(0.1, 0.6)
    power, wetness, vignette = rng.uniform(25, 90), rng.uniform(-0.8, 0.8), rng.uniform(0, 1.2)
    exposure, smoothness = tx.log_uniform(rng, 0.9, 1.6), rng.uniform(0.003, 0.01)
    wet = tx.soft_step(tx.octave_noise(rng, x.shape[0], 8, 3, gain=0.8) + wetness, 0.3)
    slope_x, slope_y = tx.slopes(tx.blur(height, smoothness))
    to_x, to_y = lamp_x - x, lamp_y - y
    near = 1 / np.sqrt(to_x**2 + to_y**2 + lamp_z**2)
    upright = 1 / np.sqrt(slope_x**2 + slope_y**2 + 1)
    facing = np.clip((lamp_z - slope_x * to_x - slope_y * to_y) * near * upright, 0, 1)
    # The camera is close to the lamp, so the mirror direction is that of the lamp.
    shine = gloss * facing**power * wet**2 * (0.2 + cv2.blur(wet, (3, 3)))
    spread = (x - 0.5) ** 2 + (y - 0.5) ** 2
    shade = (ambient + (1 - ambient) * facing) * exposure / (1 + falloff * (to_x**2 + to_y**2) + vignette * spread)
    shade *= 1 - 0.85 * lumen
    return albedo * shade[..., None] + (0.55 * shine * (1 - lumen))[..., None]


def _bubbles(rng: np.random.Generator, picture: Picture, x: Plane, y: Plane) -> None:
    """Foam: up to a dozen thin bright rings with a glint."""
    count, strength = int(rng.integers(0, 13)) if rng.random() < 0.4 else 0, rng.uniform(0.1, 0.35)
    centre = rng.uniform(0.1, 0.9, 2)
    for _ in range(count):
        bubble_x, bubble_y = (centre + rng.normal(0, 0.12, 2)).tolist()
        radius = tx.log_uniform(rng, 0.012, 0.05)
        distance = np.hypot(x - bubble_x, y - bubble_y)
        glint = np.hypot(x - bubble_x + 0.4 * radius, y - bubble_y + 0.4 * radius)
        picture += (strength * tx.bell(distance - radius, 0.005) + 0.5 * tx.bell(glint, 0.006))[..., None]

"""Building blocks of the phantoms: noise, outlines, soft layers, the camera, in coordinates relative to the image.

All draws except the sensor noise are independent of the size S in pixels: a scene looks the same at every size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Plane = NDArray[np.float32]
"""(S, S) float32, one value per pixel."""
Picture = NDArray[np.float32]
"""(S, S, 3) float32 RGB, 1.0 is white; may leave [0, 1] until the camera clips it."""
Mask = NDArray[np.uint8]
"""(S, S) uint8, 1 inside the object."""


def pixel_grid(size: int) -> tuple[Plane, Plane]:
    """Pixel centres as (x, y) planes, both in (0, 1)."""
    centres = (np.arange(size, dtype=np.float32) + 0.5) / size
    x, y = np.meshgrid(centres, centres)
    return x, y


def log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """Draw a number with a uniform logarithm: as many small lesions as large ones."""
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def smooth_noise(rng: np.random.Generator, size: int, rows: int, cols: int | None = None) -> Plane:
    """Noise of one scale, mean about 0, deviation about 1: a small random grid, enlarged to (S, S)."""
    cells = rng.standard_normal((rows, cols or rows), dtype=np.float32)
    return cv2.resize(cells, (size, size), interpolation=cv2.INTER_CUBIC)


def octave_noise(rng: np.random.Generator, size: int, first: int, num_octaves: int, gain: float = 0.5) -> Plane:
    """Sum of noises, each twice as fine and `gain` times as strong as the previous one; deviation about 1."""
    total = np.zeros((size, size), np.float32)
    for octave in range(num_octaves):
        total += gain**octave * smooth_noise(rng, size, first * 2**octave)
    return total / math.sqrt(sum(gain ** (2 * octave) for octave in range(num_octaves)))


def ridges(noise: Plane, sharpness: float) -> Plane:
    """Thin branching lines where the noise crosses zero, in (0, 1]: vessels."""
    return np.exp(-((noise * sharpness) ** 2))


def soft_step(depth: Plane, softness: float) -> Plane:
    """Alpha in [0, 1] of an edge at depth 0, `softness` wide; 0.5 exactly at the edge."""
    return 0.5 + 0.5 * np.tanh(depth * (0.5 / softness))


def bell(offset: Plane, width: float) -> Plane:
    """Gaussian of `offset`, 1 at 0: lines, rims, bands."""
    return np.exp(-((offset / width) ** 2))


def paint(plane: Plane, value: Plane | float, alpha: Plane) -> None:
    """Blend `value` over the plane, in place."""
    plane += alpha * (value - plane)


def fill(plane: Plane, value: Plane | float, depth: Plane, softness: float) -> None:
    """Blend `value` over the plane where `depth` is positive, in place, with an edge `softness` wide."""
    paint(plane, value, soft_step(depth, softness))


def mask_of(depth: Plane, visible: NDArray[np.bool_] | None = None) -> Mask:
    """Pixels of positive depth that are visible; at least the deepest visible pixel, at any resolution."""
    if visible is not None:
        depth = np.where(visible, depth, np.float32(-np.inf))
    return (depth >= min(0.0, float(depth.max()))).astype(np.uint8)


@dataclass(frozen=True)
class Blob:
    """An irregular closed outline: an ellipse with a radius that varies with the angle."""

    x: float
    y: float
    radius: float
    """Approximate radius of the circle of the same area."""
    aspect: float
    """Long axis over short axis, at least 1."""
    angle: float
    """Angle of the long axis in radians."""
    waves: tuple[tuple[int, float, float], ...]
    """(periods around the outline, share of the radius, phase)."""

    @classmethod
    def draw(
        cls, rng: np.random.Generator, x: float, y: float, radius: float, wobble: float = 0.1, max_aspect: float = 1.6
    ) -> Blob:
        """Draw an outline at a given place; `wobble` is the approximate relative deviation of the radius."""
        aspect, angle = log_uniform(rng, 1.0, max_aspect), rng.uniform(0, math.pi)
        waves = tuple((k, wobble * rng.uniform(0.4, 1.0) * 1.6 / k, rng.uniform(0, 2 * math.pi)) for k in (2, 3, 4, 5))
        return cls(x, y, radius, aspect, angle, waves)

    def depth(self, x: Plane, y: Plane) -> Plane:
        """Approximate signed distance to the outline, in the units of x and y; positive inside."""
        cos, sin, stretch = math.cos(self.angle), math.sin(self.angle), math.sqrt(self.aspect)
        u = ((x - self.x) * cos + (y - self.y) * sin) / stretch
        v = ((y - self.y) * cos - (x - self.x) * sin) * stretch
        distance, theta = cv2.cartToPolar(u, v)
        outline = np.ones_like(distance)
        for periods, share, phase in self.waves:
            outline += share * np.cos(periods * theta + phase)
        return self.radius * outline - distance

    def point(self, share: float, theta: float) -> tuple[float, float]:
        """(x, y) of the point at `share` of the distance from the centre to the outline."""
        reach = share * self.radius * (1 + sum(a * math.cos(k * theta + phase) for k, a, phase in self.waves))
        stretch = math.sqrt(self.aspect)
        u, v = reach * math.cos(theta) * stretch, reach * math.sin(theta) / stretch
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        return self.x + u * cos - v * sin, self.y + u * sin + v * cos


def slopes(height: Plane) -> tuple[Plane, Plane]:
    """Gradient of a height field along x and y, in height per image width."""
    options = {"scale": height.shape[0] / 8.0, "borderType": cv2.BORDER_REPLICATE}  # a Sobel kernel sums to 8 per pixel
    return cv2.Sobel(height, cv2.CV_32F, 1, 0, **options), cv2.Sobel(height, cv2.CV_32F, 0, 1, **options)


def blur(picture: NDArray[np.float32], sigma: float) -> NDArray[np.float32]:
    """Gaussian blur; `sigma` is a share of the image width."""
    pixels = sigma * picture.shape[0]
    # Below a quarter of a pixel the kernel is a single weight.
    return picture if pixels < 0.25 else cv2.GaussianBlur(picture, (0, 0), pixels)


def photograph(rng: np.random.Generator, picture: Picture | Plane, grain: float, clump: float) -> NDArray[np.uint8]:
    """Add sensor noise, clip to (S, S, 3) uint8 RGB and, for half of the images, compress as JPEG.

    Called last, as only these draws depend on S.

    Args:
        rng: generator of the scene.
        picture: (S, S, 3), or (S, S) for grey.
        grain: standard deviation of the noise; 1.0 is white.
        clump: size of a grain as a share of the image width; 0 for one grain per pixel.
    """
    quality = int(rng.integers(35, 95)) if rng.random() < 0.5 else None
    noise = rng.standard_normal(picture.shape, dtype=np.float32)
    if clump * picture.shape[0] >= 0.25:
        noise = blur(noise, clump)
        noise /= float(noise.std()) + 1e-6
    shot = np.clip((picture + grain * noise) * 255.0 + 0.5, 0, 255).astype(np.uint8)
    if quality is not None:
        encoded = cv2.imencode(".jpg", shot, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
        shot = cv2.imdecode(encoded, cv2.IMREAD_UNCHANGED)
    return shot if shot.ndim == 3 else np.repeat(shot[..., None], 3, axis=2)

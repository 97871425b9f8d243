"""Gallery pictures: the steps of one mined image, drawn with cv2 and embedded in the page.

Legend: H, W the image's own frame; h, w that of the picture, longest side `SIDE`.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from kmine.io.files import class_colours
from kmine.report.inputs import GalleryItem
from kmine.types import IGNORE_INDEX, Prompts

SIDE = 256
QUALITY = 80
"""WebP quality: a picture of 256 px takes 5 to 25 kB."""

COLOURS = tuple(tuple(colour) for colour in class_colours(IGNORE_INDEX).tolist())
"""RGB by class id."""
_HALO = (10, 10, 10)
"""Casing of every line, so that it is seen on bright ground as well."""
_POSITIVE, _NEGATIVE = (80, 230, 110), (255, 70, 70)


@dataclass(frozen=True)
class Panel:
    """One picture of an item; `uri` is None if there is nothing to show."""

    caption: str
    alt: str
    uri: str | None


def panels(item: GalleryItem, segmenter: str) -> list[Panel]:
    """Return image, prompts, local mask, segmenter mask and pseudo mask, in this order."""
    image = thumbnail(item.image)
    title = f"{item.sample_id}, round {item.round_idx}"
    pseudo = None if item.pseudo_mask is None else _uri(draw_mask(image, item.pseudo_mask))
    num_prompts = f"{len(item.prompts)} prompt{'' if len(item.prompts) == 1 else 's'}"
    drawn = draw_prompts(image, item.prompts, item.image.shape[:2])
    return [
        Panel("image", f"Image {title}", _uri(image)),
        Panel(num_prompts, f"{num_prompts} on image {title}", _uri(drawn)),
        Panel("local mask", f"Mask of the local model on {title}", _uri(draw_mask(image, item.local_mask))),
        Panel(f"{segmenter} mask", f"Mask of {segmenter} on {title}", _uri(draw_mask(image, item.segmenter_mask))),
        Panel("pseudo mask" if pseudo else "no pseudo mask", f"Pseudo mask of {title}", pseudo),
    ]


def thumbnail(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(H, W, 3) -> (h, w, 3); small images are enlarged, so that contours are equally thin on all."""
    height, width = image.shape[:2]
    scale = SIDE / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)


def draw_mask(image: NDArray[np.uint8], mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The picture (h, w, 3) with the contours of all classes of `mask` (H, W); ignored pixels are hatched grey."""
    small = cv2.resize(mask, image.shape[1::-1], interpolation=cv2.INTER_NEAREST)
    canvas = image.copy()
    _hatch(canvas, small == IGNORE_INDEX)
    for class_id in np.setdiff1d(small, (0, IGNORE_INDEX)):
        region = small == class_id
        colour = COLOURS[int(class_id)]
        canvas[region] = (0.8 * canvas[region] + 0.2 * np.array(colour)).astype(np.uint8)
        contours, _ = cv2.findContours(region.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(canvas, contours, -1, _HALO, 4, cv2.LINE_AA)
        cv2.drawContours(canvas, contours, -1, colour, 2, cv2.LINE_AA)
    return canvas


def draw_prompts(image: NDArray[np.uint8], prompts: Sequence[Prompts], native: tuple[int, int]) -> NDArray[np.uint8]:
    """The picture with boxes (further and jittered ones thin), positive points as discs and negative ones as crosses.

    `native` is (H, W), the frame of the prompts.
    """
    canvas = image.copy()
    scale = np.array([image.shape[1] / native[1], image.shape[0] / native[0]])

    def draw_box(box: NDArray[np.floating], colour: tuple[int, int, int], thickness: int) -> None:
        cv2.rectangle(canvas, _pixel(box[:2], scale), _pixel(box[2:], scale), colour, thickness, cv2.LINE_AA)

    for prompt in prompts:
        colour = COLOURS[prompt.class_id]
        for box in (*prompt.scaled_boxes, *prompt.jittered_boxes):
            draw_box(box, colour, 1)
        if prompt.box is not None:
            draw_box(prompt.box, _HALO, 4)
            draw_box(prompt.box, colour, 2)
        if prompt.point_coords is not None and prompt.point_labels is not None:
            for point, label in zip(prompt.point_coords, prompt.point_labels, strict=True):
                _point(canvas, _pixel(point, scale), positive=bool(label))
    return canvas


def _pixel(point: NDArray[np.floating], scale: NDArray[np.float64]) -> tuple[int, int]:
    """(x, y) of the native frame -> nearest pixel of the picture; pixel centres are integers in both."""
    x, y = np.rint((np.asarray(point, float) + 0.5) * scale - 0.5).astype(int)
    return int(x), int(y)


def _point(canvas: NDArray[np.uint8], at: tuple[int, int], *, positive: bool) -> None:
    if positive:
        cv2.circle(canvas, at, 6, _HALO, -1, cv2.LINE_AA)
        cv2.circle(canvas, at, 4, _POSITIVE, -1, cv2.LINE_AA)
        return
    for colour, thickness in ((_HALO, 5), (_NEGATIVE, 2)):
        cv2.drawMarker(canvas, at, colour, cv2.MARKER_TILTED_CROSS, 11, thickness, cv2.LINE_AA)


def _hatch(canvas: NDArray[np.uint8], region: NDArray[np.bool_]) -> None:
    """Grey the region of `canvas` in place, with diagonal stripes of 4 px."""
    rows, cols = np.nonzero(region)
    stripe = np.where(((rows + cols) // 4) % 2 == 0, 205, 95)
    canvas[rows, cols] = (0.25 * canvas[rows, cols] + 0.75 * stripe[:, None]).astype(np.uint8)


def _uri(image: NDArray[np.uint8]) -> str:
    data = encode_picture(image, ".webp", (cv2.IMWRITE_WEBP_QUALITY, QUALITY))
    return "data:image/webp;base64," + base64.b64encode(data).decode("ascii")


def encode_picture(image: NDArray[np.uint8], suffix: str, options: Sequence[int] = ()) -> bytes:
    """File of an (H, W, 3) RGB image in the format of `suffix`, with options of `cv2.imencode`."""
    ok, encoded = cv2.imencode(suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)
    if not ok:
        raise RuntimeError(f"cv2 could not encode a picture of shape {image.shape} as {suffix}")
    return encoded.tobytes()

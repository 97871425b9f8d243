"""The real sets that `tiny` is measured on, read in place below `$KMINE_TEST_DATA`; nothing of them trains it.

A set is a list of pictures that are read one by one when they are asked for: no set is held in memory, LiTS apart
(ten small volumes).
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from kmine.data.perceptual_hash import perceptual_hash
from kmine.data.splits import merge_duplicates
from kmine.types import Sample, SampleRef

POLYPS = "kvasir_seg polyps"
TUMOURS = "lits tumours"
WINDOW_HU = (-160.0, 240.0)
TUMOUR = 2
DUPLICATE_BITS = 6
"""As `data.duplicate_distance`."""


@dataclass(frozen=True)
class Picture:
    """One image with something in its mask."""

    name: str
    group: str
    """Near duplicates, volume, or the case or article that an X-ray comes from: drawn together, never split."""
    look: Callable[[], tuple[NDArray[np.uint8], NDArray[np.bool_]]]
    """Reads (H, W, 3) uint8 RGB and (H, W) bool."""

    def read(self) -> Sample:
        image, mask = self.look()
        return Sample(self.name, self.group, image, mask.astype(np.uint8))


def kvasir(root: Path, side: int = 0) -> list[Picture]:
    """Polyps at native resolution, or with the longer side reduced to `side` where that is not 0."""
    paths = sorted((root / "kvasir_seg/Kvasir-SEG/images").glob("*.jpg"))
    hashes = {path.stem: perceptual_hash(_rgb(path)) for path in paths}
    refs = merge_duplicates([SampleRef(path.stem, path.stem) for path in paths], hashes, DUPLICATE_BITS)
    return [Picture(r.sample_id, r.group_id, partial(_polyp, p, side)) for r, p in zip(refs, paths, strict=True)]


def _polyp(path: Path, side: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    image = _rgb(path)
    mask = (cv2.imread(str(path.parent.parent / "masks" / path.name), cv2.IMREAD_GRAYSCALE) > 127).astype(np.uint8)
    if side:
        factor = side / max(mask.shape)
        image = cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
        mask = cv2.resize(mask, image.shape[1::-1], interpolation=cv2.INTER_NEAREST)
    return image, mask > 0


def lits_tumours(root: Path) -> list[Picture]:
    """Axial slices with a tumour, grouped by volume."""
    return [
        Picture(f"{path.name}_{index}", path.name, partial(_slice, path, index))
        for path in sorted((root / "lits").rglob("volume-*.nii.gz"))
        for index in np.flatnonzero(_volume(path)[1].any(axis=(0, 1))).tolist()
    ]


@cache
def _volume(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Grey values and tumours, (H, W, slices); the two files are paired by number and must agree in shape."""
    import nibabel

    volume = np.asarray(nibabel.load(path).dataobj, np.float32)
    truth = np.asarray(nibabel.load(path.with_name(path.name.replace("volume", "segmentation"))).dataobj).round()
    if volume.shape != truth.shape:
        raise SystemExit(f"{path}: its segmentation has shape {truth.shape}, expected {volume.shape}")
    grey = np.clip((volume - WINDOW_HU[0]) / (WINDOW_HU[1] - WINDOW_HU[0]), 0, 1) * 255
    return grey.round().astype(np.uint8), truth == TUMOUR


def _slice(path: Path, index: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    grey, tumour = _volume(path)
    return np.repeat(grey[..., index, None], 3, axis=2), tumour[..., index]


def chest(root: Path, part: str, kind: str) -> list[Picture]:
    """X-rays of one part of the COVID-QU-Ex layout with their `kind` masks; empty masks are left out."""
    with (root / "covid_qu_ex/sources.csv").open(newline="") as file:
        sources = {row["file"]: row["source"] for row in csv.DictReader(file)}
    pictures = []
    for path in sorted((root / "covid_qu_ex" / f"{part} Segmentation Data").rglob("images/*.png")):
        mask_path = path.parent.parent / kind / path.name
        if mask_path.exists() and _mask(mask_path).any():
            # Figures of one article and days of one patient stay together; other names are one case each.
            group = re.split(r"(?i)-g04mr|[._-]fig|_f\d|-day|-[abc]\.png$", sources[path.name])[0]
            pictures.append(Picture("/".join(path.parts[-4:]), group, partial(_x_ray, path, mask_path)))
    return pictures


def _x_ray(path: Path, mask_path: Path) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    return _rgb(path), _mask(mask_path)


def _mask(path: Path) -> NDArray[np.bool_]:
    return cv2.imread(str(path), cv2.IMREAD_GRAYSCALE) > 127


def _rgb(path: Path) -> NDArray[np.uint8]:
    return cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)


SETS: dict[str, Callable[[Path], list[Picture]]] = {
    POLYPS: kvasir,
    f"{POLYPS}, long side 256": partial(kvasir, side=256),
    TUMOURS: lits_tumours,
    "covid layout, lungs": partial(chest, part="Lung", kind="lung masks"),
    "covid layout, infections": partial(chest, part="Infection", kind="infection masks"),
}
"""Every set by its name in the tables."""


def data_root() -> Path:
    """Where the sets are."""
    root = os.environ.get("KMINE_TEST_DATA")
    if not root:
        raise SystemExit("KMINE_TEST_DATA: expected the folder with the real sets, it is not set")
    return Path(root)

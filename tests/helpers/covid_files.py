"""COVID-QU-Ex in small: both parts with one image per split and class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from helpers.image_files import save_image

SHAPE = (24, 20)
INFECTION = "Infection Segmentation Data/Infection Segmentation Data"
LUNG = "Lung Segmentation Data/Lung Segmentation Data"
NAMES = {"COVID-19": "covid_1 (2)", "Non-COVID": "non_COVID (7)", "Normal": "Normal (1)"}
IDS = tuple(sorted(f"{split}/{name}/{stem}" for split in ("Train", "Val", "Test") for name, stem in NAMES.items()))
COVID_IMAGE = "COVID-19/images/covid_1 (2).png"
"""An image below each split."""


def grey_noise(*key: object, shape=SHAPE) -> np.ndarray:
    """Different noise for each key."""
    return np.random.default_rng(list("/".join(map(str, key)).encode())).integers(0, 256, shape, dtype=np.uint8)


def block(value=255, shape=SHAPE) -> np.ndarray:
    mask = np.zeros(shape, np.uint8)
    mask[4:9, 3:8] = value
    return mask


def build_part(base: Path, *, infection: bool, names=NAMES) -> None:
    for split in ("Train", "Val", "Test"):
        for name, stem in names.items():
            folder = base / split / name
            save_image(folder / "images" / f"{stem}.png", grey_noise(infection, split, name))
            save_image(folder / "lung masks" / f"{stem}.png", block())
            if infection:
                save_image(folder / "infection masks" / f"{stem}.png", block(255 if name == "COVID-19" else 0))


def build_both_parts(root: Path) -> Path:
    """As published; no image is in both."""
    build_part(root / INFECTION, infection=True)
    build_part(root / LUNG, infection=False)
    return root


def copy_file(source: Path, target: Path) -> None:
    target.write_bytes(source.read_bytes())

"""Data sets in nnU-Net's layout for tests."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from helpers.image_files import save_image, save_volume

SHAPE = (3, 6, 8)
"""(D, H, W) of the volumes."""


def write_dataset_json(root: Path, channels, labels=("background", "liver"), ending=".nii.gz", ignore=False):
    root.mkdir(parents=True, exist_ok=True)
    numbers = {name: n for n, name in enumerate((*labels, *(["ignore"] if ignore else [])))}
    value = {"channel_names": {str(n): name for n, name in enumerate(channels)}, "labels": numbers}
    value |= {"numTraining": 3, "file_ending": ending}
    (root / "dataset.json").write_text(json.dumps(value))
    return root


def volume(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-100, 400, SHAPE).astype(np.int16)


def label(value: int = 1) -> np.ndarray:
    mask = np.zeros(SHAPE, np.uint8)
    mask[1, 2:5, 3:6] = value
    return mask


def volumes(root: Path, channels=("T2", "ADC"), labeled=2, ignore=False) -> Path:
    """Cases a, b, c of NIfTI volumes, the first `labeled` of them with a label; the ignore label is 2."""
    write_dataset_json(root, channels, ignore=ignore)
    for number, name in enumerate("abc"):
        for channel in range(len(channels)):
            save_volume(root / f"imagesTr/{name}_{channel:04}.nii.gz", volume(10 * number + channel))
        if number < labeled:
            mask = label()
            mask[2, 0, 0] = 2 * ignore
            save_volume(root / f"labelsTr/{name}.nii.gz", mask)
    return root


def pictures(root: Path, count: int, colour: bool = True, ending: str = ".png") -> Path:
    """2-D cases p0, p1, ... in colour, or of three grey channels; all but the last have a label."""
    write_dataset_json(root, "RGB", ending=ending)
    for n in range(count):
        pixels = np.random.default_rng(n).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        parts = {0: pixels} if colour else {c: pixels[..., c] for c in range(3)}
        for channel, part in parts.items():
            save_image(root / f"imagesTr/p{n}_{channel:04}{ending}", part)
        if n < count - 1:
            save_image(root / f"labelsTr/p{n}{ending}", (pixels[..., 0] > 128).astype(np.uint8))
    return root

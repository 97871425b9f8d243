"""Volumes of LiTS for tests: any orientation, one planted liver with a tumour."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest

from kmine.data.io import nifti

SIZES = {"x": 0.7, "y": 0.8, "z": 2.5}
"""Millimetres along the left-right, front-back and up-down axis of the patient."""
LETTERS = {"L": (0, 1), "R": (0, -1), "P": (1, 1), "A": (1, -1), "S": (2, 1), "I": (2, -1)}
"""Axis in (column, row, number) of the slices, and its sign."""
TOWARDS = {"L": (-1, 0, 0), "R": (1, 0, 0), "P": (0, -1, 0), "A": (0, 1, 0), "S": (0, 0, 1), "I": (0, 0, -1)}
"""Directions in the coordinates of NIfTI: right, front, up."""
SHAPE = (5, 6, 7)
"""Number, height and width of the slices."""


def scan(shape=SHAPE, seed=0) -> np.ndarray:
    """(D, H, W) HU, without symmetry."""
    return np.random.default_rng(seed).integers(-400, 400, shape).astype(np.int16)


def labels(shape=SHAPE) -> np.ndarray:
    """(D, H, W): slice 0 is empty, liver from slice 1 on, a tumour in slices 2 and 3."""
    out = np.zeros(shape, np.uint8)
    out[1:, 1:4, 2:5] = 1
    out[2:4, 2, 3] = 2
    return out


def grey(slices: np.ndarray, low=-160.0, high=240.0) -> np.ndarray:
    """Windowing by its definition."""
    return np.rint((np.clip(slices.astype(float), low, high) - low) * 255 / (high - low)).astype(np.uint8)


def affine_of(codes: str, sizes=SIZES) -> np.ndarray:
    affine = np.eye(4)
    for axis, letter in enumerate(codes):
        affine[:3, axis] = np.array(TOWARDS[letter]) * sizes["xyz"[LETTERS[letter][0]]]
    return affine


def stored(slices: np.ndarray, codes: str) -> np.ndarray:
    """(D, H, W) as an array with axes that grow towards `codes`."""
    by_axis = slices.transpose(2, 1, 0).transpose([LETTERS[letter][0] for letter in codes])
    return by_axis[tuple(slice(None, None, LETTERS[letter][1]) for letter in codes)]


def save_nifti(path: Path, slices: np.ndarray, codes="LPS", affine=None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(stored(slices, codes), affine_of(codes) if affine is None else affine), path)
    return path


def save_pair(root: Path, number: int, codes="LPS", suffix=".nii.gz") -> None:
    save_nifti(root / f"volume-{number}{suffix}", scan(seed=number), codes)
    save_nifti(root / f"segmentation-{number}{suffix}", labels(), codes)


def header_bytes(shape, code=16) -> bytes:
    """Header and empty extension of a NIfTI-1 file."""
    header = nibabel.Nifti1Header()
    header.set_data_dtype(code)
    header.set_data_shape(shape)
    header.set_sform(affine_of("LPS"), code=1)
    header.set_data_offset(352)
    return header.binaryblock + bytes(4)


def rewrite(path: Path, change) -> None:
    path.write_bytes(change(path.read_bytes()))


def record_decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """List that receives the names of the files read beyond their header, in order."""
    names: list[str] = []
    original = nifti._stored

    def recording(path, *rest):
        names.append(path.name)
        return original(path, *rest)

    monkeypatch.setattr(nifti, "_stored", recording)
    return names

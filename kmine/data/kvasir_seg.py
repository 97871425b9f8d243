"""Kvasir-SEG: polyps in colonoscopy, `Kvasir-SEG/images/*.jpg` and `Kvasir-SEG/masks/*.jpg` of the same names."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kmine.data.source import fingerprint_files, image_shape, read_grey, read_rgb
from kmine.records import SampleError, SampleRef, Skipped, UserError

URL = "https://datasets.simula.no/downloads/kvasir-seg.zip"
SUFFIXES = (".jpg", ".jpeg", ".png")
FOREGROUND_ABOVE = 127
"""Masks are JPEGs: compression rings around 0 and 255, so that only the middle separates."""
MAX_NAMED = 5


class KvasirSeg:
    """A folder laid out as Kvasir-SEG; one sample a file stem, and nobody knows the patient.

    Args:
        root: the folder that holds `images/` and `masks/`, or the folder that holds `Kvasir-SEG/`.
        on_error: whether a mask without an image stops, or is listed in `skipped`.

    Raises:
        UserError: when the folder is missing, unreadable, laid out otherwise, or holds no pair.
    """

    name = "kvasir_seg"
    class_names = ("background", "polyp")

    def __init__(self, root: Path, on_error: Literal["stop", "skip"] = "stop") -> None:
        self.root = _find_root(root)
        self._images, strays = _index(self.root / "images")
        self._masks, mask_strays = _index(self.root / "masks")
        self._check_pairs()
        self.skipped = (*strays, *mask_strays, *self._drop_orphans(on_error))
        files = (*self._images.values(), *self._masks.values())
        self._fingerprint = fingerprint_files({"source": self.name, "above": FOREGROUND_ABOVE}, self.root, files)

    def refs(self) -> tuple[SampleRef, ...]:
        """Every image, sorted by stem; one without a mask can only be unlabeled."""
        return tuple(SampleRef(stem, stem, has_mask=stem in self._masks) for stem in sorted(self._images))

    def image(self, sample_id: str) -> NDArray[np.uint8]:
        """(H, W, 3) RGB, [0, 255]. Raises `SampleError`."""
        return read_rgb(self._images[sample_id])

    def mask(self, sample_id: str) -> NDArray[np.uint8]:
        """(H, W) of {0, 1}. Raises `SampleError`, also for another size than the image's and for an empty mask."""
        if sample_id not in self._masks:
            raise SampleError(str(self._images[sample_id]), "expected a mask of the same name in masks/, found none")
        path = self._masks[sample_id]
        mask = (read_grey(path) > FOREGROUND_ABOVE).astype(np.uint8)
        expected = image_shape(self._images[sample_id])
        if mask.shape != expected:
            raise SampleError(
                str(path),
                f"expected the image's size {_size(expected)}, got {_size(mask.shape)}; "
                "export the mask anew in the image's own size",
            )
        if not mask.any():
            raise SampleError(
                str(path),
                f"expected a polyp, got no pixel above {FOREGROUND_ABOVE}; "
                "store the foreground as 255 (not 1), or remove the pair if it shows none",
            )
        return mask

    def fingerprint(self) -> str:
        """SHA-256 (hex) of names, sizes and modification times, as they were when indexed."""
        return self._fingerprint

    def _check_pairs(self) -> None:
        if not self._images:
            raise UserError(f"{self.root / 'images'}: expected {_suffixes()} files, found none; check data.root")
        if not self._images.keys() & self._masks.keys():
            raise UserError(
                f"{self.root}: expected masks named like their images, found {len(self._images)} images and "
                f"{len(self._masks)} masks but no pair; give each mask its image's name"
            )

    def _drop_orphans(self, on_error: Literal["stop", "skip"]) -> list[Skipped]:
        """Masks without an image hint at lost or renamed files."""
        orphans = sorted(self._masks.keys() - self._images.keys())
        if orphans and on_error == "stop":
            more = f" and {len(orphans) - MAX_NAMED} more" if len(orphans) > MAX_NAMED else ""
            names = ", ".join(self._masks[stem].name for stem in orphans[:MAX_NAMED])
            raise UserError(
                f"{self.root / 'masks'}: expected an image for each mask, found none for {names}{more}; "
                "restore the images, or pass --data.on_error skip to leave these masks out"
            )
        return [Skipped(stem, str(self._masks.pop(stem)), "a mask without an image") for stem in orphans]


def _find_root(root: Path) -> Path:
    """The folder that holds images/ and masks/."""
    root = root.expanduser()
    if not root.exists():
        raise UserError(f"{root}: expected the Kvasir-SEG folder, found nothing; pass --data.root (published at {URL})")
    if not root.is_dir():
        raise UserError(f"{root}: expected the Kvasir-SEG folder, got a file; unzip it and pass the folder")
    for folder in (root, root / "Kvasir-SEG"):
        present = [name for name in ("images", "masks") if (folder / name).is_dir()]
        if len(present) == 2:
            return folder
        if present:
            raise UserError(f"{folder}: expected both images/ and masks/, found only {present[0]}/; unpack it again")
    raise UserError(
        f"{root}: expected images/ and masks/, or Kvasir-SEG/ that holds them, found neither; "
        f"pass --data.root FOLDER as unpacked from {URL}"
    )


def _index(folder: Path) -> tuple[dict[str, Path], list[Skipped]]:
    """Image files by stem, and what else lies there; hidden files (`._a.jpg` of macOS) are nobody's data."""
    try:
        files = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror or error}); check its permissions") from error
    found: dict[str, Path] = {}
    strays = []
    for path in files:
        if path.suffix.lower() not in SUFFIXES:
            strays.append(Skipped(path.stem, str(path), f"not a {_suffixes()} file"))
        elif path.stem in found:
            raise UserError(
                f"{folder}: expected one file a name, found {found[path.stem].name} and {path.name}; remove one of them"
            )
        else:
            found[path.stem] = path
    return found, strays


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]} x {shape[0]} (width x height)"


def _suffixes() -> str:
    return f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"

"""Kvasir-SEG: polyps in colonoscopy, `Kvasir-SEG/images/*.jpg` and `Kvasir-SEG/masks/*.jpg` of the same names."""

from __future__ import annotations

import filecmp
import os
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kmine.data.io.find_files import KINDS, drop_orphans, index_images, named, walk
from kmine.data.io.image_file import read_rgb
from kmine.data.io.pictures import FOREGROUND_ABOVE, read_foreground
from kmine.data.source import ENDOSCOPY, IndexedSource, OnError, fingerprint_files, is_folder, size_and_time
from kmine.errors import SampleError, UserError
from kmine.types import SampleRef, Skipped

URL = "https://datasets.simula.no/downloads/kvasir-seg.zip"
NORMAL = "normal/"
"""Prefix of the ids of images without a polyp; a file stem holds no slash."""


class KvasirSeg(IndexedSource):
    """A folder with the layout of Kvasir-SEG; one sample per file stem. Patients are unknown.

    With a second folder, of images without a polyp, every image has an image-level label: 1 in Kvasir-SEG, 0 in the
    second folder, whose images have no masks and are unlabeled. Without it, no image has one.

    Args:
        root: folder that holds `images/` and `masks/`, or one above it.
        on_error: whether a mask without an image stops, or is listed in `skipped`.
        normal_images: the second folder, if any; its sample ids begin with `normal/`.

    Raises:
        UserError: when a folder is missing, unreadable, of another layout, or holds no pair or no image, and for an
            image in both folders.
    """

    name = "kvasir_seg"
    symmetry = ENDOSCOPY
    class_names = ("background", "polyp")

    def __init__(self, root: Path, on_error: OnError = "stop", normal_images: Path | None = None) -> None:
        self.root = _find_root(root)
        self._images, strays = index_images(self.root / "images", on_error)
        self._masks, mask_strays = index_images(self.root / "masks", on_error)
        self._check_pairs()
        orphans = drop_orphans(self._masks, self._images, str(self.root / "masks"), on_error)
        files = (*self._images.values(), *self._masks.values())
        settings: dict[str, object] = {"source": self.name, "above": FOREGROUND_ABOVE}
        self._normals: dict[str, Path] = {}
        normal_strays: list[Skipped] = []
        if normal_images is not None:
            normals, normal_strays = _index_normals(normal_images, self._images, on_error)
            self._normals = {f"{NORMAL}{stem}": path for stem, path in normals.items()}
            settings["normal"] = fingerprint_files({}, normal_images, normals.values())
        self.skipped = (*strays, *mask_strays, *orphans, *normal_strays)
        self._fingerprint = fingerprint_files(settings, self.root, files)

    def refs(self) -> tuple[SampleRef, ...]:
        """All images, sorted by id."""
        label = 1 if self._normals else None
        polyps = [SampleRef(stem, stem, has_mask=stem in self._masks, image_label=label) for stem in self._images]
        normals = [SampleRef(name, name, has_mask=False, image_label=0) for name in self._normals]
        return tuple(sorted((*polyps, *normals), key=lambda ref: ref.sample_id))

    def image(self, sample_id: str) -> NDArray[np.uint8]:
        """(H, W, 3) RGB, [0, 255]. Raises `SampleError`."""
        return read_rgb(self._path(sample_id))

    def mask(self, sample_id: str) -> NDArray[np.uint8]:
        """(H, W) of {0, 1}. Raises `SampleError`, also for another size than the image's and for an empty mask."""
        if sample_id not in self._masks:
            raise SampleError(str(self._path(sample_id)), "expected a mask of the same name in masks/, found none")
        path = self._masks[sample_id]
        mask = read_foreground(path, self._images[sample_id])
        if not mask.any():
            raise SampleError(
                str(path),
                f"expected a polyp, got no pixel above {FOREGROUND_ABOVE}; "
                "store the foreground as 255 (not 1), or remove the pair if it shows none",
            )
        return mask

    def _path(self, sample_id: str) -> Path:
        return self._normals[sample_id] if sample_id in self._normals else self._images[sample_id]

    def _check_pairs(self) -> None:
        if not self._images:
            raise UserError(f"{self.root / 'images'}: expected {KINDS} files, found none; check data.root")
        if not self._images.keys() & self._masks.keys():
            raise UserError(
                f"{self.root}: expected masks named like their images, found {len(self._images)} images and "
                f"{len(self._masks)} masks but no pair; give each mask its image's name"
            )


def _find_root(root: Path) -> Path:
    """Folder that holds images/ and masks/: the given one, `Kvasir-SEG/` in it, or the only one further down."""
    if not os.path.lexists(root):
        raise UserError(f"{root}: expected the Kvasir-SEG folder, found nothing; pass --data.root (published at {URL})")
    if not is_folder(root):
        raise UserError(f"{root}: expected the Kvasir-SEG folder, got a file; unzip it and pass the folder")
    usual = (root, root / "Kvasir-SEG")
    found = [folder for folder in usual if len(_leaves(folder)) == 2][:1]
    found = found or [folder for folder, _, _ in walk(root) if len(_leaves(folder)) == 2]
    found = [folder for folder in found if folder.name.casefold() == "kvasir-seg"] or found
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(
            f"{root}: expected one folder of images/ and masks/ below it, found {named(map(str, found))}; pass the one "
            "you mean as --data.root"
        )
    for folder in usual:
        if half := _leaves(folder):
            raise UserError(f"{folder}: expected both images/ and masks/, found only {half[0]}/; unpack it again")
    raise UserError(
        f"{root}: expected images/ and masks/ in it or below, found neither; pass --data.root FOLDER as unpacked from "
        f"{URL}"
    )


def _leaves(folder: Path) -> list[str]:
    return [name for name in ("images", "masks") if is_folder(folder / name)]


def _index_normals(
    folder: Path, polyps: Mapping[str, Path], on_error: OnError
) -> tuple[dict[str, Path], list[Skipped]]:
    """Images without a polyp by stem, and other files; refuses copies of images with a polyp."""
    if not is_folder(folder):
        actual = "a file" if os.path.lexists(folder) else "nothing"
        raise UserError(f"data.normal_images: expected a folder of images without a polyp, found {actual} at {folder}")
    paths, strays = index_images(folder, on_error)
    if not paths:
        raise UserError(f"data.normal_images: expected {KINDS} files in {folder}, found none; name another folder")
    by_size: dict[int, list[Path]] = defaultdict(list)
    for path in polyps.values():
        by_size[size_and_time(path)[0]].append(path)
    both = [
        f"{path.name} (as {twin.name})"
        for stem, path in paths.items()
        for twin in ([polyps[stem]] if stem in polyps else by_size.get(size_and_time(path)[0], []))
        if stem in polyps or _is_copy(path, twin)
    ]
    if both:
        raise UserError(
            f"{folder}: expected images without a polyp, found those of Kvasir-SEG or of their name: {named(both)}; "
            "remove or rename them"
        )
    return paths, strays


def _is_copy(path: Path, other: Path) -> bool:
    """Whether the bytes are equal; False for a file that cannot be read, which its reader reports."""
    try:
        return filecmp.cmp(path, other, shallow=False)
    except OSError:
        return False

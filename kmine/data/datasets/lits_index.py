"""Files of LiTS, gzipped or not: `volume-N.nii` and `segmentation-N.nii`, paired by N in any folder."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from kmine.data.io.find_files import named, printable, walk
from kmine.data.io.nifti_header import Geometry, read_geometry
from kmine.data.source import OnError, require_root, stop_or_skip
from kmine.errors import SampleError, UserError
from kmine.types import Skipped

URL = "https://competitions.codalab.org/competitions/17094"
FILE_NAME = re.compile(r"(volume|segmentation)-(\d+)\.nii(\.gz)?", re.IGNORECASE)


@dataclass(frozen=True)
class Volume:
    """One scan: its number N, its files and the geometry of its image."""

    number: int
    image: Path
    mask: Path | None
    geometry: Geometry

    @property
    def group_id(self) -> str:
        """`volume-003`."""
        return group_name(self.number)

    @property
    def num_slices(self) -> int:
        """Number of axial slices."""
        return self.geometry.stack_shape[0]


def group_name(number: int) -> str:
    """`volume-003`."""
    return f"volume-{number:03}"


def find_volumes(root: Path, on_error: OnError) -> tuple[dict[int, Volume], tuple[Skipped, ...], list[Path]]:
    """Index a folder and read the headers of its volumes; no mask is opened.

    `on_error`: whether a segmentation without a volume and a damaged header stop, or are listed.

    Returns:
        Volumes by number, files left out, and all indexed files.

    Raises:
        UserError: when the folder is missing, unreadable or holds no volume, or two files have one number.
        SampleError: for a damaged header, if `on_error` is "stop".
    """
    images, masks, strays = _find(root)
    orphans = _drop_orphans(images, masks, on_error)
    read = [_read_header(number, path, masks.get(number), on_error) for number, path in sorted(images.items())]
    damaged = [skipped for skipped in read if isinstance(skipped, Skipped)]
    volumes = {volume.number: volume for volume in read if isinstance(volume, Volume)}
    if not volumes:
        raise UserError(f"{root}: expected volumes, got none that can be read ({len(damaged)} are damaged)")
    return volumes, (*strays, *orphans, *damaged), [*images.values(), *masks.values()]


def _find(root: Path) -> tuple[dict[int, Path], dict[int, Path], list[Skipped]]:
    """Volumes and segmentations by number, and NIfTI files of other names."""
    require_root(root, "LiTS", f"see {URL}")
    paths: dict[str, dict[int, Path]] = {"volume": {}, "segmentation": {}}
    strays = []
    unknown = "not named volume-N.nii or segmentation-N.nii"
    for path in sorted(_nifti_files(root)):
        match = FILE_NAME.fullmatch(path.name)
        if not match:
            strays.append(Skipped(printable(path.name), printable(path), unknown))
            continue
        kind, number = match[1].lower(), int(match[2])
        first = paths[kind].setdefault(number, path)
        if first != path:
            raise UserError(
                f"{root}: expected one {kind} of number {number}, found {first.relative_to(root)} and "
                f"{path.relative_to(root)}; keep one of them"
            )
    if not paths["volume"]:
        raise UserError(f"{root}: expected volume-N.nii or volume-N.nii.gz in it or below, found none; check data.root")
    return paths["volume"], paths["segmentation"], strays


def _nifti_files(root: Path) -> Iterable[Path]:
    """All NIfTI files, and empty folders with the name of one, which a failed extraction leaves behind."""
    for folder, folders, names in walk(root):
        if not folders and not names and FILE_NAME.fullmatch(folder.name):
            yield folder
        yield from (folder / name for name in names if name.lower().endswith((".nii", ".nii.gz")))


def _drop_orphans(images: dict[int, Path], masks: dict[int, Path], on_error: OnError) -> list[Skipped]:
    """Remove segmentations without a volume from `masks`: a sign of lost or renamed files."""
    orphans = sorted(masks.keys() - images.keys())
    if orphans and on_error == "stop":
        raise UserError(
            f"expected a volume for each segmentation, found none for {named(str(masks[n]) for n in orphans)}; "
            "restore the volumes, or pass --data.on_error skip to leave these out"
        )
    return [Skipped(group_name(n), str(masks.pop(n)), "a segmentation without a volume") for n in orphans]


def _read_header(number: int, path: Path, mask: Path | None, on_error: OnError) -> Volume | Skipped:
    try:
        geometry = read_geometry(path)
        if np.allclose([*(geometry.spacing or ()), geometry.thickness or 1], 1):  # volumes 28 to 47, any stated unit
            geometry = replace(geometry, spacing=None, thickness=None)
        return Volume(number, path, mask, geometry)
    except SampleError as error:
        return stop_or_skip(group_name(number), error, on_error)

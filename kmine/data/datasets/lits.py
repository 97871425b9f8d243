"""LiTS: liver tumours in CT; a sample is an axial slice, windowed to 8 bits with fixed limits, a group is a volume."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from kmine.config import DataConfig
from kmine.data.datasets.lits_index import Volume, find_volumes, stop_or_skip
from kmine.data.datasets.slice_labels import (
    SLICE_ID,
    SliceFacts,
    facts_of,
    facts_path,
    load_facts,
    read_image_labels,
    save_facts,
)
from kmine.data.io.find_files import named
from kmine.data.io.nifti import VolumeCache, read_labels, read_windowed
from kmine.data.source import choose_task, fingerprint_files
from kmine.errors import SampleError, UserError
from kmine.io.files import cache_root
from kmine.types import SampleRef, Skipped

VERSION = 1
"""Goes into the fingerprint: raise it when the same files and settings give other pixels."""
WINDOW = (-160.0, 240.0)
"""Hounsfield units shown as black and as white, unless the settings say otherwise."""
LIVER, TUMOUR = 1, 2
CLASS_NAMES = {
    "tumour": ("background", "tumour"),
    "liver": ("background", "liver"),
    "both": ("background", "liver", "tumour"),
}


class Lits:
    """The volumes below a folder, paired by number; one sample an axial slice, one group a volume.

    The image-level label of a slice says whether it shows the lesion of the task (tumour, or with "liver" any liver).
    It comes from `cfg.image_labels` for the volumes listed there, whose masks the index then leaves closed, and from
    the mask for the others; that is read once and kept in the cache folder. A slice that is not listed, though its
    volume is, has no label. A volume with neither a mask nor a row is unlabeled without an image-level label.

    Args:
        root: the folder; it is searched to the bottom.
        cfg: task, slices, every_nth, window, image_labels, cache_dir and on_error. The latter says whether a mask
            without a volume and a damaged file stop, or are listed in `skipped`.

    Raises:
        UserError: when the folder is missing, unreadable or holds no volume, when two files claim one number, when
            nothing is known of a volume though `image_labels` is given, or only slices with liver are wanted, and for
            a task of another data set.
        SampleError: for a damaged header.
    """

    name = "lits"

    def __init__(self, root: Path, cfg: DataConfig) -> None:
        self.root, self.cfg = root.expanduser(), cfg
        self.task = choose_task(cfg.task, self.name, tuple(CLASS_NAMES))
        self.class_names = CLASS_NAMES[self.task]
        self.window = WINDOW if cfg.window is None else cfg.window
        self._images, self._masks = VolumeCache(), VolumeCache()
        self._volumes, self._skipped, files = find_volumes(self.root, cfg.on_error)
        self._listed: dict[int, dict[int, int]] = {}
        if cfg.image_labels is not None:
            sizes = {volume.number: volume.num_slices for volume in self._volumes.values()}
            unread = {skipped.sample_id for skipped in self._skipped}
            self._listed = read_image_labels(Path(cfg.image_labels).expanduser(), sizes, unread)
        self._refuse_unknown()
        settings = {
            "source": [self.name, VERSION, self.task, cfg.slices, cfg.every_nth, *map(float, self.window)],
            "image_labels": sorted((n, sorted(labels.items())) for n, labels in self._listed.items()),
        }
        self._fingerprint = fingerprint_files(settings, self.root, files)

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """What the index left out, and why."""
        return (*self._skipped, *self._index[1])

    def refs(self) -> tuple[SampleRef, ...]:
        """Every slice, volume by volume; the first call may have to read masks (see the class)."""
        return self._index[0]

    def image(self, sample_id: str) -> NDArray[np.uint8]:
        """(H, W, 3), three times the same grey, [0, 255]. Raises `SampleError`."""
        volume, number = self._locate(sample_id)
        grey = self._images.read(
            volume.image,
            lambda: read_windowed(volume.image, volume.geometry, self.window),
            lambda slices: slices[number].copy(),
        )
        return np.repeat(grey[..., None], 3, axis=2)

    def mask(self, sample_id: str) -> NDArray[np.uint8]:
        """(H, W) class ids; most slices of a volume show no lesion. Raises `SampleError`, also where there is none."""
        volume, number = self._locate(sample_id)
        if volume.mask is None:
            raise SampleError(str(volume.image), f"expected segmentation-{volume.number}.nii beside it, found none")
        path = volume.mask
        labels = self._masks.read(
            path, lambda: read_labels(path, volume.geometry), lambda slices: slices[number].copy()
        )
        if self.task == "both":
            return labels
        return (labels == TUMOUR if self.task == "tumour" else labels >= LIVER).astype(np.uint8)

    def fingerprint(self) -> str:
        """SHA-256 (hex) of settings, image labels, and names, sizes and modification times, as they were indexed."""
        return self._fingerprint

    def _locate(self, sample_id: str) -> tuple[Volume, int]:
        match = SLICE_ID.fullmatch(sample_id)
        volume = self._volumes.get(int(match[1])) if match else None
        if match is None or volume is None or int(match[2]) >= volume.num_slices:
            raise KeyError(f"no slice {sample_id!r} among {len(self._volumes)} volumes")
        return volume, int(match[2])

    def _refuse_unknown(self) -> None:
        """LastVolume of which the settings want to know what nobody says."""
        unknown = [v for v in self._volumes.values() if v.mask is None and v.number not in self._listed]
        if not unknown or (self.cfg.image_labels is None and self.cfg.slices == "all"):
            return
        raise UserError(
            f"{self.root}: expected a segmentation file, or rows in data.image_labels, for every volume, found neither "
            f"for {named(v.image.name for v in unknown)}; add rows for their slices, or move these volumes away"
            + (", or take all slices (data.slices all)" if self.cfg.image_labels is None else "")
        )

    @cached_property
    def _index(self) -> tuple[tuple[SampleRef, ...], tuple[Skipped, ...]]:
        """Samples, and masks that could not be read for their facts."""
        facts, damaged = self._all_facts()
        lost = {skipped.sample_id for skipped in damaged}
        refs = [
            SampleRef(
                sample_id=f"{volume.group_id}/slice-{number:04}",
                group_id=volume.group_id,
                has_mask=volume.mask is not None and volume.group_id not in lost,
                image_label=label,
                spacing=volume.geometry.spacing,
            )
            for volume in self._volumes.values()
            for number, label in self._labels(volume, facts.get(volume.number))
            if number % self.cfg.every_nth == 0
        ]
        if not refs:
            raise UserError(f"{self.root}: expected slices that show liver, found none; pass --data.slices all")
        return tuple(sorted(refs, key=lambda ref: ref.sample_id)), damaged

    def _labels(self, volume: Volume, facts: SliceFacts | None) -> list[tuple[int, int | None]]:
        """Number and image-level label of each slice that `cfg.slices` wants."""
        listed, all_slices = self._listed.get(volume.number), self.cfg.slices == "all"
        if listed is not None:
            return [(n, listed.get(n)) for n in range(volume.num_slices) if all_slices or n in listed]
        if facts is None:
            return [(n, None) for n in range(volume.num_slices)] if all_slices else []
        lesion = facts.liver if self.task == "liver" else facts.tumour
        return [(n, int(n in lesion)) for n in range(volume.num_slices) if all_slices or n in facts.liver]

    def _all_facts(self) -> tuple[dict[int, SliceFacts], tuple[Skipped, ...]]:
        """Facts of the masks of volumes that are not listed, by volume number; and the damaged masks."""
        unlisted = [v for v in self._volumes.values() if v.mask is not None and v.number not in self._listed]
        folder = cache_root(self.cfg.cache_dir) / f"{self.name}-facts"
        console = Console(stderr=True)
        bar = {"console": console, "transient": True, "disable": not console.is_terminal}
        # One after the other: only one mask may be in memory.
        results = {v.number: self._facts(folder, v) for v in track(unlisted, "Looking at masks", **bar)}
        damaged = tuple(skipped for skipped in results.values() if isinstance(skipped, Skipped))
        return {number: facts for number, facts in results.items() if isinstance(facts, SliceFacts)}, damaged

    def _facts(self, folder: Path, volume: Volume) -> SliceFacts | Skipped:
        path, geometry = volume.mask, volume.geometry
        assert path is not None, "only volumes with a mask are asked"
        saved = facts_path(folder, path, geometry.shape, geometry.turn)
        facts = load_facts(saved)
        if facts is None:
            try:
                facts = self._masks.read(path, lambda: read_labels(path, geometry), facts_of)
            except SampleError as error:
                return stop_or_skip(volume.group_id, error, self.cfg.on_error)
            save_facts(saved, facts)
        return facts

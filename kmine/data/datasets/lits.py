"""LiTS: liver tumours in CT. A sample is an axial slice, windowed to 8 bits; a group is a volume."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from kmine.config import DataConfig
from kmine.data.datasets.lits_index import Volume, find_volumes
from kmine.data.datasets.slice_labels import SliceFacts, facts_of, facts_path, load_facts, read_image_labels, save_facts
from kmine.data.io.find_files import named
from kmine.data.io.nifti import VolumeCache, read_labels, read_windowed
from kmine.data.io.windowing import LIVER_WINDOW, grey_as_rgb
from kmine.data.source import AXIAL_CT, IndexedSource, choose_task, fingerprint_files, stop_or_skip
from kmine.errors import SampleError, UserError
from kmine.io.files import cache_root
from kmine.types import SampleRef, Skipped, slice_id

VERSION = 1
"""Part of the fingerprint: increase it when the same files and settings give other pixels."""
LIVER, TUMOUR = 1, 2
OBJECTS = {"tumour": ("tumour",), "liver": ("liver",), "both": ("liver", "tumour")}
"""Classes by task."""


class Lits(IndexedSource):
    """Volumes in a folder, paired with masks by number.

    The image-level label of a slice is 1 if it shows the lesion of the task (tumour; with task liver, any liver). For
    volumes listed in `cfg.image_labels` it comes from that table and the index opens no mask; a slice without a row has
    no label. For other volumes it comes from the mask, which is read once; the result is cached. Volumes with neither
    mask nor rows are unlabeled and have no image-level labels.

    Args:
        root: searched with all its subfolders.
        cfg: task, slices, every_nth, window, image_labels, cache_dir and on_error (whether a mask without a volume and
            a damaged file stop, or are listed in `skipped`).

    Raises:
        UserError: when the folder is missing, unreadable or holds no volume; for two files of one number; for volumes
            without mask and rows if `image_labels` is given or only slices with liver are selected; for a task of
            another data set.
        SampleError: for a damaged header.
    """

    name = "lits"
    symmetry = AXIAL_CT

    def __init__(self, root: Path, cfg: DataConfig) -> None:
        self.root, self.cfg = root, cfg
        self.task = choose_task(cfg.task, self.name, tuple(OBJECTS))
        self.class_names = ("background", *OBJECTS[self.task])
        self.window = LIVER_WINDOW if cfg.window is None else cfg.window
        self._images, self._masks = VolumeCache(), VolumeCache()
        self._volumes, self._skipped, files = find_volumes(self.root, cfg.on_error)
        self._by_name = {volume.group_id: volume for volume in self._volumes.values()}
        self._stacks = {volume.group_id: (volume.image, volume.num_slices) for volume in self._volumes.values()}
        self._listed: dict[int, dict[int, int]] = {}
        if cfg.image_labels is not None:
            sizes = {number: volume.num_slices for number, volume in self._volumes.items()}
            unread = {skipped.sample_id for skipped in self._skipped}
            self._listed = read_image_labels(Path(cfg.image_labels), sizes, unread)
        self._refuse_unknown()
        settings = {
            "source": [self.name, VERSION, self.task, cfg.slices, cfg.every_nth, *map(float, self.window)],
            "image_labels": sorted((n, sorted(labels.items())) for n, labels in self._listed.items()),
        }
        self._fingerprint = fingerprint_files(settings, self.root, files)

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """Files that the index left out, and why."""
        return (*self._skipped, *self._index[1])

    def refs(self) -> tuple[SampleRef, ...]:
        """All slices; the first call may read masks (see the class)."""
        return self._index[0]

    def image(self, sample_id: str) -> NDArray[np.uint8]:
        """(H, W, 3), three equal channels, [0, 255]. Raises `SampleError`."""
        volume, number = self._locate(sample_id)
        path, geometry = volume.image, volume.geometry
        return grey_as_rgb(self._images.read_slice(path, lambda: read_windowed(path, geometry, self.window), number))

    def mask(self, sample_id: str) -> NDArray[np.uint8]:
        """(H, W) class ids; all 0 in most slices. Raises `SampleError`, also for a volume without a mask."""
        volume, number = self._locate(sample_id)
        if volume.mask is None:
            raise SampleError(str(volume.image), f"expected segmentation-{volume.number}.nii beside it, found none")
        path = volume.mask
        labels = self._masks.read_slice(path, lambda: read_labels(path, volume.geometry), number)
        if self.task == "both":
            return labels
        return (labels == TUMOUR if self.task == "tumour" else labels >= LIVER).astype(np.uint8)

    def _locate(self, sample_id: str) -> tuple[Volume, int]:
        location = self.slice_location(sample_id)
        if location is None:
            raise KeyError(f"no slice {sample_id!r} among {len(self._volumes)} volumes")
        return self._by_name[location.volume], location.number

    def _refuse_unknown(self) -> None:
        """Refuse volumes that have neither a mask nor rows in data.image_labels, where labels are needed."""
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
        """All samples, and masks that could not be read."""
        facts, damaged = self._all_facts()
        lost = {skipped.sample_id for skipped in damaged}
        refs = [
            SampleRef(
                sample_id=slice_id(volume.group_id, number),
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
        """Number and image-level label of each slice selected by `cfg.slices`."""
        listed, all_slices = self._listed.get(volume.number), self.cfg.slices == "all"
        if listed is not None:
            return [(n, listed.get(n)) for n in range(volume.num_slices) if all_slices or n in listed]
        if facts is None:
            return [(n, None) for n in range(volume.num_slices)] if all_slices else []
        lesion = facts.liver if self.task == "liver" else facts.tumour
        return [(n, int(n in lesion)) for n in range(volume.num_slices) if all_slices or n in facts.liver]

    def _all_facts(self) -> tuple[dict[int, SliceFacts], tuple[Skipped, ...]]:
        """Facts of the masks of unlisted volumes by volume number, and damaged masks."""
        unlisted = [v for v in self._volumes.values() if v.mask is not None and v.number not in self._listed]
        folder = cache_root(self.cfg.cache_dir) / f"{self.name}-facts"
        console = Console(stderr=True)
        bar = {"console": console, "transient": True, "disable": not console.is_terminal}
        # Sequential, as only one mask may be in memory.
        results = {v.number: self._facts(folder, v) for v in track(unlisted, "Reading masks", **bar)}
        damaged = tuple(skipped for skipped in results.values() if isinstance(skipped, Skipped))
        return {number: facts for number, facts in results.items() if isinstance(facts, SliceFacts)}, damaged

    def _facts(self, folder: Path, volume: Volume) -> SliceFacts | Skipped:
        path, geometry = volume.mask, volume.geometry
        assert path is not None, "called for volumes with a mask only"
        saved = facts_path(folder, path, geometry.shape, geometry.orientation)
        facts = load_facts(saved)
        if facts is None:
            try:
                facts = self._masks.read(path, lambda: read_labels(path, geometry), facts_of)
            except SampleError as error:
                return stop_or_skip(volume.group_id, error, self.cfg.on_error)
            save_facts(saved, facts)
        return facts

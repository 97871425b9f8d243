"""A user's own images and masks: two folders paired by name, or a table."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kmine.config import DataConfig
from kmine.data.datasets.folder_csv import read_folder_csv
from kmine.data.datasets.folder_index import Item, file_kind, pair_folders
from kmine.data.io.dicom import Header, read_dicom, read_header
from kmine.data.io.dicom_seg import read_seg_mask
from kmine.data.io.find_files import named
from kmine.data.io.image_file import image_shape
from kmine.data.io.mask_palettes import MaskPalettes
from kmine.data.io.nifti import VolumeCache, read_integers, read_windowed
from kmine.data.io.nifti_header import Geometry, find_misplacement, read_geometry
from kmine.data.io.pictures import WINDOW_CURE, class_ids, read_mask_picture, read_picture, require_size
from kmine.data.io.windowing import LIVER_WINDOW, grey_as_rgb
from kmine.data.source import IndexedSource, fingerprint_files, size_and_time, stop_or_skip
from kmine.errors import SampleError, UserError
from kmine.types import SLICE_ID, SampleRef, Skipped, slice_id

VERSION, READ_ANEW = 1, 2
"""Part of the fingerprint: increase it when the same files and settings give other pixels.

`READ_ANEW` stands for DICOM files and for masks of differing colour palettes, which older versions read otherwise: they
are decoded again, and a run begun before resumes where the pixels are the same.
"""

_log = logging.getLogger(__name__)


class Folder(IndexedSource):
    """Images of 8-bit grey or RGB, or windowed to 8 bits, with masks for some or all of them.

    A PNG, JPEG, TIFF or DICOM file is one sample, named by its path without suffix; each axial slice of a NIfTI volume
    is one (`PATH/slice-0042`). The group is that of the table, else the DICOM series, the volume or the single image.
    Names are not interpreted: several images of a patient need the table.

    Args:
        cfg: images and masks, or csv; class_names, window, every_nth and on_error (whether a mask without an image, a
            row without its file and a damaged header stop, or are listed in `skipped`).

    Raises:
        UserError: when files are not named, not found or do not fit together; for volumes without a window.
        SampleError: for a damaged header.
    """

    name = "folder"

    def __init__(self, cfg: DataConfig) -> None:
        self.cfg = cfg
        self.class_names = self.mask_names = cfg.class_names
        self._volumes, self._labels = VolumeCache(), VolumeCache()
        root, items, left_out = self._found()
        self._require_window([item.image.name for item in items if item.kind == "nifti"])
        self._headers: dict[str, Geometry | Header] = {}
        damaged = [skipped for item in items if (skipped := self._read_header(item)) is not None]
        lost = {skipped.sample_id for skipped in damaged}
        self._items = {item.name: item for item in items if item.name not in lost}
        self.skipped = (*left_out, *damaged)
        stacks = {name: head.stack_shape[0] for name, head in self._headers.items() if isinstance(head, Geometry)}
        pictures = (m for i in self._items.values() if (m := i.mask) is not None and file_kind(m) == "picture")
        self.palettes = MaskPalettes(pictures)
        """Colours of masks with a palette."""
        self._stacks = {name: (self._items[name].image, num_slices) for name, num_slices in stacks.items()}
        refs = (ref for item in self._items.values() for ref in self._refs_of(item))
        self._refs = tuple(sorted(refs, key=lambda ref: ref.sample_id))
        self._check_refs()
        self.notes = tuple(self._misplaced_masks())
        for note in self.notes:
            _log.warning("%s", note)
        self._fingerprint = self._sign(root)

    def _found(self) -> tuple[Path, list[Item], tuple[Skipped, ...]]:
        """Root folder of the names, images, and files left out."""
        return _find(self.cfg)

    def _require_window(self, volumes: Sequence[str]) -> None:
        if volumes and self.cfg.window is None:
            raise UserError(
                f"data.window: expected the values shown as black and as white, for {named(volumes)}, got nothing; "
                f"{WINDOW_CURE}, for the liver in CT [{LIVER_WINDOW[0]:g},{LIVER_WINDOW[1]:g}]"
            )

    def refs(self) -> tuple[SampleRef, ...]:
        """All images and slices, sorted by id."""
        return self._refs

    def image(self, sample_id: str) -> NDArray[np.uint8]:
        """(H, W, 3) RGB, [0, 255]; grey as three equal channels. Raises `SampleError`."""
        item, number = self._locate(sample_id)
        if item.kind == "picture":
            return read_picture(item.image, self.cfg.window)
        if item.kind == "dicom":
            return read_dicom(item.image, self.cfg.window, number)
        geometry, window = self._geometry(item), self.cfg.window
        assert window is not None, "refused when opened"
        read = partial(read_windowed, item.image, geometry, window)
        return grey_as_rgb(self._volumes.read_slice(item.image, read, number))

    def mask(self, sample_id: str) -> NDArray[np.uint8]:
        """(H, W) class ids, 255 is ignored. Raises `SampleError`, also for another size than the image's."""
        item, number = self._locate(sample_id)
        if item.mask is None:
            raise SampleError(str(item.image), "expected a mask of the same name, found none")
        parts = [self._read_mask(item, path, number) for path in (item.mask, *item.more)]
        mask = np.maximum.reduce(parts)
        if item.label == 0 and (mask == len(self.class_names) - 1).any():
            expected = f"expected no {self.class_names[-1]} in the mask, as the label in data.csv is 0, got one"
            raise SampleError(str(item.mask), expected)
        return mask

    def dicom_frame(self, sample_id: str) -> tuple[Path, int] | None:
        """DICOM file and frame of a sample; None for another kind."""
        item, number = self._locate(sample_id)
        return (item.image, number) if item.kind == "dicom" else None

    def _read_mask(self, item: Item, path: Path, number: int) -> NDArray[np.uint8]:
        if item.kind == "nifti":
            geometry = self._geometry(item)
            mask = self._labels.read_slice(
                path, lambda: class_ids(path, read_integers(path, geometry), self.mask_names), number
            )
        else:
            is_seg = file_kind(path) == "dicom"
            mask = (
                read_seg_mask(path, item.image, number, self.class_names)
                if is_seg
                else read_mask_picture(path, self.mask_names, self.palettes)
            )
            header = self._headers.get(item.name)
            require_size(path, mask, header.shape if isinstance(header, Header) else image_shape(item.image))
        return mask

    def _locate(self, sample_id: str) -> tuple[Item, int]:
        """Item of a sample, and number of its slice (0 for other images)."""
        item = self._items.get(sample_id)
        if item is not None and item.kind != "nifti":
            return item, 0
        match = SLICE_ID.fullmatch(sample_id)
        header = self._headers.get(match[1]) if match else None
        if match and isinstance(header, Header) and int(match[2]) < header.frames > 1:
            return self._items[match[1]], int(match[2])
        location = self.slice_location(sample_id)
        if location is None:
            raise KeyError(f"no sample {sample_id!r} among {len(self._refs)}")
        return self._items[location.volume], location.number

    def _geometry(self, item: Item) -> Geometry:
        geometry = self._headers[item.name]
        assert isinstance(geometry, Geometry), "a NIfTI volume"
        return geometry

    def _read_header(self, item: Item) -> Skipped | None:
        try:
            if item.kind == "nifti":
                self._headers[item.name] = read_geometry(item.image)
            elif item.kind == "dicom":
                self._headers[item.name] = header = read_header(item.image)
                if header.frames > 1 and item.mask is not None and file_kind(item.mask) != "dicom":
                    problem = f"expected a DICOM segmentation of {item.image.name} with its {header.frames} frames"
                    raise SampleError(item.mask, f"{problem}, got another file; convert the mask, or split the image")
        except SampleError as error:
            return stop_or_skip(item.name, error, self.cfg.on_error)
        return None

    def _misplaced_masks(self) -> Iterator[str]:
        """A note on mask volumes of another spacing or origin than their images."""
        problems = []
        volumes = [(item.mask, item.image) for item in self._items.values() if item.kind == "nifti" and item.mask]
        for mask, image in volumes:
            with suppress(SampleError):  # reported when read
                if problem := find_misplacement(mask, image):
                    problems.append(f"{mask}: {problem}")
        if problems:
            yield (
                f"{len(problems)} of {len(volumes)} mask volumes have another spacing or origin than their images: "
                f"{problems[0]}; voxels are paired by number, check that they belong together"
            )

    def _refs_of(self, item: Item) -> list[SampleRef]:
        header, ids, series = self._headers.get(item.name), [item.name], None
        if isinstance(header, Geometry):
            ids = [slice_id(item.name, number) for number in range(0, header.stack_shape[0], self.cfg.every_nth)]
        elif header is not None:
            series = header.series
            if header.frames > 1:
                ids = [slice_id(item.name, number) for number in range(0, header.frames, self.cfg.every_nth)]
        group, spacing = item.group or series or item.name, header.spacing if header else None
        return [SampleRef(i, group, item.mask is not None, item.label, spacing, item.split) for i in ids]

    def _check_refs(self) -> None:
        """Checks that need the headers: slices with the name of an image, series in two splits."""
        if not self._refs:
            raise UserError(f"data: expected images, got none that can be read ({len(self.skipped)} left out)")
        for first, other in zip(self._refs, self._refs[1:], strict=False):
            if first.sample_id == other.sample_id:
                raise UserError(f"data: expected one image a name, found two of {first.sample_id}; rename one")
        sides: dict[str, SampleRef] = {}
        for ref in self._refs:
            other = sides.setdefault(ref.group_id, ref)
            if other.split != ref.split:
                raise UserError(
                    f"data.csv: expected the group {ref.group_id} in one split, got {other.sample_id} in {other.split} "
                    f"and {ref.sample_id} in {ref.split}; move all of it to one"
                )

    def _sign(self, root: Path) -> str:
        rows = [
            [item.name, file_stamp(item.image), item.mask and file_stamp(item.mask), item.group, item.label, item.split]
            + [file_stamp(path) for path in item.more]
            for _, item in sorted(self._items.items())
        ]
        is_dicom = any(item.kind == "dicom" for item in self._items.values())
        is_new = is_dicom or (len(self.class_names) > 2 and bool(self.palettes.differing))
        source = [self.name, READ_ANEW if is_new else VERSION, self.cfg.every_nth, *map(float, self.cfg.window or ())]
        return fingerprint_files({"source": source, "class_names": list(self.class_names), "rows": rows}, root, ())


def _find(cfg: DataConfig) -> tuple[Path, list[Item], tuple[Skipped, ...]]:
    """Root folder of the names, images, and files left out."""
    if cfg.csv is not None:
        if (cfg.images, cfg.masks, cfg.mask_suffix) != (None, None, None):
            raise UserError("data.csv: expected either a table or data.images (and data.masks), got both; drop one")
        table = Path(cfg.csv)
        return table.parent, *read_folder_csv(table, cfg.on_error)
    if cfg.images is None:
        raise UserError(
            "data.images: expected the folder of your images, got nothing; "
            "pass --data.images FOLDER --data.masks FOLDER, or --data.csv FILE"
        )
    images = Path(cfg.images)
    masks = Path(cfg.masks) if cfg.masks is not None else None
    return images, *pair_folders(images, masks, cfg.on_error, cfg.mask_suffix or "")


def file_stamp(path: Path) -> list[str | int]:
    """Name, bytes and modification time in ns."""
    return [path.name, *size_and_time(path)]

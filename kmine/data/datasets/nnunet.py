"""A data set in the layout of nnU-Net: one to three channels as the colours of an image, 2-D or 3-D.

Cases without a label are unlabeled; those of imagesTs with a label are the test split, others there are not used. The
ignore label becomes 255.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kmine.config import DataConfig
from kmine.data.datasets.folder import Folder, file_stamp
from kmine.data.datasets.folder_index import Item
from kmine.data.datasets.nnunet_index import CT, IGNORE, choose_channels, find_cases, read_layout
from kmine.data.io.find_files import named
from kmine.data.io.nifti import VolumeCache, percentile_window, read_windowed
from kmine.data.io.nifti_header import Geometry, read_geometry
from kmine.data.io.pictures import WINDOW_CURE, read_picture, require_size
from kmine.data.io.windowing import LIVER_WINDOW, grey_as_rgb
from kmine.errors import SampleError, UserError
from kmine.types import IGNORE_INDEX, Skipped

VERSION = 1
"""Part of the fingerprint: increase it when the same files and settings give other pixels."""


class Nnunet(Folder):
    """Cases of imagesTr and, with labels, of imagesTs.

    Values of NIfTI files are windowed by `cfg.window`; without it, each channel of a volume from its 0.5th to its
    99.5th percentile (own choice), but not that of a CT, whose values have a meaning of their own.

    Args:
        root: the folder of dataset.json.
        cfg: channels, window, every_nth and on_error.

    Raises:
        UserError: no such layout, missing channels, more than three, no window for CT.
        SampleError: a damaged header.
    """

    name = "nnunet"

    def __init__(self, root: Path, cfg: DataConfig) -> None:
        self.root, self.layout = root, read_layout(root)
        self.channels = choose_channels(self.layout, cfg.channels)
        self._caches = tuple(VolumeCache() for _ in self.channels)
        self._files: dict[str, tuple[Path, ...]] = {}
        self._num_unused = 0
        super().__init__(replace(cfg, class_names=self.layout.class_names))
        self.mask_names += (IGNORE,) if self.layout.ignore else ()
        if self._num_unused:
            self.notes += (f"{self._num_unused} images of imagesTs have no label and are not used",)

    def _found(self) -> tuple[Path, list[Item], tuple[Skipped, ...]]:
        cases, skipped, self._num_unused = find_cases(self.root, self.layout, self.channels, self.cfg.on_error)
        self._files = {case.name: case.channels for case in cases}
        given = any(case.is_test for case in cases)
        splits = {case.name: ("test" if case.is_test else "train") if given else None for case in cases}
        items = [Item(case.name, case.channels[0], case.label, split=splits[case.name]) for case in cases]
        return self.root, items, skipped

    def _require_window(self, volumes: Sequence[str]) -> None:
        if volumes and self.cfg.window is None and CT in map(str.upper, self.channel_names):
            raise UserError(
                f"data.window: expected the Hounsfield units shown as black and as white, for {named(volumes)}, got "
                f"nothing; {WINDOW_CURE}, for the liver [{LIVER_WINDOW[0]:g},{LIVER_WINDOW[1]:g}]"
            )

    @property
    def channel_names(self) -> tuple[str, ...]:
        """Names of the chosen channels."""
        return tuple(self.layout.channels[n] for n in self.channels)

    @property
    def file_channels(self) -> tuple[str, ...]:
        """These names where the channels are files of their own; none where one file is the whole image."""
        return self.channel_names if any(len(files) > 1 for files in self._files.values()) else ()

    def channel_files(self, sample_id: str) -> tuple[Path, ...]:
        """Files of the chosen channels of a sample."""
        return self._files[self._locate(sample_id)[0].name]

    def image(self, sample_id: str) -> NDArray[np.uint8]:
        """(H, W, 3), [0, 255]: a grey image, two channels and black, or three. Raises `SampleError`."""
        item, number = self._locate(sample_id)
        paths = self._files[item.name]
        if item.kind == "picture":
            pictures = [read_picture(path, self.cfg.window) for path in paths]
            if len(pictures) == 1 and len(self.layout.channels) == 3:
                planes = [pictures[0][..., n] for n in self.channels]
            elif len(pictures) == 1:
                return pictures[0]
            else:
                planes = [grey_plane(path, picture) for path, picture in zip(paths, pictures, strict=True)]
        else:
            planes = [self._slice(item, path, number, cache) for path, cache in zip(paths, self._caches, strict=True)]
        return stack_channels(paths, planes)

    def _slice(self, item: Item, path: Path, number: int, cache: VolumeCache) -> NDArray[np.uint8]:
        read = partial(read_channel, path, self._geometry(item), self.cfg.window)
        return cache.read_slice(path, read, number)

    def _read_mask(self, item: Item, path: Path, number: int) -> NDArray[np.uint8]:
        mask, ignore = super()._read_mask(item, path, number), self.layout.ignore
        return mask if ignore is None else np.where(mask == ignore, np.uint8(IGNORE_INDEX), mask)

    def _sign(self, root: Path) -> str:
        rows = [file_stamp(path) for _, paths in sorted(self._files.items()) for path in paths[1:]]
        settings = [VERSION, self.channels, self.layout, rows, super()._sign(root)]
        return hashlib.sha256(repr(settings).encode()).hexdigest()


def read_channel(path: Path, geometry: Geometry, window: tuple[float, float] | None) -> NDArray[np.uint8]:
    """(D, H, W) grey, [0, 255], of a channel's volume; `geometry` is that of the first one. Raises `SampleError`."""
    if read_geometry(path).orientation != geometry.orientation:
        raise SampleError(path, "expected the axis directions of the first channel, got others; resample it")
    return read_windowed(path, geometry, window or percentile_window(path, geometry))


def grey_plane(path: Path, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(H, W, 3) of a channel's file -> (H, W). Raises `SampleError` for colours."""
    if (picture != picture[..., :1]).any():
        raise SampleError(path, "expected one grey channel a file, got colours; store a grey image")
    return picture[..., 0]


def stack_channels(paths: Sequence[Path], planes: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """(..., H, W) of one to three channels -> (..., H, W, 3): grey, two and black, or three.

    Raises `SampleError` for another size than the first one's; `paths` are the files.
    """
    if len(planes) == 1:
        return grey_as_rgb(planes[0])
    for path, plane in zip(paths, planes, strict=False):
        require_size(path, plane, planes[0].shape)
    return np.stack([*planes, *[np.zeros_like(planes[0])] * (3 - len(planes))], axis=-1)

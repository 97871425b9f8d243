"""COVID-QU-Ex: chest X-rays with masks of the lungs and, in one of its two parts, of the COVID-19 infection."""

from __future__ import annotations

import logging
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kmine.config.data import COVID_CLASSES, DataConfig
from kmine.data.datasets import covid_qu_ex_index as index
from kmine.data.datasets.covid_qu_ex_index import IMAGES, PUBLISHED, Part
from kmine.data.io.find_files import drop_orphans, index_images
from kmine.data.io.image_file import read_rgb
from kmine.data.io.pictures import FOREGROUND_ABOVE, read_foreground
from kmine.data.source import CHEST_XRAY, IndexedSource, choose_task, fingerprint_files
from kmine.errors import SampleError, UserError
from kmine.types import SampleRef, Skipped

VERSION = 1
"""Part of the fingerprint: increase it when the same files and settings give other pixels."""
MASKS = {"infection": index.INFECTION_MASKS, "lung": index.LUNG_MASKS}
"""Folder of the masks by task."""
INFECTED = {"COVID-19": 1, "Non-COVID": 0, "Normal": 0}

_log = logging.getLogger(__name__)


class CovidQuEx(IndexedSource):
    """Images of one part, with the official split; a sample is `Train/COVID-19/NAME`.

    Task infection reads the infection part. Task lung reads the lung part or, if absent, the lung masks of the
    infection part. Image and mask have the same split, class and name. Masks of Non-COVID and Normal, and some of
    COVID-19, are all 0.

    The image-level label of task infection is the class: 1 for COVID-19, else 0, which means free of that lesion only.
    Task lung has no labels, as every image shows lungs.

    Copies of one image in several splits or classes, in either part, form one group (`name_groups`). Patients are not
    published.

    Args:
        root: searched with all its subfolders.
        cfg: task, classes and on_error (whether a mask without an image stops, or is listed in `skipped`).

    Raises:
        UserError: for a task of another data set; when the folder is missing, unreadable or of another layout, or
            lacks the required part or class.
    """

    name = "covid_qu_ex"
    symmetry = CHEST_XRAY

    def __init__(self, root: Path, cfg: DataConfig) -> None:
        self.root, self.cfg = root, cfg
        self.task = choose_task(cfg.task, self.name, tuple(MASKS))
        self.class_names = ("background", self.task)
        parts, passed_over = index.find_parts(self.root)
        part = self._choose(parts)
        self._images, strays = self._index(part, IMAGES)
        self._masks, mask_strays = self._index(part, MASKS[self.task])
        self._refuse_missing(part)
        orphans = drop_orphans(self._masks, self._images, str(part.root), cfg.on_error)
        self.skipped = (*passed_over, *strays, *mask_strays, *orphans)
        self._alike = index.find_same_named(parts.values(), part.kind)
        copies = {place.path for places in self._alike for place in places}
        files = {*self._images.values(), *self._masks.values(), *copies}
        settings = {"source": [self.name, VERSION, self.task, sorted(cfg.classes), FOREGROUND_ABOVE]}
        self._fingerprint = fingerprint_files(settings, self.root, files)

    def refs(self) -> tuple[SampleRef, ...]:
        """All images, sorted by id; the first call reads files that may be copies of one another."""
        return self._refs

    def image(self, sample_id: str) -> NDArray[np.uint8]:
        """(H, W, 3), three equal channels, [0, 255]. Raises `SampleError`."""
        return read_rgb(self._images[sample_id], allow_grey=True)

    def mask(self, sample_id: str) -> NDArray[np.uint8]:
        """(H, W) of {0, 1}, may be all 0. Raises `SampleError`, also for another size than the image's."""
        image = self._images[sample_id]
        if sample_id not in self._masks:
            raise SampleError(str(image), f"expected a mask of the same name in {MASKS[self.task]}, found none")
        return read_foreground(self._masks[sample_id], image)

    @cached_property
    def _refs(self) -> tuple[SampleRef, ...]:
        groups = index.name_groups(self._alike)
        return tuple(
            SampleRef(
                sample_id=sample_id,
                group_id=groups.get(path, sample_id),
                has_mask=sample_id in self._masks,
                image_label=INFECTED[sample_id.split("/")[1]] if self.task == "infection" else None,
                split=sample_id.split("/")[0].lower(),
            )
            for sample_id, path in sorted(self._images.items())
        )

    def _choose(self, parts: dict[str, Part]) -> Part:
        if self.task in parts:
            return parts[self.task]
        (other,) = parts.values()
        if self.task == "infection":
            raise UserError(
                f"{self.root}: expected the infection part, with folders of infection masks, found only the lung part "
                f"at {other.root}; get it ({PUBLISHED}), or pass --data.task lung"
            )
        _log.warning("%s: no lung part here; the lung masks of the infection part are used", self.root)
        return other

    def _index(self, part: Part, leaf: str) -> tuple[dict[str, Path], list[Skipped]]:
        """Files of the selected classes by sample id, and other files."""
        paths, strays = {}, []
        for split in index.SPLITS:
            for class_name in self.cfg.classes:
                folder = part.folders.get((split, class_name, leaf))
                if folder is not None:
                    files, others = index_images(folder, self.cfg.on_error)
                    paths |= {index.id_of(split, class_name, stem): path for stem, path in files.items()}
                    strays += others
        return paths, strays

    def _refuse_missing(self, part: Part) -> None:
        present = {sample_id.split("/")[1] for sample_id in self._images}
        missing = [name for name in self.cfg.classes if name not in present]
        if missing:
            rest = [name for name in COVID_CLASSES if name in present]
            choose = f", or pass --data.classes '[{', '.join(rest)}]'" if rest else ""
            raise UserError(
                f"{part.root}: expected images of class {' and '.join(missing)}, found none; "
                f"unpack it again ({PUBLISHED}){choose}"
            )
        if not self._masks:
            raise UserError(
                f"{part.root}: expected folders of {MASKS[self.task]} beside those of images, with PNG files of the "
                f"same names, found none; unpack it again ({PUBLISHED})"
            )

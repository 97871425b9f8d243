"""Folders of COVID-QU-Ex at any depth: two parts, each `{Train,Val,Test}/CLASS/{images,lung masks,...}`."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from kmine.config.data import COVID_CLASSES
from kmine.data.io.find_files import SUFFIXES, refuse_folder, walk
from kmine.data.source import require_root
from kmine.errors import UserError
from kmine.io.download import sha256_of
from kmine.types import Skipped

PUBLISHED = (
    'published on Kaggle as "COVID-QU-Ex Dataset" by A. M. Tahir et al., '
    "https://www.kaggle.com/datasets/anasmohammedtahir/covidqu"
)
SPLITS = ("Train", "Val", "Test")
IMAGES, LUNG_MASKS, INFECTION_MASKS = "images", "lung masks", "infection masks"
LEAVES = (IMAGES, LUNG_MASKS, INFECTION_MASKS)
PART_NAME = re.compile(r"(infection|lung)[ _-]segmentation[ _-]data", re.IGNORECASE)


@dataclass
class Part:
    """The infection or the lung part: a folder with Train, Val or Test."""

    root: Path
    name: str
    """infection, lung or empty, from the innermost folder named like a part."""
    folders: dict[tuple[str, str, str], Path] = field(default_factory=dict)
    """By split, class and one of `LEAVES`."""

    @property
    def kind(self) -> str:
        """infection or lung: by name, else by the presence of infection masks."""
        return self.name or ("infection" if self.holds(INFECTION_MASKS) else "lung")

    def holds(self, leaf: str) -> bool:
        """Whether the part has a folder `leaf`, one of `LEAVES`."""
        return any(key[2] == leaf for key in self.folders)


@dataclass(frozen=True)
class ImageLocation:
    """An image of either part."""

    sample_id: str
    path: Path
    kind: str
    """Kind of its part."""


def id_of(split: str, class_name: str, stem: str) -> str:
    """`Train/COVID-19/covid_1`."""
    return f"{split}/{class_name}/{stem}"


def find_parts(root: Path) -> tuple[dict[str, Part], list[Skipped]]:
    """Parts by kind, and folders with the layout of a part that are left out for one with the published name.

    Raises:
        UserError: when the folder is missing or unreadable, holds no part, or several candidates for one.
    """
    require_root(root, "COVID-QU-Ex", PUBLISHED)
    parts = [part for part in _all_parts(root) if part.holds(IMAGES)]
    if not parts:
        raise UserError(
            f"{root}: expected Train/COVID-19/images or the like in it or below, found none; "
            f"pass --data.root FOLDER as unpacked ({PUBLISHED})"
        )
    chosen: dict[str, Part] = {}
    passed_over = []
    for kind in sorted({part.kind for part in parts}):
        of_kind = [part for part in parts if part.kind == kind]
        chosen[kind], *extra = [part for part in of_kind if part.name] or of_kind
        if extra:
            raise UserError(
                f"{root}: expected one folder of the {kind} part, found {chosen[kind].root} and {extra[0].root}; "
                "pass the one you mean as --data.root, or move the other away"
            )
        passed_over += [part.root for part in of_kind if part is not chosen[kind]]
    problem = "has the layout of the data set, but not in a folder named like its parts; to use it, pass --data.root"
    return chosen, [Skipped(path.name, str(path), problem) for path in passed_over]


def find_same_named(parts: Collection[Part], own: str) -> list[list[ImageLocation]]:
    """Possible copies: images of one file name and size in several splits or classes, in either part.

    Only groups with an image of the part `own`. No file is read.
    """
    locations: dict[tuple[str, int], list[ImageLocation]] = defaultdict(list)
    for part in parts:
        for (split, class_name, leaf), folder in part.folders.items():
            if leaf == IMAGES:
                for name, size in _sizes(folder):
                    place = ImageLocation(id_of(split, class_name, Path(name).stem), folder / name, part.kind)
                    locations[name, size].append(place)
    return [
        sorted(places, key=lambda place: (place.sample_id, place.kind))
        for places in locations.values()
        if len({place.sample_id for place in places}) > 1 and any(place.kind == own for place in places)
    ]


def name_groups(alike: Collection[Collection[ImageLocation]]) -> dict[Path, str]:
    """Group names of images with equal bytes; independent of the part that is read.

    The name includes a hash, as the first id may belong to the other part and name another image in this one.
    """
    names = {}
    for places in alike:
        by_content: dict[str, list[ImageLocation]] = defaultdict(list)
        for place in places:
            by_content[_content_fingerprint(place.path)].append(place)
        for fingerprint, identical in by_content.items():
            ids = {place.sample_id for place in identical}
            if len(ids) > 1:
                names |= {place.path: f"{min(ids)}#{fingerprint[:8]}" for place in identical}
    return names


def _all_parts(root: Path) -> list[Part]:
    """All folders with a split folder that has a class folder; folders of images are not listed."""
    parts: dict[Path, Part] = {}
    for place, folders, _ in walk(root):
        split, class_name = _spelled(place.parent.name, SPLITS), _spelled(place.name, COVID_CLASSES)
        if split is None or class_name is None or len(place.relative_to(root).parts) < 2:
            continue
        base = place.parent.parent
        part = parts.setdefault(base, Part(base, _name_of(root, base)))
        for name in folders:
            leaf = _spelled(name, LEAVES)
            if leaf is not None:
                first = part.folders.setdefault((split, class_name, leaf), place / name)
                if first != place / name:
                    raise UserError(f"{first}: expected it once, found {place / name} as well; rename one of them")
        folders[:] = []
    return list(parts.values())


def _name_of(root: Path, base: Path) -> str:
    names = (root.name, *base.relative_to(root).parts)
    kinds = [match[1].lower() for name in names if (match := PART_NAME.match(name))]
    return kinds[-1] if kinds else ""


def _spelled(name: str, published: Collection[str]) -> str | None:
    """The published name that equals `name` up to case and underscores."""
    plain = name.casefold().replace("_", " ")
    return next((right for right in published if right.casefold() == plain), None)


def _sizes(folder: Path) -> Iterator[tuple[str, int]]:
    """Name and size of each image file; anything else is left out."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.lower().endswith(SUFFIXES) and not entry.name.startswith("."):
                    with contextlib.suppress(OSError):  # reported when the image is read
                        if entry.is_file():
                            yield entry.name, entry.stat().st_size
    except OSError as error:
        refuse_folder(error)


def _content_fingerprint(path: Path) -> str:
    """SHA-256 (hex) of the content; of the path where the file cannot be read."""
    try:
        return sha256_of(path)
    except OSError:
        return hashlib.sha256(os.fsencode(path)).hexdigest()

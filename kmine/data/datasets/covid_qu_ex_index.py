"""The folders of COVID-QU-Ex, wherever they lie: two parts, each `{Train,Val,Test}/CLASS/{images,lung masks,...}`."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from kmine.config import COVID_CLASSES
from kmine.data.io.find_files import SUFFIXES, walk
from kmine.data.source import BLOCK_BYTES, is_folder
from kmine.errors import UserError
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
    """The infection or the lung part: a folder that holds Train, Val or Test."""

    root: Path
    name: str
    """infection, lung or empty, as the innermost folder says that is named like a part."""
    folders: dict[tuple[str, str, str], Path] = field(default_factory=dict)
    """By split, class and one of `LEAVES`."""

    @property
    def kind(self) -> str:
        """infection or lung: by the name, else by whether there are infection masks."""
        return self.name or ("infection" if self.holds(INFECTION_MASKS) else "lung")

    def holds(self, leaf: str) -> bool:
        """Whether any folder of one of `LEAVES` is there."""
        return any(key[2] == leaf for key in self.folders)


@dataclass(frozen=True)
class ImageLocation:
    """Where an image lies."""

    sample_id: str
    path: Path
    kind: str
    """Of its part."""


def id_of(split: str, class_name: str, stem: str) -> str:
    """Train/COVID-19/covid_1."""
    return f"{split}/{class_name}/{stem}"


def find_parts(root: Path) -> tuple[dict[str, Part], list[Skipped]]:
    """The parts by kind; and what is laid out like a part, but passed over because another one has the proper name.

    Raises:
        UserError: when the folder is missing or unreadable, holds no part, or several that might be meant.
    """
    if not is_folder(root):
        actual = (
            "a file; unpack it and pass the folder"
            if os.path.lexists(root)
            else f"nothing; pass --data.root ({PUBLISHED})"
        )
        raise UserError(f"{root}: expected the COVID-QU-Ex folder, found {actual}")
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
    problem = "laid out like the data set, but not in a folder named like its parts; to use it, pass it as --data.root"
    return chosen, [Skipped(path.name, str(path), problem) for path in passed_over]


def find_same_named(parts: Collection[Part], own: str) -> list[list[ImageLocation]]:
    """Images that may be one picture: of one file name and size, in several splits or classes, in either part.

    Only where the part `own` is concerned. No file is read.
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
    """Group names of the images that are one picture indeed, byte by byte; the same name whichever part is read.

    The first id alone would not do: where the other part has it, it may belong to another picture here.
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
    """Every folder that holds a split that holds a class; folders of images are not listed."""
    parts: dict[Path, Part] = {}
    for place, folders, _ in walk(root, _refuse):
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
    """The name as published, whatever its case and however its words are joined."""
    plain = name.casefold().replace("_", " ")
    return next((right for right in published if right.casefold() == plain), None)


def _refuse(error: OSError) -> None:
    raise UserError(f"{error.filename}: cannot be read ({error.strerror}); check its permissions") from error


def _sizes(folder: Path) -> Iterator[tuple[str, int]]:
    """Name and size of each image file; what is no file, or a link to nothing, is like no other."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.lower().endswith(SUFFIXES) and not entry.name.startswith("."):
                    with contextlib.suppress(OSError):  # its reader will speak of it
                        if entry.is_file():
                            yield entry.name, entry.stat().st_size
    except OSError as error:
        _refuse(error)


def _content_fingerprint(path: Path) -> str:
    """SHA-256 (hex) of the content; of the path where it cannot be read, which its reader will say."""
    try:
        sha256 = hashlib.sha256()
        with path.open("rb") as file:
            for block in iter(lambda: file.read(BLOCK_BYTES), b""):
                sha256.update(block)
        return sha256.hexdigest()
    except OSError:
        return hashlib.sha256(os.fsencode(path)).hexdigest()

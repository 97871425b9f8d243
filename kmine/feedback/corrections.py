"""Corrected masks: a folder of PNG, TIFF or NIfTI files, a COCO file or a Label Studio export.

Each is read as (H, W) uint8 class ids, 255 for ignored pixels, in its image's own frame, and checked against the size
of the image.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from kmine.errors import UserError, first_names
from kmine.feedback.coco import masks_of_coco
from kmine.feedback.expected import ExpectedMasks, Mask, refuse_duplicates, refuse_unknown
from kmine.feedback.label_studio import masks_of_label_studio
from kmine.io.files import safe_name
from kmine.io.json_file import load_json

PICTURES, VOLUMES = (".png", ".tif", ".tiff"), (".nii.gz", ".nii")
MAX_JSON = 2**29
"""Bytes of a COCO or Label Studio file."""


def read_corrections(path: Path, expected: ExpectedMasks) -> Iterator[tuple[str, Mask]]:
    """Read corrected masks one by one: (sample id, mask).

    A folder holds ID.png (as named by `kmine.audit --export masks`) or volumes; a file is that of its path below the
    folder or, where no id is so, of its bare name. A JSON file is COCO, where an image without annotations is an empty
    mask, or a Label Studio export, whose predictions are used if it has no annotations.

    Raises:
        UserError: no masks, an unknown format, ids that the run does not have, another size, unknown classes.
    """
    if path.is_dir():
        return _from_folder(path, expected)
    what = "a folder of masks, or a COCO or Label Studio file"
    value = load_json(path, what, "check the path, or export it again", MAX_JSON)
    if isinstance(value, dict) and isinstance(value.get("images"), list):
        return masks_of_coco(path, value, expected)
    if isinstance(value, list) and value and all(isinstance(task, dict) for task in value):
        return masks_of_label_studio(path, value, expected)
    raise UserError(f"{path}: expected COCO (object with images) or Label Studio (list of tasks); export again")


def _from_folder(folder: Path, expected: ExpectedMasks) -> Iterator[tuple[str, Mask]]:
    every = sorted(path for path in folder.rglob("*") if not path.name.startswith("."))
    files = [path for path in every if path.name.lower().endswith(PICTURES + VOLUMES)]
    if not files:
        raise UserError(f"{folder}: expected masks as PNG, TIFF or NIfTI, found none; check the path")

    def sample_id(path: Path) -> str | None:
        return expected.names.get(_stem(path, folder)) or expected.names.get(_stem(path))

    pictures = {path: sample_id(path) for path in files if not path.name.lower().endswith(VOLUMES)}
    refuse_unknown(folder, [path.name for path, name in pictures.items() if name is None])
    refuse_duplicates(folder, pictures.values(), "one mask an image")
    given, rest = {*pictures.values()}, [path for path in every if path not in files and path.is_file()]
    unread = [path.name for path in rest if sample_id(path) not in {None, *given}]
    if unread:
        raise UserError(f"{folder}: expected masks as PNG, TIFF or NIfTI, got {first_names(unread)}; convert these")
    return _read_files(folder, files, pictures, expected)


def _read_files(
    folder: Path, files: Sequence[Path], pictures: Mapping[Path, str | None], expected: ExpectedMasks
) -> Iterator[tuple[str, Mask]]:
    read, seen = expected.pictures([*pictures]), {str(name) for name in pictures.values()}
    for path in files:
        if path in pictures:
            yield expected.check(str(path), str(pictures[path]), read(path))
            continue
        in_folder = [] if path.parent == folder else [safe_name(_stem(path, folder))]
        slices = next(filter(None, (expected.volumes(name, path) for name in (*in_folder, _stem(path)))), None)
        if slices is None:
            refuse_unknown(folder, [path.name])
        for sample_id, mask in slices or ():
            if sample_id in expected.shapes:  # the run may have left out slices
                if sample_id in seen:
                    raise UserError(f"{path}: expected one mask an image, got another of {sample_id}; remove one")
                seen.add(sample_id)
                yield expected.check(str(path), sample_id, mask)


def _stem(path: Path, folder: Path | None = None) -> str:
    name = path.relative_to(folder).as_posix() if folder else path.name
    return re.sub(r"(\.nii\.gz|\.[^./]*)$", "", name, flags=re.IGNORECASE)

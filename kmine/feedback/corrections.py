"""Corrected masks: a folder of PNG or NIfTI files, a COCO file or a Label Studio export.

Each is read as (H, W) uint8 class ids, 255 for ignored pixels, in its image's own frame, and checked against the size
of the image.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kmine.errors import UserError, first_names
from kmine.feedback import label_studio_rle
from kmine.io.files import safe_name
from kmine.types import IGNORE_INDEX

Mask = NDArray[np.uint8]
IGNORED = "ignored"
"""Class name of ignored pixels in COCO and in Label Studio."""
SUFFIXES = (".png", ".nii", ".nii.gz")
SIGNATURE_KEY = "kmine.signature"
"""PNG text chunk of kmine's own masks, whose values are class ids and 255 for ignored pixels."""
Volumes = Callable[[str, Path], Iterator[tuple[str, Mask]] | None]
"""(name, path of a volume's mask file) -> sample ids and masks of its slices; None for an unknown volume."""


@dataclass(frozen=True)
class ExpectedMasks:
    """The images of a run, and what a corrected mask of each must look like."""

    shapes: Mapping[str, tuple[int, int]]
    """(H, W) by sample id."""
    class_names: Sequence[str]
    """By class id, background first."""
    volumes: Volumes = lambda name, path: None

    def check(self, where: str, sample_id: str, mask: Mask) -> tuple[str, Mask]:
        """Return `(sample_id, mask)`; `where` opens the message. Raises `UserError` for another size or unknown ids."""
        shape = self.shapes[sample_id]
        if mask.shape != shape:
            raise UserError(
                f"{where}: expected a mask of {_size(shape)} for {sample_id}, got {_size(mask.shape)}; export it "
                "in the image's own size"
            )
        foreign = sorted(set(np.unique(mask).tolist()) - {*range(len(self.class_names)), IGNORE_INDEX})
        if foreign:
            raise UserError(
                f"{where}: expected the class ids 0 to {len(self.class_names) - 1} and {IGNORE_INDEX} (ignored) for "
                f"{sample_id}, got {first_names([*map(str, foreign)])}; map them to these"
            )
        return sample_id, mask


def read_corrections(path: Path, expected: ExpectedMasks) -> Iterator[tuple[str, Mask]]:
    """Read corrected masks one by one: (sample id, mask).

    A folder holds ID.png (as named by `kmine.audit --export masks`) or volumes. A JSON file is COCO, where an image
    without annotations is an empty mask, or a Label Studio export, whose predictions are used if it has no annotations.

    Raises:
        UserError: no masks, an unknown format, ids that the run does not have, another size, unknown classes.
    """
    if path.is_dir():
        return _from_folder(path, expected)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: expected corrected masks, cannot be read ({error.strerror}); check it") from error
    except ValueError as error:
        raise UserError(f"{path}: expected a folder of masks, COCO or Label Studio as JSON, got neither") from error
    if isinstance(value, dict) and isinstance(value.get("images"), list):
        return _from_coco(path, value, expected)
    if isinstance(value, list) and all(isinstance(task, dict) for task in value):
        return _from_label_studio(path, value, expected)
    raise UserError(f"{path}: expected COCO (object with images) or Label Studio (list of tasks); export again")


def picture_name(sample_id: str) -> str:
    """File name, without suffix, of a sample's picture; the same in a path and in a URL."""
    name = safe_name(sample_id)
    suffix = f"-{hashlib.sha256(sample_id.encode()).hexdigest()[:8]}" if "%" in name else ""
    return name.replace("%", "_") + suffix


def _from_folder(folder: Path, expected: ExpectedMasks) -> Iterator[tuple[str, Mask]]:
    names = _names(expected)
    files = sorted(p for p in folder.rglob("*") if p.name.lower().endswith(SUFFIXES) and not p.name.startswith("."))
    if not files:
        raise UserError(f"{folder}: expected masks as PNG or NIfTI, found none; check the path")
    pictures = {p: names.get(_stem(p)) or names.get(_stem(p, folder)) for p in files if p.suffix.lower() == ".png"}
    _refuse_unknown(folder, [p.name for p, sample_id in pictures.items() if sample_id is None])
    _refuse_duplicates(folder, pictures.values(), "one mask an image")
    return _read_files(folder, files, pictures, expected)


def _read_files(
    folder: Path, files: Sequence[Path], pictures: Mapping[Path, str | None], expected: ExpectedMasks
) -> Iterator[tuple[str, Mask]]:
    for path in files:
        if path in pictures:
            yield expected.check(str(path), str(pictures[path]), _read_png(path, len(expected.class_names)))
            continue
        slices = expected.volumes(_stem(path), path)
        if slices is None:
            _refuse_unknown(folder, [path.name])
        for sample_id, mask in slices or ():
            if sample_id in expected.shapes:  # the run may have left out slices
                yield expected.check(str(path), sample_id, mask)


def _read_png(path: Path, num_classes: int) -> Mask:
    from PIL import Image

    try:
        with Image.open(path) as image:
            own = SIGNATURE_KEY in image.info
            if image.mode not in ("L", "P", "1", "I;16", "I"):
                raise UserError(f"{path}: expected one channel of class ids, got {image.mode}; export it as grey")
            values = np.asarray(image.convert("L") if image.mode == "1" else image)
    except UserError:
        raise
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path}: expected a mask as PNG, cannot be read ({error}); export it again") from error
    if values.size and (values.min() < 0 or values.max() > IGNORE_INDEX):
        raise UserError(f"{path}: expected class ids up to {IGNORE_INDEX}, got {values.max()}; export 8 bits")
    mask = values.astype(np.uint8)
    # Image editors save black and white: with one class, white is that class and not ignored.
    if not own and num_classes == 2 and set(np.unique(mask).tolist()) <= {0, 255}:
        mask = (mask == 255).astype(np.uint8)
    return mask


def _from_coco(path: Path, value: Mapping[str, Any], expected: ExpectedMasks) -> Iterator[tuple[str, Mask]]:
    try:
        images = {image["id"]: image for image in value["images"]}
        classes = _classes(path, {c["id"]: c["name"] for c in value.get("categories", [])}, expected)
        of_image: dict[Any, list[Any]] = {}
        for annotation in value.get("annotations", []):
            of_image.setdefault(annotation["image_id"], []).append(annotation)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: expected COCO images, categories and annotations, {error} is missing") from error
    names = _names(expected)
    ids = {key: _sample_id(names, image.get("sample_id"), image.get("file_name")) for key, image in images.items()}
    _refuse_unknown(path, [str(images[key].get("file_name")) for key, sample_id in ids.items() if sample_id is None])
    _refuse_unknown(path, [f"image {key}" for key in of_image if key not in images])
    _refuse_duplicates(path, ids.values(), "one image a sample")
    return (
        expected.check(str(path), name, _mask_from_coco(f"{path}: {name}", image, of_image.get(key, []), classes))
        for key, image in images.items()
        for name in [str(ids[key])]
    )


def _mask_from_coco(
    where: str, image: Mapping[str, Any], annotations: Sequence[Mapping[str, Any]], classes: Mapping[Any, int]
) -> Mask:
    from pycocotools import mask as coco

    with _format_errors(where, "COCO segmentations"):
        height, width = int(image["height"]), int(image["width"])
        out = np.zeros((height, width), np.uint8)
        for annotation in annotations:
            shape = annotation["segmentation"]
            if isinstance(shape, list) or isinstance(shape["counts"], list):
                shape = coco.frPyObjects(shape, height, width)
            if isinstance(shape, dict) and isinstance(shape["counts"], str):
                shape = {**shape, "counts": shape["counts"].encode("ascii")}
            segment = coco.decode(coco.merge(shape) if isinstance(shape, list) else shape).astype(bool)
            if segment.shape != out.shape:
                raise UserError(f"{where}: expected a segmentation of {_size(out.shape)}, got {_size(segment.shape)}")
            out[segment] = classes[annotation["category_id"]]
        return out


def _from_label_studio(
    path: Path, tasks: Sequence[Mapping[str, Any]], expected: ExpectedMasks
) -> Iterator[tuple[str, Mask]]:
    names = _names(expected)
    annotated = [task for task in tasks if _annotations(task)] or [task for task in tasks if task.get("predictions")]
    if not annotated:
        raise UserError(f"{path}: expected tasks with annotations, got none of {len(tasks)}; export as JSON")
    data = [task["data"] if isinstance(task.get("data"), dict) else {} for task in annotated]
    ids = [_sample_id(names, entry.get("sample_id"), entry.get("image")) for entry in data]
    _refuse_unknown(path, [str(entry.get("image")) for entry, name in zip(data, ids, strict=True) if name is None])
    _refuse_duplicates(path, ids, "one task a sample")
    classes = _classes(path, {name: name for name in (*expected.class_names[1:], IGNORED)}, expected)
    return (
        expected.check(str(path), name, _mask_from_strokes(f"{path}: {name}", task, classes, expected.shapes[name]))
        for name, task in zip(map(str, ids), annotated, strict=True)
    )


def _annotations(task: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [annotation for annotation in task.get("annotations") or [] if not annotation.get("was_cancelled")]


def _mask_from_strokes(where: str, task: Mapping[str, Any], classes: Mapping[str, int], shape: tuple[int, int]) -> Mask:
    """Strokes of the latest annotation, later ones on top."""
    with _format_errors(where, "brush strokes"):
        annotations = _annotations(task) or task["predictions"]
        latest = max(annotations, key=lambda a: str(a.get("updated_at") or a.get("created_at") or ""))
        out = np.zeros(shape, np.uint8)
        for stroke in latest["result"]:
            if stroke.get("type") != "brushlabels":
                continue
            height, width = int(stroke["original_height"]), int(stroke["original_width"])
            if (height, width) != out.shape:
                raise UserError(
                    f"{where}: expected strokes of {_size(out.shape)}, got {_size((height, width))}; keep that size"
                )
            label = stroke["value"]["brushlabels"][0]
            if label not in classes:
                raise UserError(f"{where}: expected labels {', '.join(classes)}, got {label!r}; rename it")
            out[label_studio_rle.decode(stroke["value"]["rle"], height, width)] = classes[label]
        return out


@contextmanager
def _format_errors(where: str, expected: str) -> Iterator[None]:
    """Turn errors of a malformed value into one `UserError`."""
    try:
        yield
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(f"{where}: expected {expected}, got something else ({error})") from error


def _classes(path: Path, names: Mapping[Any, str], expected: ExpectedMasks) -> dict[Any, int]:
    own = {name: n for n, name in enumerate(expected.class_names) if n} | {IGNORED: IGNORE_INDEX}
    foreign = [name for name in names.values() if name not in own]
    if foreign:
        raise UserError(f"{path}: expected the classes {', '.join(own)}, got {foreign[0]!r}; rename it")
    return {key: own[name] for key, name in names.items()}


def _names(expected: ExpectedMasks) -> dict[str, str]:
    """Sample ids by every name that a returned file may have."""
    return {name(i): i for name in (picture_name, safe_name, str) for i in expected.shapes}


def _sample_id(names: Mapping[str, str], stored_id: object, file_name: object) -> str | None:
    if stored_id is not None:
        return names.get(str(stored_id))
    path = Path(str(file_name or "?"))
    return names.get(str(path.parent / path.stem)) or names.get(path.stem) or names.get(path.name)


def _stem(path: Path, folder: Path | None = None) -> str:
    name = path.relative_to(folder).as_posix() if folder else path.name
    return re.sub(r"(\.nii\.gz|\.nii|\.png)$", "", name, flags=re.IGNORECASE)


def _refuse_unknown(where: Path, names: Sequence[str]) -> None:
    if names:
        raise UserError(
            f"{where}: expected masks of this run's images, got {first_names(names)}, which it does not have; "
            "name files as kmine.audit --export masks does, or remove the others"
        )


def _refuse_duplicates(where: Path, names: Iterable[str | None], expected: str) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{where}: expected {expected}, got two for {twice[0]}; remove one")


def _size(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape[::-1])) + " (width x height)"

"""Files of a data set in the layout of nnU-Net v2: dataset.json, imagesTr, labelsTr, imagesTs, labelsTs.

https://github.com/MIC-DKFZ/nnUNet, documentation/dataset_format.md
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kmine.data.datasets.folder_index import split_suffix
from kmine.data.io.find_files import named, printable, refuse_folder
from kmine.data.source import OnError, is_folder, require_root
from kmine.errors import UserError
from kmine.io.json_file import is_kind, json_field, load_json
from kmine.types import Skipped

WHERE = "the folder DatasetNNN_NAME of nnUNet_raw"
CURE = "mend it as nnU-Net's documentation of dataset_format describes it"
IGNORE = "ignore"
"""nnU-Net's name of the label of pixels that are not annotated; its number is the highest."""
CT = "CT"
"""nnU-Net's name of a channel of Hounsfield units."""
MAX_CHANNELS = 3
"""Channels of an image in kmine."""


@dataclass(frozen=True)
class Layout:
    """Content of dataset.json."""

    channels: tuple[str, ...]
    """Names by number."""
    class_names: tuple[str, ...]
    """By label, background first, without the ignore label."""
    ignore: int | None
    """Number of the ignore label, the number of classes; None without one."""
    ending: str
    """File ending of images and labels."""


@dataclass(frozen=True)
class Case:
    """One image, or volume, with its files."""

    name: str
    channels: tuple[Path, ...]
    """A file per chosen channel, or a single picture that holds all of them in colour."""
    label: Path | None
    is_test: bool
    """Whether it lies in imagesTs; such cases are indexed only with a label."""


def read_layout(root: Path) -> Layout:
    """Read dataset.json. Raises `UserError`, also for the first version of the format and for regions."""
    require_root(root, "nnU-Net", WHERE)
    path = root / "dataset.json"
    value = load_json(path, "nnU-Net's dataset.json", "name " + WHERE)
    where = str(path)
    if not isinstance(value, dict) or ("channel_names" not in value and "modality" in value):
        cure = "convert it (nnUNetv2_convert_old_nnUNet_dataset, or nnUNetv2_convert_MSD_dataset)"
        raise UserError(f"{path}: expected the format of nnU-Net v2 (channel_names), got an older one; {cure}")
    channels = json_field(value, "channel_names", dict, where=where, cure=CURE)
    labels = json_field(value, "labels", dict, where=where, cure=CURE)
    ending = json_field(value, "file_ending", str, where=where, cure=CURE)
    if set(channels) != {str(n) for n in range(len(channels))} or not channels:
        raise UserError(f"{path}: expected channel_names numbered from 0, got {', '.join(channels) or 'none'}; {CURE}")
    kind = split_suffix(f"x{ending}")[1]
    if kind not in ("picture", "nifti"):
        raise UserError(
            f"{path}: expected file_ending .nii.gz, .nii, .png, .tif or .bmp, got {ending}; convert the files"
        )
    numbers = _label_numbers(path, labels)
    ignore = numbers.pop(IGNORE, None)
    names = tuple(sorted(numbers, key=lambda name: numbers[name]))
    if sorted(numbers.values()) != [*range(len(names))] or len(names) < 2 or ignore not in (None, len(names)):
        text = ", ".join(f"{name} {number}" for name, number in labels.items())
        raise UserError(f"{path}: expected labels numbered from 0, background first, ignore last, got {text}; {CURE}")
    ordered = tuple(str(channels[str(n)]) for n in range(len(channels)))
    return Layout(ordered, ("background", *names[1:]), ignore, ending)


def _label_numbers(path: Path, labels: Mapping[str, object]) -> dict[str, int]:
    regions = [name for name, number in labels.items() if isinstance(number, list)]
    if regions:
        cure = "the files hold one number a pixel: name each of these, as in edema: 1, core: 2, in dataset.json"
        raise UserError(f"{path}: expected a number for each label, got regions for {named(regions)}; {cure}")
    wrong = [name for name, number in labels.items() if not is_kind(number, int)]
    if wrong:
        raise UserError(f"{path}: expected labels as NAME: NUMBER, got something else for {named(wrong)}; {CURE}")
    return {name: number for name, number in labels.items() if isinstance(number, int)}


def choose_channels(layout: Layout, chosen: tuple[int, ...] | None) -> tuple[int, ...]:
    """Numbers of the channels that become red, green and blue. Raises `UserError` for more than three, and others."""
    names = ", ".join(f"{n} {name}" for n, name in enumerate(layout.channels))
    numbers = chosen or tuple(range(len(layout.channels)))
    if unknown := [n for n in numbers if n >= len(layout.channels)]:
        raise UserError(f"data.channels: expected some of {names}, got {unknown[0]}; choose others")
    if len(numbers) > MAX_CHANNELS:
        cure = "choose some, as in --data.channels [0,1,2]"
        raise UserError(
            f"data.channels: expected at most {MAX_CHANNELS} channels, got {len(numbers)} ({names}); {cure}"
        )
    return numbers


def find_cases(
    root: Path, layout: Layout, chosen: tuple[int, ...], on_error: OnError
) -> tuple[list[Case], tuple[Skipped, ...], int]:
    """Cases sorted by name, files left out, and the number of cases of imagesTs without a label, which are not used.

    Raises:
        UserError: without imagesTr or cases, for a case that lacks a channel, for a label without an image, and for a
            name that is in imagesTr and in imagesTs.
    """
    cases: list[Case] = []
    skipped: list[Skipped] = []
    num_unused = 0
    for part, is_test in (("Tr", False), ("Ts", True)):
        images, labels = root / f"images{part}", root / f"labels{part}"
        if not is_folder(images):
            if is_test:
                continue
            raise UserError(
                f"{images}: expected the images of an nnU-Net data set, found no such folder; check data.root"
            )
        files, strays = _files_by_case(images, layout)
        masks = _masks(labels, layout)
        if orphans := sorted(masks.keys() - files.keys()):
            cure = "restore the images, or remove these labels"
            raise UserError(f"{labels}: expected an image for each label, found none for {named(orphans)}; {cure}")
        skipped += strays
        for name, by_channel in sorted(files.items()):
            if is_test and name not in masks:
                num_unused += 1
            elif problem := _missing(layout, chosen, by_channel):
                if on_error == "stop":
                    cure = "restore the file, or choose other channels with --data.channels"
                    raise UserError(f"{images}: {problem} of {name}; {cure}, or pass --data.on_error skip")
                skipped.append(Skipped(name, str(images), problem))
            else:
                numbers = (0,) if _is_colour(layout, by_channel) else chosen
                cases.append(Case(name, tuple(by_channel[n] for n in numbers), masks.get(name), is_test))
    if twice := [name for name, count in Counter(case.name for case in cases).items() if count > 1]:
        raise UserError(f"{root}: expected other names in imagesTs than in imagesTr, got {named(twice)}; rename them")
    if not cases:
        example = f"NAME_0000{layout.ending}"
        raise UserError(f"{root / 'imagesTr'}: expected images named {example}, found none; check data.root")
    return sorted(cases, key=lambda case: case.name), tuple(skipped), num_unused


def _missing(layout: Layout, chosen: tuple[int, ...], by_channel: Mapping[int, Path]) -> str:
    """Which channel a case lacks, in words."""
    lacking = [n for n in chosen if n not in by_channel and not _is_colour(layout, by_channel)]
    return f"expected a file {lacking[0]:04} (channel {layout.channels[lacking[0]]}), found none" if lacking else ""


def _is_colour(layout: Layout, by_channel: Mapping[int, Path]) -> bool:
    """Whether a single picture holds all channels."""
    return {*by_channel} == {0} and len(layout.channels) == 3 and split_suffix(f"x{layout.ending}")[1] == "picture"


def _files_by_case(folder: Path, layout: Layout) -> tuple[dict[str, dict[int, Path]], list[Skipped]]:
    pattern = re.compile(rf"(.+)_(\d{{4}}){re.escape(layout.ending)}", re.DOTALL)
    files: dict[str, dict[int, Path]] = {}
    strays = []
    for path in _listed(folder):
        if match := pattern.fullmatch(path.name):
            files.setdefault(match[1], {})[int(match[2])] = path
        else:
            strays.append(Skipped(printable(path.name), printable(path), f"not named NAME_0000{layout.ending}"))
    return files, strays


def _masks(folder: Path, layout: Layout) -> dict[str, Path]:
    paths = _listed(folder) if is_folder(folder) else []
    return {p.name.removesuffix(layout.ending): p for p in paths if p.name.endswith(layout.ending)}


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        refuse_folder(error)

"""Export of masks as DICOM segmentations, one a series or file of several frames; read back as `data.masks`."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kmine.data.io.dicom import read_header
from kmine.data.io.dicom_seg import encode_seg, require_highdicom
from kmine.data.source import Source
from kmine.errors import UserError
from kmine.feedback.expected import picture_name
from kmine.io.files import write_atomic
from kmine.types import IGNORE_INDEX


def write_dicom_segs(folder: Path, masks: Iterable[tuple[str, NDArray[np.uint8]]], source: Source) -> Path:
    """Write NAME.dcm for each series among the images of the (sample id, (H, W) class ids and 255) `masks`.

    NAME is that of its first image. Frames without a mask, of a file of several, are ignored (255) as a whole.

    Raises:
        UserError: images that are not DICOM, or highdicom is not installed.
        SampleError: images that no segmentation can refer to.
    """
    require_highdicom()
    locate = getattr(source, "dicom_frame", lambda sample_id: None)
    series: dict[Any, dict[tuple[Path, int], tuple[str, bytes]]] = {}
    for sample_id, mask in masks:
        place = locate(sample_id)
        if place is None:
            cure = "use --export masks"
            raise UserError(f"--export dicomseg: expected DICOM images, got another kind for {sample_id}; {cure}")
        header = read_header(place[0])
        key = place[0] if header.frames > 1 else (header.series, header.shape, header.frame_of_reference)
        series.setdefault(key, {})[place] = (sample_id, zlib.compress(mask, 1))  # a series may end with the last mask
    for of_series in series.values():
        name = picture_name(next(iter(of_series.values()))[0])
        files, stack = _stack({place: packed for place, (_, packed) in of_series.items()})
        write_atomic(folder / f"{name}.dcm", encode_seg(files, stack, source.class_names))
    return folder


def _stack(packed: dict[tuple[Path, int], bytes]) -> tuple[Sequence[Path], NDArray[np.uint8]]:
    """Files and (N, H, W) masks in their order; of a file of several frames, all frames."""
    first = next(iter(packed))[0]
    header = read_header(first)
    masks = [np.frombuffer(zlib.decompress(data), np.uint8).reshape(header.shape) for data in packed.values()]
    if header.frames == 1:
        return [path for path, _ in packed], np.stack(masks)
    stack = np.full((header.frames, *header.shape), IGNORE_INDEX, np.uint8)
    for (_, frame), mask in zip(packed, masks, strict=True):
        stack[frame] = mask
    return [first], stack

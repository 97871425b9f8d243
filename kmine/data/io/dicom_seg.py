"""DICOM segmentations (PS3.3, A.51): masks of DICOM images, written and read by highdicom (extra `dicom`)."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kmine.data.io.dicom import SEG_CLASSES, damaged_dicom, open_dicom, read_header
from kmine.data.io.file_content import problem_text
from kmine.errors import SampleError, UserError, first_names
from kmine.types import IGNORE_INDEX

if TYPE_CHECKING:
    import pydicom

IGNORED = "ignored"
"""Label of the segment of ignored pixels."""
TISSUE = ("85756007", "SCT", "Tissue")
"""Category and type of every segment: a class name does not say which code it has (own choice)."""
AI = ("123110", "DCM", "Artificial Intelligence")
PATIENT = ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate")
PATIENT += ("StudyTime",)
"""Fields that a segmentation has in common with its images, empty where they lack them."""
CURE = "give the segmentation of these images, or export it again on them"


def require_highdicom() -> ModuleType:
    """The package highdicom. Raises `UserError` with the command that installs it."""
    try:
        import highdicom
    except ImportError as error:
        cure = "pip install 'kmine[dicom]'"
        raise UserError(f"DICOM-SEG: expected the package highdicom, which is not installed; {cure}") from error
    return highdicom


@dataclass(frozen=True)
class SegHeader:
    """What a segmentation is of."""

    covered: frozenset[str]
    """SOPInstanceUIDs of its images; those without a frame of it have an empty mask."""
    frame_of_reference: str
    labels: Mapping[int, str]
    """By segment number."""


def read_seg_header(path: Path) -> SegHeader | None:
    """Header of a segmentation; None for another DICOM file. Raises `SampleError`."""
    data = open_dicom(path, stop_before_pixels=True)
    try:
        if str(data.get("SOPClassUID")) not in SEG_CLASSES:
            return None
        of_series = [item for series in data.get("ReferencedSeriesSequence") or () for item in _instances(series)]
        of_frames = [
            source
            for frame in data.get("PerFrameFunctionalGroupsSequence") or ()
            for derivation in frame.get("DerivationImageSequence") or ()
            for source in derivation.get("SourceImageSequence") or ()
        ]
        covered = frozenset(str(item.ReferencedSOPInstanceUID) for item in (*of_series, *of_frames))
        labels = {int(item.SegmentNumber): str(item.SegmentLabel) for item in data.SegmentSequence}
        return SegHeader(covered, str(data.get("FrameOfReferenceUID") or ""), labels)
    except Exception as error:  # pydicom parses values on access and raises any type
        raise damaged_dicom(path, error) from error


def _instances(series: pydicom.Dataset) -> Sequence[pydicom.Dataset]:
    return series.get("ReferencedInstanceSequence") or ()


def pair_segs(images: Mapping[str, Path], masks: Mapping[str, Path]) -> dict[str, Path]:
    """Masks by name, with each segmentation among them, whatever its name, at the images that it is of.

    Args:
        images: DICOM files by name.
        masks: files by name, of any kind that has a suffix of DICOM or none.

    Raises:
        SampleError: a damaged file, and a segmentation of other images or of another frame of reference.
        UserError: two segmentations of one image, or one where highdicom is not installed.
    """
    headers = {name: found for name, path in masks.items() if (found := read_seg_header(path)) is not None}
    out = {name: path for name, path in masks.items() if name not in headers}
    if not headers:
        return out
    require_highdicom()
    of_images = {name: read_header(path) for name, path in images.items()}
    known = {header.uid: (name, header.frame_of_reference) for name, header in of_images.items()}
    for seg_name, header in headers.items():
        path = masks[seg_name]
        own = sorted(known[uid] for uid in header.covered & known.keys())
        frames = {frame for _, frame in (own or known.values())}
        if header.frame_of_reference and frames and header.frame_of_reference not in frames:
            one = first_names(sorted(frames), 1)
            problem = f"expected the frame of reference of its images ({one}), got {header.frame_of_reference}"
            raise SampleError(path, f"{problem}; {CURE}")
        if not own:
            problem = f"expected a segmentation of these images, got one of {len(header.covered)} others"
            raise SampleError(path, f"{problem}; {CURE}")
        for name, _ in own:
            if name in out:
                problem = f"expected one mask of {name}, found another in {out[name]}"
                raise UserError(f"{path}: {problem}; remove one of them")
            out[name] = path
    return out


def read_seg_mask(path: Path, image: Path, frame: int, class_names: Sequence[str]) -> NDArray[np.uint8]:
    """(H, W) class ids and 255 of one frame of an image.

    Segments are classes by their labels; where none has the name of a class, by their numbers.

    Raises:
        SampleError: a damaged file, overlapping segments, segments that are no classes.
    """
    header = read_header(image)
    masks = _decoded(path, path.stat().st_mtime_ns, header.uid, header.frames, tuple(class_names))
    return masks[header.uid, frame].copy()


@lru_cache(maxsize=1)
def _decoded(
    path: Path, mtime: int, uid: str, frames: int, class_names: tuple[str, ...]
) -> Mapping[tuple[str, int], NDArray[np.uint8]]:
    """(H, W) class ids by image and frame of all images, or of all frames of the image `uid` of several."""
    header = read_seg_header(path)
    assert header is not None, "a segmentation"
    table = _class_table(path, header.labels, class_names)
    options: dict[str, Any] = {"combine_segments": True, "ignore_spatial_locations": True}
    options["assert_missing_frames_are_empty"] = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            seg = require_highdicom().seg.segread(path)
            if frames > 1:
                keys = [(uid, n) for n in range(frames)]
                values = seg.get_pixels_by_source_frame(uid, [n + 1 for n in range(frames)], **options)
            else:
                keys = [(one, 0) for one in sorted(header.covered)]
                values = seg.get_pixels_by_source_instance([one for one, _ in keys], **options)
    except UserError:
        raise
    except Exception as error:  # highdicom raises many types
        problem = f"expected a segmentation whose segments do not overlap, got another ({problem_text(error)})"
        raise SampleError(path, f"{problem}; export it again, or convert it") from error
    return dict(zip(keys, table[values], strict=True))


def _class_table(path: Path, labels: Mapping[int, str], class_names: Sequence[str]) -> NDArray[np.uint8]:
    """Class id by segment number, 0 for 0."""
    ids = {name.casefold(): n for n, name in enumerate(class_names) if n}
    ignored = {number: IGNORE_INDEX for number, label in labels.items() if label.casefold() == IGNORED}
    by_name = {number: ids[label.casefold()] for number, label in labels.items() if label.casefold() in ids}
    by_number = {number: number for number in labels if number < len(class_names)}
    found = (by_name or by_number) | ignored
    if found.keys() != labels.keys():
        text = first_names([f"{number} {label}" for number, label in labels.items() if number not in found])
        expected = ", ".join([*class_names[1:], IGNORED])
        cure = "name every class in data.class_names"
        raise SampleError(path, f"expected segments labelled {expected}, got also {text}; rename them, or {cure}")
    table = np.zeros(max(labels) + 1, np.uint8)
    for number, class_id in found.items():
        table[number] = class_id
    return table


def encode_seg(files: Sequence[Path], masks: NDArray[np.uint8], class_names: Sequence[str]) -> bytes:
    """Bytes of a DICOM segmentation with a segment per class, and one of ignored pixels if there are any.

    It belongs to the study of its images, and so has the patient's data as they have. Empty frames are left out.

    Args:
        files: single-frame images of one series, or one file of several frames.
        masks: (N, H, W) class ids and 255, by file or by frame.
        class_names: by class id, background first.

    Raises:
        SampleError: images that no segmentation can refer to.
        UserError: highdicom is not installed.
    """
    hd = require_highdicom()
    import pydicom

    ignored = len(class_names)
    names = [*class_names[1:], *([IGNORED] if (masks == IGNORE_INDEX).any() else [])]
    labels = np.where(masks == IGNORE_INDEX, np.uint8(ignored), masks)
    sources = [open_dicom(path, stop_before_pixels=True) for path in files]
    for name in PATIENT:
        for source in sources:
            source.setdefault(name, "")
    content = hashlib.sha256(np.ascontiguousarray(labels)).hexdigest()
    seed = [str(sources[0].SOPInstanceUID), content, *names]
    code = hd.sr.CodedConcept(*TISSUE)
    segments = [_segment(hd, number, name, code) for number, name in enumerate(names, start=1)]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            seg = hd.seg.Segmentation(
                source_images=sources,
                pixel_array=labels,
                segmentation_type="BINARY",
                segment_descriptions=segments,
                series_instance_uid=pydicom.uid.generate_uid(entropy_srcs=["series", *seed]),
                series_number=900,
                sop_instance_uid=pydicom.uid.generate_uid(entropy_srcs=["instance", *seed]),
                instance_number=1,
                manufacturer="kmine",
                manufacturer_model_name="kmine",
                software_versions="kmine",
                device_serial_number="0",
                content_label="KMINE",
                omit_empty_frames=bool(masks.any()),
                series_description="kmine segmentation",
            )
            buffer = io.BytesIO()
            seg.save_as(buffer)
    except Exception as error:  # pydicom and highdicom raise many types
        problem = f"expected an image that a DICOM segmentation can refer to, got another ({problem_text(error)})"
        raise SampleError(files[0], f"{problem}; write masks as PNG or NIfTI instead") from error
    return buffer.getvalue()


def _segment(hd: ModuleType, number: int, name: str, code: Any) -> Any:
    algorithm = hd.AlgorithmIdentificationSequence(name="kmine", version="1", family=hd.sr.CodedConcept(*AI))
    return hd.seg.SegmentDescription(
        segment_number=number,
        segment_label=name[:64],
        segmented_property_category=code,
        segmented_property_type=code,
        algorithm_type="AUTOMATIC",
        algorithm_identification=algorithm,
    )

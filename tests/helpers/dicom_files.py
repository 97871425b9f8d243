"""DICOM series and files of several frames that segmentations can refer to."""

from __future__ import annotations

import numpy as np
from helpers.image_files import save_dicom
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

SHAPE = (6, 8)


def scan(folder, count=4, frame="1.2.9", study="1.2.8", **tags):
    """Axial slices of one series, the highest first by name."""
    files = []
    for n in range(count):
        place = {"ImagePositionPatient": [0, 0, -2.0 * n], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}
        uids = {"FrameOfReferenceUID": frame, "StudyInstanceUID": study, "Modality": "CT", "InstanceNumber": n + 1}
        values = np.full(SHAPE, n, np.int16)
        more = {"PixelSpacing": [0.5, 0.5], "SliceThickness": 2, "SeriesNumber": 1}
        files.append(save_dicom(folder / f"s{n}.dcm", values, "1.2.3", **place, **uids, **more, **tags))
    return files


def multiframe(path, count=3):
    """An enhanced CT of `count` frames."""

    def item(**tags):
        data = Dataset()
        for name, value in tags.items():
            setattr(data, name, value)
        return data

    shared = item(
        PixelMeasuresSequence=Sequence([item(PixelSpacing=[0.5, 0.5], SliceThickness=2)]),
        PlaneOrientationSequence=Sequence([item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])]),
    )
    frames = [item(PlanePositionSequence=Sequence([item(ImagePositionPatient=[0, 0, 2.0 * n])])) for n in range(count)]
    values = np.stack([np.full(SHAPE, 10 * n, np.int16) for n in range(count)])
    tags = {
        "SharedFunctionalGroupsSequence": Sequence([shared]),
        "PerFrameFunctionalGroupsSequence": Sequence(frames),
        "NumberOfFrames": count,
        "Rows": SHAPE[0],
        "Columns": SHAPE[1],
        "PixelData": values.tobytes(),
        "SOPClassUID": "1.2.840.10008.5.1.4.1.1.2.1",
        **{"FrameOfReferenceUID": "1.2.9", "StudyInstanceUID": "1.2.8", "Modality": "CT", "InstanceNumber": 1},
        "SeriesNumber": 1,
    }
    return save_dicom(path, values[0], "1.2.3", **tags)

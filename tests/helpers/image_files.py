"""Image, mask, DICOM and NIfTI files for tests of the readers."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pydicom
from PIL import Image
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

SHAPE = (8, 10)
THREE_CLASSES = ("background", "liver", "tumour")


def save_image(path: Path, array: np.ndarray | Image.Image, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    image.save(path, **options)
    return path


def colour_noise(seed=0, shape=SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def square(value=255, shape=SHAPE) -> np.ndarray:
    """Mask with 3 x 4 pixels of `value`."""
    mask = np.zeros(shape, np.uint8)
    mask[2:5, 3:7] = value
    return mask


def save_volume(path: Path, slices: np.ndarray, affine=None) -> Path:
    """(D, H, W), stored along left, back and up."""
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([-0.7, -0.8, 2.5, 1]) if affine is None else affine
    nibabel.save(nibabel.Nifti1Image(slices.transpose(2, 1, 0), affine), path)
    return path


def dicom_dataset(values: np.ndarray, **tags) -> pydicom.Dataset:
    """(H, W) grey or (H, W, 3) RGB of the type of `values`."""
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = generate_uid()
    data.Rows, data.Columns = values.shape[:2]
    data.SamplesPerPixel = 1 if values.ndim == 2 else 3
    if values.ndim == 3:
        data.PlanarConfiguration = 0
    data.PhotometricInterpretation = "MONOCHROME2" if values.ndim == 2 else "RGB"
    data.BitsAllocated = data.BitsStored = 8 * values.dtype.itemsize
    data.HighBit = data.BitsStored - 1
    data.PixelRepresentation = int(values.dtype.kind == "i")
    data.PixelData = values.tobytes() + bytes(values.nbytes % 2)
    data["PixelData"].VR = "OW" if values.itemsize == 2 else "OB"
    for name, value in tags.items():
        setattr(data, name, value)
    return data


def save_dicom(path: Path, values: np.ndarray, series="1.2.3", **tags) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    dicom_dataset(values, SeriesInstanceUID=series, **tags).save_as(path, enforce_file_format=True)
    return path


def save_slice(path: Path, values: np.ndarray, position=None, series="1.2.3", spacing=(0.5, 0.25)) -> Path:
    """A 16-bit axial slice, at a position in mm to the left, back and up where one is given."""
    tags = {} if position is None else {"ImagePositionPatient": list(position)}
    tags |= {} if position is None else {"ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}
    return save_dicom(path, values.astype("<i2"), series, PixelSpacing=list(spacing), **tags)

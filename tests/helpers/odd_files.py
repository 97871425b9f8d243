"""PNG, DICOM and NIfTI files written byte by byte, and the result of reading a folder of them."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import nibabel
import numpy as np
import pydicom
from helpers.image_files import dicom_dataset
from PIL import Image
from pydicom.uid import ExplicitVRLittleEndian

from kmine.config import DataConfig
from kmine.data import open_source
from kmine.data.cache.sample_cache import SampleCache

SHAPE = (24, 20)
WINDOW = (0.0, 255.0)


def noise(shape: tuple[int, ...] = SHAPE, seed=0, dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape).astype(dtype)


def settings(root: Path, on_error="skip", masks=False) -> DataConfig:
    folder = {"images": f"{root}/images", "masks": f"{root}/masks" if masks else None}
    return DataConfig(name="folder", on_error=on_error, window=WINDOW, cache_dir=f"{root}/cache", **folder)


def place(root: Path, name: str, content: bytes) -> Path:
    """Write the file beside a valid one."""
    path = root / "images" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise()).save(path.parent / "good.png")
    path.write_bytes(content)
    return path


def outcome(cfg: DataConfig) -> tuple[list[str], list[str]]:
    """Ids of the samples read, and problems of those skipped."""
    source = open_source(cfg)
    cache = SampleCache(source, 32, Path(str(cfg.cache_dir)), cfg.on_error)
    for ref in cache.refs:
        assert cache.image_native(ref.sample_id).dtype == np.uint8
    return [ref.sample_id for ref in cache.refs], [skipped.problem for skipped in (*source.skipped, *cache.skipped)]


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, stream: bytes, *more: bytes, depth=8, colour=2) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"".join([b"\x89PNG\r\n\x1a\n", header, *more, chunk(b"IDAT", stream), chunk(b"IEND", b"")])


def nifti(shape: tuple[int, ...], body: bytes, dtype: type = np.uint8, offset=352, start=b"\0\0\0\0") -> bytes:
    header = nibabel.Nifti1Header()
    header.set_data_dtype(dtype)
    header.set_data_shape(shape)
    header.set_sform(np.diag([-1, -1, 2, 1]), code=1)
    header.set_data_offset(offset)
    return header.binaryblock + start + body


def dicom(syntax: str = ExplicitVRLittleEndian, pixels: bytes | None = None, **tags: object) -> bytes:
    data = dicom_dataset(noise(), **tags)
    data.file_meta.TransferSyntaxUID = syntax
    if pixels is not None:
        data.PixelData = pixels
    out = io.BytesIO()
    pydicom.dcmwrite(out, data, implicit_vr=False, little_endian=True, enforce_file_format=True)
    return out.getvalue()

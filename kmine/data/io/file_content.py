"""What a file holds, by its first bytes, for messages and for names that do not tell."""

from __future__ import annotations

import re
from pathlib import Path

from kmine.data.source import require_file
from kmine.errors import SampleError

HEAD_BYTES = 512
LFS = b"version https://git-lfs"
SIGNATURES: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\x89PNG\r\n\x1a\n", "a PNG picture"),
    (0, b"\xff\xd8\xff", "a JPEG picture"),
    (0, b"II*\0", "a TIFF picture"),
    (0, b"MM\0*", "a TIFF picture"),
    (0, b"BM", "a BMP picture"),
    (0, b"GIF8", "a GIF picture"),
    (8, b"WEBP", "a WebP picture"),
    (4, b"ftyp", "a HEIC, AVIF or MP4 file"),
    (0, b"\0\0\0\x0cjP  ", "a JPEG 2000 picture"),
    (0, b"\xff\x4f\xff\x51", "a JPEG 2000 picture"),
    (0, b"8BPS", "a Photoshop file"),
    (0, b"%!PS", "a PostScript file"),
    (0, b"%PDF", "a PDF file"),
    (128, b"DICM", "a DICOM file"),
    (344, b"n+1\0", "a NIfTI volume"),
    (4, b"n+2\0", "a NIfTI volume"),
    (344, b"ni1\0", "the header of a NIfTI pair (.hdr, .img)"),
    (0, b"NRRD", "an NRRD volume"),
    (0, b"ObjectType", "a MetaImage header"),
    (0, b"\x93NUMPY", "a NumPy array"),
    (0, b"MATLAB", "a MATLAB file"),
    (0, b"\x89HDF", "an HDF5 file"),
    (0, b"PK\x03\x04", "a zip archive"),
    (0, b"\x1f\x8b", "a gzip file"),
    (0, LFS, "a Git LFS pointer, which stands for the file itself"),
)
"""Offset, bytes and name of each format."""
BARE_DICOM = re.compile(rb"[\x02\x08]\0[\0-\x90]\0(?:[A-Z]{2}|[\0-\x90]\0\0\0)")
"""First element of a DICOM data set that lacks the 132 bytes before it."""
OBJECT = re.compile(r"<\S* object at 0x[0-9a-fA-F]+>")


def read_head(path: Path) -> bytes:
    """First `HEAD_BYTES` of a regular file; b"" for anything else, and for a file that cannot be read."""
    try:
        require_file(path, "a file")  # opening a pipe may block for ever
        with path.open("rb") as file:
            return file.read(HEAD_BYTES)
    except (OSError, SampleError):
        return b""


def describe_content(path: Path) -> str | None:
    """What a file holds, such as "a PNG picture"; None if unknown."""
    head = read_head(path)
    for start, magic, name in SIGNATURES:
        if head[start : start + len(magic)] == magic:
            return name
    if BARE_DICOM.match(head):
        return "a DICOM file without its first 132 bytes"
    text = head.lstrip(b"\xef\xbb\xbf \r\n\t").lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "a web page"
    return "XML" if text.startswith((b"<?xml", b"<svg")) else None


def foreign_file(path: Path, expected: str, cure: str = "convert it") -> SampleError | None:
    """Error for a file that holds something known but not `expected`; None where it is unknown."""
    content = describe_content(path)
    if content is None:
        return None
    if content == "a web page":
        cure = "download the file itself"
    elif content.startswith("a Git LFS"):
        cure = "get that with git lfs pull"
    return SampleError(path, f"expected {expected}, got {content}; {cure}")


def problem_text(error: object) -> str:
    """One line of text of an error of a library, without addresses in memory."""
    return " ".join(OBJECT.sub("the file", str(error)).split()) or type(error).__name__

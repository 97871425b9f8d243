"""Hostile files that claim all memory or time: refused within bounds with one error; a valid file is read."""

from __future__ import annotations

import functools
import gzip
import io
import json
import os
import resource
import signal
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
from helpers.odd_files import chunk, dicom, nifti, noise, outcome, place, png, settings
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, JPEGBaseline8Bit, RLELossless

from kmine.config import DataConfig
from kmine.errors import UserError

MAX_SECONDS, MAX_MB, ADDRESSES = 30, 300, 3 * 2**30
"""Limits of one file: seconds on a busy machine, additional resident memory, additional bytes of address space."""


def in_subprocess(work: Callable[[], object]) -> tuple[object, float]:
    """Result of `work` in a child process with limited time and memory, and the megabytes that it used."""
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESSES, used + ADDRESSES))
            signal.alarm(MAX_SECONDS)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            try:
                found = work()
            except UserError as error:
                found = f"UserError {error}"
            except BaseException as error:
                found = f"crash {type(error).__name__}: {error}"
            more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
            os.write(writable, json.dumps([found, more]).encode())
        finally:
            os._exit(0)
    os.close(writable)
    with os.fdopen(readable, "rb") as file:
        content = file.read()
    _, status = os.waitpid(child, 0)
    assert content, f"killed by signal {os.WTERMSIG(status)}"
    return tuple(json.loads(content))


@functools.cache
def compressed_zeros(num_bytes: int, wbits=15, start=b"") -> bytes:
    """`start` and `num_bytes` zeros, compressed."""
    packer = zlib.compressobj(1, zlib.DEFLATED, wbits)
    parts = [packer.compress(start)] + [packer.compress(bytes(2**20)) for _ in range(num_bytes >> 20)]
    return b"".join([*parts, packer.flush()])


def tiff(entries: dict[int, tuple[int, int, int]], following=0, data=b"") -> bytes:
    """One directory at byte 8: tag -> (type, count, value)."""
    rows = b"".join(struct.pack("<HHII", tag, *entry) for tag, entry in sorted(entries.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + rows + struct.pack("<I", following) + data


def plain_tiff(width=4, height=4, following=0, **changes: tuple[int, int, int]) -> bytes:
    entries = {256: (4, 1, width), 257: (4, 1, height), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1)}
    entries |= {273: (4, 1, 200), 277: (3, 1, 1), 278: (4, 1, height), 279: (4, 1, 16)}
    entries |= {int(tag[1:]): entry for tag, entry in changes.items()}
    content = tiff(entries, following)
    return content.ljust(200, b"\0") + noise((64,)).tobytes()


def long_chain(count: int) -> bytes:
    """A TIFF file of `count` directories of one tag, after that of the image."""
    start = len(plain_tiff(following=1))
    each = [struct.pack("<HHHIII", 1, 254, 4, 1, 0, start + 18 * (n + 1)) for n in range(count)]
    return plain_tiff(following=start) + b"".join(each)


def spliced(content: bytes, element: bytes) -> bytes:
    """A DICOM file with raw bytes inserted before its Rows."""
    at = content.index(b"\x28\x00\x10\x00US")
    return content[:at] + element + content[at:]


def jpeg(shape: tuple[int, ...], **options) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.zeros(shape, np.uint8)).save(out, "JPEG", **options)
    return out.getvalue()


def many_scans(side: int, count: int) -> bytes:
    """A progressive JPEG with its last scan repeated `count` times."""
    content = jpeg((side, side), progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:last] + content[last:-2] * count + b"\xff\xd9"


SEQUENCE = b"\x08\x00\x40\x11SQ\0\0\xff\xff\xff\xff"
ITEM = b"\xfe\xff\x00\xe0\xff\xff\xff\xff"
BOMBS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "a PNG header of 60000 x 60000": ("a.png", lambda: png(60000, 60000, compressed_zeros(2**20))),
    "a PNG header of 9000 x 9000": ("a.png", lambda: png(9000, 9000, compressed_zeros(2**26))),
    "a PNG header of 2 billion": ("a.png", lambda: png(2**31 - 1, 2**31 - 1, compressed_zeros(2**20))),
    "a PNG of 8000 x 8000 cut short": ("a.png", lambda: png(8000, 8000, compressed_zeros(2**20))),
    "a PNG text that unpacks to 64 MB": (
        *("a.png",),
        lambda: png(4, 4, compressed_zeros(52), chunk(b"zTXt", b"a\0\0" + compressed_zeros(2**26))),
    ),
    "a PNG profile that unpacks to 64 MB": (
        *("a.png",),
        lambda: png(4, 4, zlib.compress(bytes(51)), chunk(b"iCCP", b"a\0\0" + compressed_zeros(2**26))),
    ),
    "a TIFF of 100000 x 100000": ("a.tif", lambda: plain_tiff(100000, 100000)),
    "a TIFF of 8000 x 8000 cut short": ("a.tif", lambda: plain_tiff(8000, 8000)),
    "a TIFF whose directories run in a circle": ("a.tif", lambda: long_chain(2)[:-4] + struct.pack("<I", 8)),
    "a TIFF of 100000 directories": ("a.tif", lambda: long_chain(100_000)),
    "a TIFF tag of 4 billion values": ("a.tif", lambda: plain_tiff(t258=(3, 2**32 - 1, 8))),
    "a TIFF strip of 4 GB": ("a.tif", lambda: plain_tiff(t259=(3, 1, 8), t279=(4, 1, 2**32 - 1))),
    "a TIFF tile of 30000 x 30000": (
        *("a.tif",),
        lambda: plain_tiff(t259=(3, 1, 8), t322=(4, 1, 30000), t323=(4, 1, 30000), t324=(4, 1, 200), t325=(4, 1, 64)),
    ),
    "a JPEG of 20000 scans": ("a.jpg", lambda: many_scans(2000, 20_000)),
    "a JPEG of 65000 x 65000": ("a.jpg", lambda: jpeg((8, 8)).replace(b"\0\x08\0\x08", b"\xfd\xe8\xfd\xe8", 1)),
    "a DICOM of 65535 x 65535": ("a.dcm", lambda: dicom(Rows=65535, Columns=65535)),
    "a DICOM of 8000 x 8000 with little data": ("a.dcm", lambda: dicom(Rows=8000, Columns=8000)),
    "an RLE DICOM of 65535 x 65535": (
        *("a.dcm",),
        lambda: dicom(RLELossless, encapsulate([bytes(64)]), Rows=65535, Columns=65535),
    ),
    "a DICOM frame of 12000 x 12000": (
        *("a.dcm",),
        lambda: dicom(JPEGBaseline8Bit, encapsulate([jpeg((12000, 12000))])),
    ),
    "a deflated DICOM of 600 MB": ("a.dcm", lambda: deflated(600 * 2**20)),
    "a DICOM sequence without an end": ("a.dcm", lambda: spliced(dicom(), SEQUENCE + ITEM)),
    "DICOM sequences 5000 deep": ("a.dcm", lambda: spliced(dicom(), (SEQUENCE + ITEM) * 5000)),
    "a DICOM element of 4 GB": ("a.dcm", lambda: spliced(dicom(), b"\x18\x00\x01\x00UN\0\0\xf0\xff\xff\xff")),
    "a NIfTI header of 16 GB": ("a.nii", lambda: nifti((1024, 1024, 1024), bytes(99), np.float64, 352)),
    "a NIfTI header of 30000 x 30000 x 30000": ("a.nii", lambda: nifti((30000,) * 3, bytes(99))),
    "a gzipped header of 1 GB": ("a.nii.gz", lambda: gzip.compress(nifti((1024, 1024, 1024), bytes(99)))),
    "a gzipped header of 1 GB with 100 MB": (
        *("a.nii.gz",),
        lambda: compressed_zeros(100 * 2**20, 31, nifti((1024, 1024, 1024), b"", np.uint8)),
    ),
    "a gzip stream of 400 MB for a small volume": (
        *("a.nii.gz",),
        lambda: compressed_zeros(400 * 2**20, 31, nifti((40, 40, 3), bytes(4800))),
    ),
    "a NIfTI extension of 400 MB": (
        *("a.nii.gz",),
        lambda: compressed_zeros(
            *(400 * 2**20, 31),
            nifti((4, 4, 3), b"", start=b"\1\0\0\0" + struct.pack("<ii", 2**29, 6), offset=2**29 + 352),
        ),
    ),
    "a NIfTI extension larger than the file": (
        *("a.nii",),
        lambda: nifti((40, 40, 3), bytes(4700), start=b"\1\0\0\0" + struct.pack("<ii", 2**31 - 16, 6)),
    ),
}


def deflated(num_bytes: int) -> bytes:
    content = dicom(ExplicitVRLittleEndian)
    meta_end = content.index(b"\x08\x00\x16\x00UI")
    own = content[:meta_end].replace(ExplicitVRLittleEndian.encode() + b"\0", DeflatedExplicitVRLittleEndian.encode())
    element = b"\x7f\xe0\x10\x00OB\0\0" + struct.pack("<I", num_bytes)
    grown = len(own) - meta_end  # the group starts with its length
    length = struct.unpack_from("<I", own, 140)[0] + grown
    return (
        own[:140]
        + struct.pack("<I", length)
        + own[144:]
        + compressed_zeros(num_bytes, -15, content[meta_end:-12] + element)
    )


@pytest.mark.parametrize("kind", BOMBS)
def test_a_hostile_file_is_refused_within_bounds(tmp_path, kind):
    name, make = BOMBS[kind]
    place(tmp_path, name, make())
    started = time.perf_counter()
    (found, problems), more = in_subprocess(lambda: outcome(settings(tmp_path)))
    assert found == ["good"] and len(set(problems)) == 1 and "expected" in problems[0]
    assert more < MAX_MB, f"{more:.0f} MB"
    assert time.perf_counter() - started < MAX_SECONDS
    (stopped, _) = in_subprocess(lambda: outcome(settings(tmp_path, "stop")))
    assert stopped.startswith(f"UserError {tmp_path}/images/{name}: ")


def test_a_table_of_one_huge_line_is_refused_within_bounds(tmp_path):
    path = tmp_path / "table.csv"
    with path.open("wb") as file:
        file.truncate(2**31)
    for name, setting in (("folder", "csv"), ("lits", "image_labels")):
        nibabel.save(nibabel.Nifti1Image(noise((4, 4, 3)), np.eye(4)), tmp_path / "volume-1.nii")
        cfg = DataConfig(name=name, root=str(tmp_path), **{setting: str(path)})
        problem, more = in_subprocess(lambda cfg=cfg: outcome(cfg))
        assert (
            str(problem).startswith(f"UserError data.{setting}: {path}: expected a table of at most") and more < MAX_MB
        )

"""A damaged file is one error that names it, or a counted skip; all other files are read.

Each case goes through index, decode cache and masks. A valid data set of each layout is built once; each case copies it
and damages one file.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.image_files import save_dicom, save_image, save_volume

from kmine.config import DataConfig
from kmine.data import open_source
from kmine.data.cache.sample_cache import SampleCache
from kmine.errors import UserError

SHAPE = (24, 20)
WINDOW = (0.0, 255.0)
FLIPS = 10

# -- valid data sets


def rng(*key: object) -> np.random.Generator:
    return np.random.default_rng(list("/".join(map(str, key)).encode()))


def disc() -> np.ndarray:
    mask = np.zeros(SHAPE, np.uint8)
    mask[6:15, 5:14] = 255
    return mask


def picture(path: Path, mode="RGB", **options) -> None:
    depth = np.uint16 if mode == "I;16" else np.uint8
    channels = (3,) if mode == "RGB" else ()
    save_image(path, rng(path.name).integers(0, 256, (*SHAPE, *channels)).astype(depth), **options)


def volume(path: Path, labels: tuple[int, ...] = ()) -> None:
    """Three slices of SHAPE: noise, or a disc of one label each."""
    if labels:
        save_volume(path, ((disc() > 0) * np.array(labels)[:, None, None]).astype(np.uint8))
    else:
        save_volume(path, rng(path.name).integers(0, 256, (3, *SHAPE)).astype(np.int16))


def build_folder(root: Path) -> None:
    pictures = {"png": ("png", {}), "jpg": ("jpg", {}), "tif": ("tif", {"compression": "tiff_lzw"})}
    for name in ("good", "victim"):
        for kind, (suffix, options) in {**pictures, "deep": ("tif", {"mode": "I;16"})}.items():
            picture(root / "images" / f"{name}-{kind}.{suffix}", **options)
            mask = root / "masks" / f"{name}-{kind}.{'tif' if suffix == 'tif' else 'png'}"
            save_image(mask, disc())
        save_dicom(root / "images" / f"{name}-dcm.dcm", rng(name).integers(0, 256, SHAPE).astype(np.uint16))
        for kind, suffix in (("nii", "nii"), ("gz", "nii.gz")):
            volume(root / "images" / f"{name}-{kind}.{suffix}")
            volume(root / "masks" / f"{name}-{kind}.{suffix}", labels=(1, 1, 0))


def build_kvasir(root: Path) -> None:
    for name in ("good", "victim"):
        picture(root / "images" / f"{name}.jpg")
        save_image(root / "masks" / f"{name}.jpg", disc(), quality=90)
        picture(root / "normals" / f"{name}-normal.png")


def build_covid(root: Path) -> None:
    for split in ("Train", "Val", "Test"):
        for name in ("good", "victim"):
            folder = root / "Infection Segmentation Data/Infection Segmentation Data" / split / "COVID-19"
            save_image(folder / "images" / f"{name}.png", rng(split, name).integers(0, 256, SHAPE, np.uint8))
            save_image(folder / "infection masks" / f"{name}.png", disc())


def build_lits(root: Path) -> None:
    for number, suffix in ((1, "nii"), (2, "nii.gz"), (3, "nii.gz")):
        volume(root / f"Training Batch {number}" / f"volume-{number}.{suffix}")
        volume(root / f"Training Batch {number}" / f"segmentation-{number}.{suffix}", labels=(0, 1, 2))


BUILD = {"folder": build_folder, "kvasir_seg": build_kvasir, "covid_qu_ex": build_covid, "lits": build_lits}
TRAIN = "Infection Segmentation Data/Infection Segmentation Data/Train/COVID-19"
VICTIMS = [
    *(
        ("folder", f"images/victim-{kind}", f"victim-{kind.split('.')[0]}")
        for kind in ("png.png", "jpg.jpg", "tif.tif")
    ),
    *(("folder", f"images/victim-{kind}", f"victim-{kind.split('.')[0]}") for kind in ("deep.tif", "dcm.dcm")),
    *(("folder", f"{part}/victim-nii.nii", "victim-nii") for part in ("images", "masks")),
    *(("folder", f"{part}/victim-gz.nii.gz", "victim-gz") for part in ("images", "masks")),
    *(("folder", f"masks/victim-{kind}", f"victim-{kind.split('.')[0]}") for kind in ("png.png", "tif.tif")),
    ("kvasir_seg", "images/victim.jpg", "victim"),
    ("kvasir_seg", "masks/victim.jpg", "victim"),
    ("kvasir_seg", "normals/victim-normal.png", "normal/victim"),
    *(("covid_qu_ex", f"{TRAIN}/{part}/victim.png", "Train/COVID-19/victim") for part in ("images", "infection masks")),
    *(("lits", f"Training Batch 1/{kind}-1.nii", "volume-001") for kind in ("volume", "segmentation")),
    *(("lits", f"Training Batch 2/{kind}-2.nii.gz", "volume-002") for kind in ("volume", "segmentation")),
]
"""Data set, file, and a part of the ids of its samples."""
ONE_A_KIND = list({(name, "mask" in file or "segm" in file): (name, file, own) for name, file, own in VICTIMS}.values())
"""An image and a mask of each data set: what is opened before the format is known."""
CHECKED = (".png", ".gz")
"""Suffixes of formats with checksums."""


def settings(name: str, root: Path, on_error: str) -> DataConfig:
    places = {
        "folder": {"images": f"{root}/images", "masks": f"{root}/masks", "window": WINDOW},
        "kvasir_seg": {"root": str(root), "normal_images": f"{root}/normals"},
        "covid_qu_ex": {"root": str(root), "classes": ("COVID-19",)},
        "lits": {"root": str(root), "window": WINDOW},
    }
    return DataConfig(name=name, on_error=on_error, cache_dir=f"{root}-cache", **places[name])


Read = dict[str, tuple[np.ndarray, np.ndarray | None]]


def read_all(cfg: DataConfig) -> tuple[Read, list[str]]:
    """Image and mask by sample id, and the paths of skipped files; read through the cache."""
    source = open_source(cfg)
    cache = SampleCache(source, 32, Path(str(cfg.cache_dir)), cfg.on_error)
    with_mask = [ref.sample_id for ref in cache.refs if ref.has_mask]
    damaged = cache.decode_masks(with_mask)
    lost = {skipped.sample_id for skipped in damaged}
    found: Read = {}
    for ref in cache.refs:
        image, mask = cache.image_native(ref.sample_id), None
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
        if ref.sample_id in with_mask and ref.sample_id not in lost:
            mask = cache.mask_native(ref.sample_id)
            assert mask.dtype == np.uint8 and mask.shape == image.shape[:2]
            assert set(np.unique(mask)) <= {*range(len(source.class_names)), 255}
        found[ref.sample_id] = image, mask
    return found, [skipped.path for skipped in (*source.skipped, *cache.skipped, *damaged)]


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> dict[str, tuple[Path, Read]]:
    """Root and content of each undamaged data set."""
    made = {}
    for name, build in BUILD.items():
        root = tmp_path_factory.mktemp(name) / "data"
        build(root)
        found, skipped = read_all(settings(name, root, "stop"))
        assert skipped == [] and len(found) >= 4
        made[name] = root, found
    return made


@pytest.fixture
def check_damage(good, tmp_path) -> Callable[..., None]:
    """Damage one file: expects one error, or a counted skip and all other samples unchanged."""

    def check(victim: tuple[str, str, str], damage: Callable[[Path], object]) -> None:
        name, file, own = victim
        root, (origin, before) = tmp_path / "data", good[name]
        shutil.copytree(origin, root, copy_function=os.link)
        path = root / file
        content = path.read_bytes()
        path.unlink()  # the linked original stays intact
        path.write_bytes(content)
        damage(path)
        stopped = False
        try:
            read_all(settings(name, root, "stop"))
        except UserError as error:
            stopped = True
            assert str(path) in str(error) and "\n" not in str(error), "one line that names the file"
            assert "expected" in str(error) or "cannot be read" in str(error)
        assert stopped, "damage went unnoticed"
        found, skipped = read_all(settings(name, root, "skip"))
        assert set(skipped) == {str(path)}, "only the damaged file is counted"
        others = {sample_id for sample_id in before if own not in sample_id}
        assert others and others <= found.keys() <= before.keys()
        for sample_id in others:
            for now, then in zip(found[sample_id], before[sample_id], strict=True):
                np.testing.assert_array_equal(now, then)

    return check


def ids(value: object) -> str | None:
    return f"{value[0]}-{value[1].split(TRAIN)[-1]}".replace("/", "-") if isinstance(value, tuple) else None


# -- damage


def flip(content: bytes, at: int, bit: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]


def replaced(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.unlink()
        make(path)

    return damage


def rewritten(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(change(path.read_bytes())) and None


DAMAGE: dict[str, Callable[[Path], object]] = {
    "zero bytes": rewritten(lambda b: b""),
    "one byte": rewritten(lambda b: b[:1]),
    "text": rewritten(lambda b: b"<script>alert(1)</script>\n" * 40),
    "cut in its header": rewritten(lambda b: b[:20]),
    "cut in the middle": rewritten(lambda b: b[: len(b) // 2]),
    "all zeros": rewritten(lambda b: bytes(len(b))),
    "wrong magic": rewritten(lambda b: bytes(8) + b[8:] if b[128:132] != b"DICM" else b[:128] + b"MCID" + b[132:]),
}
NO_FILE: dict[str, Callable[[Path], object]] = {
    "a folder": replaced(Path.mkdir),
    "a link to nothing": replaced(lambda path: path.symlink_to(path.parent / "gone")),
    "a link to itself": replaced(lambda path: path.symlink_to(path)),
    "a pipe": replaced(os.mkfifo),
    "a device": replaced(lambda path: path.symlink_to("/dev/zero")),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("victim", VICTIMS, ids=ids)
def test_a_damaged_file_is_one_error_or_one_skip(check_damage, victim, kind):
    check_damage(victim, DAMAGE[kind])


@pytest.mark.parametrize("kind", NO_FILE)
@pytest.mark.parametrize("victim", ONE_A_KIND, ids=ids)
def test_what_is_no_file_is_one_error_or_one_skip(check_damage, victim, kind):
    check_damage(victim, NO_FILE[kind])


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read everything")
@pytest.mark.parametrize("victim", VICTIMS, ids=ids)
def test_an_unreadable_file_is_one_error_or_one_skip(check_damage, victim):
    check_damage(victim, lambda path: path.chmod(0))


@pytest.mark.parametrize("where", ["header", "body"])
@pytest.mark.parametrize("victim", VICTIMS, ids=ids)
def test_a_flipped_bit_is_an_error_or_gives_valid_arrays(good, tmp_path, victim, where):
    """`FLIPS` files with one bit flipped each."""
    name, file, own = victim
    origin, before = good[name]
    root = tmp_path / "data"
    shutil.copytree(origin, root)
    content, draw = (root / file).read_bytes(), rng(*victim, where)
    ends = (0, min(400, len(content) // 3)) if where == "header" else (len(content) // 3, len(content))
    for at in draw.integers(*ends, FLIPS):
        (root / file).write_bytes(flip(content, int(at), int(draw.integers(8))))
        try:
            source = open_source(settings(name, root, "stop"))
            for ref in source.refs():
                if own in ref.sample_id:
                    image = source.image(ref.sample_id)
                    same = np.array_equal(image, before.get(ref.sample_id, (0,))[0])
                    assert image.ndim == 3 and image.dtype == np.uint8
                    if ref.has_mask:
                        mask = source.mask(ref.sample_id)
                        same &= np.array_equal(mask, before.get(ref.sample_id, (0, 0))[1])
                        assert mask.shape == image.shape[:2] and {*np.unique(mask)} <= {0, 1, 255}
                    assert same or where == "header" or not file.endswith(CHECKED), "no checksum was compared"
        except UserError as error:  # may name the mask, if the size of the image changed
            assert Path(file).name.partition(".")[0].split("-")[-1] in str(error)

"""The inputs of kmine, each as the valid files of a small case, the damage done to one of them, and the command."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import nibabel
import numpy as np
from fuzz import mutations as damage
from helpers.image_files import save_image, save_slice
from PIL import Image

from kmine.segmenters.weights import OFFICIAL_WEIGHTS

SIZE = (32, 40)
NUM_IMAGES = 12
TINY = (
    *("--data.size=32", "--data.label_fraction=0.5", "--data.val_fraction=0.2", "--data.test_fraction=0.2"),
    *("--data.on_fault=say", "--fit.batch_size=2", "--fit.steps=4", "--fit.round_steps=2", "--fit.val_every=2"),
    *("--adapt.enabled=false", "--baseline=false", "--infer.tta=none", "--device=cpu", "--segmenter.name=ellipse"),
    *("--model.encoder=tu-mobilenetv3_small_050", "--model.encoder_depth=3", "--model.decoder_channels=8"),
    *("--gate.mode=ranked", "--gate.keep=1"),
    "--plan=false",
)
"""A few steps make a poor model; this gate lets its masks through."""


class Undamaged(Random):
    """Chooses as `Random` does; no surface damages anything, so that every command must end with 0."""


@dataclass(frozen=True)
class Case:
    """A command on damaged input."""

    words: tuple[str, ...]
    target: Path
    """The damaged file: a message must name it, or the folder or archive that holds it."""


Surface = Callable[[Random, Path, Path], Case]
"""(rng, folder of valid files, empty folder of the case) -> the case."""


def build_base(base: Path, kmine: Callable[[Sequence[str]], int]) -> None:
    """Valid files of all surfaces: data, a finished run, its exports. `kmine` runs a command in another process."""
    for number in range(NUM_IMAGES):
        image, mask = scene(number)
        save_image(base / "pictures" / "images" / f"p{number:02}.png", image)
        save_image(base / "pictures" / "masks" / f"p{number:02}.png", mask)
    rows = [f"images/p{n:02}.png,masks/p{n:02}.png,g{n // 2},{'1' * (n % 2)}" for n in range(NUM_IMAGES)]
    (base / "pictures" / "table.csv").write_text("image,mask,group,label\n" + "\n".join(rows) + "\n")
    for number in range(4):
        slices = np.stack([scene(10 * number + k)[0][..., 0] for k in range(5)]).astype(np.int16)
        masks = np.stack([scene(10 * number + k)[1] for k in range(5)]) // 255
        for name, values in (("images", slices), ("masks", masks.astype(np.uint8))):
            path = base / "volumes" / name / f"v{number}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(values.transpose(2, 1, 0), np.diag([-0.7, -0.8, 2.5, 1])), path)
        for k, values in enumerate(slices):
            save_slice(base / "dicom" / f"s{number}" / f"{k}.dcm", values, (0, 0, 2.5 * k), series=f"1.2.{number}")
            save_image(base / "dicom-masks" / f"s{number}" / f"{k}.png", masks[k].astype(np.uint8) * 255)
    folder = ["--data.name=folder", f"--data.images={base}/pictures/images", f"--data.masks={base}/pictures/masks"]
    steps = [
        ["loop", *folder, *TINY, "--rounds=1", f"--out={base}/run"],
        ["audit", f"{base}/run", "--no_labeled", "--export=coco", f"--out={base}/audit-coco"],
        ["audit", f"{base}/run", "--no_labeled", "--export=labelstudio", f"--out={base}/audit-ls"],
        ["audit", f"{base}/run", "--no_labeled", "--export=masks", f"--out={base}/audit-masks"],
        ["predict", f"{base}/run", f"{base}/pictures/images", f"--export={base}/model.onnx", f"--out={base}/predicted"],
    ]
    for words in steps:
        assert kmine(words) == 0, words
    _write_archives(base)
    _write_verdicts(base)
    _write_weights(base)


def scene(number: int) -> tuple[np.ndarray, np.ndarray]:
    """An (H, W, 3) image of an ellipse, and its mask of 0 and 255, uint8."""
    rng = np.random.default_rng(number)
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    centre, radii = rng.uniform(0.35, 0.65, 2) * SIZE, rng.uniform(0.15, 0.25, 2) * SIZE
    mask = ((rows - centre[0]) / radii[0]) ** 2 + ((columns - centre[1]) / radii[1]) ** 2 < 1
    image = rng.normal(70, 12, (*SIZE, 3)) + mask[..., None] * np.array([60, 30, 20])
    return np.clip(image, 0, 255).astype(np.uint8), mask.astype(np.uint8) * 255


def _write_archives(base: Path) -> None:
    with zipfile.ZipFile(base / "kvasir.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted((base / "pictures").rglob("*.png")):
            archive.write(path, f"Kvasir-SEG/{path.relative_to(base / 'pictures')}")
    zeros = bytes(1000)
    checkpoint = replace(OFFICIAL_WEIGHTS["sam_vit_b"], sha256=hashlib.sha256(zeros).hexdigest())
    OFFICIAL_WEIGHTS["sam_vit_b"] = checkpoint  # in this process and its forks
    manifest = json.dumps({"sam_vit_b": checkpoint.sha256}).encode()
    with tarfile.open(base / "bundle.tar", "w") as bundle:
        for name, content in (("kmine-weights.json", manifest), (checkpoint.filename, zeros)):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            bundle.addfile(entry, io.BytesIO(content))


def _write_verdicts(base: Path) -> None:
    """A verdict on each pseudo mask, as the page of the audit saves them."""
    from kmine.store.run_folder import RunFolder

    decisions = RunFolder(base / "run", follows=True).decisions(1)
    ids = sorted({row.sample_id for row in decisions if row.in_training})
    rows = [{"sample_id": name, "kind": "pseudo", "verdict": "accept", "note": "fine"} for name in ids]
    rows[0]["verdict"] = "reject"
    value = {"format": "kmine-verdicts-1", "run": "run", "run_signature": "", "verdicts": rows}
    (base / "verdicts.json").write_text(json.dumps(value))


def _write_weights(base: Path) -> None:
    import timm
    import torch
    from safetensors.torch import save_file

    state = timm.create_model("mobilenetv3_small_050").state_dict()
    torch.save(state, base / "encoder.pth")
    save_file({name: value.contiguous() for name, value in state.items()}, base / "encoder.safetensors")


def _damaged(rng: Random, paths: Sequence[Path], *more: damage.Mutation) -> Path:
    """Damage one of the files, half of the time by the mutations of its own kind; returns it."""
    target = rng.choice(sorted(paths))
    kinds = rng.choice((more or damage.BYTES, damage.BYTES, damage.BYTES, damage.PLACES))
    if not isinstance(rng, Undamaged):
        rng.choice(kinds)(rng, target)
    return target


def _check(case: Path, *words: str) -> tuple[str, ...]:
    return ("check", *words, "--data.size=32", "--data.label_fraction=0.5", "--device=cpu", f"--out={case}/out")


def _pictures(base: Path, case: Path) -> tuple[Path, tuple[str, ...]]:
    data = Path(shutil.copytree(base / "pictures", case / "data"))
    return data, ("--data.name=folder", f"--data.images={data}/images", f"--data.masks={data}/masks")


def _reencoded(rng: Random, path: Path) -> None:
    """The same picture in another mode or format, which the name may not tell."""
    with Image.open(path) as image:
        image.load()
    mode = rng.choice(("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F", "YCbCr"))
    picture = image.convert("L").convert(mode) if mode in ("1", "I", "F", "I;16") else image.convert(mode)
    if rng.random() < 0.3:
        picture = picture.resize(rng.choice(((1, 1), (1, 40), (3000, 2), (40, 32), (7, 7))))
    buffer = io.BytesIO()
    for kind in (rng.choice(("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP")), "TIFF", "PNG"):
        try:
            picture.save(buffer, kind)
            break
        except (OSError, KeyError, ValueError):
            buffer = io.BytesIO()
    path.write_bytes(buffer.getvalue() or path.read_bytes())


def _mask_values(rng: Random, path: Path) -> None:
    values = rng.choice(((0, 1), (0, 2), (0, 127), (255, 0), (0, 0), (255, 255), (0, 128), (254, 255)))
    with Image.open(path) as image:
        mask = np.array(image) > 0
    Image.fromarray(np.where(mask, values[1], values[0]).astype(np.uint8)).save(path, "PNG")


def pictures(rng: Random, base: Path, case: Path) -> Case:
    data, words = _pictures(base, case)
    target = _damaged(rng, list((data / "images").iterdir()), _reencoded)
    return Case(_check(case, *words, f"--data.on_error={rng.choice(('stop', 'skip'))}"), target)


def masks(rng: Random, base: Path, case: Path) -> Case:
    data, words = _pictures(base, case)
    target = _damaged(rng, list((data / "masks").iterdir()), _reencoded, _mask_values)
    return Case(_check(case, *words, f"--data.on_error={rng.choice(('stop', 'skip'))}"), target)


def _nifti_header(rng: Random, path: Path) -> None:
    """Damage inside the compressed stream."""
    import gzip

    raw = path.with_suffix("")
    raw.write_bytes(gzip.decompress(path.read_bytes()))
    rng.choice((damage.flip_header_bits, damage.flip_bits, damage.truncate, damage.zero_block))(rng, raw)
    path.write_bytes(raw.read_bytes() if rng.random() < 0.1 else gzip.compress(raw.read_bytes(), 1, mtime=0))
    raw.unlink()


def nifti(rng: Random, base: Path, case: Path) -> Case:
    data = Path(shutil.copytree(base / "volumes", case / "data"))
    target = _damaged(rng, list(data.glob("*/*.nii.gz")), _nifti_header)
    words = ("--data.name=folder", f"--data.images={data}/images", f"--data.masks={data}/masks")
    words = (*words, "--data.window=[0,255]")
    return Case(_check(case, *words), target)


def _dicom_tag(rng: Random, path: Path) -> None:
    import pydicom

    data = pydicom.dcmread(path)
    tags = ("Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "SamplesPerPixel")
    tags += ("PhotometricInterpretation", "RescaleSlope", "RescaleIntercept", "PixelSpacing", "NumberOfFrames")
    tags += ("ImagePositionPatient", "ImageOrientationPatient", "SeriesInstanceUID", "PixelData", "PlanarConfiguration")
    name = rng.choice(tags)
    values = (0, 1, 3, 16, 65535, -1, "", "1e400", "abc", [1, 2], [1, 0, 0, 1, 0, 0], [0, 0, 0], b"", b"\0" * 7, None)
    try:
        if rng.random() < 0.25:
            del data[name]
        else:
            setattr(data, name, rng.choice(values))
        data.save_as(path, enforce_file_format=True)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError, OSError):
        damage.flip_header_bits(rng, path)  # pydicom itself does not write such a value.
    except Exception:  # struct.error and others, by version
        damage.flip_bits(rng, path)


def dicom(rng: Random, base: Path, case: Path) -> Case:
    data = Path(shutil.copytree(base / "dicom", case / "data"))
    target = _damaged(rng, list(data.glob("*/*.dcm")), _dicom_tag)
    if rng.random() < 0.5:
        words = ("predict", f"{base}/model.onnx", str(data), "--window=[0,255]", "--device=cpu", f"--out={case}/out")
        return Case(words, target)
    words = ("--data.name=folder", f"--data.images={data}", f"--data.masks={base}/dicom-masks", "--data.window=[0,255]")
    return Case(_check(case, *words), target)


def predict_inputs(rng: Random, base: Path, case: Path) -> Case:
    data = case / "data"
    shutil.copytree(base / "pictures" / "images", data / "images")
    shutil.copytree(base / "volumes" / "images", data / "volumes")
    files = [*data.glob("images/p0[0-4].png"), *data.glob("volumes/*")]
    target = _damaged(rng, files, damage.flip_header_bits)
    words = ("predict", f"{base}/model.onnx", str(data), "--overlay", "--window=[0,255]", "--device=cpu")
    return Case((*words, f"--out={case}/out"), target)


def predict_outputs(rng: Random, base: Path, case: Path) -> Case:
    """The folder of an earlier prediction, from which the same command resumes."""
    out = Path(shutil.copytree(base / "predicted", case / "out"))
    files = [out / ".kmine-predict.jsonl"] * 3 + [path for path in out.rglob("*") if path.is_file()]
    target = _damaged(rng, files, damage.flip_bits)
    return Case(("predict", f"{base}/run", f"{base}/pictures/images", "--device=cpu", f"--out={out}"), target)


def predict_log(rng: Random, base: Path, case: Path) -> Case:
    out = Path(shutil.copytree(base / "predicted", case / "out"))
    target = out / ".kmine-predict.jsonl"
    if not isinstance(rng, Undamaged):
        damage.json_lines(rng, target)
    return Case(("predict", f"{base}/run", f"{base}/pictures/images", "--device=cpu", f"--out={out}"), target)


def tables(rng: Random, base: Path, case: Path) -> Case:
    data, _ = _pictures(base, case)
    target = _damaged(rng, [data / "table.csv"], damage.csv_cell, damage.csv_cell, damage.text_lines)
    return Case(_check(case, "--data.name=folder", f"--data.csv={data}/table.csv"), target)


def split_files(rng: Random, base: Path, case: Path) -> Case:
    words = _pictures(base, case)[1]
    split = Path(shutil.copyfile(base / "run" / "splits.csv", case / "splits.csv"))
    target = _damaged(rng, [split], damage.csv_cell, damage.csv_cell, damage.text_lines)
    return Case(("loop", *words, *TINY, "--rounds=0", f"--data.split_file={split}", f"--out={case}/run"), target)


def settings(rng: Random, base: Path, case: Path) -> Case:
    target = Path(shutil.copyfile(base / "run" / "config.yaml", case / "settings.yaml"))
    target = _damaged(rng, [target], damage.yaml_value, damage.yaml_value, damage.yaml_value, damage.text_lines)
    small = [
        word for word in TINY if word.startswith(("--plan", "--data.size", "--fit.", "--model.encoder", "--device"))
    ]
    return Case(("loop", f"--config={target}", *small, "--rounds=0", f"--out={case}/run"), target)


def verdicts(rng: Random, base: Path, case: Path) -> Case:
    target = Path(shutil.copyfile(base / "verdicts.json", case / "verdicts.json"))
    target = _damaged(rng, [target], damage.json_value, damage.json_value, damage.text_lines)
    if rng.random() < 0.3:
        words = _pictures(base, case)[1]
        return Case(("loop", *words, *TINY, "--rounds=0", f"--verdicts={target}", f"--out={case}/run"), target)
    run = shutil.copytree(base / "run", case / "run")
    return Case(("audit", str(run), f"--verdicts={target}", "--device=cpu"), target)


def corrections(rng: Random, base: Path, case: Path) -> Case:
    run = shutil.copytree(base / "run", case / "run")
    kind = rng.choice(("coco", "ls", "masks"))
    folder = Path(shutil.copytree(base / f"audit-{kind}", case / "corrected"))
    exported = sorted(path for path in folder.rglob("*") if path.suffix in (".json", ".png") and path.is_file())
    if kind == "masks":
        files = [path for path in exported if path.suffix == ".png" and "masks" in path.parts[-2:-1]] or exported
        target = _damaged(rng, files, _reencoded, _mask_values)
        return Case(("audit", str(run), f"--corrected={target.parent}", "--device=cpu"), target)
    target = _damaged(rng, [path for path in exported if path.suffix == ".json"], *[damage.json_value] * 3)
    return Case(("audit", str(run), f"--corrected={target}", "--device=cpu"), target)


def _commands(run: Path, base: Path, case: Path) -> dict[str, tuple[str, ...]]:
    """The commands that read a run folder."""
    images, masks = f"{base}/pictures/images", f"{base}/pictures/masks"
    data = ("--data.name=folder", f"--data.images={images}", f"--data.masks={masks}")
    return {
        "audit": ("audit", str(run), "--device=cpu", "--no_labeled"),
        "compare": ("compare", str(run), "--device=cpu"),
        "predict": ("predict", str(run), images, "--device=cpu", f"--out={case}/predicted"),
        "loop": ("loop", *data, *TINY, "--rounds=1", f"--out={run}"),
    }


def run_folders(rng: Random, base: Path, case: Path) -> Case:
    run = Path(shutil.copytree(base / "run", case / "run"))
    files = sorted(path for path in run.rglob("*") if path.is_file())
    suffix = rng.choice(sorted({path.suffix for path in files}))
    files = [path for path in files if path.suffix == suffix]
    own = {".json": damage.json_value, ".csv": damage.csv_cell, ".yaml": damage.yaml_value, ".jsonl": damage.json_lines}
    target = _damaged(rng, files, own.get(suffix, damage.flip_bits))
    words = _commands(run, base, case)
    return Case(words[rng.choice(sorted(words))], target)


def links(rng: Random, base: Path, case: Path) -> Case:
    """A file of a received run folder links to a file outside, which no command may change."""
    run = Path(shutil.copytree(base / "run", case / "run"))
    files = [path for path in run.rglob("*") if path.is_file()]
    target = rng.choice(sorted([*files, run / ".lock", run / "report.html", run / "test_table.md", run / "audit"]))
    outside = base.parent / "outside"
    if isinstance(rng, Undamaged):
        pass
    elif rng.random() < 0.3 and target.parent != run:
        shutil.rmtree(target.parent)
        target = target.parent
        target.symlink_to(outside, target_is_directory=True)
    else:
        target.unlink(missing_ok=True)
        target.symlink_to(outside / ("sub" if target.name == "audit" else "precious.txt"))
    words = _commands(run, base, case)
    return Case(words[rng.choice(sorted(words))], target)


def onnx(rng: Random, base: Path, case: Path) -> Case:
    target = Path(shutil.copyfile(base / "model.onnx", case / "model.onnx"))
    if rng.random() < 0.5 and not isinstance(rng, Undamaged):
        import onnx as library

        model = library.load(target)
        entry = rng.choice(model.metadata_props)
        try:
            entry.value = json.dumps(damage.change_value(rng, json.loads(entry.value)))
        except (ValueError, RecursionError):
            entry.value = str(rng.choice(damage.VALUES))
        library.save(model, target)
    else:
        target = _damaged(rng, [target])
    return Case(
        ("predict", str(target), f"{base}/pictures/images/p00.png", "--device=cpu", f"--out={case}/out"), target
    )


def _zip_entry(rng: Random, path: Path) -> None:
    names = (
        "../evil.png",
        "/tmp/evil.png",
        "a/../../evil",
        "C:\\evil",
        "x" * 300,
        "a\x1b[31m",
        "",
        "Kvasir-SEG",
        "con",
    )
    with zipfile.ZipFile(path, "a") as archive:
        entry = zipfile.ZipInfo(rng.choice(names))
        if rng.random() < 0.3:
            entry.external_attr = 0o120777 << 16  # a symbolic link
        if rng.random() < 0.3:  # the Unicode path, which Python writes from 3.12 on
            other = rng.choice(names).encode()
            crc = zlib.crc32(entry.filename.encode())
            entry.extra = struct.pack("<HHBI", 0x7075, len(other) + 5, 1, crc) + other
        archive.writestr(entry, rng.choice((b"../../outside/precious.txt", bytes(5_000_000), b"")))


def archives(rng: Random, base: Path, case: Path) -> Case:
    target = Path(shutil.copyfile(base / "kvasir.zip", case / "covid.zip"))
    target = _damaged(rng, [target], _zip_entry)
    return Case(("fetch", "covid_qu_ex", f"--archive={target}", f"--out={case}/out"), target)


def bundles(rng: Random, base: Path, case: Path) -> Case:
    target = _damaged(rng, [Path(shutil.copyfile(base / "bundle.tar", case / "bundle.tar"))])
    return Case(("weights", "unbundle", str(target), f"--cache_dir={case}/cache", "--offline"), target)


def checkpoints(rng: Random, base: Path, case: Path) -> Case:
    suffix = rng.choice((".pth", ".safetensors"))
    target = _damaged(rng, [Path(shutil.copyfile(base / f"encoder{suffix}", case / f"encoder{suffix}"))])
    words = _pictures(base, case)[1]
    flags = (f"--model.encoder_weights={target}", f"--segmenter.checkpoint={target}")
    flag = flags[0] if isinstance(rng, Undamaged) else rng.choice(flags)  # it is no SAM
    more = ("--segmenter.name=sam_vit_b",) if "segmenter" in flag else ()
    return Case(("loop", *words, *TINY, "--rounds=0", *more, flag, "--offline", f"--out={case}/run"), target)


_FILES = (pictures, masks, nifti, dicom, tables, split_files, settings, verdicts, corrections, archives, bundles)
_KMINES_OWN = (predict_inputs, predict_outputs, predict_log, run_folders, links, onnx, checkpoints)
SURFACES: dict[str, Surface] = {surface.__name__: surface for surface in (*_FILES, *_KMINES_OWN)}

"""The data doctor at the size of real data sets: indexing, memory and speed of the check, search for copies.

    python benchmarks/check_scale.py index|memory|twins

`index` makes the layouts out of hard links to one file that is no image, so that whoever reads pixels fails, and counts
the files opened. `memory` checks few and many 256 px PNGs (noise over phantoms) in a process each. `twins` searches
30,000 made-up looks.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ALL = 33_920
COVID = {"Train": 0.64, "Val": 0.16, "Test": 0.2}
opened: list[str] = []


def links(folder: Path, names: list[str], content: Path) -> None:
    folder.mkdir(parents=True)
    first = folder / names[0]
    first.write_bytes(content.read_bytes())  # a file system may allow but 65,000 links to one
    for name in names[1:]:
        os.link(first, folder / name)


def layouts(root: Path) -> dict[str, dict[str, object]]:
    """Settings by name of the layout."""
    import nibabel

    text = root / "no_image"
    text.write_text("no image")
    names = [f"image {n} ({n % 7}).png" for n in range(ALL)]
    links(root / "kvasir/images", [f"{name[:-4]}.jpg" for name in names], text)
    links(root / "kvasir/masks", [f"{name[:-4]}.jpg" for name in names], text)
    links(root / "folder/images", names, text)
    links(root / "folder/masks", names, text)
    rows = "".join(f"images/{name},masks/{name},patient{n // 3},train\n" for n, name in enumerate(names))
    (root / "folder/table.csv").write_text(f"image,mask,group,split\n{rows}")
    part = root / "covid/Lung Segmentation Data/Lung Segmentation Data"
    start = 0
    for split, share in COVID.items():
        for kind in ("COVID-19", "Non-COVID", "Normal"):
            stop = start + round(ALL * share / 3)
            for leaf in ("images", "lung masks"):
                links(part / split / kind / leaf, [f"{kind} {name}" for name in names[start:stop]], text)
            start = stop
    for n in range(131):
        folder = root / f"lits/Training Batch {1 + n // 28}"
        folder.mkdir(parents=True, exist_ok=True)
        for kind in ("volume", "segmentation"):
            image = nibabel.Nifti1Image(np.zeros((8, 8, 6), np.int16), np.diag([0.7, 0.7, 5, 1]))
            nibabel.save(image, folder / f"{kind}-{n}.nii")
    return {
        "kvasir_seg": {"name": "kvasir_seg", "root": str(root / "kvasir")},
        "covid_qu_ex": {"name": "covid_qu_ex", "root": str(root / "covid"), "task": "lung"},
        "folder": {"name": "folder", "images": str(root / "folder/images"), "masks": str(root / "folder/masks")},
        "folder, csv": {"name": "folder", "csv": str(root / "folder/table.csv")},
        "lits": {"name": "lits", "root": str(root / "lits"), "cache_dir": str(root / "cache")},
    }


def note_opened(event: str, args: tuple[object, ...]) -> None:
    if event == "open":
        opened.append(str(args[0]))


def index(args: argparse.Namespace) -> None:
    from kmine.config import DataConfig
    from kmine.data import open_source

    sys.addaudithook(note_opened)
    with tempfile.TemporaryDirectory() as folder:
        for name, settings in layouts(Path(folder)).items():
            if args.layouts and name not in args.layouts:
                continue
            cfg = DataConfig(**settings)  # type: ignore[arg-type]
            source_of = open_source(cfg) and open_source  # imports apart
            opened.clear()
            wall, cpu = time.perf_counter(), time.process_time()
            source = source_of(cfg)
            refs = source.refs()
            source.fingerprint()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            data = [path for path in opened if path.endswith((".png", ".jpg", ".nii"))]
            print(f"{name}: {len(refs)} samples, {cpu:.2f} s of processor, {wall:.2f} s, {len(data)} data files opened")


def make(folder: Path, count: int, first: int = 0) -> None:
    """256 px RGB; a few phantoms under noise that makes each a picture of its own."""
    import cv2

    from kmine.data.datasets.phantom.dataset import PhantomSource

    source = PhantomSource("polyp", 50, 256)
    drawn = [(source.image(ref.sample_id), source.mask(ref.sample_id)) for ref in source.refs()]
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for n in range(first, count):
        image, mask = drawn[n % 50]
        coarse = np.random.default_rng(n).normal(0, 40, (12, 12, 3)).astype(np.float32)
        mixed = np.clip(image + cv2.resize(coarse, (256, 256), interpolation=cv2.INTER_CUBIC), 0, 255)
        rolled, at = (np.roll(array, n // 50, axis=1) for array in (mixed.astype(np.uint8), mask * 255))
        cv2.imwrite(str(folder / f"images/{n:05}.png"), rolled)
        cv2.imwrite(str(folder / f"masks/{n:05}.png"), at)


def memory(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, peaks, made = Path(name), [], 0
        for count in (args.few, args.many):
            make(folder, count, made)
            made = count
            words = ["--data.name=folder", f"--data.images={folder}/images", f"--data.masks={folder}/masks"]
            wall = time.perf_counter()
            process = subprocess.Popen(
                [sys.executable, "-m", "kmine.check", *words, f"--out={folder}/out"],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            assert process.stderr is not None
            shown = process.stderr.read()
            _, _, usage = os.wait4(process.pid, 0)
            wall, cpu = time.perf_counter() - wall, usage.ru_utime + usage.ru_stime
            peaks.append(usage.ru_maxrss)
            print(
                f"{count} images: peak {usage.ru_maxrss / 1024:.0f} MB, {cpu:.1f} s of processor in {wall:.1f} s "
                f"({cpu / wall:.2f} cores), {count / cpu:.0f} images a second of processor; "
                f"{shown.count(chr(10))} lines of progress",
                flush=True,
            )
        more = (peaks[1] - peaks[0]) * 1024 / (args.many - args.few)
        print(f"ratio {peaks[1] / peaks[0]:.3f}; {more:.0f} bytes an image")


def twins(args: argparse.Namespace) -> None:
    """Worst cases: nothing alike, all alike in their hashes, all alike in their pictures."""
    from kmine.data.quality.image_stats import ImageStats
    from kmine.data.quality.near_duplicates import find_duplicates

    rng = np.random.default_rng(0)
    base = rng.integers(0, 256, (64, 64))
    for name, share, one_hash in (("nothing alike", 0.0, False), ("one hash", 0.0, True), ("lookalikes", 0.93, False)):
        looks = []
        for n in range(args.num):
            other = rng.integers(0, 256, (8, 8)).astype(np.uint8).repeat(8, axis=0).repeat(8, axis=1)
            small = (share * base + (1 - share) * other).astype(np.uint8)
            bits = 0 if one_hash else int(rng.integers(2**63))
            looks.append(ImageStats(str(n), (256, 256), 0, 255, 100.0, 50.0, rng.bytes(16), bits, small, small, None))
        wall, cpu = time.perf_counter(), time.process_time()
        found, search = find_duplicates(looks, {item.sample_id: item.sample_id for item in looks}, 6)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(
            f"{args.num}, {name}: {cpu:.0f} s of processor, {wall:.0f} s, {search.num_compared} pairs compared, "
            f"complete {search.complete}, {len(found)} returned, peak {peak:.0f} MB",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("index", "memory", "twins"))
    parser.add_argument("--layouts", nargs="+", help="index: these alone")
    parser.add_argument("--few", type=int, default=300)
    parser.add_argument("--many", type=int, default=3000)
    parser.add_argument("--num", type=int, default=30_000)
    args = parser.parse_args()
    {"index": index, "memory": memory, "twins": twins}[args.what](args)


if __name__ == "__main__":
    main()

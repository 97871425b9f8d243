"""`kmine predict` beside a plain inference script, and its memory over many images.

    OMP_NUM_THREADS=1 python benchmarks/predict.py speed --images 200 [--repeats 3] [--before CLONE]
    OMP_NUM_THREADS=1 python benchmarks/predict.py memory

speed: U-Net++ (MobileNetV2, random weights) at 256 px on JPEG files of 626 x 532, read, squashed, asked, resized and
written as PNG by three in turn in one process: a plain loop over batches with cv2 and segmentation-models-pytorch,
kmine with PyTorch, kmine with an ONNX file. PyTorch and onnxruntime take as many threads as OMP_NUM_THREADS says.
memory: peak resident memory of a process of its own for 300 and for 3,000 images.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from alternate import alternate, print_json

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
SIZE, BATCH = 256, 16


def draw(folder: Path, count: int, height: int, width: int) -> list[Path]:
    """JPEG files with something to see."""
    folder.mkdir(parents=True)
    rng, paths = np.random.default_rng(0), []
    for number in range(count):
        coarse = rng.integers(0, 256, (12, 14, 3)).astype(np.uint8)
        paths.append(folder / f"{number:04}.jpg")
        cv2.imwrite(str(paths[-1]), cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC))
    return paths


def plain(paths: list[Path], out: Path, root: Path) -> None:
    """What one would write in an afternoon: batches, one step after the other."""
    import torch

    from kmine.predict.run_model import load_model, open_run_model

    net = load_model(open_run_model(root, None, "best")).net.eval()
    out.mkdir(parents=True)
    for first in range(0, len(paths), BATCH):
        images = [cv2.imread(str(path))[..., ::-1] for path in paths[first : first + BATCH]]
        small = np.stack([cv2.resize(image, (SIZE, SIZE), interpolation=cv2.INTER_AREA) for image in images])
        with torch.inference_mode():
            x = torch.from_numpy(small).permute(0, 3, 1, 2).float() / 127.5 - 1
            probs = net(x.contiguous(memory_format=torch.channels_last)).softmax(dim=1).numpy()
        for path, image, of_one in zip(paths[first : first + BATCH], images, probs, strict=True):
            grown = [cv2.resize(p, image.shape[1::-1], interpolation=cv2.INTER_LINEAR) for p in of_one]
            cv2.imwrite(str(out / f"{path.stem}.png"), np.argmax(grown, axis=0).astype(np.uint8))


def ours(model: Path, folder: Path, out: Path) -> None:
    """The command, in this process."""
    from kmine.predict import __main__ as predict

    sys.stderr, kept = open(os.devnull, "w"), sys.stderr  # noqa: SIM115, PTH123
    try:
        assert predict.main([str(model), str(folder), "--out", str(out)]) == 0
    finally:
        sys.stderr = kept


def digest(folders: list[Path]) -> str:
    """SHA-256 of all masks below the folders."""
    sha256 = hashlib.sha256()
    for path in sorted(path for folder in folders for path in folder.rglob("*.png")):
        sha256.update(cv2.imread(str(path), cv2.IMREAD_UNCHANGED))
    return sha256.hexdigest()


def speed(count: int, repeats: int, as_json: bool) -> None:
    """Images a second of each, the same images in turn."""
    import torch
    from helpers.made_up_run import make_run

    from kmine.config import DataConfig, ModelConfig
    from kmine.predict import __main__ as predict

    with tempfile.TemporaryDirectory() as temp:
        root = Path(temp)
        data = DataConfig(name="folder", images="IMAGES", class_names=("background", "polyp"), size=SIZE)
        run = make_run(root / "run", model=ModelConfig(name="unetpp"), data=data, seeds=(0,))
        text = (run / "config.yaml").read_text()
        (run / "config.yaml").write_text(text.replace("  batch_size: 3\n  tta", f"  batch_size: {BATCH}\n  tta"))
        assert predict.main([str(run), "--export", str(root / "model.onnx")]) == 0
        warm, paths = draw(root / "warm", BATCH, 532, 626), draw(root / "in", count, 532, 626)
        ways: dict[str, Callable[[list[Path], Path], None]] = {
            "plain smp": lambda some, out: plain(some, out, run),
            "kmine, PyTorch": lambda some, out: ours(run, some[0].parent, out),
            "kmine, ONNX": lambda some, out: ours(root / "model.onnx", some[0].parent, out),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        cpu: dict[str, list[float]] = {name: [] for name in ways}
        for name, way in ways.items():
            way(warm, root / "out" / f"warm-{name}")
        for repeat in range(repeats):
            for name, way in ways.items():
                began, used = time.perf_counter(), time.process_time()
                way(paths, root / "out" / f"{repeat}-{name}")
                seconds[name].append(time.perf_counter() - began)
                cpu[name].append(time.process_time() - used)
        if as_json:
            spent = {name: [statistics.median(table[name]) for table in (seconds, cpu)] for name in ways}
            print_json(spent, digest([root / "out" / f"0-{name}" for name in ways if name != "plain smp"]))
            return
        base, base_cpu = (statistics.median(table["plain smp"]) for table in (seconds, cpu))
        print(f"{count} images, {repeats} repeats, threads {torch.get_num_threads()}, load {os.getloadavg()[0]:.1f}")
        for name in ways:
            wall, used = statistics.median(seconds[name]), statistics.median(cpu[name])
            print(
                f"{name:<15} {count / wall:6.1f} images/s  {base / wall:.2f} x  "
                f"{1000 * used / count:6.1f} ms of processor an image  {base_cpu / used:.2f} x"
            )


def memory(few: int, many: int) -> None:
    """Peak memory of two processes, and the ratio."""
    from helpers.made_up_run import make_run

    peaks = []
    with tempfile.TemporaryDirectory() as temp:
        run = make_run(Path(temp) / "run", seeds=(0,))
        for count in (few, many):
            folder = Path(temp) / f"in-{count}"
            draw(folder, count, 256, 256)
            words = [sys.executable, __file__, "one", str(run), str(folder), str(Path(temp) / f"out-{count}")]
            began = time.perf_counter()
            done = subprocess.run(words, check=True, capture_output=True, text=True)
            peaks.append(int(done.stdout.split()[-1]) / 1024)
            print(f"{count} images: peak {peaks[-1]:.0f} MB, {time.perf_counter() - began:.0f} s")
    print(f"ratio {peaks[1] / peaks[0]:.2f}")


def one(run: str, folder: str, out: str) -> None:
    """Predict a folder and print the peak of this process in kB."""
    ours(Path(run), Path(folder), Path(out))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def main() -> None:
    if sys.argv[1:2] == ["one"]:
        return one(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "memory"))
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--few", type=int, default=300)
    parser.add_argument("--many", type=int, default=3000)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if given.what == "speed" and given.before and not given.json:
        return alternate(["speed", "--images", str(given.images)], given.before, given.repeats)
    if given.what == "speed":
        return speed(given.images, given.repeats, given.json)
    return memory(given.few, given.many)


if __name__ == "__main__":
    main()

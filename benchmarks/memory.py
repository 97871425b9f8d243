"""Peak memory of a whole run on 3,000 phantom images beside that on 300, each in a process of its own.

    python benchmarks/memory.py [--few 300] [--many 3000]

The runs take the same few training steps and mine every unlabeled image. Peak resident memory is the
operating system's own figure, from run.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow.parquet as pq

SETTINGS = {
    "rounds": 1,
    "baseline": "false",
    "fit.steps": 60,
    "fit.round_steps": 20,
    "fit.val_every": 20,
    "adapt.fold_steps": 20,
    "adapt.steps": 20,
    "infer.tta": "none",
    # Few steps make a poor model; the gate lets its masks through, so that pseudo masks are read in training, too.
    "gate.mode": "ranked",
    "gate.keep": 1,
}


def peak_mb(num_samples: int, folder: Path) -> tuple[int, int, float]:
    """(peak resident MB, pseudo masks trained on, seconds) of one run."""
    run_folder = folder / f"run{num_samples}"
    settings = SETTINGS | {
        "data.num_samples": num_samples,
        "data.label_fraction": 20 / num_samples,
        "data.val_fraction": 30 / num_samples,
        "data.cache_dir": folder / "cache",
        "out": run_folder,
    }
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "kmine.loop", *flags], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    pseudo = sum(pq.read_metadata(path).num_rows for path in run_folder.glob("round_01/pseudo_masks/*.parquet"))
    return json.loads((run_folder / "run.json").read_text())["peak_memory_mb"], pseudo, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--few", type=int, default=300)
    parser.add_argument("--many", type=int, default=3000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = [(count, *peak_mb(count, Path(folder))) for count in (args.few, args.many)]
    for count, peak, pseudo, seconds in found:
        print(f"{count} images: peak {peak} MB, {pseudo} pseudo masks, {seconds:.0f} s")
    print(f"ratio {found[1][1] / found[0][1]:.3f}")


if __name__ == "__main__":
    main()

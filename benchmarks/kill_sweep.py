"""kill -9 at random moments of a small sweep, the same command again each time: is its table that of one left alone?

    python benchmarks/kill_sweep.py [--kills 5] [--seed 0] [--processes 2]

The same sweep twice: once left alone and timed from the moment its first cell trains, once killed with SIGKILL at
moments drawn uniformly over that time; a session's clock begins when a cell trains, too (imports are not counted).
Workers must be gone before the next session begins. Compared are sweep.csv apart from seconds and peak memory,
every pseudo mask, and every checkpoint's weights. Exit code 1 where anything differs.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from kill_resume import content

SETTINGS = {
    "rounds": 1,
    "segmenter.name": "ellipse",
    "data.num_samples": 24,
    "data.size": 32,
    "data.val_fraction": 0.2,
    "model.encoder": "tu-mobilenetv3_small_050",
    "model.encoder_depth": 3,
    "model.decoder_channels": 8,
    "fit.batch_size": 2,
    "fit.steps": 40,
    "fit.round_steps": 30,
    "fit.val_every": 10,
    "infer.tta": "none",
    # Few steps make a poor model; the gate lets its masks through, so that pseudo masks are read in training, too.
    "gate.min_agreement": 0,
    "gate.min_jitter_dice": 0,
    "gate.min_confidence": 0,
    "gate.max_confidence_outside": 1,
    "gate.max_area_ratio": 1000,
    "device": "cpu",
}
VARIED = ("--fractions", "0.3", "--seeds", "0", "1", "--methods", "supervised", "mining")
MEASURED = ("seconds", "peak_memory_mb")


def command(out: Path, cache: Path, processes: int) -> list[str]:
    settings = SETTINGS | {"out": out, "data.cache_dir": cache, "processes": processes}
    return [sys.executable, "-m", "kmine.sweep", *(f"--{name}={value}" for name, value in settings.items()), *VARIED]


def at_work(out: Path, since: float) -> dict[int, str]:
    """Process id -> cell, of the cells that were begun after `since`."""
    begun = [path for path in out.glob("cells/*/cell.json") if path.stat().st_mtime > since]
    states = {path.parent.name: json.loads(path.read_text()) for path in begun}
    return {state["pid"]: name for name, state in states.items() if state["status"] == "running"}


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def session(words: list[str], out: Path, log: Path, seconds: float | None) -> tuple[float, str]:
    """Run the command, and kill it `seconds` after a cell first said something in its log.

    Returns the seconds since then, and at which cells it was killed; empty where it came to its end before.
    """
    began, first = time.time(), 0.0
    with log.open("a") as file:
        process = subprocess.Popen(words, stderr=file)
    while process.poll() is None:
        if not first and any(path.stat().st_mtime > began for path in out.glob("cells/*/log.txt")):
            first = time.monotonic()
        if first and seconds is not None and time.monotonic() - first >= seconds:
            workers = at_work(out, began)
            process.kill()
            process.wait()
            while any(map(is_alive, workers)):
                time.sleep(0.1)
            return time.monotonic() - first, ", ".join(workers.values()) or "no cell"
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"a session failed: {log.read_text()[-2000:]}")
    return time.monotonic() - first, ""


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "sweep.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k not in MEASURED} for row in csv.DictReader(file)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="draws the moments")
    parser.add_argument("--processes", type=int, default=2, help="2 or more: one alone keeps no log")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        one, other, log = folder / "undisturbed", folder / "killed", folder / "log"
        seconds, _ = session(command(one, folder / "cache0", args.processes), one, log, None)
        print(f"undisturbed: {seconds:.1f} s, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS')}", flush=True)
        rng, struck, before = random.Random(args.seed), 0, 0.0
        words = command(other, folder / "cache1", args.processes)
        for moment in sorted(rng.uniform(0, seconds) for _ in range(args.kills)):
            _, where = session(words, other, log, moment - before)
            if not where:
                break
            struck, before = struck + 1, moment
            print(f"  kill {struck} at {moment:5.1f} s: {where}", flush=True)
        session(words, other, log, None)
        hashes, others = content(one), content(other)
        wrong = [f"{n} differs" for n in sorted(hashes.keys() | others.keys()) if hashes.get(n) != others.get(n)]
        wrong += [] if rows(one) == rows(other) else ["sweep.csv differs"]
        print(f"{struck} kills; compared {len(rows(one))} rows, {len(hashes)} pseudo masks and checkpoints")
        print("\n".join(wrong[:20]))
    failed = bool(wrong) or struck < args.kills
    print("FAIL" if failed else "PASS")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

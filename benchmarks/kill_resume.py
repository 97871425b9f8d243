"""kill -9 at random moments of a small run, resumed each time: is the result that of an undisturbed run?

    python benchmarks/kill_resume.py [--kills 10] [--seed 0]

The same run twice: once left alone and timed, once killed with SIGKILL at moments drawn uniformly over the first one's
duration. A session that is not the first begins to count at its first output (imports are not counted again), so that
the moments spread over the whole run; what a kill costs is worked off again before the next one comes. Compared are
results.csv apart from seconds, every pseudo mask byte for byte, and every checkpoint's weights. Exit code 1 where
anything differs.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

SETTINGS = {
    "rounds": 2,
    "data.num_samples": 160,
    "data.size": 64,
    "data.label_fraction": 0.15,
    "model.decoder_channels": 32,
    "fit.steps": 200,
    "adapt.fold_steps": 60,
    "adapt.steps": 40,
    "fit.round_steps": 120,
    "fit.val_every": 10,
    "fit.batch_size": 4,
    "infer.tta": "hflip",
    # Few steps make a poor model; the gate lets its masks through, so that pseudo masks are read in training, too.
    "gate.min_agreement": 0,
    "gate.min_jitter_dice": 0,
    "gate.min_confidence": 0,
    "gate.max_confidence_outside": 1,
    "gate.max_area_ratio": 1000,
    "device": "cpu",
}


class Session:
    """One process of the run, and what it said last."""

    def __init__(self, command: list[str], log: Path) -> None:
        self.phase, self.began = "imports, decoding", time.perf_counter()
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.opened = threading.Event()
        self._log = log
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        with self._log.open("a") as log:
            for line in self.process.stderr:
                log.write(line)
                if re.match(r"round \d+|phantom:|results:", line):
                    self.phase = line.split("  ")[0].split(";")[0].strip()
                    self.opened.set()
        self.opened.set()

    def wait(self, seconds: float | None = None) -> bool:
        """Whether the process ended by itself within `seconds`; it is killed otherwise."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            self._reader.join()
            return False
        self._reader.join()
        return True

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began


def command(out: Path, cache: Path) -> list[str]:
    settings = SETTINGS | {"out": out, "data.cache_dir": cache}
    return [sys.executable, "-m", "kmine.loop", *(f"--{name}={value}" for name, value in settings.items())]


def results(out: Path) -> list[dict[str, str]]:
    """results.csv without the seconds."""
    with (out / "results.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if not k.startswith("seconds_")} for row in csv.DictReader(file)]


def content(out: Path) -> dict[str, str]:
    """SHA-256 of pseudo masks and, without the header (which holds seconds), of checkpoints."""
    found = {}
    for path in sorted(p for p in out.rglob("*") if p.suffix in (".png", ".safetensors")):
        data = path.read_bytes()
        if path.suffix == ".safetensors":
            data = data[8 + int.from_bytes(data[:8], "little") :]
        found[path.relative_to(out).as_posix()] = hashlib.sha256(data).hexdigest()
    return found


def killed_run(out: Path, cache: Path, moments: list[float], log: Path) -> int:
    """Number of kills that struck; the run is complete afterwards."""
    struck, before = 0, 0.0
    for moment in moments:
        session = Session(command(out, cache), log)
        if struck:
            session.opened.wait()
        if session.wait(moment - before):
            break
        struck, before = struck + 1, moment
        print(f"  kill {struck:2d} at {moment:5.1f} s: {session.phase}", flush=True)
    last = Session(command(out, cache), log)
    last.wait()
    if last.process.returncode:
        raise SystemExit(f"the last session failed: {log.read_text()[-2000:]}")
    return struck


def differences(one: Path, other: Path) -> list[str]:
    """What differs between two runs, in words; empty where nothing does."""
    hashes, others = content(one), content(other)
    found = [
        f"{name} differs" for name in sorted(hashes.keys() | others.keys()) if hashes.get(name) != others.get(name)
    ]
    return found + (["results.csv differs"] if results(one) != results(other) else [])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="draws the moments")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first = Session(command(folder / "undisturbed", folder / "cache0"), folder / "log")
        first.wait()
        if first.process.returncode:
            raise SystemExit((folder / "log").read_text()[-2000:])
        seconds = first.seconds
        print(f"undisturbed: {seconds:.1f} s, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS')}", flush=True)
        rng, one, other = random.Random(args.seed), folder / "undisturbed", folder / "killed"
        moments = sorted(rng.uniform(0, seconds) for _ in range(args.kills))
        struck = killed_run(other, folder / "cache1", moments, folder / "log")
        wrong = differences(one, other)
        num_masks, num_models = (sum(n.endswith(end) for n in content(one)) for end in (".png", ".safetensors"))
        print(f"{struck} kills; compared {len(results(one))} rows, {num_masks} pseudo masks, {num_models} checkpoints")
        print("\n".join(wrong[:20]))
    failed = bool(wrong) or struck < args.kills or not num_masks
    print("FAIL" if failed else "PASS")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

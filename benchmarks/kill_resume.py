"""Every command killed at random moments and given again: are its files those of an undisturbed one?

    python benchmarks/kill_resume.py [--kills 30] [--terms 10] [--seed 0] [--commands loop predict ...]

Each command runs once undisturbed, timed. Then the commands in turn are ended at a moment drawn uniformly over that
time (SIGKILL; SIGTERM for the last `--terms`) and given again; one time in three the second session is struck, too. All
files are compared with the undisturbed ones: byte for byte; weights without their header, tables and JSON without times
and memory, pages without charts and times. A SIGTERM must end with exit code 143, or 0 where the work was done; one
that comes before the command has begun or after its work, while Python starts or ends, is 143 to a shell. Not compared:
fold models in a trial of a sweep, which are links to those that its siblings have finished when it begins.
Exit code 1 where anything differs.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kmine.store.table_files import TableRows
from kmine.store.tables import MaskRow

SMALL = (
    "--plan=false",
    *("--data.size=32", "--data.label_fraction=0.3", "--data.val_fraction=0.2", "--data.test_fraction=0.2"),
    *("--data.on_fault=say", "--fit.batch_size=2", "--fit.steps=60", "--fit.round_steps=30", "--fit.val_every=10"),
    *("--adapt.fold_steps=20", "--adapt.steps=20", "--infer.tta=hflip", "--device=cpu"),
    *("--model.encoder=tu-mobilenetv3_small_050", "--model.encoder_depth=3", "--model.decoder_channels=8"),
    "--gate.keep=1",
)
"""A few steps make a poor model; this gate lets its masks through, so that pseudo masks are read in training."""
VOLATILE = re.compile(r"seconds|time|memory|_mb$|opened|started|ended|pid|git_commit|^command$|^created|^took$")
TIMES = re.compile(rb"\d[\d.,]* ?(s|ms|min|h|MB|GB)\b|\d{4}-\d\d-\d\d[ T]\d\d:\d\d(:\d\d)?")
ROWS = re.compile(rb"<tr><th[^>]*>[^<]*(seconds|memory)[^<]*</th>.*?</tr>", re.DOTALL)
CHARTS = re.compile(rb"<svg.*?</svg>|data:image/[^\"]*", re.DOTALL)
"""Rows and charts of a page; one chart shows seconds."""
LINKED = re.compile(r"sweep/cells/[^/]+/(witness_)?fold_\d+/")
SKIPPED = {".lock", ".sweep.lock", "log.txt", ".kmine-predict.jsonl"}
"""Locks, and logs to which each session adds."""


def build_data(folder: Path, num_images: int = 60) -> None:
    """Pictures of ellipses, and their masks."""
    rows, columns = np.mgrid[:64, :80]
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for number in range(num_images):
        rng = np.random.default_rng(number)
        centre, radii = rng.uniform(0.35, 0.65, 2) * (64, 80), rng.uniform(0.12, 0.25, 2) * (64, 80)
        mask = ((rows - centre[0]) / radii[0]) ** 2 + ((columns - centre[1]) / radii[1]) ** 2 < 1
        image = rng.normal(70, 12, (64, 80, 3)) + mask[..., None] * np.array([60, 30, 20])
        Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).save(folder / "images" / f"p{number:03}.png")
        Image.fromarray(mask.astype(np.uint8) * 255).save(folder / "masks" / f"p{number:03}.png")


def commands(place: Path, data: Path) -> dict[str, list[str]]:
    """The commands by name, in the order in which each finds the work of those before it in `place`."""
    own = ["--data.name=folder", f"--data.images={data}/images", f"--data.masks={data}/masks", *SMALL]
    own.append(f"--data.cache_dir={place}/cache")
    predict = ["--device=cpu", "--probs", "--overlay"]
    sweep = ["--fractions", "0.3", "--seeds", "0", "--methods", "supervised", "mining"]
    return {
        "check": ["check", *own, f"--out={place}/check"],
        "loop": ["loop", *own, "--rounds=1", f"--out={place}/run"],
        "audit": ["audit", f"{place}/run", "--device=cpu", "--export=coco"],
        "verdicts": ["audit", f"{place}/run", "--device=cpu", f"--verdicts={place}/verdicts.json"],
        "predict": ["predict", f"{place}/run", f"{data}/images", *predict, f"--out={place}/predicted"],
        "export": ["predict", f"{place}/run", "--device=cpu", f"--export={place}/model.onnx"],
        "compare": ["compare", f"{place}/run", "--device=cpu"],
        "sweep": ["sweep", *own, "--rounds=1", "--processes=2", f"--out={place}/sweep", *sweep],
    }


def write_verdicts(place: Path) -> None:
    """A verdict on each pseudo mask of the run."""
    files = (place / "run").glob("round_*/pseudo_masks/*.parquet")
    names = sorted(name for path in files for name in TableRows([path], MaskRow).column("sample_id"))
    rows = [
        {"sample_id": name, "kind": "pseudo", "verdict": "accept" if n else "reject"} for n, name in enumerate(names)
    ]
    value = {"format": "kmine-verdicts-1", "run": "", "run_signature": "", "verdicts": rows}
    (place / "verdicts.json").write_text(json.dumps(value))


def run(words: list[str], log: Path, strike: tuple[float, int] | None = None) -> tuple[int, float, bool]:
    """Run a command; (exit code, seconds, whether the signal `strike` = (seconds, number) reached it)."""
    started = time.monotonic()
    with log.open("a") as file:
        process = subprocess.Popen([sys.executable, "-m", "kmine", *words], stdout=file, stderr=file)
        try:
            return process.wait(strike[0] if strike else None), time.monotonic() - started, False
        except subprocess.TimeoutExpired:
            process.send_signal(strike[1])
            return process.wait(), time.monotonic() - started, True


def content(place: Path) -> dict[str, Any]:
    """What every file holds, without times and memory, by its path."""
    files = [path for path in sorted(place.rglob("*")) if path.is_file() and path.name not in SKIPPED]
    return {
        path.relative_to(place).as_posix(): _content(path)
        for path in files
        if path.relative_to(place).parts[0] != "cache" and not LINKED.match(path.relative_to(place).as_posix())
    }


def _content(path: Path) -> Any:
    data = path.read_bytes()
    if path.suffix == ".safetensors":
        return data[8 + int.from_bytes(data[:8], "little") :]
    if path.suffix == ".json":
        return _without_times(json.loads(data))
    if path.suffix == ".csv":
        rows = csv.DictReader(io.StringIO(data.decode(), newline=""))
        return [{name: value for name, value in row.items() if not VOLATILE.search(name or "")} for row in rows]
    return TIMES.sub(b"", ROWS.sub(b"", CHARTS.sub(b"", data))) if path.suffix in (".html", ".js", ".md") else data


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        # `check` as text is a checksum of the entries, times included.
        kept = {name: entry for name, entry in value.items() if name != "check" or not isinstance(entry, str)}
        return {name: _without_times(entry) for name, entry in kept.items() if not VOLATILE.search(name)}
    return [_without_times(entry) for entry in value] if isinstance(value, list) else value


def differences(one: Path, other: Path) -> list[str]:
    """Files that differ, in words."""
    left, right = content(one), content(other)
    found = [f"{name} only undisturbed" for name in sorted(left.keys() - right.keys())]
    found += [f"{name} only after the signal" for name in sorted(right.keys() - left.keys())]
    return found + [f"{name} differs" for name in sorted(left.keys() & right.keys()) if left[name] != right[name]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--terms", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="draws the moments")
    parser.add_argument("--commands", nargs="+", default=[], help="only these are struck")
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    rng, wrong = random.Random(given.seed), 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data, place, log = folder / "data", folder / "place", folder / "log"
        build_data(data)
        os.environ["KMINE_CACHE"] = str(folder / "kmine-cache")
        place.mkdir()
        seconds: dict[str, float] = {}
        before, after = folder / "before", folder / "after"
        for command, words in commands(place, data).items():
            shutil.copytree(place, before / command)
            code, seconds[command], _ = run(words, log)
            if code not in (0, 1):
                raise SystemExit(f"{command} failed: {log.read_text()[-2000:]}")
            if command == "loop":
                write_verdicts(place)
            shutil.copytree(place, after / command)
            print(f"{command:<9} undisturbed {seconds[command]:5.1f} s", flush=True)
        names = given.commands or list(seconds)
        for number in range(given.kills + given.terms):
            command, kind = names[number % len(names)], signal.SIGKILL if number < given.kills else signal.SIGTERM
            shutil.rmtree(place)
            shutil.copytree(before / command, place)
            words, struck = commands(place, data)[command], []
            for _ in range(rng.choice((1, 1, 2))):
                code, at, hit = run(words, log, (rng.uniform(0.1, seconds[command]), kind))
                if hit:
                    struck.append(f"{at:.1f} s")
                if kind == signal.SIGTERM and hit and code not in (143, -kind, 0):
                    wrong += 1
                    print(f"  {command}: exit code {code} after SIGTERM")
            code = run(words, log)[0]
            if command == "loop":
                write_verdicts(place)
            found = differences(after / command, place) if code in (0, 1) else [log.read_text()[-300:]]
            wrong += bool(found)
            what = "; ".join(found[:5]) or "as undisturbed"
            print(f"{number + 1:>3} {command:<9} {kind.name} at {', '.join(struck) or 'its end'}: {what}", flush=True)
    print(f"{given.kills} SIGKILL, {given.terms} SIGTERM: {'FAIL' if wrong else 'PASS'}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())

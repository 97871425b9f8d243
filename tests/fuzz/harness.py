"""Run commands on damaged input, each in a process of its own, and say what went wrong.

    python tests/fuzz/harness.py --cases 5000            all surfaces, two at once
    python tests/fuzz/harness.py --surface onnx --first 17 --cases 1 --keep DIR    one case again, its output kept
    python tests/fuzz/harness.py --undamaged 36 --cases 0    the valid files alone (seeds below 0), exit code 0 each

A case passes if the command ends by itself within `SECONDS`, with exit code 0, 1 or 2 and without a traceback, if an
error names the damaged file on one line free of control characters, if no file outside the case's folder changes, and
if memory stays below `MEGABYTES`. Commands run in forks of one process that has loaded the libraries: a case costs a
tenth of a second instead of four.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fuzz.surfaces import SURFACES, Case, Undamaged, build_base

SECONDS = 30
MEGABYTES = 3000
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e]")
LIBRARIES = (
    "torch",
    "timm",
    "segmentation_models_pytorch",
    "segment_anything",
    "albumentations",
    "onnxruntime",
    "onnx",
)
LIBRARIES += ("cv2", "nibabel", "pydicom", "jsonargparse", "pandas", "scipy.ndimage", "jinja2", "safetensors.torch")
LIBRARIES += (
    "sklearn.isotonic",
    "rich.console",
    "rich.progress",
    "matplotlib.pyplot",
    "monai.metrics",
    "lightning.fabric",
)


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    code: int
    """Exit code; negative: the signal that ended it."""
    seconds: float
    megabytes: float
    output: str

    def faults(self, case: Case) -> list[str]:
        """What is wrong, in words; empty if nothing is."""
        found = []
        if self.code < 0:
            ended = "hang" if self.seconds >= SECONDS else "crash"
            found.append(f"{ended}: signal {-self.code} after {self.seconds:.0f} s")
        elif self.code not in (0, 1, 2):
            found.append(f"exit code {self.code}")
        if "Traceback (most recent call last)" in self.output:
            found.append("traceback: " + self.output.strip().splitlines()[-1][:200])
        lines = [line for line in self.output.splitlines() if ": error: " in line]
        if self.code == 2 and not found:
            if len(lines) != 1:
                found.append(f"{len(lines)} error lines")
            elif case.target.name not in lines[0] and case.target.stem.split(".")[0] not in lines[0]:
                found.append(f"does not name {case.target.name}: {lines[0][:200]}")
        if CONTROL.search(self.output.replace("\n", "").replace("\r\n", "")):
            found.append("control characters in the output")
        if self.megabytes > MEGABYTES:
            found.append(f"{self.megabytes:.0f} MB of memory")
        return found


@dataclass
class Harness:
    """Folders of a session: `base` of valid files, `outside` of files that nothing may touch, `cases`."""

    root: Path

    def __post_init__(self) -> None:
        self.base, self.outside, self.cases = (self.root / name for name in ("base", "outside", "cases"))
        (self.outside / "sub").mkdir(parents=True)
        (self.outside / "precious.txt").write_text("ten years of work\n" * 100)
        self.cases.mkdir()
        os.environ |= {"KMINE_CACHE": str(self.root / "cache"), "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
        load_libraries()
        build_base(self.base, self._build)

    def _build(self, words: Sequence[str]) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(_start(words, self.cases), 0)[1])

    def run(self, chosen: Iterable[tuple[str, int]], jobs: int) -> Iterator[tuple[str, int, Case, Outcome, list[str]]]:
        """Run the cases (surface, seed); yields each as it ends, with its faults."""
        waiting, running = iter(chosen), {}
        untouched = self._outside_state()
        while True:
            while len(running) < jobs and (following := next(waiting, None)) is not None:
                folder = self.cases / f"{following[0]}-{following[1]}"
                folder.mkdir()
                rng = (Undamaged if following[1] < 0 else Random)(f"{following[0]} {following[1]}")
                case = SURFACES[following[0]](rng, self.base, folder)
                running[_start(case.words, folder)] = (*following, case, folder, time.monotonic())
            if not running:
                return
            for pid, (surface, seed, case, folder, started) in list(running.items()):
                seconds = time.monotonic() - started
                done, status, usage = os.wait4(pid, os.WNOHANG)
                if not done:
                    if seconds > SECONDS:
                        os.killpg(pid, signal.SIGKILL)
                    continue
                del running[pid]
                output = (folder / "output.txt").read_text("utf-8", errors="replace")
                outcome = Outcome(os.waitstatus_to_exitcode(status), seconds, usage.ru_maxrss / 1024, output)
                faults = outcome.faults(case)
                if seed < 0 and outcome.code != 0:
                    faults.append(f"exit code {outcome.code} without damage")
                if (state := self._outside_state()) != untouched:
                    changed = sorted(dict(set(state.items()) ^ set(untouched.items())))
                    faults.append(f"files outside changed: {changed[:3]}")
                    untouched = state
                yield surface, seed, case, outcome, faults
                shutil.rmtree(folder, ignore_errors=True)
            time.sleep(0.005)

    def _outside_state(self) -> dict[str, tuple[int, int]]:
        paths = [path for folder in (self.base, self.outside) for path in folder.rglob("*")]
        stats = {str(path): path.stat() for path in paths}
        return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


def load_libraries() -> None:
    """Import what the commands import, so that a fork need not; nothing here starts a thread."""
    import importlib

    for name in LIBRARIES:
        importlib.import_module(name)
    package = Path(__file__).resolve().parents[2] / "kmine"
    for path in sorted(package.rglob("*.py")):
        name = ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__")
        if not name.endswith("ray_backend"):
            importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    gc.freeze()  # a collection in a fork does not copy the memory of all libraries


def _start(words: Sequence[str], folder: Path) -> int:
    """Fork and run `kmine WORDS` in `folder`; returns the process id, which is that of its process group too."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.setsid()
        os.chdir(folder)
        out = os.open("output.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        code = _call(words)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _call(words: Sequence[str]) -> int:
    import traceback

    from kmine.__main__ import main as kmine

    try:
        return kmine(words)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1


def main() -> int:
    """Run the cases of the command line; exit code 1 if any has a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--undamaged", type=int, default=0, help="cases without damage, before the others")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--surface", choices=sorted(SURFACES))
    parser.add_argument("--keep", type=Path, help="copy output of faulty cases to this folder")
    given = parser.parse_args()
    names = [given.surface] if given.surface else list(SURFACES)
    numbers = [(n, -1 - n // len(names)) for n in range(given.undamaged)]
    numbers += [(n, given.first + n // len(names)) for n in range(given.cases)]
    chosen = [(names[n % len(names)], seed) for n, seed in numbers]
    counts: Counter[str] = Counter()
    kinds: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory(prefix="kmine-fuzz-") as root:
        harness, started = Harness(Path(root)), time.monotonic()
        for number, (surface, seed, case, outcome, faults) in enumerate(harness.run(chosen, given.jobs), 1):
            counts[f"exit {outcome.code}"] += 1
            for fault in faults:
                kind = re.sub(r"\d+|/[^\s,;]+", "#", fault)[:110]
                kinds.setdefault(f"{surface}: {kind}", []).append(f"{surface} {seed}: {' '.join(case.words)} | {fault}")
            if faults and given.keep:
                name = hashlib.sha256(f"{surface}{seed}".encode()).hexdigest()[:6]
                given.keep.mkdir(parents=True, exist_ok=True)
                (given.keep / f"{surface}-{seed}-{name}.txt").write_text(f"{case}\n{faults}\n{outcome.output}")
            if number % 100 == 0:
                print(f"{number} of {len(chosen)}, {time.monotonic() - started:.0f} s, {len(kinds)} kinds of fault")
    for kind, found in sorted(kinds.items(), key=lambda entry: -len(entry[1])):
        print(f"{len(found):>5}  {kind}\n       {found[0][:600]}")
    print(f"{len(chosen)} cases, {dict(counts)}, {sum(map(len, kinds.values()))} faults of {len(kinds)} kinds")
    return bool(kinds)


if __name__ == "__main__":
    sys.exit(main())

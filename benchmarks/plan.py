"""`kmine plan` against what the run takes: time by stage and peak memory, side by side.

    python benchmarks/plan.py OUT [--case phantom kvasir lits own] [--minutes 5] [--data ../shared/data] [SETTINGS]

Plans each case (`kmine plan --out FILE.yaml`), runs it (`kmine loop --config FILE.yaml`), and prints the estimate, what
was measured and their ratio; the goal is a ratio of at most 1.5 either way. Memory is the resident memory of the whole
process tree, sampled four times a second. `own` is 40 pictures of Kvasir-SEG, masks for 12 of them. SETTINGS are those
of `kmine loop`. For an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

LIMIT = 1.5
RECORD = """
import json, sys
from pathlib import Path
from kmine import cli
from kmine.config import LoopConfig
from kmine.plan.__main__ import show_plan

cfg = cli.parse(LoopConfig, sys.argv[2:], prog="kmine plan", description="")
Path(sys.argv[1]).write_text(json.dumps(show_plan(cfg, frozenset(cli.GIVEN)).record()))
"""
PAGE = os.sysconf("SC_PAGE_SIZE")


def tree_memory(root: int) -> int:
    """Resident bytes of a process and all below it."""
    parents, resident = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(folder.name)], resident[int(folder.name)] = int(fields[1]), int(fields[21]) * PAGE
    members = {root}
    while more := {pid for pid, parent in parents.items() if parent in members} - members:
        members |= more
    return sum(resident.get(pid, 0) for pid in members)


def timed(words: list[str], log: Path) -> tuple[float, float, float]:
    """Seconds, peak GB and CPU seconds of a command; its output goes to `log`."""
    began, peak, before = time.perf_counter(), 0, resource.getrusage(resource.RUSAGE_CHILDREN)
    with log.open("w") as file:
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT)
        while process.poll() is None:
            peak = max(peak, tree_memory(process.pid))
            time.sleep(0.25)
    if process.returncode:
        sys.exit(f"{' '.join(words)} failed:\n{log.read_text()[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - began, peak / 2**30, used


def own_pictures(data: Path, out: Path) -> list[str]:
    """40 pictures, 12 masks."""
    source = data / "kvasir_seg" / "Kvasir-SEG"
    for number, path in enumerate(sorted((source / "images").iterdir())[::7][:40]):
        for name in ("images", "masks")[: 1 + (number < 12)]:
            (out / name).mkdir(parents=True, exist_ok=True)
            shutil.copy(source / name / path.name, out / name / path.name)
    return ["--data.name", "folder", "--data.images", str(out / "images"), "--data.masks", str(out / "masks")]


def flags(case: str, data: Path, out: Path) -> list[str]:
    """Data settings of a case."""
    if case == "own":
        return own_pictures(data, out / "own_data")
    return {
        "phantom": ["--config", "phantom"],
        "kvasir": ["--data.name=kvasir_seg", f"--data.root={data / 'kvasir_seg'}", "--data.label_fraction=0.1"],
        "lits": ["--config", "lits", "--data.root", str(data / "lits"), "--plan", "true"],
    }[case]


def stages(run: Path) -> dict[str, float]:
    """Seconds that the run folder records, by the estimate's names."""
    info = json.loads((run / "run.json").read_text())
    found = {"adaptation and calibration": info.get("preparation_seconds", 0.0)}
    for path in sorted(run.glob("**/metrics.json")):
        seconds = json.loads(path.read_text()).get("seconds", {})
        arm = path.parent.relative_to(run).as_posix()
        name = "round 0" if arm == "round_00" else "baseline" if "/" in arm else "rounds"
        for stage, took in seconds.items():
            key = name if stage in ("fit", "evaluate") else "mining"
            found[key] = found.get(key, 0.0) + took
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--case", nargs="+", default=["phantom", "kvasir", "lits", "own"])
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    args, more = parser.parse_known_args()
    os.environ["KMINE_CACHE"] = str(args.out / "cache")
    print(f"{'case':<10}{'':<12}{'plan':>8}{'run':>8}{'ratio':>7}")
    worst = 1.0
    for case in args.case:
        yaml, run = args.out / f"{case}.yaml", args.out / f"run_{case}"
        args.out.mkdir(parents=True, exist_ok=True)
        words = [*flags(case, args.data, args.out), "--plan_minutes", str(args.minutes), *more]
        record = args.out / f"{case}.json"
        planner = [sys.executable, "-c", RECORD, str(record), *words, "--out", str(yaml)]
        took, _, _ = timed(planner, args.out / f"{case}.plan.txt")
        command = [sys.executable, "-m", "kmine.loop", "--config", str(yaml), "--out", str(run)]
        estimate = json.loads(record.read_text())["estimate"]
        seconds, peak, used = timed(command, args.out / f"{case}.loop.txt")
        expected = sum(estimate["seconds"].values())
        print(f"{case:<10}{'planned in':<12}{took:>6.0f} s")
        for name, unit, a, b in (("time", "s", expected, seconds), ("memory", "GB", estimate["peak_gb"], peak)):
            worst = max(worst, a / b, b / a)
            print(f"{case:<10}{name:<12}{a:>8.1f}{b:>8.1f}{a / b:>7.2f}  {unit}")
        print(f"  CPU seconds of the run: {used:.0f} (beside other work, with one thread, the better measure)")
        print("  expected:", ", ".join(f"{stage} {value:.0f}" for stage, value in estimate["seconds"].items()))
        print("  measured:", ", ".join(f"{stage} {value:.0f}" for stage, value in stages(run).items()))
    print(f"worst ratio {worst:.2f}, goal {LIMIT}")


if __name__ == "__main__":
    main()

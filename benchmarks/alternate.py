"""A benchmark here and in another clone of this repository, in turn: medians, their ratio, and whether results agree.

Scripts that import this take `--before CLONE`; with `--json` they print one line: seconds of the clock and of the
processor by name, and a digest of what was computed.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

Spent = dict[str, list[float]]
"""Seconds of the clock, and of the processor (all threads, user and system), by the name of a part."""
HERE = Path(__file__).resolve().parents[1]


def print_json(spent: Spent, digest: str) -> None:
    """The line that `alternate` reads."""
    print(json.dumps({"spent": spent, "digest": digest}))


def alternate(words: list[str], before: Path, repeats: int) -> None:
    """Run this process's script with `words` on the kmine of this clone and of `before`, `repeats` times in turn."""
    results: dict[str, list[dict]] = {"now": [], "before": []}
    for _ in range(repeats):
        for name, root in (("now", HERE), ("before", before.resolve())):
            command = [sys.executable, sys.argv[0], *words, "--json"]
            done = subprocess.run(
                command, env=os.environ | {"PYTHONPATH": str(root)}, check=True, capture_output=True, text=True
            )
            results[name].append(json.loads(done.stdout.splitlines()[-1]))
    load = (
        f"load {os.getloadavg()[0]:.1f}, {repeats} times in turn, OMP_NUM_THREADS {os.environ.get('OMP_NUM_THREADS')}"
    )
    print(f"{load}\n{'':24} {'clock, s':>18} {'ratio':>7} {'processor, s':>18} {'ratio':>7}")
    for part in results["now"][0]["spent"]:
        now, past = ([statistics.median(r["spent"][part][k] for r in results[n]) for k in (0, 1)] for n in results)
        columns = (f"{b:8.2f} -> {a:6.2f} {b / a:7.2f}" for a, b in zip(now, past, strict=True))
        print(f"{part:24} {'  '.join(columns)}")
    digests = {result["digest"] for of_clone in results.values() for result in of_clone}
    print("results are the same" if len(digests) == 1 else "RESULTS DIFFER")

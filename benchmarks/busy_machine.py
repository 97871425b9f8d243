"""Training beside other busy processes: what waiting OpenMP threads cost, by the policy of waiting.

    python benchmarks/busy_machine.py [--steps 120] [--repeats 2]

The same short training of the phantom (whole command) on an idle machine and beside as many busy processes as there are
cores (`--busy`: other numbers), each with OpenMP that spins without end ("as it comes": OMP_WAIT_POLICY=ACTIVE), with
shorter spinning (GOMP_SPINCOUNT), with OMP_WAIT_POLICY=PASSIVE, with one thread, and with what kmine sets. Seconds.
The machine must be idle otherwise.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

POLICIES = {
    "as it comes": {"OMP_WAIT_POLICY": "ACTIVE"},
    "spin 300000": {"GOMP_SPINCOUNT": "300000"},  # libgomp's own
    "spin 30000": {"GOMP_SPINCOUNT": "30000"},
    "spin 10000": {"GOMP_SPINCOUNT": "10000"},
    "spin 3000": {"GOMP_SPINCOUNT": "3000"},
    "spin 1000": {"GOMP_SPINCOUNT": "1000"},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
    "kmine's own": {},  # as spin 10000
}
TRAINING = "--data.num_samples=60 --rounds=0 --baseline=false --segmenter.name=ellipse --device=cpu"


def seconds(policy: dict[str, str], steps: int, num_busy: int) -> float:
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")
    environment = {name: value for name, value in os.environ.items() if name not in names} | policy
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "kmine.loop", *TRAINING.split(), f"--fit.steps={steps}"]
        words += [f"--out={folder}/run", f"--data.cache_dir={folder}/cache"]
        busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(num_busy)]
        time.sleep(1.0)
        try:
            started = time.monotonic()
            with Path(folder, "log").open("w") as log:
                subprocess.run(words, env=environment, check=True, stdout=log, stderr=log)
            return time.monotonic() - started
        finally:
            for process in busy:
                process.kill()
                process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--policies", nargs="+", choices=sorted(POLICIES), default=list(POLICIES))
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--busy", nargs="+", type=int, default=[0, cores], help="busy processes beside it, by column")
    given = parser.parse_args()
    load, busy = os.getloadavg()[0], ", ".join(map(str, given.busy))
    print(
        f"{cores} cores, load {load:.1f}; seconds, least of {given.repeats}, beside {busy} busy processes", flush=True
    )
    for name in given.policies:
        columns = [min(seconds(POLICIES[name], given.steps, busy) for _ in range(given.repeats)) for busy in given.busy]
        print(f"| {name} | {' | '.join(f'{column:.1f}' for column in columns)} |", flush=True)


if __name__ == "__main__":
    main()

"""`kmine check` and a two-round loop on every data set, as its users have it; a row each.

    python experiments/data_sets/run.py OUT --data DATA [--only kvasir_seg folder ...]

DATA holds kvasir_seg/, lits/ and covid_qu_ex/ (with genuine_samples/) in their published layouts. Few steps at 96 px
from scratch: this shows that everything runs and what the doctor says, not how good anything is. Rows that are in
OUT/results.csv are not repeated.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

QUICK = {
    "rounds": 2, "baseline": "false", "data.size": 96, "fit.steps": 150, "fit.round_steps": 60, "fit.val_every": 50,
    "adapt.fold_steps": 60, "adapt.steps": 60, "model.encoder_weights": "null",
}  # fmt: skip
NUM_FOLDER, NUM_MASKED = 80, 20
COLUMNS = (
    "set", "samples", "check_exit_code", "check_seconds", "findings", "loop_exit_code", "loop_seconds", "labeled",
    "unlabeled", "val", "pseudo_round_1", "pseudo_round_2", "dice_round_0", "dice_round_2", "stopped_by", "segmenter",
)  # fmt: skip


def settings_of(name: str, data: Path, out: Path) -> list[str]:
    """Flags of a set; makes what is needed below `out`."""
    config = {"phantom": "phantom", "covid": "covid_qu_ex"}.get(name.partition(" ")[0], name.partition(" ")[0])
    flags = ["--config", str(Path(__file__).parents[2] / "configs" / f"{config}.yaml")]
    match name:
        case "kvasir_seg":
            return [*flags, "--data.root", str(data / "kvasir_seg"), "--data.label_fraction", "0.15"]
        case "lits":
            return [*flags, "--data.root", str(data / "lits"), "--data.task", "liver", "--data.every_nth", "3"]
        case "covid lung" | "covid infection":
            task = name.split()[1]
            return [
                *flags,
                "--data.root",
                str(data / "covid_qu_ex"),
                "--data.task",
                task,
                "--data.label_fraction",
                "0.3",
            ]
        case "covid genuine samples":
            table = _own_split(data / "covid_qu_ex" / "genuine_samples", out / "genuine_split.csv")
            root = ["--data.root", str(data / "covid_qu_ex" / "genuine_samples"), "--data.split_file", str(table)]
            return [*flags, *root, "--data.task", "lung", "--data.label_fraction", "0.5", "--fit.batch_size", "2"]
        case "folder":
            images, masks = _folder(data / "kvasir_seg" / "Kvasir-SEG", out / "folder")
            return [*flags, "--data.images", str(images), "--data.masks", str(masks)]
    return [*flags, "--data.kind", name.split()[1], "--data.num_samples", "120"]


SETS = (
    "kvasir_seg", "lits", "covid lung", "covid infection", "covid genuine samples", "folder", "phantom polyp",
    "phantom ct", "phantom xray",
)  # fmt: skip


def _folder(kvasir: Path, folder: Path) -> tuple[Path, Path]:
    """80 images, masks for 20 of them, none for the others: a newcomer's folder, as links."""
    images, masks = folder / "images", folder / "masks"
    shutil.rmtree(folder, ignore_errors=True)
    for sub in (images, masks):
        sub.mkdir(parents=True)
    for n, path in enumerate(sorted((kvasir / "images").glob("*.jpg"))[:NUM_FOLDER]):
        (images / path.name).symlink_to(path)
        if n % (NUM_FOLDER // NUM_MASKED) == 0:
            (masks / path.name).symlink_to(kvasir / "masks" / path.name)
    return images, masks


def _own_split(root: Path, table: Path) -> Path:
    """A split for files that all come from the official test part: 8 to train on, 2 for validation, 2 for test."""
    from kmine.config import DataConfig
    from kmine.data import open_source

    ids = sorted(
        ref.sample_id for ref in open_source(DataConfig(name="covid_qu_ex", root=str(root), task="lung")).refs()
    )
    sides = ["train"] * (len(ids) - 4) + ["val"] * 2 + ["test"] * 2
    table.parent.mkdir(parents=True, exist_ok=True)
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([("sample_id", "split"), *zip(ids, sides, strict=True)])
    return table


def row_of(name: str, data: Path, out: Path) -> dict[str, object]:
    """Check, then loop; what both said."""
    folder = out / name.replace(" ", "_")
    shutil.rmtree(folder, ignore_errors=True)
    flags = settings_of(name, data, out)
    code, seconds = _run("check", [*flags, "--out", str(folder / "check")], out / f"{folder.name}_check.log")
    row: dict[str, object] = {"set": name, "check_exit_code": code, "check_seconds": round(seconds)}
    found = folder / "check" / "check.json"
    if found.exists():
        report = json.loads(found.read_text())
        codes = [f"{finding['severity']}:{finding['code']}" for finding in report["findings"]]
        row |= {"samples": report["num_samples"], "findings": " ".join(codes) or "none"}
    quick = [word for key, value in QUICK.items() for word in (f"--{key}", str(value))]
    run = folder / "run"
    code, seconds = _run("loop", [*flags, *quick, "--out", str(run)], out / f"{folder.name}_loop.log")
    row |= {"loop_exit_code": code, "loop_seconds": round(seconds)}
    if code == 0:
        about = json.loads((run / "run.json").read_text())
        with (run / "results.csv").open(newline="") as file:
            rounds = list(csv.DictReader(file))
        row |= {k: about["splits"][k] for k in ("labeled", "unlabeled", "val")}
        row |= {f"pseudo_round_{r['round']}": r["num_pseudo"] for r in rounds[1:]}
        row |= {
            f"dice_round_{r['round']}": f"{float(r['dice'] or 'nan'):.3f}" for r in rounds if r["round"] in ("0", "2")
        }
        row |= {"stopped_by": about["stopped_by"], "segmenter": about["segmenter"]}
    return row


def _run(command: str, flags: Sequence[str], log: Path) -> tuple[int, float]:
    began = time.perf_counter()
    with log.open("w") as file:
        code = subprocess.run([sys.executable, "-m", f"kmine.{command}", *flags], stdout=file, stderr=file).returncode
    return code, time.perf_counter() - began


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--data", type=Path, default=os.environ.get("KMINE_TEST_DATA"), required="KMINE_TEST_DATA" not in os.environ
    )
    parser.add_argument("--only", nargs="+", choices=SETS, default=SETS)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    table = args.out / "results.csv"
    done = list(csv.DictReader(table.open(newline=""))) if table.exists() else []
    for name in args.only:
        if name in {row["set"] for row in done}:
            continue
        done.append({k: str(v) for k, v in row_of(name, args.data.resolve(), args.out.resolve()).items()})
        with table.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(done)
        print("  ".join(f"{k}={v}" for k, v in done[-1].items()), flush=True)


if __name__ == "__main__":
    main()

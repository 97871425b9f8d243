"""The audit of many masks: seconds and memory for a made-up run folder of 10,000 pseudo masks.

    python benchmarks/audit.py [--masks 10000] [--size 96] [--labeled]
    python benchmarks/audit.py --reports 100000       # only what the reports on so many masks hold in memory

The images are bright ellipses in noise, decoded into a cache beforehand; the models are a small U-Net++ as it is
initialised, five of them: three of parts, two of rounds. Masks are other random ellipses, scores random numbers. Timed
is `kmine.audit` in a process of its own, page and pictures included where the page is there.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from kmine import cli
from kmine.audit.label_issues import ConfidentDisagreement
from kmine.audit.ranking import SHAPE_FEATURES, WEIGHTS
from kmine.audit.reports import MaskReport, MaskReports
from kmine.config import (
    DataConfig,
    LoopConfig,
    ModelConfig,
    SegmenterConfig,
)
from kmine.io.files import write_atomic
from kmine.models.build import build_model
from kmine.ops.masks import to_rle
from kmine.setup.open import open_cache, open_splits
from kmine.setup.preflight import preflight
from kmine.store.run_folder import RunFolder
from kmine.store.table_files import encode_table
from kmine.store.tables import DecisionRow, MaskRow, PromptRow
from kmine.types import Evidence

SIGNATURE = "benchmark"
GIVEN = 40
"""Images with masks: three in four labeled, the others for validation."""


def draw(rng: np.random.Generator, size: int) -> NDArray[np.uint8]:
    """(size, size) of one ellipse."""
    mask = np.zeros((size, size), np.uint8)
    centre, axes = rng.integers(size // 4, 3 * size // 4, 2), rng.integers(size // 12, size // 4, 2)
    cv2.ellipse(mask, tuple(map(int, centre)), tuple(map(int, axes)), float(rng.uniform(0, 180)), 0, 360, 1, -1)
    return mask


def write_png(path: Path, pixels: NDArray[np.uint8]) -> None:
    """As it is."""
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(cv2.imencode(".png", pixels)[1].tobytes())


def make_run(folder: Path, masks: int, size: int) -> None:
    """A finished run of one round in which every unlabeled image teaches."""
    cfg = LoopConfig(
        rounds=1,
        out=str(folder),
        data=DataConfig(
            name="folder", images=str(folder.parent / "images"), masks=str(folder.parent / "masks"), size=size,
            label_fraction=0.75, val_fraction=0.25, test_fraction=0, cache_dir=str(folder.parent / "cache"),
            duplicate_distance=-1, on_fault="say",
        ),
        model=ModelConfig(encoder="tu-mobilenetv3_small_050", encoder_depth=3, decoder_channels=8),
        segmenter=SegmenterConfig("ellipse"),
    )  # fmt: skip
    rng = np.random.default_rng(0)
    for number in range(masks + GIVEN):
        mask = draw(rng, size)
        noise = rng.integers(0, 100, (size, size, 3)) + 100 * mask[:, :, None]
        write_png(folder.parent / "images" / f"{number:06}.png", noise.astype(np.uint8))
        if number < GIVEN:
            write_png(folder.parent / "masks" / f"{number:06}.png", mask * 255)
    source, store = preflight(cfg), RunFolder(folder)
    store.claim(cli.to_dict(cfg), source.fingerprint())
    splits = open_splits(cfg, open_cache(cfg, source), store)
    store.update_run(stopped_by="rounds", adopted_round=1, segmenter="ellipse", segmenter_sha256="none")
    model = build_model(cfg.model, 2, 0)
    for arm, number in (("fold_0", 0), ("fold_1", 0), ("fold_2", 0), ("", 0), ("", 1)):
        store.save_tensors(store.round_dir(number, arm) / "model.safetensors", model.state_dict(), SIGNATURE)
    tables: dict[str, list[dict[str, object]]] = {"prompts": [], "decisions": []}
    masks: list[MaskRow] = []
    for sample_id in splits.unlabeled:
        mask = draw(rng, size)
        masks.append(MaskRow.from_mask(sample_id, mask))
        key = {"sample_id": sample_id, "object_idx": 0, "class_id": 1}
        rle = to_rle(mask.astype(bool))
        scores = {name: float(rng.uniform()) for name in (*vars(Evidence()), "estimated_dice")}
        verdict = {"kept": True, "reason": "kept", "source": "both", "in_training": True}
        frame = {"height": size, "width": size, "local_rle": rle, "segmenter_rle": rle}
        tables["decisions"].append(key | verdict | scores | frame)
        tables["prompts"].append(
            key | {"box": [1.0, 2.0, 3.0, 4.0], "point_coords": [[2.0, 3.0]], "point_labels": [1],
                   "has_mask_input": True, "jittered_boxes": [[1.0, 2.0, 3.0, 4.0]] * 4}
        )  # fmt: skip
    for (name, rows), row_type in zip(tables.items(), (PromptRow, DecisionRow), strict=True):
        rows = [row_type.from_arrow(row) for row in rows]
        write_atomic(store.round_dir(1) / f"{name}.parquet", encode_table(rows, row_type, SIGNATURE))
    write_atomic(store.round_dir(1) / "pseudo_masks" / "00000.parquet", encode_table(masks, MaskRow, SIGNATURE))
    store.save_json(store.round_dir(1) / "metrics.json", {"adopted": True}, SIGNATURE)
    store.close()


def reports(number: int) -> Iterator[MaskReport]:
    """With random figures and run lengths of 85 characters."""
    rng = np.random.default_rng(0)
    for n in range(number):
        values = rng.random(18).tolist()
        conflict, shape = ConfidentDisagreement(*values[:4]), tuple(values[4:10])
        signals = dict(zip(WEIGHTS, (*values[2:4], *values[10:15], values[15]), strict=True))
        yield MaskReport(f"sample {n:07}", "pseudo", f"{n:016x}", 32, 32, shape, (1,), values[16], values[17], signals,
                         conflict, ("fold_0", "fold_1"), False, {1: f"{n:085}"})  # fmt: skip


def measure_reports(number: int) -> None:
    """Print the bytes a mask that are held after the ranking, and at its peak."""
    tracemalloc.start()
    held = MaskReports(reports(number)).ranked(np.zeros((10, len(SHAPE_FEATURES))))
    now, peak = (value / len(held) for value in tracemalloc.get_traced_memory())
    sys.stdout.write(f"{number} reports: {now:.0f} bytes a mask, {peak:.0f} at the peak\n")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--masks", type=int, default=10_000)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--labeled", action="store_true", help="look at the given masks, too")
    parser.add_argument("--reports", type=int, help="measure the memory of so many reports instead")
    args = parser.parse_args()
    if args.reports:
        return measure_reports(args.reports)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        make_run(run, args.masks, args.size)
        words = [sys.executable, "-m", "kmine.audit", str(run), "--device", "cpu", "--export", "coco"]
        began = time.perf_counter()
        subprocess.run([*words, *([] if args.labeled else ["--no-labeled"])], check=True)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = used.ru_utime + used.ru_stime
        wall, peak = time.perf_counter() - began, used.ru_maxrss / 1024
        sys.stdout.write(
            f"{args.masks} masks of {args.size} px: {wall:.0f} s, {cpu:.0f} s of CPU, peak {peak:.0f} MB\n"
        )
        wrote = sum(path.stat().st_size for path in (run / "audit").rglob("*") if path.is_file())
        sys.stdout.write(f"written: {wrote / 2**20:.0f} MB in {run.name}/audit\n")
    return None


if __name__ == "__main__":
    main()

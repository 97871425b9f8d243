"""A run folder as the loop leaves it, with untrained weights: enough for whoever only opens one."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save_file

from kmine import cli
from kmine.config import (
    DataConfig,
    InferConfig,
    LoopConfig,
    ModelConfig,
)
from kmine.models.build import build_model
from kmine.ops.calibrator import FEATURES, Calibrator
from kmine.predict.metadata import ModelMetadata

UNET = ModelConfig(name="unet", encoder="tu-resnet10t", encoder_depth=3, decoder_channels=8)
NAMES = ("background", "polyp")


def surely(share: float = 1.0) -> dict[str, Any]:
    """A calibrator by which the estimated Dice is `share` of the mean probability inside of an object."""
    weights = tuple(float(name == "confidence_inside") for name in FEATURES)
    made = Calibrator((0.0,) * len(weights), weights, weights, 0.0, ((0.0, 0.0), (1.0, share)))
    return json.loads(json.dumps(made.to_json()))


ALONE: dict[str, Any] = {
    "num_parts": 3,
    "labeled_area": {"1": 0.1},
    "prompts": {"box": True, "points": False, "min_area_px": 5, "min_area_fraction": 0.0, "box_margin": 0.05},
    "by_tta": {
        tta: {
            "calibrator": surely(share),
            "num_objects": 41,
            "rank_correlation": 0.625,
            "mean": {"estimate": 0.7, "dice": 0.75},
            "reliability": [[0.7, 0.75, 41]],
        }
        for tta, share in (("none", 1.0), ("hflip", 0.5))
    },
}
"""What calibration.json has under `alone`."""
ABOUT = ModelMetadata(
    name="m",
    dataset="d",
    class_names=("background", "a"),
    size=4,
    window=None,
    batch_size=3,
    method="mining",
    segmenter="ellipse",
    round_idx=0,
    checkpoint="best",
    signature="s",
    intensity=None,
)
"""Metadata of a model of two classes with an input of 4 x 4."""


def calibrated(run: Path, alone: dict[str, Any] | None = ALONE) -> Path:
    """Give a run folder what estimates the Dice of its masks."""
    (run / "calibration").mkdir()
    told = {"num_objects": 41, "promise": None, "alone": alone}
    (run / "calibration" / "calibration.json").write_text(json.dumps(told))
    return run


def case(sample_id: str, dice: float) -> dict[str, Any]:
    """A row of metrics.json."""
    return {"sample_id": sample_id, "dice": dice, "iou": dice / 2, "hd95": 3.0, "num_missed": 0, "counts": []}


def make_run(
    root: Path,
    *,
    model: ModelConfig = UNET,
    class_names: tuple[str, ...] = NAMES,
    data: DataConfig | None = None,
    seeds: tuple[int, ...] = (0, 1),
    with_weights: bool = True,
    **run: Any,
) -> Path:
    """A run of which round n has the random weights of seeds[n]; the last is adopted unless `run` says otherwise."""
    data = data or DataConfig(name="folder", images="IMAGES", class_names=class_names, size=32)
    cfg = LoopConfig(rounds=len(seeds) - 1, model=model, data=data, infer=InferConfig(batch_size=3))
    root.mkdir(parents=True)
    (root / "config.yaml").write_text(yaml.safe_dump(cli.to_dict(cfg)))
    arm = run.get("arm", "")
    for number, seed in enumerate(seeds):
        folder = root / (arm if number else "") / f"round_{number:02d}"
        folder.mkdir(parents=True)
        for name, drawn in (("model", seed), ("model_final", seed + 100)):
            path = folder / f"{name}.safetensors"
            tensors = build_model(model, len(class_names), drawn).state_dict() if with_weights else {}
            save_file({k: v.contiguous() for k, v in tensors.items()}, path)
        metrics = {"cases": [case("a", 0.4), case("b", 0.6), case("c", 0.8)]}
        (folder / "metrics.json").write_text(json.dumps({"metrics": metrics, "final_metrics": metrics}))
    told = {
        "class_names": list(class_names),
        "dataset": "made up",
        "segmenter": "ellipse",
        "stopped_by": "rounds",
        "adopted_round": len(seeds) - 1,
        "data_fingerprint": "f" * 64,
        "versions": {"torch": "2"},
        **run,
    }
    (root / "run.json").write_text(json.dumps(told))
    with (root / "splits.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [("sample_id", "group_id", "split"), ("a", "p1", "val"), ("b", "p2", "val"), ("c", "p2", "val")]
        )
    return root

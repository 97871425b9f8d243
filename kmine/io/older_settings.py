"""Settings that are younger than a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

BEFORE: dict[str, Any] = {
    **{"data.resize": "squash", "data.mask_resize": "nearest", "data.patch": None},
    **{"data.folds": None, "data.fold": None},
    **{"model.decoder_width": 8, "model.decoder": "unet", "model.fine_init": "weights", "model.veto": False},
    **{"fit.dice": "batch", "fit.encoder_lr": 1.0, "fit.decay_norms": True, "fit.clip_grad": 0.0},
    **{"fit.flips": "both", "fit.rotation": 30.0, "fit.scale": [0.8, 1.25], "fit.checkpoint": "best"},
    **{"fit.clean_share": 0.0, "fit.supersample": 1, "classifier.patience": 0, "baseline_models": []},
    **{"retrain": False, "unimatch.weight": 1.0, "unimatch.threshold": 0.95, "unimatch.cutmix": 0.5},
    **{"unimatch.feature_perturbation": 0.5, "unimatch.decay": 0.99},
    **{"model.encoder_sha256": None, "model.force_normalization": False},
    **{"prompts.box_scales": [1.0], "prompts.doubtful": None, "prompts.file": None},
    "prompts.max_objects": 10**9,
    **{"log": [], "backend": "local"},
    **{"data.channels": None, "adapt.fold_steps": 300, "gate.keep": 0.5, "refine.doubt": 0.5, "crossfit": 1},
}
"""Settings that older runs lack, and the values in effect then. They are filled in when settings of a run are read, and
are not signed, so that what an older run has finished stays valid."""
_LIMITS = ("min_predicted_iou", "min_stability", "min_agreement", "min_jitter_dice", "min_confidence")
_LIMITS += ("max_confidence_outside", "max_tta_std", "max_area_ratio")
REMOVED = dict.fromkeys((f"gate.{name}" for name in _LIMITS), "the gate keeps a share of the objects, gate.keep")
"""Settings that only older runs have, and what there is instead."""
WITHDRAWN = {"gate.mode": "thresholds"}
"""Values that only older runs have; these can be read, but not continued."""


def older_settings(path: Path) -> dict[str, Any]:
    """`BEFORE` for the config.yaml of a run or of a sweep; nothing for other settings files."""
    folder = path.parent
    is_record = path.name == "config.yaml" and any((folder / name).is_file() for name in ("run.json", "sweep.json"))
    return BEFORE if is_record else {}

"""Settings that are chosen by the data set, filled in before anything is signed or saved."""

from __future__ import annotations

from dataclasses import replace

from kmine.config import LoopConfig
from kmine.data.augment import DEFAULT_SYMMETRY, symmetry_of
from kmine.data.source import Source

TTA_OF_FLIPS = {"none": "none", "horizontal": "hflip", "both": "flips"}
"""`infer.tta` that mirrors images as training does."""


def resolve_settings(cfg: LoopConfig, source: Source) -> LoopConfig:
    """`cfg` with the values of `source` in place of auto and of absent ones; without any it is unchanged.

    A source without a `symmetry` has that of a user's own files.
    """
    symmetry = symmetry_of(cfg.fit, getattr(source, "symmetry", DEFAULT_SYMMETRY))
    tta = TTA_OF_FLIPS[symmetry.flips] if cfg.infer.tta == "auto" else cfg.infer.tta
    return replace(cfg, fit=replace(cfg.fit, **symmetry._asdict()), infer=replace(cfg.infer, tta=tta))

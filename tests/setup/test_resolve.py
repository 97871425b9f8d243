"""Settings chosen by the data set."""

from __future__ import annotations

import pytest

from kmine.config import DataConfig, FitConfig, InferConfig, LoopConfig
from kmine.data import open_source
from kmine.setup.resolve import resolve_settings


@pytest.mark.parametrize(
    ("kind", "flips", "tta", "rotation"),
    [("polyp", "horizontal", "hflip", 180.0), ("ct", "horizontal", "hflip", 15.0), ("xray", "none", "none", 10.0)],
)
def test_flips_and_rotations_are_those_of_the_modality(kind, flips, tta, rotation):
    cfg = LoopConfig(data=DataConfig(kind=kind))
    resolved = resolve_settings(cfg, open_source(cfg.data))
    assert (resolved.fit.flips, resolved.infer.tta, resolved.fit.rotation) == (flips, tta, rotation)
    assert resolved.fit.scale is not None
    assert resolve_settings(resolved, object()) == resolved, "what is resolved stays"


def test_given_values_win_and_a_source_without_geometry_has_that_of_own_files():
    cfg = LoopConfig(fit=FitConfig(flips="both"), infer=InferConfig(tta="none"))
    resolved = resolve_settings(cfg, object())
    assert (resolved.fit.flips, resolved.infer.tta) == ("both", "none")
    assert (resolved.fit.rotation, resolved.fit.scale) == (30.0, (0.8, 1.25))
    assert resolve_settings(LoopConfig(), object()).fit.flips == "horizontal"

"""Settings as a whole: frozen, valid by default, documented field by field."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, is_dataclass

import pytest
from helpers.settings import assert_refused
from helpers.sources import documented

from kmine import config
from kmine.config import (
    LoopConfig,
)

CLASSES = [kind for kind in vars(config).values() if is_dataclass(kind)]
OUT_OF_RANGE = [
    (LoopConfig, "rounds", -1),
    (LoopConfig, "seed", -1),
    (LoopConfig, "seed", 2**31),
    (LoopConfig, "adopt_tolerance", -0.1),
]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_defaults_are_valid_and_frozen(kind):
    built = kind()
    with pytest.raises(FrozenInstanceError):
        setattr(built, fields(kind)[0].name, 0)


@pytest.mark.parametrize("kind", [k for k in CLASSES if k is not LoopConfig], ids=lambda kind: kind.__name__)
def test_every_field_is_documented(kind):
    assert {f.name for f in fields(kind)} == set(documented(kind.__name__))


def test_every_plain_field_of_the_whole_is_documented():
    sections = {f.name for f in fields(LoopConfig) if isinstance(getattr(LoopConfig(), f.name), tuple(CLASSES))}
    assert {f.name for f in fields(LoopConfig)} - sections == set(documented("LoopConfig"))


@pytest.mark.parametrize(("kind", "name", "value"), OUT_OF_RANGE)
def test_a_value_out_of_range_is_refused_by_name(kind, name, value):
    assert_refused(kind, name, value)

"""Checks of settings, made when a config is built."""

from __future__ import annotations

import math

from kmine.errors import UserError


def require(condition: bool, field_name: str, expected: str, actual: object) -> None:
    """Raise `UserError` with the expected and the actual value unless `condition` holds."""
    if not condition:
        raise UserError(f"{field_name}: expected {expected}, got {actual!r}")


def fraction(value: float, name: str, *, closed_low: bool = False) -> None:
    """Require a value in (0, 1], or with `closed_low` in [0, 1]."""
    ok = (0 <= value <= 1) if closed_low else (0 < value <= 1)
    require(ok, name, f"a fraction in {'[' if closed_low else '('}0, 1]", value)


def is_range(limits: tuple[float, float]) -> bool:
    """Whether a pair is finite and rising."""
    return len(limits) == 2 and all(map(math.isfinite, limits)) and limits[0] < limits[1]


def is_count(value: float) -> bool:
    """Whether a number is whole and at least 1."""
    return value >= 1 and float(value).is_integer()

"""Checks of settings, made when a config is built."""

from __future__ import annotations

import math
from functools import cache
from typing import Annotated, Any, get_args, get_type_hints

from kmine.errors import UserError
from kmine.io.errors import expanded

LocalPath = Annotated[str, "path"]
"""A file or folder; `~` is expanded when the settings are built."""


def expand_paths(config: Any) -> None:
    """Expand `~` in all fields of a frozen dataclass that are declared as `LocalPath`, alone or in a list."""
    for name in _path_fields(type(config)):
        value = getattr(config, name)
        if isinstance(value, list):
            object.__setattr__(config, name, [str(expanded(path)) if path.startswith("~") else path for path in value])
        elif value and value.startswith("~"):
            object.__setattr__(config, name, str(expanded(value)))


@cache
def _path_fields(config_class: type[Any]) -> list[str]:
    """Names of the fields with a `LocalPath` in their type."""
    hints = get_type_hints(config_class, include_extras=True)
    return [name for name, kind in hints.items() if LocalPath in (kind, *get_args(kind))]


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

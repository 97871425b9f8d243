"""Values out of range, refused by the name of their field."""

from __future__ import annotations

from typing import Any

import pytest

from kmine.config import LoopConfig
from kmine.errors import UserError


def assert_refused(kind: type, name: str, value: Any) -> None:
    """The error begins with the dotted name of the field and holds the value."""
    section = "" if kind is LoopConfig else kind.__name__.removesuffix("Config").lower() + "."
    with pytest.raises(UserError) as error:
        kind(**{name: value})
    assert str(error.value).startswith(f"{section}{name}: expected ")
    assert repr(value) in str(error.value)

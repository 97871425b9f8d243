"""Errors that a user can mend, and what is refused by design."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path


class UserError(ValueError):
    """A mistake of the user's: the message says what was expected, what came, and the cure.

    Commands print it as one line and end with exit code 2, without a traceback.
    """


class SampleError(UserError):
    """One damaged or unfit sample; `--data.on_error skip` counts and lists it instead of stopping."""

    def __init__(self, path: Path | str, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = str(path)
        self.problem = problem


def unknown_name(field_name: str, value: str, choices: Iterable[str]) -> UserError:
    """The error for a name that is not known: it suggests the nearest and lists them all."""
    names = sorted(choices)
    near = difflib.get_close_matches(value, names, n=1)
    suggestion = f"did you mean {near[0]}? " if near else ""
    return UserError(f"{field_name}: unknown name {value!r}; {suggestion}Known: {', '.join(names)}")


def first_names(names: Sequence[str], limit: int = 5, separator: str = ", ") -> str:
    """The first `limit` names, and the number of the others: `a, b and 3 more`."""
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return separator.join(names[:limit]) + rest


class WithheldMaskError(RuntimeError):
    """Access to a withheld mask: a fault of kmine itself, never a user error."""

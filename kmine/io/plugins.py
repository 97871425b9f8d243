"""Implementations by name: kmine's own, those registered in this process, and those of installed packages.

A package adds a name by an entry point, which is imported at first use:

    [project.entry-points."kmine.segmenters"]
    my_sam = "my_package.segmenter:open_my_sam"
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from typing import Generic, TypeVar

from kmine.errors import UserError, unknown_name

T = TypeVar("T")


class Registry(Generic[T]):
    """Values, such as factories, by name; kmine's own names cannot be replaced."""

    def __init__(self, setting: str, group: str, builtin: Mapping[str, T], hint: str = "") -> None:
        """A registry of `builtin` names and entry points of `group`; `setting`, as segmenter.name, opens messages.

        `hint` ends the message on an unknown name.
        """
        self._setting, self._group, self._hint = setting, group, hint
        self._builtin, self._registered = dict(builtin), dict[str, T]()

    def register(self, name: str, value: T) -> None:
        """Add a name for this process only, or replace an added one. Raises `UserError` for kmine's own or no name."""
        if not name or name in self._builtin:
            raise UserError(f"{self._setting}: expected a new name, got {name!r}, empty or kmine's own; choose another")
        self._registered[name] = value

    def is_builtin(self, name: str) -> bool:
        """Whether a name is kmine's own."""
        return name in self._builtin

    def names(self) -> list[str]:
        """All names, sorted; no package is imported."""
        return sorted({*self._builtin, *self._registered, *self._entry_points()})

    def get(self, name: str) -> T:
        """The value of a name; imports the package that adds it. Raises `UserError` if unknown or not importable."""
        for known in (self._builtin, self._registered):
            if name in known:
                return known[name]
        entry_point = self._entry_points().get(name)
        if entry_point is None:
            raise UserError(f"{unknown_name(self._setting, name, self.names())}{self._hint}")
        try:
            value: T = entry_point.load()
        except Exception as error:
            package = entry_point.dist.name if entry_point.dist else "an installed package"
            raise UserError(
                f"{self._setting}: {name!r} of {package} ({entry_point.value}) cannot be imported: "
                f"{type(error).__name__}: {' '.join(str(error).split())}; repair that package, or choose another name"
            ) from error
        return self._registered.setdefault(name, value)

    def _entry_points(self) -> dict[str, metadata.EntryPoint]:
        return {entry_point.name: entry_point for entry_point in metadata.entry_points(group=self._group)}

"""Implementations by name: kmine's own, those registered in this process, and those of installed packages.

A package adds a name by an entry point, which is imported at first use:

    [project.entry-points."kmine.segmenters"]
    my_sam = "my_package.segmenter:open_my_sam"

Such an object may also be named directly, `my_package.segmenter:open_my_sam`, if its module can be imported.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import import_module, metadata
from typing import Any, Generic, TypeVar

from kmine.errors import UserError, unknown_name

T = TypeVar("T")
_OBJECT = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", re.ASCII)
"""The name of an object in a module."""


class Registry(Generic[T]):
    """Values, such as factories, by name; kmine's own names cannot be replaced."""

    def __init__(
        self,
        setting: str,
        group: str,
        builtin: Mapping[str, T],
        hint: str = "",
        prefixes: Mapping[str, T] | None = None,
    ) -> None:
        """A registry of `builtin` names and entry points of `group`; `setting`, as segmenter.name, opens messages.

        `hint` ends the message on an unknown name; `prefixes` has the values of all names that begin so (`hf:`).
        """
        self._prefixes = dict(prefixes or {})
        self._setting, self._group, self._hint = setting, group, hint
        self._builtin, self._registered = dict(builtin), dict[str, T]()

    def register(self, name: str, value: T) -> None:
        """Add a name for this process only, or replace an added one. Raises `UserError` for kmine's own or no name."""
        if not name or name in self._builtin:
            raise UserError(f"{self._setting}: expected a new name, got {name!r}, empty or kmine's own; choose another")
        self._registered[name] = value

    def is_builtin(self, name: str) -> bool:
        """Whether a name is kmine's own."""
        return name in self._builtin or name.startswith(tuple(self._prefixes))

    def names(self) -> list[str]:
        """All names, sorted; no package is imported."""
        return sorted({*self._builtin, *self._registered, *self._entry_points()})

    def get(self, name: str) -> T:
        """The value of a name; imports the package that adds it. Raises `UserError` if unknown or not importable."""
        for known in (self._builtin, self._registered):
            if name in known:
                return known[name]
        for prefix, value in self._prefixes.items():
            if name.startswith(prefix):
                return value
        entry_point = self._entry_points().get(name)
        if entry_point is None and not _OBJECT.fullmatch(name):
            raise UserError(f"{unknown_name(self._setting, name, self.names())}{self._hint}")
        try:
            value = entry_point.load() if entry_point else _object(name)
        except Exception as error:
            place, cure = repr(name), "install that package, or put its folder on PYTHONPATH"
            if entry_point:
                package = entry_point.dist.name if entry_point.dist else "an installed package"
                place, cure = f"{name!r} of {package} ({entry_point.value})", "repair that package"
            raise UserError(
                f"{self._setting}: {place} cannot be imported: {type(error).__name__}: "
                f"{' '.join(str(error).split())}; {cure}, or choose another name"
            ) from error
        return self._registered.setdefault(name, value)

    def _entry_points(self) -> dict[str, metadata.EntryPoint]:
        return {entry_point.name: entry_point for entry_point in metadata.entry_points(group=self._group)}


def _object(name: str) -> Any:
    """The object `package.module:name`."""
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)

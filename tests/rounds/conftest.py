"""Fixtures: those of the methods."""

from methods.conftest import task_of

__all__ = ["task_of"]

"""`kmine audit`: pseudo masks and given masks of a finished run, the most suspicious first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kmine.audit.label_issues import find_label_issues
    from kmine.audit.run import audit_run

__all__ = ["audit_run", "find_label_issues"]


def __getattr__(name: str) -> Any:
    # Lazy: the command's --help needs neither OpenCV nor torch.
    if name == "audit_run":
        from kmine.audit.run import audit_run

        return audit_run
    if name == "find_label_issues":
        from kmine.audit.label_issues import find_label_issues

        return find_label_issues
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

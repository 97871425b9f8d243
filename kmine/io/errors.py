"""Errors of the file system as one line with the cure."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from kmine.errors import UserError

FULL = {
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "the disk quota is used up; free some space",
    errno.EFBIG: "the file would be larger than the limit for one file; raise it (ulimit -f)",
}
ANOTHER_FOLDER = "choose another folder (--out, --cache_dir, or KMINE_CACHE in the environment)"
RERUN = "and run the same command again, it resumes"
_REFUSED = {
    errno.EACCES: "no permission to write there",
    errno.EPERM: "no permission to write there",
    errno.EROFS: "the file system is read-only",
    errno.ENOTDIR: "a file stands where a folder is needed",
    errno.EEXIST: "a file stands where a folder is needed",
    errno.EISDIR: "a folder stands where a file is needed",
    errno.ENOTEMPTY: "a folder stands where a file is needed",
    errno.ENAMETOOLONG: "the name is too long for this file system",
}


def expanded(path: str | Path) -> Path:
    """A path of the user's with its leading `~` or `~name` expanded.

    Raises:
        UserError: there is no such home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        known = "of that name" if str(path)[1:2] not in ("", "/") else "for this user id"
        raise UserError(f"{path}: no home folder {known}; give the whole path, or set HOME") from error


@contextmanager
def user_errors(path: Path, *, cure: str = "choose another --out", otherwise: str | None = None) -> Iterator[None]:
    """Turn an `OSError` into a `UserError` on `path`; files already written are not touched.

    `cure` is for all errors but a full disk. `otherwise` is the problem reported for errors not listed here, such as
    "cannot be read"; without it they pass through.
    """
    try:
        yield
    except OSError as error:
        code = error.errno or 0
        if code in FULL:
            raise UserError(f"{path}: {FULL[code]} {RERUN}") from error
        problem = _REFUSED.get(code) or (f"{otherwise} ({error.strerror or error})" if otherwise else None)
        if problem is None:
            raise
        raise UserError(f"{path}: {problem}; {cure}") from error


def storage_errors(path: Path) -> AbstractContextManager[None]:
    """`user_errors` for files outside a run folder (downloads, archives, bundles); covers every `OSError`."""
    return user_errors(path, cure=ANOTHER_FOLDER, otherwise="cannot be read or written")

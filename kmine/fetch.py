"""`python -m kmine.fetch NAME`: downloads and unpacks data sets, or prints where to get them.

The hidden folder `.kmine-fetch` of the output folder holds an incomplete download, a lock, and for each unpacked
archive a record (JSON) of its files, their sizes and CRC-32.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from kmine import cli
from kmine.config.checks import LocalPath, expand_paths
from kmine.data import DATASETS
from kmine.errors import UserError, unknown_name
from kmine.io.archive import Contents, differences, drop_leftovers, read_contents, top_names, unpack
from kmine.io.console import say
from kmine.io.download import download, sha256_of
from kmine.io.errors import storage_errors
from kmine.io.files import lock, open_lock, read_json, write_atomic

DESCRIPTION = """Fetch a data set, check it and unpack it; a download that broke off goes on where it did, and what is
there and whole is left alone. kvasir_seg is downloaded. For lits and covid_qu_ex, which ask for an account or a
licence, it says where to get them, and unpacks what you got there (--archive)."""

STATE_DIR = ".kmine-fetch"
MAX_NAMED = 3


@dataclass(frozen=True)
class FetchConfig:
    """Settings of `python -m kmine.fetch`."""

    name: list[str]
    """The data set."""
    out: LocalPath | None = None
    """Folder to unpack into, which --data.root names afterwards; default: data/NAME."""
    archive: LocalPath | None = None
    """A zip file that you downloaded by other means; it is only unpacked, and stays where it is."""
    offline: bool = False
    """Forbid the download; a missing archive is then an error."""

    def __post_init__(self) -> None:
        expand_paths(self)


@dataclass(frozen=True)
class Published:
    """An archive with public access."""

    url: str
    sha256: str
    top: str
    """Top folder in the archive."""

    @property
    def filename(self) -> str:
        """Last part of the address."""
        return self.url.rsplit("/", 1)[-1]


# Data sets are imported at first use, not for `--help`.
def _kvasir_seg() -> Published:
    from kmine.data.datasets.kvasir_seg import URL

    return Published(URL, "03b30e21d584e04facf49397a2576738fd626815771afbbf788f74a7153478f7", "Kvasir-SEG")


def _lits() -> str:
    from kmine.data.datasets.lits_index import URL

    return (
        f"the LiTS competition ({URL}) and its mirrors ask for an account or a licence: download the training batches "
        "there; --data.root is the folder that holds volume-N.nii and segmentation-N.nii, in it or anywhere below"
    )


def _covid_qu_ex() -> str:
    from kmine.data.datasets.covid_qu_ex_index import PUBLISHED

    return (
        f"it is {PUBLISHED}, which asks for an account: download it there; --data.root is the folder that holds the "
        "Infection and Lung Segmentation Data, in it or anywhere below"
    )


DOWNLOADS: dict[str, Callable[[], Published]] = {"kvasir_seg": _kvasir_seg}
MANUAL_SOURCES: dict[str, Callable[[], str]] = {"lits": _lits, "covid_qu_ex": _covid_qu_ex}
"""Texts for data sets without public access: where to get them, and the folder for --data.root."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    prog, words = "kmine fetch", sys.argv[1:] if argv is None else argv
    cfg = cli.parse(FetchConfig, words, prog=prog, description=DESCRIPTION, positional="name")
    return cli.guarded(prog, lambda: run_fetch(cfg))


def run_fetch(cfg: FetchConfig) -> int:
    """Fetch the data set of `cfg` and print the command that uses it. Raises `UserError`."""
    if len(cfg.name) != 1:
        raise UserError(f"expected the name of one data set, got {', '.join(cfg.name)}; fetch one at a time")
    (name,) = cfg.name
    if name not in DATASETS.names():
        raise unknown_name("data set", name, DATASETS.names())
    if name not in DOWNLOADS | MANUAL_SOURCES:
        return _nothing_to_fetch(name)
    published = DOWNLOADS[name]() if name in DOWNLOADS else None
    out = Path(cfg.out or f"data/{name}")
    if cfg.archive is None and published is None:
        raise UserError(
            f"{name} cannot be fetched: {MANUAL_SOURCES[name]()}. `kmine fetch {name} --archive FILE.zip --out FOLDER` "
            f"unpacks a zip; then: {_usage(name, 'FOLDER')}"
        )
    archive = Path(cfg.archive) if cfg.archive is not None else None
    is_new = _obtain(name, published, archive, out, cfg.offline)
    result = "is now in" if is_new else "is there and whole, nothing was done:"
    say(f"{name} {result} {out}\n{_usage(name, str(out))}\n")
    return 0


def _nothing_to_fetch(name: str) -> int:
    own = {"folder": "--config folder --data.images IMAGES --data.masks MASKS"}
    own["nnunet"] = "--data.name nnunet --data.root Dataset123_NAME"
    if name in own:
        raise UserError(
            f"{name}: these are your own images, there is nothing to fetch; pass them as in `kmine check {own[name]}`"
        )
    say(f"{name}: nothing to fetch, its images are made as they are needed: kmine loop\n")
    return 0


def _usage(name: str, root: str) -> str:
    return f"kmine check --config {name} --data.root {shlex.quote(root)}"


def _obtain(name: str, published: Published | None, user_archive: Path | None, out: Path, offline: bool) -> bool:
    """Unpack the archive into `out`, downloaded unless `user_archive` is given; False if all files exist already.

    One of `published` and `user_archive` is not None.
    """
    sha256 = _check_user_archive(user_archive, published) if user_archive is not None else published.sha256  # type: ignore[union-attr]
    if _is_whole(out, sha256):
        return False
    with _locked_state_dir(out) as own:
        drop_leftovers(out)
        if user_archive is not None:
            return _unpack(user_archive, out, own / f"{sha256}.json")
        assert published is not None
        archive = own / published.filename
        _download(name, published, archive, out, offline)
        is_new = _unpack(archive, out, own / f"{sha256}.json")
        archive.unlink()
        return is_new


def _check_user_archive(archive: Path, published: Published | None) -> str:
    """SHA-256 (hex) of the user's archive. Raises `UserError` if it differs from that of the published archive."""
    if not archive.is_file():
        actual = "a folder" if archive.is_dir() else "nothing"
        raise UserError(f"--archive {archive}: expected a zip file, found {actual}; name the file as it was downloaded")
    with storage_errors(archive):
        actual = sha256_of(archive)
    if published is not None and actual != published.sha256:
        raise UserError(
            f"--archive {archive}: expected {published.filename} as published, SHA-256 {published.sha256}, got {actual}; "  # noqa: E501
            f"download it again from {published.url}; if it is packed anew on purpose, unpack it yourself and name the "
            "folder with --data.root"
        )
    return actual


def _download(name: str, published: Published, archive: Path, out: Path, offline: bool) -> None:
    """Download to `archive`, a file in the state folder, unless it is complete."""
    if archive.is_file() and sha256_of(archive) == published.sha256:
        return
    archive.unlink(missing_ok=True)
    otherwise = "fetch the file by other means and pass it with --archive FILE"
    if offline:
        raise UserError(f"{published.url}: not downloaded, --offline forbids it; {otherwise}")
    if os.path.lexists(out / published.top):
        raise UserError(
            f"{out / published.top}: expected nothing there yet, found files that kmine fetch has no record of; they "
            f"were left alone: use them as they are ({_usage(name, str(out))}), move them away, or choose another "
            "--out; with --archive FILE they are compared with that archive"
        )
    download(published.url, published.sha256, archive, otherwise=otherwise)


def _unpack(archive: Path, out: Path, record: Path) -> bool:
    """Unpack and write the record; only the record if all files exist, as after a kill between the two steps."""
    contents = read_contents(archive)
    is_new = bool(differences(contents, out))
    if is_new:
        terminal = cli.Terminal()
        terminal.start("unpacking", len(contents))
        try:
            unpack(archive, out, advance=terminal.advance)
        finally:
            terminal.stop()
    with storage_errors(record):
        write_atomic(record, json.dumps(contents).encode())
    return is_new


def _is_whole(out: Path, sha256: str) -> bool:
    """Whether all files of an archive unpacked before exist unchanged; False also if all are gone.

    `UserError` if some are missing or changed.
    """
    contents = _read_record(out / STATE_DIR / f"{sha256}.json")
    if contents is None:
        return False
    lost, tops = differences(contents, out), [out / name for name in top_names(contents)]
    if lost and any(os.path.lexists(top) for top in tops):
        raise UserError(
            f"{out}: expected {len(contents)} files as they were fetched, found {len(lost)} of them missing or changed "
            f"({', '.join(lost[:MAX_NAMED])}{', ...' if len(lost) > MAX_NAMED else ''}); the others were left alone: "
            f"to fetch all anew, move {' and '.join(map(str, tops))} away and run the same command again"
        )
    return not lost


def _read_record(path: Path) -> Contents | None:
    """The files of an archive; None if the record is missing or unreadable."""
    try:
        return {str(name): (int(size), int(crc)) for name, (size, crc) in (read_json(path) or {}).items()} or None
    except (ValueError, TypeError, OverflowError):
        return None


@contextmanager
def _locked_state_dir(out: Path) -> Iterator[Path]:
    """State folder in `out`, locked by one process; removed if empty in the end, as is an `out` created here."""
    own, was_there = out / STATE_DIR, out.exists()
    with storage_errors(own):
        own.mkdir(parents=True, exist_ok=True)
        file = open_lock(own / ".lock")
    with file:
        try:
            lock(file, wait=False)
        except BlockingIOError as error:
            problem = "another process is fetching into this folder; wait, or choose another --out"
            raise UserError(f"{out}: {problem}") from error
        try:
            yield own
        finally:
            with suppress(OSError):  # not empty
                (own / ".lock").unlink(missing_ok=True)
                own.rmdir()
                if not was_there:
                    out.rmdir()


if __name__ == "__main__":
    sys.exit(main())

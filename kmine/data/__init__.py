"""Data sets, by the name they have in the config."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from kmine.config import DataConfig
from kmine.errors import UserError, unknown_name

if TYPE_CHECKING:
    from kmine.data.source import Source

# Factories import what they need when called: `--help` needs none of it.


def _phantom(cfg: DataConfig) -> Source:
    from kmine.data.datasets.phantom.dataset import PhantomSource

    return PhantomSource(cfg.kind, cfg.num_samples, cfg.size)


def _kvasir_seg(cfg: DataConfig) -> Source:
    from kmine.data.datasets.kvasir_seg import URL, KvasirSeg

    if cfg.root is None:
        raise UserError(
            "data.root: expected the folder that holds Kvasir-SEG, got nothing; "
            f"pass --data.root FOLDER (published at {URL})"
        )
    normals = Path(cfg.normal_images) if cfg.normal_images is not None else None
    return KvasirSeg(Path(cfg.root), cfg.on_error, normals)


def _lits(cfg: DataConfig) -> Source:
    from kmine.data.datasets.lits import Lits
    from kmine.data.datasets.lits_index import URL

    if cfg.root is None:
        raise UserError(
            "data.root: expected the folder that holds the volumes of LiTS, got nothing; "
            f"pass --data.root FOLDER (published at {URL})"
        )
    return Lits(Path(cfg.root), cfg)


def _covid_qu_ex(cfg: DataConfig) -> Source:
    from kmine.data.datasets.covid_qu_ex import CovidQuEx
    from kmine.data.datasets.covid_qu_ex_index import PUBLISHED

    if cfg.root is None:
        raise UserError(
            f"data.root: expected the folder that holds COVID-QU-Ex, got nothing; pass --data.root FOLDER ({PUBLISHED})"
        )
    return CovidQuEx(Path(cfg.root), cfg)


def _folder(cfg: DataConfig) -> Source:
    from kmine.data.datasets.folder import Folder

    return Folder(cfg)


SOURCES: dict[str, Callable[[DataConfig], Source]] = {
    "phantom": _phantom,
    "kvasir_seg": _kvasir_seg,
    "lits": _lits,
    "covid_qu_ex": _covid_qu_ex,
    "folder": _folder,
}
"""A new data set is one file and one line here."""


def open_source(cfg: DataConfig) -> Source:
    """Index the data set that the config names.

    Raises:
        UserError: for a name that nobody has, and for whatever the data set finds wrong with its folder.
    """
    if cfg.name not in SOURCES:
        raise unknown_name("data.name", cfg.name, SOURCES)
    return SOURCES[cfg.name](cfg)

"""Data sets by the name they have in the config. Importing this package loads no data set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from kmine.config import DataConfig
from kmine.errors import UserError
from kmine.io.plugins import Registry

if TYPE_CHECKING:
    from kmine.data.source import Source

# The factories import lazily, so that `--help` loads no data set.


def _phantom(cfg: DataConfig) -> Source:
    from kmine.data.datasets.phantom.dataset import PhantomSource

    return PhantomSource(cfg.kind, cfg.num_samples, cfg.size)


def _kvasir_seg(cfg: DataConfig) -> Source:
    from kmine.data.datasets.kvasir_seg import URL, KvasirSeg

    normals = Path(cfg.normal_images) if cfg.normal_images is not None else None
    return KvasirSeg(_root(cfg, "that holds Kvasir-SEG", f"published at {URL}"), cfg.on_error, normals)


def _lits(cfg: DataConfig) -> Source:
    from kmine.data.datasets.lits import Lits
    from kmine.data.datasets.lits_index import URL

    return Lits(_root(cfg, "that holds the volumes of LiTS", f"published at {URL}"), cfg)


def _covid_qu_ex(cfg: DataConfig) -> Source:
    from kmine.data.datasets.covid_qu_ex import CovidQuEx
    from kmine.data.datasets.covid_qu_ex_index import PUBLISHED

    return CovidQuEx(_root(cfg, "that holds COVID-QU-Ex", PUBLISHED), cfg)


def _folder(cfg: DataConfig) -> Source:
    from kmine.data.datasets.folder import Folder

    return Folder(cfg)


def _nnunet(cfg: DataConfig) -> Source:
    from kmine.data.datasets.nnunet import Nnunet
    from kmine.data.datasets.nnunet_index import WHERE

    return Nnunet(_root(cfg, "of an nnU-Net data set", WHERE), cfg)


def _root(cfg: DataConfig, expected: str, where: str) -> Path:
    if cfg.root is None:
        raise UserError(f"data.root: expected the folder {expected}, got nothing; pass --data.root FOLDER ({where})")
    return Path(cfg.root)


DatasetFactory = Callable[[DataConfig], "Source"]
DATASETS: Registry[DatasetFactory] = Registry(
    "data.name",
    "kmine.datasets",
    {
        **{"phantom": _phantom, "kvasir_seg": _kvasir_seg, "lits": _lits, "covid_qu_ex": _covid_qu_ex},
        **{"folder": _folder, "nnunet": _nnunet},
    },
)


def register_dataset(name: str, factory: DatasetFactory) -> None:
    """Add a data set for `data.name`, in this process.

    For all commands, a package adds it by an entry point of the group `kmine.datasets`.

    `factory` opens a `kmine.data.source.Source` from the settings `data.*`. It reads no pixel; a mistake of the user is
    a `kmine.UserError`. An empty or built-in name raises it as well.
    """
    DATASETS.register(name, factory)


def open_source(cfg: DataConfig) -> Source:
    """Index the data set of the config. Raises `UserError`, also for an unknown name and a plug-in that fails."""
    return DATASETS.get(cfg.name)(cfg)

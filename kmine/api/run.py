"""A run folder to read: settings, rounds, decisions and pseudo masks as plain values and pandas tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from kmine import cli
from kmine.config import LoopConfig
from kmine.errors import UserError
from kmine.io.errors import expanded
from kmine.setup.finished import final_run, read_run_info
from kmine.store.artifacts import record_errors
from kmine.store.run_folder import RunFolder
from kmine.types import RoundResult


class PseudoMasks(Mapping[str, NDArray[np.uint8]]):
    """Pseudo masks of a round by sample id: (H, W) uint8 class ids, 255 ignored; each is read when it is wanted."""

    def __init__(self, folder: RunFolder, round_idx: int) -> None:
        self._folder, self._round_idx = folder, round_idx
        self._ids = {i: 0 for i, used in folder.by_sample(round_idx)[0].firsts("in_training").items() if used}

    def __getitem__(self, sample_id: str) -> NDArray[np.uint8]:
        if sample_id not in self._ids:
            raise KeyError(sample_id)
        return self._folder.pseudo_mask(self._round_idx, sample_id)

    def __iter__(self) -> Iterator[str]:
        return iter(self._ids)

    def __len__(self) -> int:
        return len(self._ids)


class Run:
    """A run folder, opened for reading: nothing in it is changed or locked. Usable wherever a path is expected."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._folder = RunFolder(root, follows=True)

    def __fspath__(self) -> str:
        return str(self.root)

    def __repr__(self) -> str:
        return f"Run({str(self.root)!r})"

    @cached_property
    def config(self) -> LoopConfig:
        """The settings of the run."""
        return cli.load_config(LoopConfig, self.root / "config.yaml")

    @property
    def info(self) -> dict[str, Any]:
        """Content of run.json: command, versions, seed, device, segmenter, `stopped_by`, `adopted_round`."""
        return self._folder.run()

    @property
    def rounds(self) -> list[RoundResult]:
        """Results of the rounds that are done, in order."""
        paths = sorted(self.root.glob("round_*/metrics.json"), key=lambda path: int(path.parent.name[6:]))
        results = []
        for path in paths:
            with record_errors(path):
                results.append(RoundResult.from_json(self._folder.read_json(path) or {}))
        return results

    @property
    def metrics(self) -> pd.DataFrame:
        """results.csv: a row a round, with Dice, IoU and HD95 on validation images."""
        return self._table("results.csv")

    @property
    def splits(self) -> pd.DataFrame:
        """splits.csv: sample_id, group_id, split (labeled, unlabeled, val or test)."""
        return self._table("splits.csv")

    def decisions(self, round_idx: int | None = None) -> pd.DataFrame:
        """The gate's decisions of a round, a row an object; without `round_idx` of that of the kept model's masks."""
        return pd.DataFrame([row.to_arrow() for row in self._folder.decisions(self._adopted(round_idx))])

    def prompts(self, round_idx: int | None = None) -> pd.DataFrame:
        """The prompts of a round, a row an object; without `round_idx` of that of the kept model's masks."""
        return pd.DataFrame([row.to_arrow() for row in self._folder.prompts(self._adopted(round_idx))])

    def pseudo_masks(self, round_idx: int | None = None) -> PseudoMasks:
        """The pseudo masks that a round was trained on; without `round_idx` those of the kept model."""
        return PseudoMasks(self._folder, self._adopted(round_idx))

    def _adopted(self, round_idx: int | None) -> int:
        if round_idx is not None:
            return round_idx
        kept = self.info.get("adopted_round", max((r.round_idx for r in self.rounds if r.adopted), default=0))
        # A retrained model learned from the masks of the last round that has any.
        return max((r.round_idx for r in self.rounds if r.round_idx <= kept and not r.retrained), default=0)

    def _table(self, name: str) -> pd.DataFrame:
        if not (self.root / name).is_file():
            raise UserError(f"{self.root}: expected {name}, which a run writes with its first round; resume the run")
        names = dict.fromkeys(("sample_id", "group_id"), str)  # converters, as `dtype` takes NA for a missing value
        return pd.read_csv(self.root / name, converters=names)


def open_run(path: str | Path) -> Run:
    """Open a run folder for reading; of the folder of `data.folds`, the run on all masks.

    Raises:
        UserError: `path` is not a run folder.
    """
    root = final_run(expanded(path))
    read_run_info(root)
    return Run(root)

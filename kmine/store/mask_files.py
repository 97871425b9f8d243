"""The pseudo masks of a round: run lengths in `pseudo_masks/00000.parquet`, ...; in older runs a PNG each."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import cached_property
from itertools import count
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kmine.errors import UserError
from kmine.io.files import read_png, safe_name
from kmine.store.artifacts import CURE, DamagedError
from kmine.store.table_files import GROUP_ROWS, TableRows, join_tables, open_table
from kmine.store.tables import MaskRow

FILE_GROUPS = 16  # groups of `GROUP_ROWS` masks in a file: 4,096 masks, so a million are 245 files


class MaskFiles:
    """Pseudo masks by sample id, from the folder of a round, which is looked at once; all who read one come here."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, parts: Iterable[Path], signature: str) -> None:
        """Join the tables of batches, and remove what earlier mining left."""
        written = join_tables(parts, MaskRow, signature, map(self._table, count()), FILE_GROUPS)
        for path in {*self._folder.glob("*.parquet"), *self._folder.glob("*.png")}.difference(written):
            path.unlink()

    def is_complete(self, ids: Collection[str], signature: str) -> bool:
        """Whether the mask of each of `ids` is there, undamaged and of this signature; PNG files need only be there."""
        if not self._paths:
            return not self.missing(ids)
        rows = open_table(self._paths, MaskRow, signature)
        return rows is not None and set(ids) == set(rows.column("sample_id"))

    def missing(self, ids: Iterable[str]) -> list[str]:
        """Those of `ids` without a mask. Raises `DamagedError`."""
        return [i for i in ids if not (i in self._index[1] if self._paths else self.path(i).is_file())]

    def path(self, sample_id: str) -> Path:
        """The file that holds the mask of a sample, or should."""
        if not self._paths:
            return self._folder / f"{safe_name(sample_id)}.png"
        return self._table(self._index[1].get(sample_id, 0) // (FILE_GROUPS * GROUP_ROWS))

    def read(self, sample_id: str) -> NDArray[np.uint8]:
        """(H, W) class ids and 255, bit for bit as saved. `UserError` where it is missing or damaged."""
        path = self.path(sample_id)
        if not self._paths:
            return read_png(path, CURE)
        rows, numbers = self._index
        if sample_id not in numbers:
            raise UserError(f"{self._folder}: expected a pseudo mask of {sample_id}, found none; {CURE}")
        row = rows[numbers[sample_id]]
        try:
            return row.to_mask()
        except (TypeError, ValueError) as error:
            raise DamagedError(path, f"{sample_id}: {error}") from error

    def _table(self, number: int) -> Path:
        return self._folder / f"{number:05}.parquet"

    @cached_property
    def _paths(self) -> list[Path]:
        return sorted(self._folder.glob("*.parquet"))

    @cached_property
    def _index(self) -> tuple[TableRows[MaskRow], dict[str, int]]:
        """Rows, and their numbers by sample id."""
        rows = TableRows(self._paths, MaskRow)
        return rows, {sample_id: n for n, sample_id in enumerate(rows.column("sample_id"))}

"""Pseudo masks of a run folder, replaced, or stored as older code did."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from kmine.io.files import encode_png, safe_name
from kmine.store.run_folder import RunFolder
from kmine.store.table_files import TableRows, encode_table
from kmine.store.tables import MaskRow


def mask_ids(folder: Path) -> list[str]:
    """Samples with a mask in the folder `pseudo_masks` of a round."""
    return TableRows(sorted(folder.glob("*.parquet")), MaskRow).column("sample_id")


def replace_masks(store: RunFolder, round_idx: int, masks: Mapping[str, np.ndarray]) -> Path:
    """Put other masks in the place of some of a round; returns the file."""
    folder = store.round_dir(round_idx) / "pseudo_masks"
    rows = TableRows([folder / "00000.parquet"], MaskRow)
    changed = [MaskRow.from_mask(r.sample_id, masks[r.sample_id]) if r.sample_id in masks else r for r in rows]
    (folder / "00000.parquet").write_bytes(encode_table(changed, MaskRow, store.round_signature(round_idx)))
    store.masks.cache_clear()
    return folder / "00000.parquet"


def older_layout(store: RunFolder, round_idx: int) -> Path:
    """Store the masks of a round as a PNG each; returns the folder."""
    folder = store.round_dir(round_idx) / "pseudo_masks"
    signature = store.round_signature(round_idx)
    for path in sorted(folder.glob("*.parquet")):
        for row in TableRows([path], MaskRow):
            file = folder / f"{safe_name(row.sample_id)}.png"
            file.write_bytes(encode_png(row.to_mask(), signature, round_idx))
        path.unlink()
    store.masks.cache_clear()
    return folder

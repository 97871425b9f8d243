"""One run folder: every artifact written atomically, signed, and read back only if the signature matches.

    config.yaml  run.json  splits.csv  results.csv  report.html
    round_00/  model.safetensors  model_final.safetensors  metrics.json
    round_01/  the same, and prompts.parquet  decisions.parquet  changes.json  pseudo_masks/00000.parquet ...
    supervised/round_01/ ...   the baseline at equal steps

A signature is the hash of what an artifact was made from: settings, inputs, weights. It is stored inside the file: in
the metadata of safetensors and parquet, in a key of a JSON file.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from numpy.typing import NDArray

from kmine.errors import UserError
from kmine.io.download import sha256_of
from kmine.io.errors import user_errors
from kmine.io.files import UNFINISHED, lock, open_lock, read_json, refuse_links, write_atomic, write_csv, write_json
from kmine.io.older_settings import WITHDRAWN
from kmine.io.yaml_file import read_yaml
from kmine.store.artifacts import (
    DamagedError,
    checked,
    encode_tensors,
    read_checked,
    read_rows,
    read_tensors,
    record_errors,
    seconds_of,
    tensor_metadata,
)
from kmine.store.mask_files import MaskFiles
from kmine.store.run_info import valid_info
from kmine.store.settings import as_flags, settings_changes
from kmine.store.table_files import RowsBySample, TableRows, encode_table, join_tables, open_table
from kmine.store.tables import DecisionRow, MaskRow, PromptRow
from kmine.types import PseudoLabel

if TYPE_CHECKING:
    from torch import Tensor

NEEDS_WRITING = "make this run writable (the command records there what it opened), or work on a copy of it"
FOLD_TRAININGS = ("fold_*/round_00", "witness_fold_*/round_00")
"""Folders of the trainings that mining needs before its first round."""
TABLES: dict[str, Any] = {"prompts": PromptRow, "masks": MaskRow, "decisions": DecisionRow}
"""Tables of a mined batch; the last is written last, so its presence marks the others as complete."""


class BusyError(UserError):
    """Another process holds the lock of this run folder."""


class RunFolder:
    """One run folder, locked by one process at a time.

    Args:
        root: the folder; created unless `follows`.
        follows: take no lock and write nothing but mined batches: for readers, and for the other ranks of a distributed
            run, whose rank 0 writes everything else.
        cure: what to do where the folder cannot be written.

    Raises:
        BusyError: another process holds the lock.
    """

    def __init__(self, root: Path, *, follows: bool = False, cure: str = "choose another --out") -> None:
        self.root = root
        self.follows = follows
        self.log: Callable[[str], None] = lambda text: None
        """Receives a line on each damaged file that is made anew."""
        self.trackers: Sequence[Any] = ()  # `kmine.store.trackers.Tracker`
        self.masks = lru_cache(2)(lambda round_idx: MaskFiles(root / f"round_{round_idx:02d}" / "pseudo_masks"))
        if follows:
            return
        with user_errors(root, cure=cure):
            root.mkdir(parents=True, exist_ok=True)
            if (root / "run.json").exists():  # W&B links to its own files
                refuse_links(p for p in root.iterdir() if p.name != "wandb" or p.is_symlink())
            self._lock = open_lock(root / ".lock")
        try:
            lock(self._lock, wait=False)
        except OSError as error:
            self._lock.close()
            problem = f"another process is working in this run folder; {cure}, or wait until it ends"
            raise BusyError(f"{root}: {problem}") from error

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy in another process is a follower."""
        return partial(RunFolder, follows=True), (self.root.resolve(),)

    # -- the run as a whole

    def claim(
        self,
        config: Mapping[str, Any],
        fingerprint: str,
        content_fingerprints: Callable[[], Mapping[str, str]] | None = None,
    ) -> None:
        """Begin or resume a run with `config` on data of `fingerprint`.

        If nothing was trained yet, changed settings or data replace the old ones. Data of another fingerprint but equal
        `content_fingerprints` are a copy, and keep the old fingerprint.

        Raises:
            UserError: a setting or the data differ from those of the run; names the setting.
        """
        has_weights = self._has_weights()
        try:
            self._refuse_others(config)
            fingerprint = self._same_data(fingerprint, content_fingerprints if has_weights else None)
        except UserError:
            if has_weights or "data_fingerprint" not in self.run():
                raise
            for name in ("splits.csv", "contents.csv"):
                (self.root / name).unlink(missing_ok=True)
        self._drop_unfinished_writes()
        self.update_run(data_fingerprint=fingerprint)
        self.write_text("config.yaml", yaml.safe_dump(dict(config), sort_keys=False))

    def claim_file(self, entry: str, setting: str, fingerprint: str) -> None:
        """Record in run.json the fingerprint of the file that a setting names, empty without one.

        `UserError` for another one than before once anything was trained.
        """
        previous = self.run().get(entry, "")
        if previous == fingerprint:
            return
        if self._has_weights():
            difference = f"(sha256 {fingerprint[:12]}, was {previous[:12]}); choose another --out, or restore the file"
            raise UserError(f"{self.root}: {setting} has changed since this run began {difference}")
        if setting == "data.split_file":
            (self.root / "splits.csv").unlink(missing_ok=True)
        self.update_run(**{entry: fingerprint})

    def _refuse_others(self, config: Mapping[str, Any]) -> None:
        path = self.root / "config.yaml"
        if path.exists():
            changes = settings_changes(read_yaml(path, str(path), "choose another --out"), config)
            if changes:
                withdrawn = [change for change in changes if WITHDRAWN.get(change[0]) == change[1]]
                key, old, new = (withdrawn or changes)[0]
                cure = "" if withdrawn else f", or give the same settings to resume: {as_flags(changes)}"
                differs = f"{path}: holds a run with {key} = {old!r}, this command has {new!r}"
                raise UserError(f"{differs}; choose another --out{cure}")

    def _same_data(self, fingerprint: str, content_fingerprints: Callable[[], Mapping[str, str]] | None) -> str:
        """The fingerprint that the run began with; an error where neither it nor the files' contents are the same."""
        run = self.run()
        previous, stored_contents = run.get("data_fingerprint", fingerprint), run.get("data_contents")
        known = content_fingerprints is not None and stored_contents is not None
        if previous != fingerprint and not (known and dict(content_fingerprints()) == stored_contents):
            difference = f"(fingerprint {fingerprint[:12]}, was {previous[:12]}); choose another --out"
            raise UserError(f"{self.root}: the data are not those this run began with {difference}")
        return str(previous)

    def begun_settings(self) -> dict[str, Any]:
        """Content of config.yaml if anything was trained here, or if this process follows another; else empty."""
        path = self.root / "config.yaml"
        if not path.exists() or not (self.follows or self._has_weights()):
            return {}
        return read_yaml(path, str(path), "choose another --out")

    def _has_weights(self) -> bool:
        """Whether anything here was trained."""
        return any(file for folder in self._round_dirs() for file in folder.glob("*.safetensors"))

    def _round_dirs(self) -> list[Path]:
        return [*self.root.glob("round_*"), *self.root.glob("*/round_*")]

    def _drop_unfinished_writes(self) -> None:
        """Remove the unfinished files of a killed process."""
        pattern = f".*{UNFINISHED}"
        shallow = [*self.root.glob(pattern), *self.root.glob(f"*/{pattern}")]
        for path in [*shallow, *(p for folder in self._round_dirs() for p in folder.rglob(pattern))]:
            path.unlink(missing_ok=True)

    def remove_training(self, round_idx: int) -> None:
        """Remove the models and metrics of a round of the loop, as of the retrained model of a run that had fewer."""
        if not self.follows:
            folder = self.round_dir(round_idx)
            for path in (folder / "metrics.json", *folder.glob("*.safetensors")):
                path.unlink(missing_ok=True)

    def run(self) -> dict[str, Any]:
        """Content of run.json; empty before the first write."""
        return valid_info(read_json(self.root / "run.json") or {})

    def update_run(self, **fields: Any) -> None:
        """Set fields of run.json."""
        self._write_json(self.root / "run.json", {**self.run(), **fields})

    def close(self) -> None:
        """Close the trackers and release the lock."""
        for tracker in self.trackers:
            tracker.close(self.log)
        if not self.follows:
            self._lock.close()

    def write_text(self, name: str, text: str) -> None:
        """Write a text file at the top level of the run folder."""
        self.write_bytes(name, text.encode())

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a file at the top level of the run folder."""
        self._write(self.root / name, data)

    def write_csv(self, name: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Write a CSV file at the top level of the run folder."""
        if not self.follows:
            write_csv(self.root / name, header, rows)

    def read_csv(self, name: str) -> list[dict[str, str]] | None:
        """Rows of a CSV file at the top level; None if it does not exist. `DamagedError` if it is no whole table."""
        return read_rows(self.root / name)

    def round_dir(self, round_idx: int, method_dir: str = "") -> Path:
        """Folder of a round; `method_dir` is empty for mining, or the folder of another training or method."""
        return self.root / method_dir / f"round_{round_idx:02d}"

    # -- tensors and JSON, signed

    def save_tensors(self, path: Path, tensors: Mapping[str, Tensor], signature: str, **meta: Any) -> None:
        """Write tensors as safetensors with the signature, JSON-able metadata and a checksum."""
        self._write(path, encode_tensors(tensors, signature, meta))

    def load_tensors(self, path: Path, signature: str | None) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and metadata; None where the file is missing, damaged or of another signature.

        `signature` None accepts any, and a damaged file is a `DamagedError`.
        """
        if signature is not None and path.is_file() and tensor_metadata(path).get("signature") != signature:
            return None
        try:
            found = read_tensors(path)
        except DamagedError as error:
            if signature is None:
                raise
            self.log(str(error))
            return None
        if found is None:
            return None
        with record_errors(path):
            return found[0], dict(json.loads(found[1].get("meta", "{}")))

    def training_seconds(self, pattern: str) -> float:
        """Sum over the trainings in the round folders that match `pattern` below the run folder."""
        return sum(map(seconds_of, self.root.glob(f"{pattern}/model.safetensors")))

    def preparation_seconds(self) -> float:
        """Seconds before the rounds of mining, including fold models, even if another run of a sweep trained them."""
        return self.run().get("preparation_seconds", 0.0) + sum(map(self.training_seconds, FOLD_TRAININGS))

    def weights_signature(self, path: Path) -> tuple[str, str]:
        """Signature of weights, and the SHA-256 (hex) of their file; empty where they are missing or damaged."""
        header = tensor_metadata(path)
        return (header.get("signature", ""), sha256_of(path)) if header else ("", "")

    def save_json(self, path: Path, value: Mapping[str, Any], signature: str) -> None:
        """Write JSON with its signature and a checksum; NaN becomes null."""
        self._write_json(path, checked({"signature": signature, **value}))

    def read_json(self, path: Path) -> dict[str, Any] | None:
        """Content of a JSON file of any signature; None where there is none. `DamagedError` if it was changed."""
        return read_checked(path)

    def load_json(self, path: Path, signature: str) -> dict[str, Any] | None:
        """Content that `save_json` wrote; None where missing, damaged or of another signature."""
        try:
            value = read_checked(path)
        except DamagedError as error:
            self.log(str(error))
            return None
        return value if value is not None and value.get("signature") == signature else None

    def _write_json(self, path: Path, value: Mapping[str, Any]) -> None:
        if not self.follows:
            write_json(path, value)

    def _write(self, path: Path, data: bytes) -> None:
        if not self.follows:
            write_atomic(path, data)

    # -- mining: batches while it goes on, two tables and the masks when it is done

    def pending_batches(
        self, round_idx: int, signature: str, ids: Sequence[str], batch_size: int
    ) -> Iterator[tuple[int, list[str]]]:
        """Numbered batches of `ids` that no earlier, interrupted session has mined."""
        if self._is_complete(round_idx, signature):
            return
        for n, first in enumerate(range(0, len(ids), batch_size)):
            if not self._is_complete(round_idx, signature, n):
                yield n, list(ids[first : first + batch_size])

    def save_batch(
        self,
        round_idx: int,
        signature: str,
        batch_idx: int,
        prompts: Sequence[PromptRow],
        decisions: Sequence[DecisionRow],
        labels: Mapping[str, PseudoLabel],
    ) -> None:
        """Save one batch: its prompts, its pseudo masks, and last its decisions, which mark it as complete.

        Only these are synced: what a power failure damages of the others is found by its checksum, and made again.
        """
        masks = [MaskRow.from_mask(sample_id, label.mask) for sample_id, label in labels.items()]
        for (name, row_type), rows in zip(TABLES.items(), (prompts, masks, decisions), strict=True):
            data = encode_table(rows, row_type, signature)
            write_atomic(self._table_path(round_idx, name, batch_idx), data, sync=name == "decisions")

    def close_round(self, round_idx: int, signature: str, num_batches: int) -> TableRows[DecisionRow]:
        """Join the batches into pseudo_masks/, prompts.parquet and decisions.parquet; return the decisions."""
        self.masks.cache_clear()  # another process may have joined them
        if not self._is_complete(round_idx, signature):
            parts = {name: [self._table_path(round_idx, name, n) for n in range(num_batches)] for name in TABLES}
            self.masks(round_idx).write(parts.pop("masks"), signature)
            for name, paths in parts.items():
                join_tables(paths, TABLES[name], signature, [self._table_path(round_idx, name)])
        self.masks.cache_clear()
        shutil.rmtree(self.round_dir(round_idx) / ".parts", ignore_errors=True)
        return self.decisions(round_idx)

    def _is_complete(self, round_idx: int, signature: str, batch_idx: int | None = None) -> bool:
        """Whether both tables and every pseudo mask of a round or of one batch are there, undamaged."""
        paths = {name: self._table_path(round_idx, name, batch_idx) for name in TABLES}
        prompts, masks, decisions = (open_table([paths[name]], TABLES[name], signature) for name in TABLES)
        if prompts is None or decisions is None:
            return False
        rows = zip(decisions.column("sample_id"), decisions.column("in_training"), strict=True)
        masked = {sample_id for sample_id, in_training in rows if in_training}
        if batch_idx is None:
            return self.masks(round_idx).is_complete(masked, signature)
        return masks is not None and masked == set(masks.column("sample_id"))

    def decisions(self, round_idx: int) -> TableRows[DecisionRow]:
        """The decisions of a round of any signature; empty where there are none."""
        return self._rows(round_idx, "decisions", DecisionRow)

    def prompts(self, round_idx: int) -> TableRows[PromptRow]:
        """The prompts of a round of any signature; empty where there are none."""
        return self._rows(round_idx, "prompts", PromptRow)

    def by_sample(self, round_idx: int) -> tuple[RowsBySample[DecisionRow], RowsBySample[PromptRow]]:
        """Decisions and prompts of a round by sample; empty where there are none."""
        return RowsBySample(self.decisions(round_idx)), RowsBySample(self.prompts(round_idx))

    def pseudo_mask(self, round_idx: int, sample_id: str) -> NDArray[np.uint8]:
        """(H, W) uint8 class ids and 255, bit for bit as saved. `UserError` where it is missing or damaged."""
        return self.masks(round_idx).read(sample_id)

    def _rows(self, round_idx: int, name: str, row_type: Any) -> TableRows[Any]:
        path = self._table_path(round_idx, name)
        return TableRows([path] if os.path.lexists(path) else [], row_type)

    def round_signature(self, round_idx: int) -> str:
        """Signature of what the masks of a round were made from; empty where nothing was mined."""
        return next(iter(self.decisions(round_idx).signatures), "")

    def _table_path(self, round_idx: int, name: str, batch_idx: int | None = None) -> Path:
        """Path of a table of a round, or of one of its batches."""
        if batch_idx is None:
            return self.round_dir(round_idx) / f"{name}.parquet"
        return self.round_dir(round_idx) / f".parts/{batch_idx // 1000:03}/{batch_idx:05}.{name}.parquet"

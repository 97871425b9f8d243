"""One run folder: every artifact written atomically, signed, and read back only if the signature matches.

    config.yaml  run.json  splits.csv  results.csv  report.html
    round_00/  model.safetensors  model_final.safetensors  metrics.json
    round_01/  the same, and prompts.parquet  decisions.parquet  changes.json  pseudo_masks/ID.png
    supervised/round_01/ ...   the baseline at equal steps

A signature says what an artifact was made from (settings, inputs, weights); it travels inside the file: in the
metadata of safetensors and parquet, in a text chunk of a PNG, in a key of a JSON file.
"""

from __future__ import annotations

import csv
import fcntl
import hashlib
import io
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from numpy.typing import NDArray

from kmine.errors import UserError
from kmine.io.errors import user_errors
from kmine.io.files import (
    UNFINISHED,
    encode_png,
    is_whole_png,
    read_json,
    safe_name,
    write_atomic,
    write_json,
)
from kmine.store.tables import (
    RowsBySample,
    encode_table,
    read_by_sample,
    read_table,
    table_signature,
)

if TYPE_CHECKING:
    from torch import Tensor

RESUMABLE_CHANGES = (
    "out",
    "device",
    "offline",
    "baseline",
    "data.cache_dir",
    "data.root",
    "data.images",
    "data.masks",
    "data.csv",
    "data.image_labels",
    "data.task",
    "data.classes",
    "data.normal_images",
    "data.allow_leaks",
    "data.on_fault",
    "data.on_error",
    "fit.num_workers",
    "segmenter.cache_dir",
    "segmenter.cache_gb",
)
"""Settings that may differ when a run is resumed: none changes a result.

Other data are told by their fingerprint or what they hold, and so is what `data.task` and the like make of them."""


FOLD_TRAININGS = ("fold_*/round_00", "witness_fold_*/round_00")
"""Trainings that mining needs before its first round."""


class BusyError(UserError):
    """Another process is working in this run folder."""


class RunFolder:
    """One run folder, held by one process at a time, or by one that leads and others that follow it.

    Those that follow write nothing but what they mined; all else the leader writes.
    """

    def __init__(self, root: Path, *, follows: bool = False) -> None:
        self.root = root
        self.follows = follows
        if follows:
            return
        with user_errors(root):
            root.mkdir(parents=True, exist_ok=True)
            self._lock = (root / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise BusyError(f"{root}: another process is working in this run folder; choose another --out") from error

    # -- the run as a whole

    def claim(
        self,
        config: Mapping[str, Any],
        fingerprint: str,
        content_fingerprints: Callable[[], Mapping[str, str]] | None = None,
    ) -> None:
        """Take the folder for `config` on data of `fingerprint`, or refuse, naming the field that differs.

        A run in which nothing was trained yet gives way: a mistake mended at once costs no new folder. Data of another
        fingerprint whose `content_fingerprints` are those the run began with were copied, and go by the old fingerprint.
        """
        has_weights = self._has_weights()
        try:
            self._refuse_others(config)
            fingerprint = self._same_data(fingerprint, content_fingerprints if has_weights else None)
        except UserError:
            if has_weights or "data_fingerprint" not in self.run():
                raise
            (self.root / "splits.csv").unlink(missing_ok=True)
        self._drop_unfinished_writes()
        self.update_run(data_fingerprint=fingerprint)
        self.write_text("config.yaml", yaml.safe_dump(dict(config), sort_keys=False))

    def claim_split(self, fingerprint: str) -> None:
        """Hold the run to what its split file said, empty without one; before training a mended file is taken anew."""
        if self._changed("split_file_sha256", "data.split_file", fingerprint):
            (self.root / "splits.csv").unlink(missing_ok=True)
            self.update_run(split_file_sha256=fingerprint)

    def claim_verdicts(self, signature: str) -> None:
        """Hold the run to what its verdicts said; before training others are taken."""
        if self._changed("verdicts_signature", "verdicts", signature):
            self.update_run(verdicts_signature=signature)

    def _changed(self, entry: str, setting: str, fingerprint: str) -> bool:
        """Whether run.json has another digest of the file that a setting names; refused where something was trained."""
        previous = self.run().get(entry, "")
        if previous != fingerprint and self._has_weights():
            raise UserError(
                f"{self.root}: {setting} does not say what it said when this run began (sha256 {fingerprint[:12]}, "
                f"was {previous[:12]}); choose another --out, or restore the file"
            )
        return previous != fingerprint

    def _refuse_others(self, config: Mapping[str, Any]) -> None:
        path = self.root / "config.yaml"
        if path.exists():
            try:
                before = _flat(yaml.safe_load(path.read_text()))
            except (AttributeError, UnicodeDecodeError, yaml.YAMLError) as error:
                raise UserError(f"{path}: expected a run's settings, found none; choose another --out") from error
            _refuse_other_config(self.root, before, _flat(config))

    def _same_data(self, fingerprint: str, content_fingerprints: Callable[[], Mapping[str, str]] | None) -> str:
        """The fingerprint that the run began with; refused where neither that nor what the files hold is the same."""
        run = self.run()
        previous, stored_contents = run.get("data_fingerprint", fingerprint), run.get("data_contents")
        if previous != fingerprint and (
            content_fingerprints is None or stored_contents is None or dict(content_fingerprints()) != stored_contents
        ):
            raise UserError(
                f"{self.root}: the data are not those this run began with (fingerprint {fingerprint[:12]}, "
                f"was {previous[:12]}); choose another --out"
            )
        return str(previous)

    def _has_weights(self) -> bool:
        """Whether anything here was trained."""
        return any(file for folder in self._round_dirs() for file in folder.glob("*.safetensors"))

    def _round_dirs(self) -> list[Path]:
        return [*self.root.glob("round_*"), *self.root.glob("*/round_*")]

    def _drop_unfinished_writes(self) -> None:
        """Remove what a killed process left of files it was writing."""
        pattern = f".*{UNFINISHED}"
        for path in [*self.root.glob(pattern), *(p for folder in self._round_dirs() for p in folder.rglob(pattern))]:
            path.unlink(missing_ok=True)

    def run(self) -> dict[str, Any]:
        """What run.json holds; empty before the first write."""
        return self.read_json(self.root / "run.json") or {}

    def update_run(self, **fields: Any) -> None:
        """Set fields of run.json."""
        self._write_json(self.root / "run.json", {**self.run(), **fields})

    def close(self) -> None:
        """Let another process have the folder."""
        if not self.follows:
            self._lock.close()

    def write_text(self, name: str, text: str) -> None:
        """Write a text of the run folder's top level."""
        self.write_bytes(name, text.encode())

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a file of the run folder's top level."""
        self._write(self.root / name, data)

    def write_csv(self, name: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Write a table of the run folder's top level."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
        self._write(self.root / name, text.getvalue().encode())

    def read_csv(self, name: str) -> list[dict[str, str]] | None:
        """Rows of a table of the top level; None where there is none yet."""
        path = self.root / name
        if not path.exists():
            return None
        with path.open(newline="") as file:
            return list(csv.DictReader(file))

    def round_dir(self, round_idx: int, method_dir: str = "") -> Path:
        """Folder of a round; `arm` is empty for the loop itself, or the name of what it is compared with."""
        return self.root / method_dir / f"round_{round_idx:02d}"

    # -- tensors and JSON, signed

    def save_tensors(self, path: Path, tensors: Mapping[str, Tensor], signature: str, **meta: Any) -> None:
        """Write tensors as safetensors with the signature and JSON-able metadata."""
        from safetensors.torch import save

        contiguous = {k: v.contiguous() for k, v in tensors.items()}
        self._write(path, save(contiguous, {"signature": signature, "meta": json.dumps(meta)}))

    def load_tensors(self, path: Path, signature: str | None) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and metadata; None where the file is missing, damaged or made from something else.

        `signature` None takes whatever there is.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                if signature not in (None, header.get("signature")):
                    return None
                return {k: file.get_tensor(k) for k in file.keys()}, json.loads(header["meta"])  # noqa: SIM118
        except (FileNotFoundError, SafetensorError):
            return None

    def training_seconds(self, pattern: str) -> float:
        """Of the trainings whose round folders `pattern` finds below the run folder, as each has booked them."""
        return sum(self._meta(path).get("seconds", 0.0) for path in self.root.glob(f"{pattern}/model.safetensors"))

    def preparation_seconds(self) -> float:
        """What came before the rounds of mining, the models of the folds included, be they shared with another run."""
        return self.run().get("preparation_seconds", 0.0) + sum(map(self.training_seconds, FOLD_TRAININGS))

    def _meta(self, path: Path) -> dict[str, Any]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                return json.loads((file.metadata() or {}).get("meta", "{}"))
        except (FileNotFoundError, SafetensorError):
            return {}

    def weights_signature(self, path: Path) -> tuple[str, str]:
        """What weights were made from, and the SHA-256 (hex) of their file; empty where they are missing or damaged."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                signature = (file.metadata() or {}).get("signature", "")
            return signature, hashlib.sha256(path.read_bytes()).hexdigest()
        except (FileNotFoundError, SafetensorError):
            return "", ""

    def save_json(self, path: Path, value: Mapping[str, Any], signature: str) -> None:
        """Write JSON with its signature; NaN becomes null."""
        self._write_json(path, {"signature": signature, **value})

    def read_json(self, path: Path) -> dict[str, Any] | None:
        """What a JSON file holds, whoever wrote it; None where it is missing or damaged."""
        return read_json(path)

    def load_json(self, path: Path, signature: str) -> dict[str, Any] | None:
        """What `save_json` wrote; None where missing, damaged or made from something else."""
        value = self.read_json(path)
        return value if value is not None and value.get("signature") == signature else None

    def _write_json(self, path: Path, value: Mapping[str, Any]) -> None:
        if not self.follows:
            write_json(path, value)

    def _write(self, path: Path, data: bytes) -> None:
        if not self.follows:
            write_atomic(path, data)

    # -- mining: parts while it goes on, two tables and the masks when it is done

    def pending_batches(
        self, round_idx: int, signature: str, ids: Sequence[str], batch_size: int
    ) -> Iterator[tuple[int, list[str]]]:
        """Numbered chunks of `ids` that no earlier, interrupted session has mined already."""
        if self._whole_decisions(round_idx, signature) is not None:
            return
        for n, first in enumerate(range(0, len(ids), batch_size)):
            if self._whole_decisions(round_idx, signature, n) is None:
                yield n, list(ids[first : first + batch_size])

    def save_batch(
        self,
        round_idx: int,
        signature: str,
        batch_idx: int,
        tables: Mapping[str, list[dict[str, Any]]],
        pseudo: Mapping[str, NDArray[np.uint8]],
    ) -> None:
        """Save one chunk: its pseudo masks, then its rows; the decisions come last and say that the chunk is done."""
        for sample_id, mask in pseudo.items():
            write_atomic(self.pseudo_path(round_idx, sample_id), encode_png(mask, signature, round_idx))
        for name in ("prompts", "decisions"):
            write_atomic(self._batch_path(round_idx, batch_idx, name), encode_table(tables[name], name, signature))

    def close_round(self, round_idx: int, signature: str, num_batches: int) -> list[dict[str, Any]]:
        """Join the parts into prompts.parquet and decisions.parquet; return the decisions."""
        done = self._whole_decisions(round_idx, signature)
        if done is None:
            for name in ("prompts", "decisions"):
                tables = [read_table(self._batch_path(round_idx, n, name), signature) for n in range(num_batches)]
                assert None not in tables, "mining is finished only once no chunk is left"
                done = [row for rows in tables for row in rows or ()]
                write_atomic(self.round_dir(round_idx) / f"{name}.parquet", encode_table(done, name, signature))
        self._drop_stale_masks(round_idx, {r["sample_id"] for r in done if r["in_training"]})
        shutil.rmtree(self.round_dir(round_idx) / ".parts", ignore_errors=True)
        return done

    def _whole_decisions(
        self, round_idx: int, signature: str, batch_idx: int | None = None
    ) -> list[dict[str, Any]] | None:
        """Decisions of a round, or of one of its parts; None unless both tables and every pseudo mask are whole."""
        folder = self.round_dir(round_idx)
        both = [
            read_table(
                folder / f"{n}.parquet" if batch_idx is None else self._batch_path(round_idx, batch_idx, n), signature
            )
            for n in ("prompts", "decisions")
        ]
        if None in both:
            return None
        masked = {row["sample_id"] for row in both[1] or () if row["in_training"]}
        return both[1] if all(is_whole_png(self.pseudo_path(round_idx, i), signature) for i in masked) else None

    def decisions(self, round_idx: int) -> list[dict[str, Any]]:
        """The decisions of a round, whoever made them; empty where there are none."""
        return read_table(self.round_dir(round_idx) / "decisions.parquet", None) or []

    def prompts(self, round_idx: int) -> list[dict[str, Any]]:
        """The prompts of a round."""
        return read_table(self.round_dir(round_idx) / "prompts.parquet", None) or []

    def by_sample(self, round_idx: int) -> tuple[RowsBySample, RowsBySample]:
        """Decisions and prompts of a round by sample; empty where there are none."""
        decisions, prompts = (
            read_by_sample(self.round_dir(round_idx) / f"{n}.parquet") for n in ("decisions", "prompts")
        )
        return decisions, prompts

    def round_signature(self, round_idx: int) -> str:
        """Signature of what made the masks of a round: model, segmenter, settings; empty where nothing was mined."""
        return table_signature(self.round_dir(round_idx) / "decisions.parquet")

    def pseudo_path(self, round_idx: int, sample_id: str) -> Path:
        """Where the pseudo mask of a sample lies; any id is one file name."""
        return self.round_dir(round_idx) / "pseudo_masks" / f"{safe_name(sample_id)}.png"

    def pseudo_mask(self, round_idx: int, sample_id: str) -> NDArray[np.uint8]:
        """(H, W) uint8 class ids and 255, as saved."""
        from PIL import Image

        with Image.open(self.pseudo_path(round_idx, sample_id)) as image:
            return np.asarray(image, np.uint8).copy()

    def _drop_stale_masks(self, round_idx: int, kept: set[str]) -> None:
        kept_names = {self.pseudo_path(round_idx, sample_id).name for sample_id in kept}
        for path in (self.round_dir(round_idx) / "pseudo_masks").glob("*.png"):
            if path.name not in kept_names:
                path.unlink()

    def _batch_path(self, round_idx: int, batch_idx: int, name: str) -> Path:
        return self.round_dir(round_idx) / ".parts" / f"{batch_idx:05d}.{name}.parquet"


def _refuse_other_config(root: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    for key in sorted(set(old) | set(new)):
        before, now = old.get(key), new.get(key)
        more_rounds = key == "rounds" and isinstance(before, int) and now >= before
        if key in RESUMABLE_CHANGES or before == now or more_rounds:
            continue
        raise UserError(
            f"{root} holds a run with {key} = {before!r}, this command has {now!r}; "
            "choose another --out, or give the same settings to resume"
        )


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            out |= _flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = list(value) if isinstance(value, tuple) else value
    return out

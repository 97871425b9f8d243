"""The run folder: every artifact written atomically, signed, and read back only if the signature matches.

    config.yaml  run.json  splits.csv  results.csv  report.html
    round_00/  model.safetensors  model_final.safetensors  metrics.json
    round_01/  the same, and prompts.parquet  decisions.parquet  pseudo_masks/ID.png
    supervised/round_01/ ...   the baseline at equal steps

A signature says what an artifact was made from (settings, inputs, weights); it travels inside the file: in the
metadata of safetensors and parquet, in a text chunk of a PNG, in a key of a JSON file.
"""

from __future__ import annotations

import csv
import errno
import fcntl
import hashlib
import io
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
import yaml
from numpy.typing import NDArray

from kmine.records import Evidence, UserError

if TYPE_CHECKING:
    from torch import Tensor

HARMLESS = ("out", "device", "offline", "baseline", "data.cache_dir", "data.root", "data.on_error", "fit.num_workers")
"""Settings that may differ when a run is resumed: none changes a result (other data are told by their fingerprint)."""
UNFINISHED = ".kmine-tmp"
"""How the name of a file being written ends."""
MAX_NAME = 200
"""Bytes of a file name before its ending; file systems end at 255, and a file being written needs some more."""


def sign(*parts: object) -> str:
    """A short signature (16 hex digits) of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn a full disk or a missing permission into one clear error; nothing already written is touched."""
    try:
        yield
    except OSError as error:
        cures = {
            errno.ENOSPC: "the disk is full; free some space and run the same command again, it resumes",
            errno.EDQUOT: "the disk quota is used up; free some space and run the same command again, it resumes",
            errno.EACCES: "no permission to write there; choose another --out",
            errno.EPERM: "no permission to write there; choose another --out",
            errno.EROFS: "the file system is read-only; choose another --out",
            errno.ENOTDIR: "a file stands where a folder is needed; choose another --out",
            errno.EEXIST: "a file stands where a folder is needed; choose another --out",
            errno.ENAMETOOLONG: "the name is too long for this file system; choose a shorter --out",
        }
        if error.errno not in cures:
            raise
        raise UserError(f"{path}: {cures[error.errno]}") from error


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader sees the old file or the whole new one, whatever happens meanwhile."""
    temp = path.with_name(f".{path.name}.{os.getpid()}{UNFINISHED}")
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temp.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temp.replace(path)
        finally:
            temp.unlink(missing_ok=True)


class RunStore:
    """One run folder, held by one process at a time."""

    def __init__(self, root: Path) -> None:
        self.root = root
        with explained(root):
            root.mkdir(parents=True, exist_ok=True)
            self._lock = (root / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"{root}: another process is working in this run folder; choose another --out") from error

    # -- the run as a whole

    def claim(self, config: Mapping[str, Any], fingerprint: str) -> None:
        """Take the folder for `config` on data of `fingerprint`, or refuse, naming the field that differs.

        A run in which nothing was trained yet gives way: a mistake mended at once costs no new folder.
        """
        try:
            self._refuse_others(config, fingerprint)
        except UserError:
            if self._begun() or "data_fingerprint" not in self.run():
                raise
            (self.root / "splits.csv").unlink(missing_ok=True)
        self._drop_unfinished_writes()
        self.update_run(data_fingerprint=fingerprint)
        self.write_text("config.yaml", yaml.safe_dump(dict(config), sort_keys=False))

    def _refuse_others(self, config: Mapping[str, Any], fingerprint: str) -> None:
        path, was = self.root / "config.yaml", self.run().get("data_fingerprint", fingerprint)
        if path.exists():
            try:
                before = _flat(yaml.safe_load(path.read_text()))
            except (AttributeError, UnicodeDecodeError, yaml.YAMLError) as error:
                raise UserError(f"{path}: expected a run's settings, found none; choose another --out") from error
            _refuse_other_config(self.root, before, _flat(config))
        if was != fingerprint:
            raise UserError(
                f"{self.root}: the data are not those this run began with (fingerprint {fingerprint[:12]}, "
                f"was {was[:12]}); choose another --out"
            )

    def _begun(self) -> bool:
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
        self._lock.close()

    def write_text(self, name: str, text: str) -> None:
        """Write a text of the run folder's top level."""
        write_atomic(self.root / name, text.encode())

    def write_csv(self, name: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Write a table of the run folder's top level."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
        write_atomic(self.root / name, text.getvalue().encode())

    def read_csv(self, name: str) -> list[dict[str, str]] | None:
        """Rows of a table of the top level; None where there is none yet."""
        path = self.root / name
        if not path.exists():
            return None
        with path.open(newline="") as file:
            return list(csv.DictReader(file))

    def round_dir(self, round_idx: int, arm: str = "") -> Path:
        """Folder of a round; `arm` is empty for the loop itself, or the name of what it is compared with."""
        return self.root / arm / f"round_{round_idx:02d}"

    # -- tensors and JSON, signed

    def save_tensors(self, path: Path, tensors: Mapping[str, Tensor], signature: str, **meta: Any) -> None:
        """Write tensors as safetensors with the signature and JSON-able metadata."""
        from safetensors.torch import save

        contiguous = {k: v.contiguous() for k, v in tensors.items()}
        write_atomic(path, save(contiguous, {"signature": signature, "meta": json.dumps(meta)}))

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

    def save_json(self, path: Path, value: Mapping[str, Any], signature: str) -> None:
        """Write JSON with its signature; NaN becomes null."""
        self._write_json(path, {"signature": signature, **value})

    def read_json(self, path: Path) -> dict[str, Any] | None:
        """What a JSON file holds, whoever wrote it; None where it is missing or damaged."""
        try:
            value = json.loads(path.read_text())
        except (FileNotFoundError, ValueError):  # bytes that are no text, text that is no JSON
            return None
        return value if isinstance(value, dict) else None

    def load_json(self, path: Path, signature: str) -> dict[str, Any] | None:
        """What `save_json` wrote; None where missing, damaged or made from something else."""
        value = self.read_json(path)
        return value if value is not None and value.get("signature") == signature else None

    def _write_json(self, path: Path, value: Mapping[str, Any]) -> None:
        write_atomic(path, json.dumps(_no_nan(value), indent=1, allow_nan=False).encode())

    # -- mining: parts while it goes on, two tables and the masks when it is done

    def unmined(
        self, round_idx: int, signature: str, ids: Sequence[str], chunk: int
    ) -> Iterator[tuple[int, list[str]]]:
        """Numbered chunks of `ids` that no earlier, interrupted session has mined already."""
        if self._mined(round_idx, signature) is not None:
            return
        for n, first in enumerate(range(0, len(ids), chunk)):
            if self._mined(round_idx, signature, n) is None:
                yield n, list(ids[first : first + chunk])

    def save_mined(
        self,
        round_idx: int,
        signature: str,
        part: int,
        tables: Mapping[str, list[dict[str, Any]]],
        pseudo: Mapping[str, NDArray[np.uint8]],
    ) -> None:
        """Save one chunk: its pseudo masks, then its rows; the decisions come last and say that the chunk is done."""
        for sample_id, mask in pseudo.items():
            write_atomic(self.pseudo_path(round_idx, sample_id), _png(mask, signature, round_idx))
        for name in ("prompts", "decisions"):
            self._write_table(self._part(round_idx, part, name), tables[name], name, signature)

    def finish_mining(self, round_idx: int, signature: str, num_parts: int) -> list[dict[str, Any]]:
        """Join the parts into prompts.parquet and decisions.parquet; return the decisions."""
        done = self._mined(round_idx, signature)
        if done is None:
            for name in ("prompts", "decisions"):
                tables = [self._read_table(self._part(round_idx, n, name), signature) for n in range(num_parts)]
                assert None not in tables, "mining is finished only once no chunk is left"
                done = [row for rows in tables for row in rows or ()]
                self._write_table(self.round_dir(round_idx) / f"{name}.parquet", done, name, signature)
        self._drop_stale_masks(round_idx, {r["sample_id"] for r in done if r["in_training"]})
        shutil.rmtree(self.round_dir(round_idx) / ".parts", ignore_errors=True)
        return done

    def _mined(self, round_idx: int, signature: str, part: int | None = None) -> list[dict[str, Any]] | None:
        """Decisions of a round, or of one of its parts; None unless both tables and every pseudo mask are whole."""
        folder = self.round_dir(round_idx)
        both = [
            self._read_table(folder / f"{n}.parquet" if part is None else self._part(round_idx, part, n), signature)
            for n in ("prompts", "decisions")
        ]
        if None in both:
            return None
        masked = {row["sample_id"] for row in both[1] or () if row["in_training"]}
        return both[1] if all(_is_whole_png(self.pseudo_path(round_idx, i), signature) for i in masked) else None

    def decisions(self, round_idx: int) -> list[dict[str, Any]]:
        """The decisions of a round, whoever made them; empty where there are none."""
        return self._read_table(self.round_dir(round_idx) / "decisions.parquet", None) or []

    def prompts(self, round_idx: int) -> list[dict[str, Any]]:
        """The prompts of a round."""
        return self._read_table(self.round_dir(round_idx) / "prompts.parquet", None) or []

    def pseudo_path(self, round_idx: int, sample_id: str) -> Path:
        """Where the pseudo mask of a sample lies; ids are percent-encoded, so that any id is one file name.

        The end of an id too long for a file name is replaced by a hash of the whole.
        """
        name = quote(sample_id, safe=" ()+,=@")
        if len(name) > MAX_NAME:
            name = f"{name[: MAX_NAME - 17]}~{hashlib.sha256(sample_id.encode()).hexdigest()[:16]}"
        return self.round_dir(round_idx) / "pseudo_masks" / f"{name}.png"

    def pseudo_mask(self, round_idx: int, sample_id: str) -> NDArray[np.uint8]:
        """(H, W) uint8 class ids and 255, as saved."""
        from PIL import Image

        with Image.open(self.pseudo_path(round_idx, sample_id)) as image:
            return np.asarray(image, np.uint8).copy()

    def _drop_stale_masks(self, round_idx: int, kept: set[str]) -> None:
        wanted = {self.pseudo_path(round_idx, sample_id).name for sample_id in kept}
        for path in (self.round_dir(round_idx) / "pseudo_masks").glob("*.png"):
            if path.name not in wanted:
                path.unlink()

    def _part(self, round_idx: int, part: int, name: str) -> Path:
        return self.round_dir(round_idx) / ".parts" / f"{part:05d}.{name}.parquet"

    def _write_table(self, path: Path, rows: list[dict[str, Any]], name: str, signature: str) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema = _schema(pa, name).with_metadata({"signature": signature})
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, schema), buffer)
        write_atomic(path, buffer.getvalue())

    def _read_table(self, path: Path, signature: str | None) -> list[dict[str, Any]] | None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not path.exists():
            return None
        data = io.BytesIO(path.read_bytes())  # read apart: an OSError below is pyarrow's word for a damaged file
        try:
            table = pq.read_table(data)
            if signature is not None and (table.schema.metadata or {}).get(b"signature") != signature.encode():
                return None
            return table.to_pylist()
        except (pa.ArrowException, OSError, UnicodeDecodeError):
            return None


def _schema(pa: Any, name: str) -> Any:
    """Columns of the two tables of a mining round; `object_idx` is -1 for an image in which no object was found."""
    text, number, whole, flag = pa.string(), pa.float64(), pa.int64(), pa.bool_()
    keys = [("sample_id", text), ("object_idx", whole), ("class_id", whole)]
    if name == "prompts":
        numbers, rows = pa.list_(number), pa.list_(pa.list_(number))
        more = [("box", numbers), ("point_coords", rows), ("point_labels", pa.list_(whole))]
        return pa.schema([*keys, *more, ("has_mask_input", flag), ("jittered_boxes", rows)])
    more = [(s, number) for s in [*(f.name for f in fields(Evidence)), "estimated_dice"]]
    masks = [("height", whole), ("width", whole), ("local_rle", text), ("segmenter_rle", text)]
    return pa.schema([*keys, ("kept", flag), ("reason", text), ("in_training", flag), *more, *masks])


def _png(mask: NDArray[np.uint8], signature: str, round_idx: int) -> bytes:
    from PIL import Image, PngImagePlugin

    info = PngImagePlugin.PngInfo()
    info.add_text("kmine.signature", signature)
    info.add_text("kmine.round", str(round_idx))
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def _is_whole_png(path: Path, signature: str) -> bool:
    """Whether a pseudo mask is there, undamaged and made from what the signature says."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            signed = image.info.get("kmine.signature") == signature
            image.verify()
    except (OSError, SyntaxError, ValueError):  # Pillow's words for missing, truncated and damaged
        return False
    return signed


def _refuse_other_config(root: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    for key in sorted(set(old) | set(new)):
        was, now = old.get(key), new.get(key)
        more_rounds = key == "rounds" and isinstance(was, int) and now >= was
        if key in HARMLESS or was == now or more_rounds:
            continue
        raise UserError(
            f"{root} holds a run with {key} = {was!r}, this command has {now!r}; "
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


def _no_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _no_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_no_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

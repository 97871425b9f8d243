"""`python -m kmine.weights list|get|verify|bundle|unbundle`: weights of segmenters and encoders, fetched or in bundles.

A bundle is a plain tar file of weights and of `kmine-weights.json` with their SHA-256. Unpacking trusts neither: of
segmenters only files that kmine knows are written, and only with the SHA-256 that kmine knows; of encoders only
safetensors (no code) under their own names, with the SHA-256 of the manifest, which becomes their record.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from kmine import cli
from kmine.config.checks import LocalPath, expand_paths
from kmine.errors import UserError, unknown_name
from kmine.io.console import say
from kmine.io.download import check_space, download, sha256_of
from kmine.io.errors import storage_errors
from kmine.io.files import default_cache_dir, read_json, write_json
from kmine.io.json_file import parse_json
from kmine.io.tensor_file import content_kind
from kmine.models.encoder_hub import (
    PREFIX,
    EncoderRecord,
    encoder_name,
    encoder_path,
    encoder_record,
    fetch_encoder,
    require_recorded,
)
from kmine.segmenters import tiny
from kmine.segmenters.weights import OFFICIAL_WEIGHTS, download_weights

DESCRIPTION = """The weights that kmine may download: those of segmenters, and of encoders with ImageNet weights, named
as in encoder:resnet34 or encoder:tu-swinv2_tiny_window8_256. `list`: where they lie, whether they are whole.
`get NAME ...`: download. `verify [FILE ...]`: whether files are the official ones; without one, all that are here.
`bundle FILE.tar NAME ...` and, on a machine without network, `unbundle FILE.tar`."""

SIZES = {"sam_vit_b": 375_042_383, "sam_vit_l": 1_249_524_607, "sam_vit_h": 2_564_550_879, "mobile_sam": 40_728_226}
"""Bytes of the files on the server, for the list."""
MANIFEST = "kmine-weights.json"
MAX_MANIFEST = 2**20
BLOCK_BYTES = 2**20
SHIPPED = "tiny"


@dataclass(frozen=True)
class WeightsConfig:
    """Settings of `python -m kmine.weights`."""

    action: list[LocalPath] = field(default_factory=list)
    """list, get NAME ..., verify [FILE ...], bundle FILE.tar NAME ... or unbundle FILE.tar."""
    cache_dir: LocalPath | None = None
    """Folder of the checkpoints; default: weights in $KMINE_CACHE, else in ~/.cache/kmine."""
    offline: bool = False
    """Forbid every download; a missing file is then an error."""

    def __post_init__(self) -> None:
        expand_paths(self)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    prog, words = "kmine weights", sys.argv[1:] if argv is None else argv
    cfg = cli.parse(WeightsConfig, words, prog=prog, description=DESCRIPTION, positional="action")
    return cli.guarded(prog, lambda: run_weights(cfg))


def run_weights(cfg: WeightsConfig) -> int:
    """Run the action named by the first word."""
    action, *words = cfg.action
    if action not in ACTIONS:
        raise unknown_name("action", action, ACTIONS)
    folder = Path(cfg.cache_dir) if cfg.cache_dir else default_cache_dir()
    return ACTIONS[action](words, folder, cfg.offline)


def _list(words: Sequence[str], folder: Path, offline: bool) -> int:
    """Print size, state, path and SHA-256 of every checkpoint."""
    _expect(not words, f"list: expected nothing after it, got {' '.join(words)}")
    lines = [f"{SHIPPED:<10}  {_shipped()}"]
    for name, checkpoint in OFFICIAL_WEIGHTS.items():
        path = folder / checkpoint.filename
        lines.append(f"{name:<10}  {_size(SIZES.get(name)):>8}  {_state(path, checkpoint.sha256)}")
        lines.append(f"{'':<10}  {'':>8}  {path}  sha256 {checkpoint.sha256}")
    for name, path in _encoders(folder).items():
        record = encoder_record(path)
        state = _state(path, record.sha256) if record else "here, without a record of its SHA-256"
        lines.append(f"{name}  {_size(path.stat().st_size)}  {state}")
        if record:
            lines.append(f"{'':<10}  {'':>8}  {path}  sha256 {record.sha256}")
            lines.append(f"{'':<10}  {'':>8}  {record.source} {record.revision}, input {record.normalization}")
    lines.append(
        f"Encoders with ImageNet weights: `kmine weights get {PREFIX}NAME` (segmentation-models-pytorch, or tu-NAME of "
        "timm); a run takes them from here (--model.encoder_weights auto). `kmine fetch` downloads data sets."
    )
    say("\n".join(lines) + "\n")
    return 0


def _encoders(folder: Path) -> dict[str, Path]:
    """The files of encoder weights in a folder, by name as in commands."""
    files = sorted(folder.glob("encoder-*.safetensors")) if folder.is_dir() else []
    return {PREFIX + name: path for path in files if (name := encoder_name(path.name))}


def _state(path: Path, sha256: str) -> str:
    part = path.with_name(path.name + ".part")
    if path.is_file():
        return "here, whole" if sha256_of(path) == sha256 else "here, but not the official file"
    return f"begun: {_size(part.stat().st_size)} are here" if part.is_file() else "not here"


def _shipped() -> str:
    """Size and state of the weights that kmine ships with."""
    path = tiny.SHIPPED
    try:
        expected = (read_json(path.with_suffix(".json")) or {})["sha256"]
        state = "here, whole" if sha256_of(path) == expected else "damaged; reinstall kmine"
        return f"{_size(path.stat().st_size):>8}  {state} (ships with kmine)"
    except (OSError, ValueError, KeyError):
        return f"{'':>8}  missing or damaged; reinstall kmine"


def _verify(words: Sequence[str], folder: Path, offline: bool) -> int:
    """Compare files by path, or all in the folder; exit code 1 if one is not official."""
    by_sum = {checkpoint.sha256: f"the official {name}" for name, checkpoint in OFFICIAL_WEIGHTS.items()}
    encoders = {name: (path, encoder_record(path)) for name, path in _encoders(folder).items()}
    by_sum |= {record.sha256: f"{name} of {record.source}" for name, (_, record) in encoders.items() if record}
    known_paths = [folder / checkpoint.filename for checkpoint in OFFICIAL_WEIGHTS.values()]
    known_paths += [path for path, _ in encoders.values()]
    paths = [Path(word) for word in words] or [path for path in known_paths if path.is_file()]
    for path in paths:
        _expect(path.is_file(), f"{path}: expected a file of weights, found none; check the path")
    bad = 0
    for path in paths:
        with storage_errors(path):
            actual = sha256_of(path)
        bad += actual not in by_sum
        description = by_sum.get(actual, "not an official file: damaged, or weights of your own")
        say(f"{path}: {description} (sha256 {actual})\n")
    if not paths:
        say(f"nothing in {folder}\n")
    return 1 if bad else 0


def _get(words: Sequence[str], folder: Path, offline: bool) -> int:
    for name in _names(words, "get"):
        path = _path(name, folder)
        existed = path.is_file()
        if name.startswith(PREFIX):
            fetch_encoder(name.removeprefix(PREFIX), folder, offline=offline)
        elif existed or offline:
            download_weights(name, folder, offline)  # checks an existing file
        else:
            checkpoint = OFFICIAL_WEIGHTS[name]
            otherwise = "fetch it on another machine and carry it here: kmine weights bundle, kmine weights unbundle"
            download(checkpoint.url, checkpoint.sha256, path, otherwise=otherwise)
        say(f"{name} {'is there and whole' if existed else 'is now there'}: {path}\n")
    return 0


def _bundle(words: Sequence[str], folder: Path, offline: bool) -> int:
    _expect(len(words) >= 2, "bundle: expected a file to write and names, as in `kmine weights bundle w.tar sam_vit_b`")
    target, names = Path(words[0]), _names(words[1:], "bundle")
    _expect(not target.exists(), f"{target}: expected no file there yet, found one; choose another name")
    _get(names, folder, offline)
    files = [_path(name, folder) for name in names]
    manifest = json.dumps({name: _manifest_entry(name, folder) for name in names}, indent=1).encode()
    total = sum(path.stat().st_size for path in files)
    with _replacing(target, total, "the bundle") as part, tarfile.open(part, "w") as tar:
        entry = tarfile.TarInfo(MANIFEST)
        entry.size = len(manifest)
        tar.addfile(entry, io.BytesIO(manifest))
        for path in files:
            entry = tarfile.TarInfo(path.name)
            entry.size = path.stat().st_size
            with path.open("rb") as file:
                tar.addfile(entry, file)
    say(f"{target}: {', '.join(names)}; there: kmine weights unbundle {target.name}\n")
    return 0


def _path(name: str, folder: Path) -> Path:
    is_encoder = name.startswith(PREFIX)
    return encoder_path(folder, name.removeprefix(PREFIX)) if is_encoder else folder / OFFICIAL_WEIGHTS[name].filename


def _manifest_entry(name: str, folder: Path) -> Any:
    """SHA-256 of a segmenter's weights, the whole record of an encoder's."""
    if name.startswith(PREFIX):
        return asdict(require_recorded(_path(name, folder)))
    return OFFICIAL_WEIGHTS[name].sha256


def _unbundle(words: Sequence[str], folder: Path, offline: bool) -> int:
    _expect(len(words) == 1, f"unbundle: expected one file, got {len(words)}")
    path = Path(words[0])
    _expect(path.is_file(), f"{path}: expected a bundle of weights, found no such file; check the path")
    by_file = {checkpoint.filename: (name, checkpoint.sha256) for name, checkpoint in OFFICIAL_WEIGHTS.items()}
    records: dict[str, EncoderRecord] = {}
    unpacked = []
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                is_whole = member.isreg() and member.size <= path.stat().st_size  # a sparse file may claim any size
                stream = tar.extractfile(member) if is_whole else None
                if stream and member.name == MANIFEST and member.size <= MAX_MANIFEST:
                    records |= _records(stream.read(), path)
                    continue
                # Names are looked up, never used as paths: only files that kmine knows can be written.
                record = records.get(member.name)
                match = (PREFIX + encoder_name(member.name), record.sha256) if record else by_file.get(member.name)
                if match is None or stream is None:
                    raise UserError(
                        f"{path}: expected what `kmine weights bundle` writes, found {member.name[:200]!r} in it; "
                        "nothing of that was unpacked: make the bundle anew"
                    )
                _unpack(path, stream, member.size, folder / member.name, match[1])
                if record:
                    write_json(encoder_path(folder, encoder_name(member.name)).with_suffix(".json"), asdict(record))
                unpacked.append(match[0])
    except UserError:
        raise
    except (tarfile.TarError, EOFError, ValueError, ArithmeticError, LookupError) as error:  # damaged fields
        raise UserError(f"{path}: expected a whole tar file ({error}); copy it again") from error
    _expect(bool(unpacked), f"{path}: expected checkpoints, found none in it; make the bundle anew")
    say(f"{', '.join(unpacked)}: whole, now in {folder}\n")
    return 0


def _records(manifest: bytes, bundle: Path) -> dict[str, EncoderRecord]:
    """Records of encoders in a manifest of any origin, by file name; entries of another form are left out."""
    where = f"{bundle}: {MANIFEST}"
    entries = parse_json(manifest, where, "the sums of a bundle", "make the bundle anew")
    entries = entries if isinstance(entries, dict) else {}
    encoders = {name.removeprefix(PREFIX): entries[name] for name in entries if name.startswith(PREFIX)}
    found = {f"encoder-{name}.safetensors": EncoderRecord.of(entry) for name, entry in encoders.items()}
    return {name: record for name, record in found.items() if record and encoder_name(name)}


def _unpack(bundle: Path, stream: IO[bytes], size: int, target: Path, sha256: str) -> None:
    """Write a member, which gets its name once its SHA-256 is verified."""
    if target.is_file() and sha256_of(target) == sha256:
        return
    _expect(not target.exists(), f"{target}: expected the official file or nothing, found another; move it away")
    with _replacing(target, size, f"{target.name} of {bundle}") as part:
        with part.open("wb") as file:
            shutil.copyfileobj(stream, file, BLOCK_BYTES)
        actual = sha256_of(part)
        _expect(
            actual == sha256,
            f"{bundle}: expected SHA-256 {sha256} of {target.name}, got {actual}; it was not unpacked: copy the "
            "bundle again, or make it anew",
        )
        if encoder_name(target.name) and content_kind(part) != "safetensors":
            raise UserError(f"{bundle}: expected safetensors in {target.name}, got {content_kind(part)}; not unpacked")


@contextmanager
def _replacing(target: Path, num_bytes: int, what: str) -> Iterator[Path]:
    """A temporary path that replaces `target` on success; `what` and its size are for the check of free space."""
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    with storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        check_space(target.parent, num_bytes, what)
        try:
            yield part
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)


def _names(words: Sequence[str], action: str) -> list[str]:
    """Names of checkpoints. Raises `UserError` for none, for an unknown one, and for what ships with kmine."""
    known = f"{', '.join(OFFICIAL_WEIGHTS)}, and encoders, such as {PREFIX}resnet34"
    _expect(bool(words), f"{action}: expected a name, got none; known: {known}")
    for word in words:
        _expect(word != SHIPPED, f"{SHIPPED} ships with kmine: there is nothing to {action}")
        if word not in OFFICIAL_WEIGHTS and not word.startswith(PREFIX):
            raise unknown_name(action, word, OFFICIAL_WEIGHTS)
    return list(dict.fromkeys(words))


def _size(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:,.1f} MB"


def _expect(is_so: bool, otherwise: str) -> None:
    if not is_so:
        raise UserError(otherwise)


Action = Callable[[Sequence[str], Path, bool], int]
ACTIONS: dict[str, Action] = {"list": _list, "get": _get, "verify": _verify, "bundle": _bundle, "unbundle": _unbundle}


if __name__ == "__main__":
    sys.exit(main())

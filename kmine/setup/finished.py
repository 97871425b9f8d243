"""Run folders that are opened again after training; the data may have been moved since."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kmine import cli
from kmine.config import LoopConfig
from kmine.errors import UserError
from kmine.io.errors import expanded
from kmine.io.json_file import json_field, load_json
from kmine.store.run_info import CURE, check_info

OWN_FILES = ("images", "masks", "csv")
"""Settings of `data` with paths to a user's own files."""


FOLDS = "folds.json"
"""File of a folder whose sub-folders are the runs of data.folds: `{"runs": [folder of each fold ..., ALL_MASKS]}`."""
ALL_MASKS = "all"
"""The run of such a folder without test split, whose model is the one to use."""


@dataclass(frozen=True)
class FinishedRun:
    """A finished run folder; neither changed nor locked."""

    root: Path
    info: dict[str, Any]
    """Content of run.json."""
    cfg: LoopConfig


def open_finished_run(root: Path, *, device: str = "auto", data_root: str | None = None) -> FinishedRun:
    """Read run.json and the settings of a finished run; `device` and `data_root` as in `load_settings`.

    Raises:
        UserError: no run folder, an unfinished run, damaged settings.
    """
    info = read_run_info(root)
    require_finished(root, info)
    return FinishedRun(root, info, load_settings(root, device=device, data_root=data_root))


def fold_runs(root: Path) -> list[Path]:
    """Run folders of the folds in a folder of `kmine loop --data.folds`, without that on all masks; else empty.

    Raises:
        UserError: a damaged `FOLDS`.
    """
    path, words = root / FOLDS, "run the same kmine.loop again, which writes it anew"
    if not path.is_file():
        return []
    names = json_field(load_json(path, "the list of folds", words), "runs", list, where=str(path), cure=words)
    if not all(isinstance(name, str) and re.fullmatch(rf"fold-\d+|{ALL_MASKS}", name) for name in names):
        raise UserError(f"{path}: expected names of folds for `runs`, got others; {words}")
    return [root / name for name in names if name != ALL_MASKS]


def final_run(root: Path) -> Path:
    """The run whose model is to be used: that on all masks of a folder of folds, else `root` itself."""
    return root / ALL_MASKS if (root / FOLDS).is_file() else root


def read_run_info(root: Path) -> dict[str, Any]:
    """Content of run.json of any run; `UserError` if `root` is no run folder or run.json is damaged."""
    if (root / "sweep.csv").is_file():
        raise UserError(f"{root}: expected a run folder, found a sweep; give one of the runs in its sweep.csv")
    if not (root / "run.json").is_file() or not (root / "config.yaml").is_file():
        actual = "a folder without them" if root.is_dir() else "another file" if root.exists() else "nothing"
        raise UserError(
            f"{root}: expected a run folder with config.yaml and run.json, found {actual}; run kmine.loop first"
        )
    info = load_json(root / "run.json", "the record of a run", CURE)
    if not isinstance(info, dict):
        raise UserError(f"{root / 'run.json'}: expected a JSON object; {CURE}")
    check_info(info, root / "run.json")
    return info


def require_finished(root: Path, info: dict[str, Any], cure: str = "resume it first") -> None:
    """Raise `UserError`, with `cure`, if run.json (`info`) is that of a run without a final model."""
    if info.get("stopped_by") in (None, "interrupted") or "adopted_round" not in info:
        raise UserError(f"{root}: the run is not finished (stopped_by {info.get('stopped_by')}); {cure}")


def load_settings(root: Path, *, device: str, data_root: str | None) -> LoopConfig:
    """Settings of a run's config.yaml, adapted to this machine.

    Args:
        root: the run folder.
        device: replaces the run's device.
        data_root: folder that holds the data now, None where the run found them. Replaces data.root, or the common
            parent folder of a user's own files.

    Raises:
        UserError: a damaged file, an unknown setting or an unfit value.
    """
    flags = ["--device", device]
    if os.environ.get("KMINE_CACHE"):  # the run's own folder of decoded images may be of another machine
        flags += ["--data.cache_dir", "null"]
    if data_root:
        data = cli.to_dict(cli.load_config(LoopConfig, root / "config.yaml").data)
        flags += [word for name, path in _moved(data, data_root).items() for word in (f"--data.{name}", path)]
    return cli.load_config(LoopConfig, root / "config.yaml", flags)


def _moved(data: dict[str, Any], data_root: str) -> dict[str, str]:
    """Settings that locate the data below `data_root`, by name."""
    own = {name: Path(data[name]).absolute() for name in OWN_FILES if data.get(name)}
    if not own:
        return {"root": data_root}
    common_parent = os.path.commonpath([path.parent for path in own.values()])
    return {name: str(expanded(data_root) / path.relative_to(common_parent)) for name, path in own.items()}

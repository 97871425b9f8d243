"""The settings of a finished run, for commands that look at it once more; its data may have moved since."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from kmine import cli
from kmine.config import LoopConfig

OWN_FILES = ("images", "masks", "csv")
"""Settings of `data` that name a user's own files."""


def load_settings(folder: Path, *, device: str, data_root: str | None, prog: str, description: str) -> LoopConfig:
    """What config.yaml of a run folder says, on this machine.

    Args:
        folder: of the run.
        device: instead of the run's.
        data_root: where the data lie now, if not where the run found them: instead of data.root, and of a user's own
            files instead of the folder that holds all that the run named.
        prog: name of the command, for its messages.
        description: what it does.
    """
    words = ["--config", str(folder / "config.yaml"), "--device", device]
    if data_root:
        data = (yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")) or {}).get("data", {})
        words += [word for name, path in _moved(data, data_root).items() for word in (f"--data.{name}", path)]
    return cli.parse(LoopConfig, words, prog=prog, description=description)


def _moved(data: dict[str, Any], data_root: str) -> dict[str, str]:
    """The settings that say where the data lie, by name."""
    own = {name: Path(data[name]).expanduser().absolute() for name in OWN_FILES if data.get(name)}
    if not own:
        return {"root": data_root}
    common_parent = os.path.commonpath([path.parent for path in own.values()])
    return {name: str(Path(data_root) / path.relative_to(common_parent)) for name, path in own.items()}

"""A cache of Hugging Face as its library leaves it after a download, without a network."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import constants

from kmine.models.encoder_hub import source_of

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def hub_file(monkeypatch, root: Path, name: str, **config: object) -> Path:
    """Where the cache below `root` has the weights of an encoder; the caller writes the file."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))
    source = source_of(name)
    repo = root / f"models--{source.repo.replace('/', '--')}"
    folder = repo / "snapshots" / (source.revision or COMMIT)
    folder.mkdir(parents=True)
    if source.revision is None:
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text(COMMIT)
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder / "model.safetensors"

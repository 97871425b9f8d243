"""Opens the segmenter of a folder of transformers: with a memory, if it is a video model of SAM 2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kmine.segmenters.hf.files import PREFIX
from kmine.segmenters.hf.memory import HfMemorySegmenter
from kmine.segmenters.hf.segmenter import HfSegmenter, load_network


def open_hf(name: str, folder: Path, device: str, **settings: Any) -> HfSegmenter:
    """The segmenter of a folder; `name` is that of the settings, of a local folder its last part alone is shown."""
    model = name.removeprefix(PREFIX)
    shown = f"{PREFIX}{folder.name}" if Path(model).expanduser().is_dir() else name
    loaded = load_network(folder, model.rstrip("/").rsplit("/", 1)[-1], device)
    if json.loads((folder / "config.json").read_bytes())["model_type"] == "sam2_video":
        return HfMemorySegmenter(loaded, shown, folder, **settings)
    return HfSegmenter(loaded, shown, **settings)

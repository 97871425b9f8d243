"""Early checks of settings: names, paths and devices, before torch is loaded."""

from __future__ import annotations

import os

from kmine.config import LoopConfig
from kmine.config.checks import require
from kmine.data import open_source
from kmine.data.source import Source
from kmine.errors import unknown_name
from kmine.io.ray_cluster import import_ray
from kmine.models import ARCHITECTURES
from kmine.segmenters import SEGMENTERS, check_prompting
from kmine.setup.device import require_device_name
from kmine.store.trackers import require_trackers


def preflight(cfg: LoopConfig, *, mines: bool = True) -> Source:
    """Check names and open the data source; no pixel is read.

    Segmenter and trackers are checked only if the command `mines`.

    Raises:
        UserError: an unknown model, segmenter, device or data set, prompts that the segmenter does not support, or a
            missing data set.
    """
    for model in cfg.model.split():
        if model and model.name not in ARCHITECTURES:
            raise unknown_name("model.name", model.name, ARCHITECTURES)
    if mines:
        require_trackers(cfg.log)
        if cfg.backend == "ray":
            import_ray("use --backend local")
            several = int(os.environ.get("WORLD_SIZE", 1)) > 1
            require(not several, "backend", "local in a launch of several processes, which share the mining", "ray")
        SEGMENTERS.get(cfg.segmenter.name)
        if cfg.rounds:
            check_prompting(cfg.segmenter.name, cfg.prompts)
    require_device_name(cfg.device)
    return open_source(cfg.data)

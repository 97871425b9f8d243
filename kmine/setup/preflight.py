"""What can be refused at once: names, paths and devices that cannot work, found before anything heavy is imported."""

from __future__ import annotations

import re

from kmine.config import LoopConfig
from kmine.data import open_source
from kmine.data.source import Source
from kmine.errors import UserError, unknown_name
from kmine.models import ARCHITECTURES
from kmine.segmenters import SEGMENTERS, check_prompting


def preflight(cfg: LoopConfig, *, mines: bool = True) -> Source:
    """The opened data source; no pixel is read. The segmenter is checked only if the command `mines`.

    Raises:
        UserError: an unknown model, segmenter, device or data set, prompts that the segmenter cannot answer, or a data
            set that is not where it should be.
    """
    for model in cfg.model.split():
        if model and model.name not in ARCHITECTURES:
            raise unknown_name("model.name", model.name, ARCHITECTURES)
    if mines:
        SEGMENTERS.get(cfg.segmenter.name)
        if cfg.rounds:
            check_prompting(cfg.segmenter.name, cfg.prompts)
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", cfg.device):
        raise UserError(f"device: expected auto, cpu, cuda or cuda:N, got {cfg.device!r}")
    return open_source(cfg.data)

"""Promptable segmenters. Importing this package loads no torch."""

from __future__ import annotations

from kmine.segmenters.base import Embedding, Segmenter
from kmine.segmenters.registry import (
    SEGMENTERS,
    check_prompting,
    create_segmenter,
    fetch_weights,
    fitted_prompts,
    needs_box,
    open_segmenter,
    register_segmenter,
)

__all__ = ["SEGMENTERS", "Embedding", "Segmenter", "check_prompting", "create_segmenter"]
__all__ += ["fetch_weights", "fitted_prompts", "needs_box", "open_segmenter", "register_segmenter"]

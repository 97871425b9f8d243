"""Promptable segmenters; the sole home of segment_anything.

Importing this costs no torch: a segmenter's own libraries load when it is opened.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from kmine.config import PromptsConfig, SegmenterConfig
from kmine.errors import UserError, unknown_name
from kmine.segmenters.base import (
    Embedding,
    Segmenter,
    box_required_error,
    no_proposals_error,
)

__all__ = ["REGISTRY", "Embedding", "Segmenter", "check_prompting", "fetch_weights", "open_segmenter"]

LogFn = Callable[[str], None]
"""Is told a sentence for the user."""


def _open_ellipse(cfg: SegmenterConfig, device: str, offline: bool, log: LogFn) -> Segmenter:
    from kmine.segmenters.ellipse import Ellipse

    if cfg.checkpoint is not None:
        raise UserError(
            f"segmenter.checkpoint: the segmenter `ellipse` has no weights, got {cfg.checkpoint!r}; "
            "leave it out, or name the architecture of the file with --segmenter.name sam_vit_b"
        )
    return Ellipse()


def _open_tiny(cfg: SegmenterConfig, device: str, offline: bool, log: LogFn) -> Segmenter:
    from kmine.segmenters.tiny.segmenter import open_tiny
    from kmine.segmenters.tiny.weights import SHIPPED

    # The config's batch size counts images that are encoded at once; here nothing is.
    if cfg.checkpoint is None:
        return open_tiny(SHIPPED, device=device)
    path = Path(cfg.checkpoint).expanduser()
    return open_tiny(path, name=f"tiny:{path.stem}", device=device)


def _open_sam(cfg: SegmenterConfig, device: str, offline: bool, log: LogFn) -> Segmenter:
    from kmine.segmenters.embedding_cache import EmbeddingCache, default_folder
    from kmine.segmenters.sam.segmenter import SamSegmenter, build_sam
    from kmine.segmenters.weights import default_cache_dir, download_weights, is_official

    name = cfg.name
    if cfg.checkpoint is None:
        path = download_weights(cfg.name, default_cache_dir(), offline)
    else:
        path = Path(cfg.checkpoint).expanduser()
        if not is_official(cfg.name, path):
            name = f"{cfg.name}:{path.stem}"
    folder = Path(cfg.cache_dir).expanduser() if cfg.cache_dir else default_folder()
    return SamSegmenter(
        build_sam(cfg.name, path),
        name=name,
        device=device,
        batch_size=cfg.batch_size,
        cache=EmbeddingCache(folder, int(cfg.cache_gb * 1e9), log) if cfg.cache_gb else None,
        dtype=cfg.cache_dtype,
        log=log,
    )


REGISTRY: dict[str, Callable[[SegmenterConfig, str, bool, LogFn], Segmenter]] = {
    "ellipse": _open_ellipse,
    "tiny": _open_tiny,
    "sam_vit_b": _open_sam,
    "sam_vit_l": _open_sam,
    "sam_vit_h": _open_sam,
}
"""Name -> what opens it, from (config, device, offline, say)."""


NEEDS_BOX = ("ellipse", "tiny")
"""Those that do not answer points alone."""
NO_PROPOSALS = ("ellipse",)
"""Those that are not `AutomaticMaskGenerator`."""


def check_prompting(name: str, prompts: PromptsConfig) -> None:
    """Refuses prompts that the segmenter of that name cannot answer, before it is opened or anything is trained.

    Raises:
        UserError: points without a box, or proposals, from a segmenter that has no use for them or none.
    """
    if name in NEEDS_BOX and not prompts.box:
        raise box_required_error(name)
    if name in NO_PROPOSALS and prompts.source == "auto":
        raise no_proposals_error(name)


def fetch_weights(cfg: SegmenterConfig, *, offline: bool) -> None:
    """Sees to it that the file of a segmenter's weights is there, before several runs want it; it is not read.

    Raises:
        UserError: the checkpoint is missing, or the official one, and it cannot be downloaded.
    """
    from kmine.segmenters.weights import (
        OFFICIAL_WEIGHTS,
        default_cache_dir,
        download_weights,
        require_checkpoint,
    )

    if cfg.checkpoint is not None:
        require_checkpoint(Path(cfg.checkpoint).expanduser())
    elif cfg.name in OFFICIAL_WEIGHTS:
        download_weights(cfg.name, default_cache_dir(), offline)


def open_segmenter(cfg: SegmenterConfig, *, device: str, offline: bool, log: LogFn = lambda text: None) -> Segmenter:
    """The segmenter that the config names, with its weights loaded.

    Its `name` is the config's; a checkpoint that is not the official file is named as well: `sam_vit_b:medsam`,
    `tiny:mine`.

    Args:
        cfg: name, checkpoint, batch size, cache of embeddings.
        device: a torch device, `cpu`, `cuda` or `cuda:1`; `auto` is resolved by the caller.
        offline: forbid the download of missing weights.
        log: is told what happens later on that the user should know, in one sentence each.

    Raises:
        UserError: an unknown name, weights that are missing, damaged or of another architecture, a failed download.
    """
    if cfg.name not in REGISTRY:
        raise unknown_name("segmenter.name", cfg.name, REGISTRY)
    return REGISTRY[cfg.name](cfg, device, offline, log)

"""Segmenters by name. Importing this module loads no torch: a segmenter's libraries load when it is opened."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from kmine.config import PromptsConfig, SegmenterConfig
from kmine.errors import UserError
from kmine.io.plugins import Registry
from kmine.segmenters.base import (
    AutomaticMaskGenerator,
    MemorySegmenter,
    Segmenter,
    abilities_of,
    box_required_error,
    no_memory_error,
    no_proposals_error,
)
from kmine.segmenters.hf.files import PREFIX, model_folder, require_transformers

LogFn = Callable[[str], None]
"""Gets messages for the user, one line each."""
SegmenterFactory = Callable[[SegmenterConfig, str, bool, LogFn], Segmenter]
"""Opens a segmenter from (settings, torch device, offline, log), called with positional arguments.

`checkpoint` is the user's file, or None for the default weights. Offline forbids downloads. A user's mistake is a
`kmine.UserError` of one line with what was expected, what came, and the cure.
"""

BOXES_ALONE = ("medsam", "lite_medsam")
"""Those that were trained with boxes alone, for one mask."""
NEEDS_BOX = ("ellipse", "tiny", *BOXES_ALONE)
"""Built-in segmenters that do not take points without a box."""
NO_PROPOSALS = ("ellipse", *BOXES_ALONE)
"""Built-in segmenters that are not `AutomaticMaskGenerator`."""


def _open_ellipse(cfg: SegmenterConfig, device: str, offline: bool, log: LogFn) -> Segmenter:
    from kmine.segmenters.ellipse import Ellipse

    if cfg.checkpoint is not None:
        raise UserError(
            f"segmenter.checkpoint: the segmenter `ellipse` has no weights, got {cfg.checkpoint!r}; "
            "remove it, or name the architecture of the file with --segmenter.name sam_vit_b"
        )
    return Ellipse()


def _open_tiny(cfg: SegmenterConfig, device: str, offline: bool, log: LogFn) -> Segmenter:
    from kmine.segmenters.tiny import SHIPPED
    from kmine.segmenters.tiny.segmenter import open_tiny

    # The batch size of the settings counts images that are encoded; `tiny` encodes none.
    if cfg.checkpoint is None:
        return open_tiny(SHIPPED, device=device)
    path = Path(cfg.checkpoint)
    return open_tiny(path, name=f"tiny:{path.stem}", device=device)


def _open_sam(cfg: SegmenterConfig, device: str, offline: bool, log: LogFn) -> Segmenter:
    from kmine.io.files import default_cache_dir
    from kmine.segmenters.sam.build import build_sam, feed_of
    from kmine.segmenters.sam.segmenter import SamSegmenter
    from kmine.segmenters.weights import is_official, weights_path

    name = cfg.name
    path = weights_path(name, cfg.checkpoint, default_cache_dir(), offline)
    if cfg.checkpoint is not None and not is_official(name, path):
        name = f"{name}:{path.stem}"
    multimask = False if cfg.name in BOXES_ALONE else None
    sam, settings = build_sam(cfg.name, path), _encoding(cfg, log)
    return SamSegmenter(sam, name=name, feed=feed_of(cfg.name), device=device, multimask=multimask, **settings)


def _open_hf(cfg: SegmenterConfig, device: str, offline: bool, log: LogFn) -> Segmenter:
    require_transformers()
    from kmine.segmenters.hf.open import open_hf

    if cfg.checkpoint is not None:
        raise UserError(
            f"segmenter.checkpoint: the segmenter {cfg.name} has its own weights, got {cfg.checkpoint!r}; remove it, "
            "or name the folder with those weights: --segmenter.name hf:FOLDER"
        )
    folder = model_folder(cfg.name.removeprefix(PREFIX), offline)
    return open_hf(cfg.name, folder, device, **_encoding(cfg, log))


def _encoding(cfg: SegmenterConfig, log: LogFn) -> dict[str, Any]:
    """Settings of a `CachedEncoder`."""
    from kmine.segmenters.embedding_cache import EmbeddingCache, default_folder

    folder = Path(cfg.cache_dir) if cfg.cache_dir else default_folder()
    budget = None if cfg.cache_gb is None else int(cfg.cache_gb * 1e9)
    cache = None if budget == 0 else EmbeddingCache(folder, budget, log)
    return {"batch_size": cfg.batch_size, "cache": cache, "dtype": cfg.cache_dtype, "log": log}


SAMS = ("sam_vit_b", "sam_vit_l", "sam_vit_h", "medsam", "mobile_sam", "lite_medsam")
"""Segmenters built from SAM's official modules."""
SEGMENTERS: Registry[SegmenterFactory] = Registry(
    "segmenter.name",
    "kmine.segmenters",
    {"ellipse": _open_ellipse, "tiny": _open_tiny, **dict.fromkeys(SAMS, _open_sam)},
    "; weights of your own go with their architecture (--segmenter.name sam_vit_b --segmenter.checkpoint FILE), models "
    "of transformers are named hf:OWNER/NAME or hf:FOLDER, your own segmenter package.module:Class",
    {PREFIX: _open_hf},
)


def register_segmenter(name: str, factory: SegmenterFactory) -> None:
    """Add a segmenter to the choices of `segmenter.name` in this process.

    A name that was added before is replaced. Commands find the segmenters of installed packages by entry points of the
    group `kmine.segmenters`, whose objects are factories. Factories return a `kmine.segmenters.base.Segmenter`.

    Raises:
        UserError: an empty name, or one of kmine's own.

    Example:
        >>> from kmine.segmenters.ellipse import Ellipse
        >>> class Named(Ellipse):
        ...     name = "my_ellipse"
        >>> register_segmenter("my_ellipse", lambda cfg, device, offline, log: Named())
        >>> create_segmenter("my_ellipse").name
        'my_ellipse'
    """
    SEGMENTERS.register(name, factory)


def create_segmenter(
    name: str = SegmenterConfig.name,
    *,
    checkpoint: str | Path | None = SegmenterConfig.checkpoint,
    device: str = "cpu",
    offline: bool = False,
) -> Segmenter:
    """Open a segmenter; images are encoded once, then any number of prompts is decoded.

    `encode(images)` takes (H, W, 3) uint8 RGB images of any sizes and returns one embedding per image.
    `decode(embeddings, prompts)` takes one list of `kmine.types.Prompts` per embedding: boxes (4,) XYXY and points
    (P, 2) as (x, y), both in pixels of the image, and mask inputs (H, W) of logits. It returns one list per embedding
    with one `kmine.types.Candidate` per `Prompts`: masks (M, H, W) bool in the image's frame and scores (M,).

    Args:
        name: tiny, ellipse, sam_vit_b, sam_vit_l, sam_vit_h, medsam, mobile_sam, lite_medsam, hf: and an id of the hub
            or a folder, package.module:Class, or the name of a registered one.
        checkpoint: weights of that architecture; None: the shipped ones of `tiny`, the official ones of SAM.
        device: a torch device.
        offline: forbid the download of missing weights.

    Raises:
        UserError: an unknown name, weights that are missing, damaged or of another architecture, a failed download.

    Example:
        >>> import numpy as np
        >>> from kmine.types import Prompts
        >>> segmenter = create_segmenter("ellipse")
        >>> embeddings = segmenter.encode([np.zeros((40, 60, 3), np.uint8)])
        >>> box = np.array([10, 5, 40, 30], np.float32)
        >>> ((candidate,),) = segmenter.decode(embeddings, [[Prompts(class_id=1, box=box)]])
        >>> candidate.masks.shape
        (1, 40, 60)
    """
    cfg = SegmenterConfig(name=name, checkpoint=None if checkpoint is None else str(checkpoint))
    return open_segmenter(cfg, device=device, offline=offline)


def open_segmenter(cfg: SegmenterConfig, *, device: str, offline: bool, log: LogFn = lambda text: None) -> Segmenter:
    """The segmenter of the settings, with its weights loaded.

    Its `name` is that of the settings; a checkpoint that is not the official file is appended: `sam_vit_b:mine`,
    `tiny:mine`. `device` is a torch device, not `auto`; `log` gets later warnings.

    Raises:
        UserError: as `create_segmenter`; a plug-in that returns no segmenter.
    """
    segmenter = SEGMENTERS.get(cfg.name)(cfg, device, offline, log)
    lacking = [part for part in ("name", "signature", "encode", "decode") if not hasattr(segmenter, part)]
    if lacking:
        raise UserError(
            f"segmenter.name: {cfg.name} expected to give a kmine.segmenters.Segmenter, got a "
            f"{type(segmenter).__name__} without {', '.join(lacking)}; see docs/segmenters.md"
        )
    return segmenter


def fitted_prompts(segmenter: Segmenter, prompts: PromptsConfig) -> PromptsConfig:
    """The settings without the prompts that the segmenter does not take.

    Raises:
        UserError: nothing is left, or a source of prompts that the segmenter does not support.
    """
    able = abilities_of(segmenter)
    has_box, has_points = prompts.box and able.box, prompts.points and able.points
    if not (has_box or has_points):
        if able.points:
            raise UserError(
                f"prompts.points: the segmenter `{segmenter.name}` takes points, no boxes; got prompts.points false; "
                "set --prompts.points true, or choose another segmenter with --segmenter.name"
            )
        raise box_required_error(segmenter.name)
    if prompts.source == "cascade" and not able.mask_input:
        raise UserError(
            f"prompts.source: cascade expects a segmenter that takes mask prompts, `{segmenter.name}` does not; set "
            "--prompts.source local"
        )
    if prompts.source == "auto" and not (able.points and isinstance(segmenter, AutomaticMaskGenerator)):
        raise no_proposals_error(segmenter.name)
    if prompts.source == "memory" and not isinstance(segmenter, MemorySegmenter):
        raise no_memory_error(segmenter.name)
    return replace(prompts, box=has_box, points=has_points, mask_hint=prompts.mask_hint and able.mask_input)


def needs_box(segmenter: Segmenter) -> bool:
    """Whether a segmenter takes no points without a box."""
    return re.split("[:+]", segmenter.name)[0] in NEEDS_BOX or not abilities_of(segmenter).points


def check_prompting(name: str, prompts: PromptsConfig) -> None:
    """Raise `UserError` for what a built-in segmenter cannot do, or lacks, before training."""
    from kmine.segmenters.weights import OFFICIAL_WEIGHTS

    if name.startswith(PREFIX):
        require_transformers()
    if name in NEEDS_BOX and not prompts.box:
        raise box_required_error(name)
    if (name in NO_PROPOSALS or name.startswith(PREFIX)) and prompts.source == "auto":
        raise no_proposals_error(name)
    if prompts.source == "memory" and name in (*NEEDS_BOX, *OFFICIAL_WEIGHTS):
        raise no_memory_error(name)


def fetch_weights(cfg: SegmenterConfig, *, offline: bool) -> None:
    """Download the weights of a built-in segmenter before several runs need them; they are not read.

    Raises:
        UserError: the checkpoint is missing, or the official one, and it cannot be downloaded.
    """
    from kmine.io.files import default_cache_dir
    from kmine.segmenters.weights import require_checkpoint, weights_path

    if not SEGMENTERS.is_builtin(cfg.name):
        return
    if cfg.name.startswith(PREFIX):
        require_transformers()
        model_folder(cfg.name.removeprefix(PREFIX), offline)
    elif cfg.checkpoint is not None:
        require_checkpoint(Path(cfg.checkpoint))
    elif cfg.name in SAMS:
        weights_path(cfg.name, None, default_cache_dir(), offline)

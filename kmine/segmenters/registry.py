"""Segmenters by name. Importing this module loads no torch: a segmenter's libraries load when it is opened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from kmine.config import PromptsConfig, SegmenterConfig
from kmine.errors import UserError
from kmine.io.plugins import Registry
from kmine.segmenters.base import Segmenter, box_required_error, no_proposals_error

LogFn = Callable[[str], None]
"""Gets messages for the user, one line each."""
SegmenterFactory = Callable[[SegmenterConfig, str, bool, LogFn], Segmenter]
"""Opens a segmenter from (settings, torch device, offline, log), called with positional arguments.

`checkpoint` is the user's file, or None for the default weights. Offline forbids downloads. A user's mistake is a
`kmine.UserError` of one line with what was expected, what came, and the cure.
"""

NEEDS_BOX = ("ellipse", "tiny")
"""Built-in segmenters that do not take points without a box."""
NO_PROPOSALS = ("ellipse",)
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
    from kmine.segmenters.embedding_cache import EmbeddingCache, default_folder
    from kmine.segmenters.sam.build import build_sam
    from kmine.segmenters.sam.segmenter import SamSegmenter
    from kmine.segmenters.weights import download_weights, is_official

    name = cfg.name
    if cfg.checkpoint is None:
        path = download_weights(name, default_cache_dir(), offline)
    else:
        path = Path(cfg.checkpoint)
        if not is_official(name, path):
            name = f"{name}:{path.stem}"
    folder = Path(cfg.cache_dir) if cfg.cache_dir else default_folder()
    return SamSegmenter(
        build_sam(cfg.name, path),
        name=name,
        device=device,
        batch_size=cfg.batch_size,
        cache=EmbeddingCache(folder, int(cfg.cache_gb * 1e9), log) if cfg.cache_gb else None,
        dtype=cfg.cache_dtype,
        log=log,
    )


SEGMENTERS: Registry[SegmenterFactory] = Registry(
    "segmenter.name",
    "kmine.segmenters",
    {"ellipse": _open_ellipse, "tiny": _open_tiny, **dict.fromkeys(("sam_vit_b", "sam_vit_l", "sam_vit_h"), _open_sam)},
    "; MedSAM and other weights go with their architecture: --segmenter.name sam_vit_b --segmenter.checkpoint FILE",
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
        name: tiny, ellipse, sam_vit_b, sam_vit_l, sam_vit_h, or the name of a registered one.
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

    Its `name` is that of the settings; a checkpoint that is not the official file is appended: `sam_vit_b:medsam`,
    `tiny:mine`. `device` is a torch device, not `auto`; `log` gets later warnings.

    Raises:
        UserError: as `create_segmenter`.
    """
    return SEGMENTERS.get(cfg.name)(cfg, device, offline, log)


def check_prompting(name: str, prompts: PromptsConfig) -> None:
    """Raise `UserError` for points without a box or proposals that a built-in segmenter cannot do, before training."""
    if name in NEEDS_BOX and not prompts.box:
        raise box_required_error(name)
    if name in NO_PROPOSALS and prompts.source == "auto":
        raise no_proposals_error(name)


def fetch_weights(cfg: SegmenterConfig, *, offline: bool) -> None:
    """Download the weights of a built-in segmenter before several runs need them; they are not read.

    Raises:
        UserError: the checkpoint is missing, or the official one, and it cannot be downloaded.
    """
    from kmine.io.files import default_cache_dir
    from kmine.segmenters.weights import OFFICIAL_WEIGHTS, download_weights, require_checkpoint

    if not SEGMENTERS.is_builtin(cfg.name):
        return
    if cfg.checkpoint is not None:
        require_checkpoint(Path(cfg.checkpoint))
    elif cfg.name in OFFICIAL_WEIGHTS:
        download_weights(cfg.name, default_cache_dir(), offline)

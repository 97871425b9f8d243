"""UniMatch (arXiv 2208.09910): confident targets made anew at every step, two strong views, and perturbed features.

Own reading, as `kmine.methods.fixmatch`, with two differences from it: each unlabeled image has two strong views (same
place; colours, sharpness and CutMix drawn for each), and the targets are those of a teacher, the exponential moving
average of the model's weights (ours; the paper's model makes its own).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

from kmine.io.files import sign
from kmine.methods.fixmatch import fixmatch_consistency, require_views
from kmine.training.fit import Consistency
from kmine.training.rounds import train_rounds
from kmine.training.task import Task
from kmine.types import RoundResult

METHOD_DIR = "unimatch"


def unimatch(task: Task) -> Iterator[RoundResult]:
    """Round 0 of mining, then as many rounds and steps on labels and on the teacher's confident predictions.

    These, on the weak view of an unlabeled image, are the labels of its two strong views and of the weak view with
    channels dropped. The teacher is validated and kept. Masks, stored pseudo masks and image-level labels of unlabeled
    images are not read. With weight 0 no unlabeled image takes part.

    Raises:
        UserError: no place for unlabeled images in a batch (`fit.labeled_share`), or `fit.augment` is off.
    """
    cfg = task.cfg.unimatch
    require_views(task, METHOD_DIR, cfg.weight)
    views = {"strong": True, "num_strong": 2, "cutmix": cfg.cutmix, "ema_decay": cfg.decay}
    loss = fixmatch_consistency(cfg, has_teacher=True)
    consistency = Consistency(sign(METHOD_DIR, asdict(cfg)), loss, **views)
    return train_rounds(task, METHOD_DIR, lambda _: {"consistency": consistency} if cfg.weight else {})

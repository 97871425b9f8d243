"""The one thing to do next where a run kept no mask, or does not show that mining helped."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from kmine.config.mining import ENCODING
from kmine.data.quality.examine import FEW
from kmine.data.source import Source
from kmine.mining.calibration.fit import MIN_OBJECTS
from kmine.models.encoder_hub import PREFIX, weights_name
from kmine.ops.metrics import correction_text
from kmine.ops.statistics import SMALL_SPLIT, Paired
from kmine.store.run_folder import RunFolder
from kmine.store.tables import DecisionRow
from kmine.training.task import Task

OTHER_OUT = "then the same command with another --out"


@dataclass(frozen=True)
class Outcome:
    """What a finished run shows, for `next_step`."""

    kept_none: bool
    """Whether the last round kept no pseudo mask."""
    gain: Paired | None
    """Of mining over the baseline, with its interval; None where there are too few images for one."""
    num_labeled: int
    num_masked: int
    """Images with masks in use: labeled and validation ones."""
    num_test: int
    """Images of the test split."""
    can_fold: bool
    """Whether the same command may take data.folds."""
    missing_weights: str
    """Name of the encoder's weights, empty if training began with some."""
    has_sam: bool
    correction: Sequence[float | None]
    """Wrong pixels of the fold models on labeled images that mining corrects, and newly broken ones, as shares of the
    wrong ones; empty if unknown."""
    reasons: str
    """The most frequent reason of the last round's decisions, with its share."""


def outcome_of(
    task: Task, source: Source, decisions: Sequence[DecisionRow], gain: Paired | None, *, kept_none: bool
) -> Outcome:
    """The outcome of a run on `source` with the `decisions` of its last round."""
    model, data = task.cfg.model, task.cfg.data
    calibration = task.run.read_json(task.run.root / "calibration" / "calibration.json") or {}
    reason, count = Counter(row.reason for row in decisions).most_common(1)[0] if decisions else ("", 0)
    return Outcome(
        kept_none=kept_none,
        gain=gain,
        num_labeled=len(task.labeled),
        num_masked=len(task.labeled) + len(task.val),
        num_test=_num_test(task.run),
        can_fold=not (data.folds or data.split_file or all(ref.split for ref in source.refs())),
        missing_weights="" if model.is_pretrained else weights_name(model.name, model.encoder),
        has_sam=task.cfg.segmenter.name.startswith(ENCODING),
        correction=calibration.get("correction") or (),
        reasons=f"most often {reason} ({count} of {len(decisions)})" if reason else "nothing to mine",
    )


def next_commands(run: RunFolder) -> list[tuple[str, str]]:
    """What to type after a run, and what for."""
    root = shlex.quote(str(run.root))
    num_test = _num_test(run)
    return [
        (f"kmine audit {root}", "review and mend the masks, the most doubtful first"),
        (f"kmine next {root}", "which images to label next"),
        *([(f"kmine compare {root}", f"figures of the {num_test} test images, with intervals")] if num_test else []),
        (f"kmine predict {root} IMAGES --out masks", "masks of new images"),
    ]


def _num_test(run: RunFolder) -> int:
    return sum(row["split"] == "test" for row in run.read_csv("splits.csv") or ())


def next_step(outcome: Outcome) -> str:
    """One sentence: what the run does not show, and what to do next; empty where mining is shown to help.

    The first of these that applies (own choice of order, cheapest first): pretrained weights, the test split, folds,
    another segmenter, more labels.
    """
    gain, few = outcome.gain, outcome.gain is None or math.isnan(outcome.gain.low)
    if outcome.kept_none:
        problem = f"no mask was kept, {outcome.reasons}"
    elif few:
        problem = "too few validation images to show whether mining helped"
    elif gain.low <= 0:
        problem = f"no gain by mining is shown ({gain.difference:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}])"
    else:
        return ""
    return f"{problem}; next: {_cure(outcome, few=few and not outcome.kept_none)}"


def _cure(outcome: Outcome, *, few: bool) -> str:
    if name := outcome.missing_weights:
        return f"begin with ImageNet weights: kmine weights get {PREFIX}{name}, {OTHER_OUT}"
    if few and outcome.num_test >= SMALL_SPLIT:
        return f"kmine compare with this folder, which tests on {outcome.num_test} images"
    if few and outcome.can_fold and outcome.num_masked >= FEW:
        return "--data.folds 5 with another --out, which tests on every image with a mask"
    if (shares := outcome.correction) and None not in shares and shares[0] <= shares[1]:
        other = "--segmenter.checkpoint of your modality" if outcome.has_sam else "--segmenter.name sam_vit_b"
        why = f"of labeled images this one breaks as many pixels as it corrects ({correction_text(shares)})"
        return f"another segmenter ({other}), as {why}"
    number = max(MIN_OBJECTS - outcome.num_labeled, math.ceil(outcome.num_labeled / 2))
    return f"label about {number} more images, which kmine next -n {number} with this folder chooses; {OTHER_OUT}"

"""The audit of a finished run: rows of audit.csv as a table, and the files that `kmine audit` writes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from kmine import cli
from kmine.audit.evidence import rank_all_masks
from kmine.audit.export import export_masks
from kmine.audit.history import COLUMNS, MaskHistory
from kmine.audit.reports import MaskReport
from kmine.audit.rounds import AuditedRun, open_audit
from kmine.audit.truth import Stratum, corrections, figures, withheld_dice
from kmine.io.errors import expanded
from kmine.io.files import write_csv
from kmine.mining.gate import why_none_is_kept
from kmine.ops.metrics import correction_text, nanmean
from kmine.report.audit.page import write_page
from kmine.setup.open import open_withheld
from kmine.setup.provenance import peak_memory_mb
from kmine.types import ProgressReporter

if TYPE_CHECKING:
    import pandas as pd

NUM_LOGGED, MAX_SHOWN = 5, 5000
"""Masks of each kind in the log, and on the page with their pictures; audit.csv has all."""


def audit_run(
    run: str | PathLike[str],
    *,
    labeled: bool = True,
    round_idx: int | None = None,
    device: str = "auto",
    data_root: str | None = None,
    progress: ProgressReporter | None = None,
) -> pd.DataFrame:
    """Rank the pseudo masks and the given masks of a finished run by how suspicious they are.

    Withheld masks are not opened. Fold models that the run lacks are trained for `labeled` and kept in the run folder.

    Args:
        run: the run folder, or a `kmine.Run`.
        labeled: rank the given masks too.
        round_idx: round of the pseudo masks; None: that of the masks of the kept model.
        device: auto, cpu, cuda or cuda:N.
        data_root: where the data lie now, if they were moved.
        progress: receives the progress; None is silent.

    Returns:
        The rows of audit.csv: pseudo masks, then given masks, each most suspicious first. `suspicion` is in [0, 1],
        `causes` holds the reasons, `mask_signature` identifies the mask.

    Raises:
        UserError: no finished run, no such round, missing pseudo masks, data that cannot be opened.

    Example:
        >>> audit_run("runs/phantom").head(10)[["sample_id", "suspicion", "causes"]]  # doctest: +SKIP
    """
    import pandas as pd

    progress = progress or cli.Terminal(quiet=True)
    root = expanded(run)
    with open_audit(root, progress, round_idx=round_idx, device=device, data_root=data_root) as audited:
        pseudo, given = rank_all_masks(audited.task, audited.rounds, audited.audited_round, with_labeled=labeled)
        history = MaskHistory(audited)
        return pd.DataFrame([history.row(report) for report in chain(pseudo, given)], columns=list(COLUMNS))


def write_audit(
    audited: AuditedRun, out: Path, log: Callable[[str], None], *, labeled: bool, with_withheld: bool, export: str
) -> None:
    """Write audit.csv, audit.html with its folders, strata.csv with `with_withheld`, and the export into `out`.

    `labeled`: audit the given masks too. `with_withheld`: open withheld masks for true Dice, calibration and strata;
    logged in run.json. `export`: as `kmine audit --help` has it.
    """
    began = time.perf_counter()
    pseudo, given = rank_all_masks(audited.task, audited.rounds, audited.audited_round, with_labeled=labeled)
    if not pseudo:
        mined = audited.audited_round
        reasons = [*mined.decisions.firsts("reason").values()]
        log(f"round {mined.round_idx} kept no mask, only given ones are ranked: {why_none_is_kept(reasons)}")
    history = MaskHistory(audited)
    truth, withheld, charts, changed = None, None, {}, {}
    if with_withheld:
        withheld = open_withheld(audited.task, audited.source)
        truth = withheld_dice(audited, pseudo, withheld)
        true_charts, table = figures(audited, pseudo, truth)
        charts |= true_charts
        changed = {n: correction_text(found.shares) for n, found in corrections(audited, withheld).items()}
        # By signature: the masks of a round may be made anew.
        audited.store.update_run(corrections={audited.store.round_signature(n): t for n, t in changed.items()})
        write_csv(out / "strata.csv", Stratum._fields, table)
    rows = (history.row(report, truth) for report in chain(pseudo, given))
    write_csv(out / "audit.csv", COLUMNS, ([row[name] for name in COLUMNS] for row in rows))
    if export != "none":
        log(f"exported: {export_masks(audited, export, out, (pseudo, given))}")
    shown = [*pseudo[:MAX_SHOWN], *given[:MAX_SHOWN]]
    summary = _summary(audited, pseudo, given, truth) | _corrections(audited, changed)
    if len(shown) < len(pseudo) + len(given):
        summary["on this page"] = f"the {MAX_SHOWN:,} most suspicious masks of each kind; all are in audit.csv"
    page = write_page(
        out,
        history.items(shown, out, truth, withheld),
        title=f"Audit of {audited.name}",
        run_name=audited.name,
        run_signature=audited.signature,
        class_names=audited.source.class_names,
        summary=summary,
        figures=charts,
    )
    for report in (*pseudo[:NUM_LOGGED], *given[:NUM_LOGGED]):
        explanation = "; ".join(report.explanations) or "no signal stands out"
        log(f"{report.kind} {report.rank}. {report.sample_id} ({report.suspicion:.2f}): {explanation}")
    log(
        f"{len(pseudo)} pseudo masks of round {audited.audited_round.round_idx} and {len(given)} given masks in "
        f"{time.perf_counter() - began:.0f} s, {peak_memory_mb()} MB"
    )
    log(f"table: {out / 'audit.csv'}   page: {page}")


def _corrections(audited: AuditedRun, by_round: Mapping[int, str]) -> dict[str, str]:
    """Lines of the summary: shares of the local model's wrong pixels corrected and newly broken by pseudo masks."""
    record = audited.store.read_json(audited.store.root / "calibration" / "calibration.json") or {}
    name = "wrong pixels of the local model corrected / newly broken"
    lines = {f"{name}, labeled images by fold models": correction_text(record.get("correction"))}
    return lines | {f"{name}, round {n}, withheld masks": text for n, text in by_round.items()}


def _summary(
    audited: AuditedRun, pseudo: Sequence[MaskReport], given: Sequence[MaskReport], truth: Mapping[str, float] | None
) -> dict[str, str | int | float]:
    estimate = nanmean([audited.audited_round.mean_estimate(report.sample_id) for report in pseudo])
    true_dice = nanmean([*(truth or {}).values()])
    summary: dict[str, str | int | float] = {
        "pseudo masks": len(pseudo),
        "given masks": len(given),
        "round": audited.audited_round.round_idx,
        "segmenter": str(audited.info.get("segmenter", "")),
        "models compared with": " ".join(sorted({name for report in pseudo for name in report.model_names})) or "none",
    }
    means = {"mean estimated Dice": estimate, "mean true Dice (withheld masks)": true_dice}
    return summary | {name: round(value, 3) for name, value in means.items() if value == value}

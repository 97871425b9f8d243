"""`python -m kmine.audit RUN`: the pseudo masks of a finished run, the most suspicious first, and what a person says.

Writes RUN/audit/: audit.csv with the whole story of every mask, audit.html to look through, and exports. Withheld masks
stay closed unless `--with_withheld` asks for them; run.json then says that they were opened.
"""

from __future__ import annotations

import csv
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kmine import cli
from kmine.config import LoopConfig
from kmine.errors import UserError
from kmine.io.files import atomic_open
from kmine.setup.finished import load_settings
from kmine.store.run_folder import RunFolder

if TYPE_CHECKING:
    from kmine.audit.evidence import AuditedRun, MaskReport
    from kmine.audit.history import MaskHistory

DESCRIPTION = """Look through the pseudo masks of a finished run, the most suspicious first: audit.csv and audit.html in
RUN/audit. The given masks are looked at as well, by models that were trained without them. With --verdicts, take what a
person said of them back into the run."""
MAX_NAMED = 5
"""Of ids in a message."""


@dataclass(frozen=True)
class AuditConfig:
    """Everything `python -m kmine.audit` can be told."""

    run: list[str] = field(default_factory=list)
    """The run folder of a finished kmine.loop."""
    out: str | None = None
    """Folder for audit.csv, audit.html and exports; default: audit in the run folder."""
    round: int | None = None
    """Whose pseudo masks; default: those of the last adopted round."""
    no_labeled: bool = False
    """Leave the given masks alone, and train no models for them where the run has none."""
    with_withheld: bool = False
    """Open the withheld masks of the unlabeled images, where there are any: true Dice, calibration, strata.

    Off unless asked: who has looked at them cannot unsee them when the next settings are chosen."""
    export: Literal["none", "coco", "masks", "labelstudio"] = "none"
    """Also write the masks for other tools: COCO run lengths, PNG (NIfTI for volumes), Label Studio."""
    verdicts: str | None = None
    """A verdicts.json saved from audit.html: checked, and stored in the run. Nothing else is done then."""
    corrected: str | None = None
    """With or without verdicts: corrected masks, a folder of PNG or NIfTI, a COCO file or a Label Studio export."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    data_root: str | None = None
    """Where the data lie now, if not where the run found them; of your own files, the folder that holds them all."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    prog, words = "kmine audit", list(sys.argv[1:] if argv is None else argv)
    # `--no-labeled` is how one would write it.
    words = [_as_setting(word) for word in words]
    cfg = cli.parse(AuditConfig, words, prog=prog, description=DESCRIPTION, positional="run")
    return cli.guarded(prog, lambda: run_audit(cfg))


def _as_setting(word: str) -> str:
    return {"--no-labeled": "--no_labeled", "--with-withheld": "--with_withheld"}.get(word, word)


def run_audit(cfg: AuditConfig) -> int:
    """Audit a run, or take verdicts into it."""
    if len(cfg.run) != 1:
        raise UserError(f"expected one run folder, got {len(cfg.run)}; audit them one at a time")
    for name in ("verdicts", "corrected"):
        path = getattr(cfg, name)
        if path is not None and not Path(path).exists():
            raise UserError(f"--{name} {path}: no such file; check the path")
    loop = _settings(Path(cfg.run[0]), cfg)
    store, terminal, began = RunFolder(Path(cfg.run[0])), cli.Terminal(), time.perf_counter()
    try:
        audited = _open(store, loop, cfg, terminal)
        if cfg.verdicts is not None or cfg.corrected is not None:
            from kmine.audit.import_verdicts import import_verdicts

            verdicts, corrected = (None if name is None else Path(name) for name in (cfg.verdicts, cfg.corrected))
            import_verdicts(audited, verdicts, corrected, terminal.log)
            return 0
        return _write_audit(audited, cfg, terminal, began)
    finally:
        terminal.stop()
        store.close()


def _settings(path: Path, cfg: AuditConfig) -> LoopConfig:
    """Of a finished run; nothing of it is opened."""
    if not (path / "run.json").is_file() or not (path / "config.yaml").is_file():
        raise UserError(f"{path}: expected a run folder with config.yaml and run.json, got none; run kmine.loop first")
    store = RunFolder(path)
    stopped_by = store.run().get("stopped_by")
    store.close()
    if stopped_by in (None, "interrupted"):
        raise UserError(f"{path}: the run is not finished (stopped_by {stopped_by}); resume it first")
    about = {"prog": "kmine audit", "description": DESCRIPTION}
    return load_settings(path, device=cfg.device, data_root=cfg.data_root, **about)


def _open(store: RunFolder, loop: LoopConfig, cfg: AuditConfig, terminal: cli.Terminal) -> AuditedRun:
    from kmine.audit.evidence import AuditedRun, load_rounds, select_round

    rounds = load_rounds(store)
    audited_round = select_round(rounds, cfg.round, store.root)
    missing = [i for i in audited_round.pseudo_labeled if not store.pseudo_path(audited_round.round_idx, i).is_file()]
    if missing:
        raise UserError(
            f"{store.root}: expected {len(audited_round.pseudo_labeled)} pseudo masks, that of {missing[0]} is missing; "
            "run the loop again"
        )
    from kmine.setup.open import open_for_audit
    from kmine.setup.preflight import preflight

    source = preflight(loop, mines=False)
    task = open_for_audit(loop, source, store, terminal)
    unknown = set(audited_round.pseudo_labeled).difference(task.unlabeled.ids)
    if unknown:
        raise UserError(
            f"{store.root}: round {audited_round.round_idx} mined {min(unknown)}, which is no unlabeled image of it"
        )
    return AuditedRun(store, store.run(), source, task, rounds, audited_round)


# -- looking


def _write_audit(audited: AuditedRun, cfg: AuditConfig, terminal: cli.Terminal, began: float) -> int:
    from kmine.audit.evidence import rank_all_masks
    from kmine.audit.history import COLUMNS
    from kmine.setup.provenance import peak_memory_mb

    out = Path(cfg.out) if cfg.out else audited.store.root / "audit"
    pseudo, labeled = rank_all_masks(
        audited.task, audited.rounds, audited.audited_round, with_labeled=not cfg.no_labeled
    )
    history, reports = _mask_history(audited), [*pseudo, *labeled]
    truth, withheld, figures = None, None, _explanations_chart(pseudo)
    if cfg.with_withheld:
        truth, withheld, charts = _open_truth(audited, pseudo, out)
        figures |= charts
    rows = (history.row(report, truth) for report in reports)
    _write_csv(out / "audit.csv", COLUMNS, ([row[name] for name in COLUMNS] for row in rows))
    if cfg.export != "none":
        terminal.log(f"exported: {_export(audited, cfg.export, out, reports)}")
    items = history.items(reports, {kind: audited.read(kind) for kind in ("pseudo", "labeled")}, out, truth, withheld)
    page = _page(out, items, audited, _summary(audited, pseudo, labeled, truth), figures)
    for report in (*pseudo[:MAX_NAMED], *labeled[:MAX_NAMED]):
        explanation = "; ".join(report.explanations) or "nothing stands out"
        terminal.log(f"{report.kind} {report.rank}. {report.sample_id} ({report.suspicion:.2f}): {explanation}")
    terminal.log(
        f"{len(pseudo)} pseudo masks of round {audited.audited_round.round_idx} and {len(labeled)} given masks in "
        f"{time.perf_counter() - began:.0f} s, {peak_memory_mb()} MB"
    )
    terminal.log(f"table: {out / 'audit.csv'}   page: {page}")
    return 0


def _mask_history(audited: AuditedRun) -> MaskHistory:
    from kmine.audit.history import MaskHistory

    store, prompting_rounds = audited.store, {mined_round.prompting_round for mined_round in audited.rounds}
    return MaskHistory(
        audited.task,
        store,
        audited.rounds,
        audited.audited_round,
        audited.source.class_names,
        str(audited.run.get("segmenter", "the segmenter")),
        str(audited.run.get("segmenter_sha256", "")),
        {n: store.weights_signature(store.round_dir(n) / "model.safetensors") for n in prompting_rounds},
    )


def _open_truth(audited: AuditedRun, pseudo: Sequence[MaskReport], out: Path) -> tuple[Any, Any, dict[str, str]]:
    """True Dice by sample, the pool it comes from, and charts."""
    from kmine.audit.truth import figures, withheld_dice
    from kmine.setup.open import open_withheld

    task = audited.task
    withheld = open_withheld(task, audited.source)
    truth = withheld_dice(pseudo, audited.read("pseudo"), withheld, task.num_classes)
    groups = {i: task.unlabeled.group_of(i) for i in audited.audited_round.pseudo_labeled}
    charts, table = figures(pseudo, truth, audited.audited_round, groups, audited.source.class_names)
    _write_csv(out / "strata.csv", ("stratum", "value", "count", "mean_dice"), (list(row.values()) for row in table))
    return truth, withheld, charts


def _explanations_chart(pseudo: Sequence[MaskReport]) -> dict[str, str]:
    from kmine.audit.ranking import MIN_NAMED_RANK, WEIGHTS, ranks
    from kmine.report.audit.figures import explanations_chart

    top = max(len(pseudo) // 5, 1)
    counts: Counter[str] = Counter()
    for name in WEIGHTS:
        places = ranks([report.signals.get(name, float("nan")) for report in pseudo])
        counts[name] = int((places[:top] >= MIN_NAMED_RANK).sum())
    return {"causes": explanations_chart(counts.most_common())}


def _summary(
    audited: AuditedRun, pseudo: Sequence[MaskReport], labeled: Sequence[MaskReport], truth: Mapping[str, float] | None
) -> dict[str, str | int | float]:
    from kmine.audit.truth import mean_estimate

    estimates = [mean_estimate(audited.audited_round, report.sample_id) for report in pseudo]
    known_estimates = [value for value in estimates if value == value]
    known_dice = [value for value in (truth or {}).values() if value == value]
    summary: dict[str, str | int | float] = {
        "pseudo masks": len(pseudo),
        "given masks": len(labeled),
        "round": audited.audited_round.round_idx,
        "segmenter": str(audited.run.get("segmenter", "")),
        "models that were asked": " ".join(sorted({name for report in pseudo for name in report.model_names}))
        or "none",
    }
    summary |= {"mean estimated Dice": round(sum(known_estimates) / len(known_estimates), 3)} if known_estimates else {}
    summary |= {"mean true Dice (withheld masks)": round(sum(known_dice) / len(known_dice), 3)} if known_dice else {}
    return summary


def _page(
    out: Path,
    items: Iterator[Any],
    audited: AuditedRun,
    summary: Mapping[str, str | int | float],
    figures: Mapping[str, str],
) -> Path:
    from kmine.report.audit.page import write_page

    name = audited.store.root.resolve().name
    about = {"title": f"Audit of {name}", "run_name": name, "run_signature": audited.signature}
    return write_page(out, items, **about, summary=summary, figures=figures)


def _export(audited: AuditedRun, what: str, out: Path, reports: Sequence[MaskReport]) -> Path:
    from kmine.audit.export import (
        ExportedMask,
        write_coco,
        write_label_studio,
        write_masks,
    )
    from kmine.feedback.corrections import picture_name

    def masks() -> Iterator[ExportedMask]:
        for report in sorted(reports, key=lambda report: report.sample_id):  # slices of a volume one after the other
            mined = report.kind == "pseudo"
            yield ExportedMask(
                report.sample_id,
                report.kind,
                audited.read(report.kind)(report.sample_id),
                f"pictures/{picture_name(report.sample_id)}.jpg",
                round(report.suspicion, 4),
                report.rank,
                audited.audited_round.signature if mined else "",
                audited.audited_round.round_idx if mined else 0,
            )

    names = audited.source.class_names
    if what == "coco":
        return write_coco(out / "coco.json", masks(), names, f"kmine audit of {audited.store.root.name}")
    if what == "labelstudio":
        return write_label_studio(out / "labelstudio.json", masks(), names)
    return write_masks(out / "masks", masks(), audited.source)


def _write_csv(path: Path, header: Sequence[str], rows: Iterator[list[Any]]) -> None:
    with atomic_open(path, "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(main())

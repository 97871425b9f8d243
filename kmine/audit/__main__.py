"""`python -m kmine.audit RUN`: rank the masks of a finished run, or import a reviewer's verdicts.

Writes RUN/audit/: audit.csv with the history of every mask, audit.html to review them, and exports. Withheld masks stay
closed without `--with_withheld`; with it run.json logs that they were opened.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from kmine import cli
from kmine.config.checks import LocalPath, expand_paths
from kmine.errors import UserError

DESCRIPTION = """Rank the pseudo masks of a finished run, the most suspicious first: audit.csv and audit.html in
RUN/audit. The given masks are ranked too, by models that were trained without them. With --verdicts, import a
reviewer's verdicts into the run."""


@dataclass(frozen=True)
class AuditConfig:
    """Settings of `python -m kmine.audit`."""

    run: list[LocalPath] = field(default_factory=list)
    """The run folder of a finished kmine.loop."""
    out: LocalPath | None = None
    """Folder for audit.csv, audit.html and exports; default: audit in the run folder."""
    round: int | None = None
    """Round of the pseudo masks; default: that of the masks of the kept model."""
    no_labeled: bool = False
    """Leave out the given masks, and train no models for them if the run has none."""
    with_withheld: bool = False
    """Open the withheld masks of the unlabeled images, if any: true Dice, calibration, strata.

    Off by default: settings chosen after looking at them are no longer validated independently."""
    export: Literal["none", "coco", "masks", "dicomseg", "labelstudio", "nnunet"] = "none"
    """Also write the masks for other tools: COCO run lengths, PNG (NIfTI for volumes), DICOM-SEG (extra dicom), Label
    Studio; nnunet: images, given masks and pseudo masks as a data set of nnU-Net, doubtful pixels as its ignore
    label."""
    verdicts: LocalPath | None = None
    """A verdicts.json saved from audit.html: checked and stored in the run. Nothing else is done then."""
    corrected: LocalPath | None = None
    """Corrected masks, with or without verdicts: a folder of PNG or NIfTI, a COCO file, a Label Studio export, or
    DICOM-SEG (a file or a folder; extra dicom)."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    data_root: LocalPath | None = None
    """Where the data lie now, if they were moved since the run; for your own files the folder that holds them all."""

    def __post_init__(self) -> None:
        expand_paths(self)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    prog = "kmine audit"
    dashed = {"--no-labeled": "--no_labeled", "--with-withheld": "--with_withheld"}
    words = [dashed.get(word, word) for word in (sys.argv[1:] if argv is None else argv)]
    cfg = cli.parse(AuditConfig, words, prog=prog, description=DESCRIPTION, positional="run")
    return cli.guarded(prog, lambda: run_audit(cfg))


def run_audit(cfg: AuditConfig) -> int:
    """Audit a run, or import verdicts into it; returns the exit code."""
    if len(cfg.run) != 1:
        raise UserError(f"expected one run folder, got {len(cfg.run)}; audit them one at a time")
    for name in ("verdicts", "corrected"):
        path = getattr(cfg, name)
        if path is not None and not Path(path).exists():
            raise UserError(f"--{name} {path}: no such file; check the path")
    from kmine.audit.import_verdicts import import_verdicts
    from kmine.audit.rounds import open_audit
    from kmine.audit.run import write_audit
    from kmine.setup.finished import final_run

    root, terminal = final_run(Path(cfg.run[0])), cli.Terminal()
    log, out = terminal.log, Path(cfg.out) if cfg.out else root / "audit"
    verdicts, corrected = (None if name is None else Path(name) for name in (cfg.verdicts, cfg.corrected))
    try:
        with open_audit(root, terminal, round_idx=cfg.round, device=cfg.device, data_root=cfg.data_root) as audited:
            if verdicts or corrected:
                import_verdicts(audited, verdicts, corrected, log)
                return 0
            write_audit(
                audited, out, log, labeled=not cfg.no_labeled, with_withheld=cfg.with_withheld, export=cfg.export
            )
    finally:
        terminal.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())

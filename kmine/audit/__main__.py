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
from kmine.io.files import writing
from kmine.setup.finished import settings_of
from kmine.store.run_folder import RunStore

if TYPE_CHECKING:
    from kmine.audit.evidence import Found, Opened
    from kmine.audit.history import Teller

DESCRIPTION = """Look through the pseudo masks of a finished run, the most suspicious first: audit.csv and audit.html in
RUN/audit. The given masks are looked at as well, by models that were trained without them. With --verdicts, take what a
person said of them back into the run."""
SHOWN = 5
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
    return cli.guarded(prog, lambda: audit(cfg))


def _as_setting(word: str) -> str:
    return {"--no-labeled": "--no_labeled", "--with-withheld": "--with_withheld"}.get(word, word)


def audit(cfg: AuditConfig) -> int:
    """Audit a run, or take verdicts into it."""
    if len(cfg.run) != 1:
        raise UserError(f"expected one run folder, got {len(cfg.run)}; audit them one at a time")
    for name in ("verdicts", "corrected"):
        path = getattr(cfg, name)
        if path is not None and not Path(path).exists():
            raise UserError(f"--{name} {path}: no such file; check the path")
    loop = _settings(Path(cfg.run[0]), cfg)
    store, terminal, began = RunStore(Path(cfg.run[0])), cli.Terminal(), time.perf_counter()
    try:
        opened = _open(store, loop, cfg, terminal)
        if cfg.verdicts is not None or cfg.corrected is not None:
            from kmine.audit.import_verdicts import take_in

            verdicts, corrected = (None if name is None else Path(name) for name in (cfg.verdicts, cfg.corrected))
            take_in(opened, verdicts, corrected, terminal.say)
            return 0
        return _look_through(opened, cfg, terminal, began)
    finally:
        terminal.stop()
        store.close()


def _settings(path: Path, cfg: AuditConfig) -> LoopConfig:
    """Of a finished run; nothing of it is opened."""
    if not (path / "run.json").is_file() or not (path / "config.yaml").is_file():
        raise UserError(f"{path}: expected a run folder with config.yaml and run.json, got none; run kmine.loop first")
    store = RunStore(path)
    stopped_by = store.run().get("stopped_by")
    store.close()
    if stopped_by in (None, "interrupted"):
        raise UserError(f"{path}: the run is not finished (stopped_by {stopped_by}); resume it first")
    about = {"prog": "kmine audit", "description": DESCRIPTION}
    return settings_of(path, device=cfg.device, data_root=cfg.data_root, **about)


def _open(store: RunStore, loop: LoopConfig, cfg: AuditConfig, terminal: cli.Terminal) -> Opened:
    from kmine.audit.evidence import Opened, chosen, past_of

    past = past_of(store)
    this = chosen(past, cfg.round, store.root)
    lost = [i for i in this.teaching if not store.pseudo_path(this.round_idx, i).is_file()]
    if lost:
        raise UserError(
            f"{store.root}: expected {len(this.teaching)} pseudo masks, that of {lost[0]} is missing; "
            "run the loop again"
        )
    from kmine.setup.open import open_for_audit
    from kmine.setup.preflight import preflight

    source = preflight(loop)
    task = open_for_audit(loop, source, store, terminal)
    strange = set(this.teaching).difference(task.unlabeled.ids)
    if strange:
        raise UserError(f"{store.root}: round {this.round_idx} mined {min(strange)}, which is no unlabeled image of it")
    return Opened(store, store.run(), source, task, past, this)


# -- looking


def _look_through(opened: Opened, cfg: AuditConfig, terminal: cli.Terminal, began: float) -> int:
    from kmine.audit.evidence import investigate
    from kmine.audit.history import COLUMNS
    from kmine.setup.provenance import peak_memory_mb

    out = Path(cfg.out) if cfg.out else opened.store.root / "audit"
    pseudo, labeled = investigate(opened.task, opened.store, opened.past, opened.this, with_labeled=not cfg.no_labeled)
    teller, found = _teller(opened), [*pseudo, *labeled]
    truth, withheld, figures = None, None, _causes(pseudo)
    if cfg.with_withheld:
        truth, withheld, charts = _open_truth(opened, pseudo, out)
        figures |= charts
    rows = (teller.row(one, truth) for one in found)
    _write_csv(out / "audit.csv", COLUMNS, ([row[name] for name in COLUMNS] for row in rows))
    if cfg.export != "none":
        terminal.say(f"exported: {_export(opened, cfg.export, out, found)}")
    items = teller.items(found, {kind: opened.read(kind) for kind in ("pseudo", "labeled")}, out, truth, withheld)
    page = _page(out, items, opened, _summary(opened, pseudo, labeled, truth), figures)
    for one in (*pseudo[:SHOWN], *labeled[:SHOWN]):
        why = "; ".join(one.causes) or "nothing stands out"
        terminal.say(f"{one.kind} {one.rank}. {one.sample_id} ({one.suspicion:.2f}): {why}")
    terminal.say(
        f"{len(pseudo)} pseudo masks of round {opened.this.round_idx} and {len(labeled)} given masks in "
        f"{time.perf_counter() - began:.0f} s, {peak_memory_mb()} MB"
    )
    terminal.say(f"table: {out / 'audit.csv'}   page: {page}")
    return 0


def _teller(opened: Opened) -> Teller:
    from kmine.audit.history import Teller

    store, rounds = opened.store, {one.asked_by for one in opened.past}
    return Teller(
        opened.task,
        store,
        opened.past,
        opened.this,
        opened.source.class_names,
        str(opened.run.get("segmenter", "the segmenter")),
        str(opened.run.get("segmenter_sha256", "")),
        {n: store.weights_signature(store.round_dir(n) / "model.safetensors") for n in rounds},
    )


def _open_truth(opened: Opened, pseudo: Sequence[Found], out: Path) -> tuple[Any, Any, dict[str, str]]:
    """True Dice by sample, the pool it comes from, and charts."""
    from kmine.audit.truth import figures, true_dice
    from kmine.setup.open import open_withheld

    task = opened.task
    withheld = open_withheld(task, opened.source, opened.store)
    truth = true_dice(pseudo, opened.read("pseudo"), withheld, task.num_classes)
    groups = {i: task.unlabeled.group_of(i) for i in opened.this.teaching}
    charts, table = figures(pseudo, truth, opened.this, groups, opened.source.class_names)
    _write_csv(out / "strata.csv", ("stratum", "value", "count", "mean_dice"), (list(row.values()) for row in table))
    return truth, withheld, charts


def _causes(pseudo: Sequence[Found]) -> dict[str, str]:
    from kmine.audit.ranking import STANDS_OUT, WEIGHTS, ranks
    from kmine.report.audit_figures import causes_chart

    top = max(len(pseudo) // 5, 1)
    counts: Counter[str] = Counter()
    for name in WEIGHTS:
        places = ranks([one.signals.get(name, float("nan")) for one in pseudo])
        counts[name] = int((places[:top] >= STANDS_OUT).sum())
    return {"causes": causes_chart(counts.most_common())}


def _summary(
    opened: Opened, pseudo: Sequence[Found], labeled: Sequence[Found], truth: Mapping[str, float] | None
) -> dict[str, str | int | float]:
    from kmine.audit.truth import estimate_of

    estimates = [estimate_of(opened.this, one.sample_id) for one in pseudo]
    told = [value for value in estimates if value == value]
    real = [value for value in (truth or {}).values() if value == value]
    about: dict[str, str | int | float] = {
        "pseudo masks": len(pseudo),
        "given masks": len(labeled),
        "round": opened.this.round_idx,
        "segmenter": str(opened.run.get("segmenter", "")),
        "models that were asked": " ".join(sorted({name for one in pseudo for name in one.witnesses})) or "none",
    }
    about |= {"mean estimated Dice": round(sum(told) / len(told), 3)} if told else {}
    about |= {"mean true Dice (withheld masks)": round(sum(real) / len(real), 3)} if real else {}
    return about


def _page(
    out: Path,
    items: Iterator[Any],
    opened: Opened,
    summary: Mapping[str, str | int | float],
    figures: Mapping[str, str],
) -> Path:
    from kmine.report.audit_page import write_page

    name = opened.store.root.resolve().name
    about = {"title": f"Audit of {name}", "run_name": name, "run_signature": opened.signature}
    return write_page(out, items, **about, summary=summary, figures=figures)


def _export(opened: Opened, what: str, out: Path, found: Sequence[Found]) -> Path:
    from kmine.audit.export import (
        Exported,
        write_coco,
        write_label_studio,
        write_masks,
    )
    from kmine.feedback.corrections import picture_name

    def masks() -> Iterator[Exported]:
        for one in sorted(found, key=lambda one: one.sample_id):  # slices of a volume one after the other
            mined = one.kind == "pseudo"
            yield Exported(
                one.sample_id,
                one.kind,
                opened.read(one.kind)(one.sample_id),
                f"pictures/{picture_name(one.sample_id)}.jpg",
                round(one.suspicion, 4),
                one.rank,
                opened.this.made_by if mined else "",
                opened.this.round_idx if mined else 0,
            )

    names = opened.source.class_names
    if what == "coco":
        return write_coco(out / "coco.json", masks(), names, f"kmine audit of {opened.store.root.name}")
    if what == "labelstudio":
        return write_label_studio(out / "labelstudio.json", masks(), names)
    return write_masks(out / "masks", masks(), opened.source)


def _write_csv(path: Path, header: Sequence[str], rows: Iterator[list[Any]]) -> None:
    with writing(path, "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(main())

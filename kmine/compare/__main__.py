"""`python -m kmine.compare RUN ... | SWEEP`: methods on the test split, each held against a baseline.

The only command that opens the test split; each opening is written into the run's run.json.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kmine import cli
from kmine.compare.table import (
    BASELINE,
    MINING,
    ROUND_0,
    Cost,
    LabelsSaved,
    Result,
    label_curve,
    tabulate,
    volume_of,
    with_labels_saved,
)
from kmine.config import LoopConfig
from kmine.errors import UserError
from kmine.io.files import sign
from kmine.ops.metrics import summarise
from kmine.report import Comparison, comparison
from kmine.report.curve import CurvePoint, label_efficiency
from kmine.setup.finished import load_settings
from kmine.store.run_folder import RunFolder
from kmine.store.settings import RESUMABLE_CHANGES
from kmine.types import CaseMetrics, Metrics

if TYPE_CHECKING:
    from kmine.data.pool import Pool

DESCRIPTION = """Evaluate finished runs on their test split, and hold each method against a baseline. Of a run of
kmine.loop: the labels alone (round 0), the labels alone for as many steps as mining had, and mining. Of a sweep: every
finished cell. Seeds are averaged; differences are paired by image and seed."""

SWEEP_TABLE = "sweep.csv"
SWEEP_COLUMNS = ("method", "model", "label_fraction", "seed", "status", "run")
"""Those without which a cell cannot be placed; the others are cost."""
CASE_COLUMNS = (
    *("run", "arm", "checkpoint", "sample_id", "dice", "iou", "hd95", "num_missed"),
    *("group_id", "model", "label_fraction", "seed"),
)
MAY_DIFFER = {*RESUMABLE_CHANGES, "seed", "data.label_fraction", "data.fine_groups", "data.split_file"}
"""Settings in which runs of one table may differ: the splits themselves are compared."""
NAN = float("nan")

RoundsByMethod = dict[str, tuple[int, str]]
"""Method -> (round, folder prefix) of what it came to."""


@dataclass(frozen=True)
class CompareConfig:
    """Everything `python -m kmine.compare` can be told."""

    runs: list[str] = field(default_factory=list)
    """Run folders, of several seeds, label fractions or models, with one test split; or the folder of a sweep."""
    baseline: str = "supervised"
    """The method that all others are compared with; of kmine.loop's runs, supervised is the one at equal steps."""
    format: Literal["all", "markdown", "csv", "latex", "html"] = "all"
    """What to write beside test_table.md, which is printed, too: one of the others, all of them, or nothing more."""
    out: str | None = None
    """Folder for test_table.md and the like, and test_cases.csv; default: that of the first run, or of the sweep."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    data_root: str | None = None
    """Where the data lie now, if not where the runs found them; of your own files, the folder that holds them all."""


@dataclass(frozen=True)
class _Run:
    """A finished run folder, looked at but not yet evaluated."""

    path: Path
    row: Mapping[str, str] | None
    """Of sweep.csv, where it is a cell of a sweep."""
    run: dict[str, Any]
    config: dict[str, Any]
    """Settings by their dotted names."""
    splits: list[dict[str, str]]

    @property
    def test_ids(self) -> list[str]:
        return [row["sample_id"] for row in self.splits if row["split"] == "test"]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    prog, words = "kmine compare", sys.argv[1:] if argv is None else argv
    cfg = cli.parse(CompareConfig, words, prog=prog, description=DESCRIPTION, positional="runs")
    return cli.guarded(prog, lambda: run_compare(cfg))


def run_compare(cfg: CompareConfig) -> int:
    """Print the table of the runs and write it, with the figures of every case."""
    terminal = cli.Terminal()
    runs, notes = _find(cfg.runs)
    _refuse_mixtures(runs)
    results = [result for run in runs for result in _results(run, cfg, terminal)]
    terminal.stop()
    table = tabulate(results, cfg.baseline, notes)
    out = RunFolder(Path(cfg.out or cfg.runs[0]))
    points, saved = label_curve(results, cfg.baseline)
    table = with_labels_saved(table, saved)
    chart = label_efficiency(points, f"{runs[0].run.get('dataset', 'test split')}, segmenter {table.segmenter}")
    _write(out, replace(table, chart=chart[0]), cfg.format)
    _write_curve(out, points, saved, chart)
    out.write_csv("test_cases.csv", CASE_COLUMNS, _cases(results))
    out.close()
    sys.stdout.write(comparison.markdown(table))
    return 0


def _write(out: RunFolder, table: Comparison, which: str) -> None:
    out.write_text("test_table.md", comparison.markdown(table))
    if which in ("all", "csv"):
        out.write_csv("test_table.csv", *comparison.tidy(table))
    if which in ("all", "latex"):
        out.write_text("test_table.tex", comparison.latex(table))
    if which in ("all", "html"):
        out.write_text("test_table.html", comparison.html(table))


def _write_curve(out: RunFolder, points: list[CurvePoint], saved: list[LabelsSaved], chart: tuple[str, bytes]) -> None:
    """The label-efficiency curve as a table and as pictures, and the labels saved; nothing with one label fraction."""
    if not points:
        return
    out.write_csv("label_efficiency.csv", [f.name for f in fields(CurvePoint)], [astuple(point) for point in points])
    out.write_text("label_efficiency.svg", chart[0])
    out.write_bytes("label_efficiency.png", chart[1])
    rows = [
        (saving.method, saving.model, saving.num_labels, *astuple(saving.needed), saving.num_seeds) for saving in saved
    ]
    out.write_csv("labels_saved.csv", ("method", "model", "num_labels", "needed", "low", "high", "num_seeds"), rows)


# -- what there is: nothing of the test split is opened here


def _find(names: Sequence[str]) -> tuple[list[_Run], list[str]]:
    """The runs, cells of sweeps in their places, and what a reader must know of those that are missing."""
    runs, notes = [], []
    for name in names:
        if not (Path(name) / SWEEP_TABLE).is_file():
            runs.append(_open_run(Path(name), None))
            continue
        rows = _read_sweep(Path(name))
        done = [row for row in rows if row["status"] == "done"]
        if not done:
            raise UserError(f"{name}: none of the {len(rows)} cells of {SWEEP_TABLE} is done; run kmine.sweep again")
        if len(done) < len(rows):
            notes.append(f"{len(rows) - len(done)} of {len(rows)} cells of {Path(name).name} failed and are left out.")
        runs += [_open_run(Path(name) / row["run"], row) for row in done]
    return runs, notes


def _read_sweep(folder: Path) -> list[dict[str, str]]:
    import csv

    path = folder / SWEEP_TABLE
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: expected the table of a sweep, cannot read it ({error}); run kmine.sweep") from error
    for row in rows:
        lost = [name for name in SWEEP_COLUMNS if row.get(name) is None]
        if lost:
            raise UserError(f"{path}: expected the columns {', '.join(SWEEP_COLUMNS)}, {lost[0]} is missing")
        try:
            float(row["label_fraction"]), int(row["seed"])
        except ValueError as error:
            raise UserError(f"{path}: expected numbers for label_fraction and seed ({error}); mend that row") from error
    return rows


def _open_run(path: Path, row: Mapping[str, str] | None) -> _Run:
    if not (path / "run.json").is_file() or not (path / "config.yaml").is_file():
        raise UserError(f"{path}: expected a run folder with config.yaml and run.json, got none; run kmine.loop first")
    import yaml

    store = RunFolder(path)
    run, splits = store.run(), store.read_csv("splits.csv")
    store.close()
    if run.get("stopped_by") in (None, "interrupted"):
        raise UserError(f"{path}: the run is not finished (stopped_by {run.get('stopped_by')}); resume it first")
    if row is not None and run.get("method") != row["method"]:
        raise UserError(
            f"{path}: expected a run of {row['method']}, as {SWEEP_TABLE} says; run.json says {run.get('method')}; "
            "run kmine.sweep again"
        )
    try:
        config = _flat(yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8")))
    except (AttributeError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path / 'config.yaml'}: expected a run's settings, found none; restore the file") from error
    if splits is None:
        raise UserError(f"{path / 'splits.csv'}: expected the run's splits, the file is missing; restore it")
    return _Run(path, row, run, config, splits)


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in config.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return out


def _refuse_mixtures(runs: Sequence[_Run]) -> None:
    """Refuse runs that do not belong into one table, before the test split of any is opened."""
    loop_runs = [run for run in runs if run.row is None]
    for other in runs:
        reference, differing = runs[0], _differing_data(runs[0], other)
        if other.row is None and not differing:
            same_model = [run for run in loop_runs if run.config.get("model.name") == other.config.get("model.name")]
            reference = same_model[0] if other is not same_model[0] else loop_runs[0]
            differing = _differing_setting(reference.config, other.config)
        if differing:
            raise UserError(f"{other.path} and {reference.path} differ in {differing}; compare them one at a time")


def _differing_data(reference: _Run, other: _Run) -> str:
    images = [run.get("data_contents", {}).get("images") for run in (reference.run, other.run)]
    copied = images[0] is not None and images[0] == images[1]
    if reference.run.get("data_fingerprint") != other.run.get("data_fingerprint") and not copied:
        return "data"
    return "" if reference.test_ids == other.test_ids else "test split"


def _differing_setting(reference: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """A setting that only one of two runs could have, as text; those of another model are that model's own.

    A setting that an older run does not know yet is passed over.
    """
    other_model = reference.get("model.name") != other.get("model.name")
    for name in sorted(reference.keys() & other.keys() - MAY_DIFFER):
        own = name.startswith(("model.", "classifier.")) and other_model
        if reference[name] != other[name] and not own:
            return f"{name} ({reference[name]!r} and {other[name]!r})"
    return ""


# -- the test split


def _results(finished: _Run, cfg: CompareConfig, terminal: cli.Terminal) -> list[Result]:
    """Every method of a run on its test split, from its folder or computed now."""
    about = {"prog": "kmine compare", "description": DESCRIPTION}
    loop = load_settings(finished.path, device=cfg.device, data_root=cfg.data_root, **about)
    store = RunFolder(finished.path)
    rounds = _rounds_to_evaluate(store, finished.run, loop)
    saved = _evaluate(store, finished.run, loop, rounds, terminal)
    groups = {row["sample_id"]: row["group_id"] for row in finished.splits}
    results = []
    for name, (round_idx, method_dir) in rounds.items():
        chosen, final = (_metrics(saved["arms"][name][which]) for which in ("chosen", "final"))
        cost = _cost(finished, store, name, round_idx, method_dir, saved.get("num_parameters"))
        results.append(Result(**_place(finished, loop, name), chosen=chosen, final=final, groups=groups, cost=cost))
    store.close()
    return results


def _place(finished: _Run, loop: LoopConfig, method: str) -> dict[str, Any]:
    """Where a result belongs: of a sweep what its table says, else what the run was told."""
    data, row = loop.data, finished.row
    place = {
        "run": str(finished.path),
        "segmenter": finished.run.get("segmenter", "none"),
        "num_labeled": finished.run.get("splits", {}).get("labeled"),
        "method": method,
    }
    if row is None:
        fraction = data.label_fraction if data.fine_groups is None else data.fine_groups
        return place | {"model": loop.model.name, "label_fraction": fraction, "seed": loop.seed}
    numbers = {"label_fraction": float(row["label_fraction"]), "seed": int(row["seed"])}
    return place | {"model": row["model"], "method": row["method"]} | numbers


def _rounds_to_evaluate(store: RunFolder, run: Mapping[str, Any], loop: LoopConfig) -> RoundsByMethod:
    """What to evaluate: of each chain of rounds, the round that was adopted last."""
    if "method" in run:
        return {run["method"]: (run["adopted_round"], run.get("arm", ""))}
    rounds = {ROUND_0: (0, "")}
    adopted = [
        n
        for n in range(1, loop.rounds + 1)
        if (store.read_json(store.round_dir(n, "supervised") / "metrics.json") or {}).get("adopted")
    ]
    if (store.root / "supervised").is_dir():
        rounds[BASELINE] = (adopted[-1], "supervised") if adopted else (0, "")
    if loop.rounds:
        rounds[MINING] = (run["adopted_round"], "")
    return rounds


def _evaluate(
    store: RunFolder, run: Mapping[str, Any], loop: LoopConfig, rounds: RoundsByMethod, terminal: cli.Terminal
) -> dict[str, Any]:
    """Test figures of a run as test_metrics.json holds them: read, or computed, saved and the opening logged."""
    signature = sign(
        *((name, round_idx, method_dir) for name, (round_idx, method_dir) in rounds.items()), run["adopted_round"]
    )
    saved = store.load_json(store.root / "test_metrics.json", signature)
    if saved and _can_be_pooled(saved["arms"]):
        return saved
    from kmine.setup.preflight import preflight

    source = preflight(loop, mines=False)
    from kmine.setup.open import open_for_test

    pool, model, how = open_for_test(loop, source, store)
    terminal.start(f"{store.root.name}: test split", len(rounds))
    figures = {}
    for done, (name, (round_idx, method_dir)) in enumerate(rounds.items(), start=1):
        figures[name] = _both_checkpoints(store, round_idx, method_dir, pool, model, how)
        terminal.advance(done)
    terminal.stop()
    opened = [*run.get("test_opened", []), datetime.now(timezone.utc).isoformat(timespec="seconds")]
    store.update_run(test_opened=opened)
    value = {"num_parameters": sum(p.numel() for p in model.parameters()), "arms": figures}
    store.save_json(store.root / "test_metrics.json", value, signature)
    return store.load_json(store.root / "test_metrics.json", signature) or value


def _can_be_pooled(by_method: Mapping[str, Any]) -> bool:
    """Whether slices have what makes a volume of them: figures written before counts were kept are computed anew."""
    cases = [
        case for checkpoints in by_method.values() for metrics in checkpoints.values() for case in metrics["cases"]
    ]
    return all(case.get("counts") or volume_of(case["sample_id"]) is None for case in cases)


def _both_checkpoints(
    store: RunFolder, round_idx: int, method_dir: str, pool: Pool, model: Any, how: dict[str, Any]
) -> dict[str, Any]:
    from kmine.training.evaluation import evaluate_checkpoint

    out = {}
    for checkpoint, name in (("chosen", "model"), ("final", "model_final")):
        path = store.round_dir(round_idx, method_dir) / f"{name}.safetensors"
        weights = store.load_tensors(path, None)
        if weights is None:
            raise UserError(f"{path}: missing or damaged; run the loop's command again, it makes it anew")
        out[checkpoint] = asdict(evaluate_checkpoint(pool, model, weights[0], **how))
    return out


def _metrics(value: Mapping[str, Any]) -> Metrics:
    """Metrics as JSON holds them."""
    return summarise(CaseMetrics(**{k: NAN if v is None else v for k, v in case.items()}) for case in value["cases"])


def _cost(
    finished: _Run, store: RunFolder, method: str, round_idx: int, method_dir: str, num_parameters: int | None
) -> Cost:
    """Of a cell what the sweep measured; of an arm of kmine.loop what its rounds took.

    Peak memory was measured of the whole run, where mining takes most: it stands there alone.
    """
    parameters = NAN if num_parameters is None else float(num_parameters)
    if finished.row is not None:
        costs = {name: _number(finished.row.get(name)) for name in ("seconds", "peak_memory_mb", "num_parameters")}
        known = costs["num_parameters"] == costs["num_parameters"]
        return Cost(**(costs | ({} if known else {"num_parameters": parameters})))
    memory = float(finished.run.get("peak_memory_mb") or NAN) if method == MINING else NAN
    return Cost(_seconds(store, method, method_dir), memory, parameters)


def _seconds(store: RunFolder, method: str, method_dir: str) -> float:
    """Of all rounds that an arm trained, refused ones included, and what came before them; of round 0 its own."""
    folders = [store.round_dir(0)]
    if method != ROUND_0:
        folders += sorted((store.root / ("supervised" if method == BASELINE else method_dir)).glob("round_*"))
    metrics = [store.read_json(folder / "metrics.json") or {} for folder in dict.fromkeys(folders)]
    if not all(metrics):
        return NAN
    before = store.preparation_seconds() if method == MINING else 0.0
    return before + float(sum(sum(m.get("seconds", {}).values()) for m in metrics))


def _number(text: str | None) -> float:
    try:
        return float(text) if text else NAN
    except ValueError:
        return NAN


def _cases(results: Sequence[Result]) -> list[list[Any]]:
    """One row an image, method and checkpoint; empty cells where there is no number."""
    return [
        [result.run, result.method, checkpoint, case.sample_id]
        + ["" if value != value else value for value in (case.dice, case.iou, case.hd95, case.num_missed)]
        + [result.groups[case.sample_id], result.model, result.label_fraction, result.seed]
        for result in results
        for checkpoint, metrics in (("chosen", result.chosen), ("final", result.final))
        for case in metrics.cases
    ]


if __name__ == "__main__":
    sys.exit(main())

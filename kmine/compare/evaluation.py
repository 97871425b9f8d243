"""Test figures and costs of a run, per method; figures are kept in test_metrics.json of its run folder."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any

from torch import Tensor

from kmine.compare.runs import ComparedRun
from kmine.compare.table import NAN, ONCE, Cost, Result, volume_of
from kmine.config.sweep import MINING
from kmine.errors import UserError
from kmine.io.files import sign
from kmine.ops.metrics import metrics_from_json
from kmine.setup.open import open_for_test
from kmine.setup.preflight import preflight
from kmine.store.artifacts import CURE, fitting, record_errors
from kmine.store.run_folder import NEEDS_WRITING, RunFolder
from kmine.training.evaluation import Evaluator
from kmine.types import EQUAL_STEPS, ONE_SCHEDULE, ROUND_0, ProgressReporter, labels_only_dir, labels_only_method

RoundsByMethod = dict[str, tuple[int, str]]
"""Method -> (kept round, folder of the method within the run folder)."""


def evaluate_run(compared: ComparedRun, progress: ProgressReporter) -> list[Result]:
    """Results of every method of a run on its test split, read from its folder or computed now.

    Raises:
        UserError: no test split, missing or damaged weights, data that are not there.
    """
    groups = {row["sample_id"]: row["group_id"] for row in compared.splits}
    model, label_fraction, seed = compared.model_fraction_seed
    with closing(RunFolder(compared.root, cure=NEEDS_WRITING)) as run:
        rounds = _rounds_to_evaluate(run, compared)
        saved = _test_figures(run, compared, rounds, progress)
        with record_errors(run.root / "test_metrics.json"):
            figures = {
                method: [metrics_from_json(saved["arms"][method][name]) for name in ("chosen", "final")]
                for method in rounds
            }
        return [
            Result(
                run=compared.name,
                method=method,
                model=model,
                label_fraction=label_fraction,
                num_labeled=compared.info.get("splits", {}).get("labeled"),
                seed=seed,
                segmenter=compared.info.get("segmenter", "none"),
                chosen=figures[method][0],
                final=figures[method][1],
                groups=groups,
                cost=_cost(compared, run, method, method_dir, _num_parameters(saved, method)),
                val_score=_validation_score(run, round_idx, method_dir),
            )
            for method, (round_idx, method_dir) in rounds.items()
        ]


def _rounds_to_evaluate(run: RunFolder, compared: ComparedRun) -> RoundsByMethod:
    """The kept round of each method."""
    info = compared.info
    if "method" in info:
        return {info["method"]: (info["adopted_round"], info.get("arm", ""))}
    rounds = {ROUND_0: (0, "")}
    if (run.root / "supervised").is_dir():
        kept = _kept_round(run, compared, "supervised")
        rounds[EQUAL_STEPS] = (kept, "supervised") if kept else (0, "")
    if ONCE in info.get("kept_rounds", {}):
        rounds[ONE_SCHEDULE] = (info["kept_rounds"][ONCE], ONCE)
    if compared.cfg.rounds:
        rounds[MINING] = (info["adopted_round"], "")
    for name in compared.cfg.baseline_models:
        folder = labels_only_dir(name)
        if (run.root / folder).is_dir():
            rounds[labels_only_method(name)] = (_kept_round(run, compared, folder), folder)
    return rounds


def _kept_round(run: RunFolder, compared: ComparedRun, method_dir: str) -> int:
    """The round that a method keeps; in older runs, which do not record it, the last adopted one."""
    if method_dir in (kept := compared.info.get("kept_rounds", {})):
        return int(kept[method_dir])
    folders = [(n, run.round_dir(n, method_dir)) for n in range(compared.cfg.rounds, 0, -1)]
    metrics = ((n, run.read_json(folder / "metrics.json")) for n, folder in folders)
    return next((n for n, found in metrics if (found or {}).get("adopted")), 0)


def _validation_score(run: RunFolder, round_idx: int, method_dir: str) -> float:
    """Mean `CaseMetrics.score` on validation; NaN if unknown."""
    found = run.read_json(run.round_dir(round_idx, method_dir) / "metrics.json") or {}
    return metrics_from_json(found["metrics"]).score if "metrics" in found else NAN


def _test_figures(
    run: RunFolder, compared: ComparedRun, rounds: RoundsByMethod, progress: ProgressReporter
) -> dict[str, Any]:
    """Content of test_metrics.json: read, or computed and saved, with the opening logged in run.json."""
    path, info = run.root / "test_metrics.json", compared.info
    signature = sign(*((name, *where) for name, where in rounds.items()), info["adopted_round"])
    saved = run.load_json(path, signature)
    if saved and _can_be_pooled(saved["arms"]):
        return saved
    evaluator = open_for_test(compared.cfg, preflight(compared.cfg, mines=False), run)
    progress.start(f"{run.root.name}: test split", len(rounds))
    figures, parameters = {}, {}
    of_models = {labels_only_method(name): name for name in compared.cfg.baseline_models}
    for done, (name, (round_idx, method_dir)) in enumerate(rounds.items(), start=1):
        own = evaluator.with_architecture(compared.cfg, of_models[name]) if name in of_models else evaluator
        figures[name] = _both_checkpoints(run, round_idx, method_dir, own)
        parameters[name] = sum(p.numel() for p in own.model.parameters())
        progress.advance(done)
    opened = [*info.get("test_opened", []), datetime.now(timezone.utc).isoformat(timespec="seconds")]
    run.update_run(test_opened=opened)
    num_parameters = sum(p.numel() for p in evaluator.model.parameters())
    value = {"num_parameters": num_parameters, "arms": figures, "parameters": parameters}
    run.save_json(path, value, signature)
    return run.load_json(path, signature) or value


def _num_parameters(saved: Mapping[str, Any], method: str) -> int | None:
    return saved.get("parameters", {}).get(method, saved.get("num_parameters"))


def _can_be_pooled(by_method: Mapping[str, Any]) -> bool:
    """Whether slices have pixel counts, which pool them to volumes; older figures without counts are recomputed."""
    metrics = [metrics for checkpoints in by_method.values() for metrics in checkpoints.values()]
    return all(case.get("counts") or volume_of(case["sample_id"]) is None for m in metrics for case in m["cases"])


def _both_checkpoints(run: RunFolder, round_idx: int, method_dir: str, evaluator: Evaluator) -> dict[str, Any]:
    out: dict[str, Any] = {}
    evaluated: dict[str, Tensor] = {}
    for checkpoint, name in (("chosen", "model"), ("final", "model_final")):
        path = run.round_dir(round_idx, method_dir) / f"{name}.safetensors"
        weights = run.load_tensors(path, None)
        if weights is None:
            raise UserError(f"{path}: expected the weights of the run, found no such file; {CURE}")
        if evaluated and all(evaluated[k].equal(v) for k, v in weights[0].items()):
            return out | {checkpoint: out["chosen"]}  # the last step's weights are those in use
        with fitting(path):
            out[checkpoint] = asdict(evaluator.evaluate(evaluated := weights[0]))
    return out


def _cost(compared: ComparedRun, run: RunFolder, method: str, method_dir: str, num_parameters: int | None) -> Cost:
    """Costs of a trial as the sweep measured them; of a method of kmine.loop the sum over its rounds.

    The peak memory of a run of kmine.loop is that of mining, which needs most.
    """
    if compared.trial is not None:
        costs = {name: _number(compared.trial.get(name)) for name in ("seconds", "peak_memory_mb", "num_parameters")}
        if costs["num_parameters"] != costs["num_parameters"] and num_parameters is not None:
            costs["num_parameters"] = float(num_parameters)
        return Cost(**costs)
    memory = float(compared.info.get("peak_memory_mb") or NAN) if method == MINING else NAN
    return Cost(_seconds(run, method, method_dir), memory, NAN if num_parameters is None else float(num_parameters))


def _seconds(run: RunFolder, method: str, method_dir: str) -> float:
    """Seconds of all rounds of a method, refused ones included, and of its preparation; NaN if unknown."""
    own_start = method == ONE_SCHEDULE or (method_dir and run.round_dir(0, method_dir).is_dir())
    folders = [] if own_start else [run.round_dir(0)]
    if method != ROUND_0:
        folders += sorted((run.root / ("supervised" if method == EQUAL_STEPS else method_dir)).glob("round_*"))
    metrics = [run.read_json(folder / "metrics.json") or {} for folder in dict.fromkeys(folders)]
    if not all(metrics):
        return NAN
    before = run.preparation_seconds() if method == MINING else 0.0
    return before + float(sum(sum(m.get("seconds", {}).values()) for m in metrics))


def _number(text: str | None) -> float:
    try:
        return float(text or NAN)
    except ValueError:
        return NAN

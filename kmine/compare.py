"""`python -m kmine.compare RUN ...`: mining against its supervised baseline on the test split, with paired intervals.

The only command that opens the test split; each opening is written into the run's run.json.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kmine import cli
from kmine.config import LoopConfig
from kmine.records import STOPPED_BY, UserError
from kmine.statistics import Paired, paired_difference
from kmine.store import RunStore, sign

if TYPE_CHECKING:
    from kmine.data.pool import Pool

DESCRIPTION = """Evaluate finished runs on their test split: the labels alone (round 0), the labels alone for as many
steps as mining had, and mining. Runs of several seeds are averaged; differences are paired by image and seed."""

ROUND_0, BASELINE, MINING = "supervised, round 0", "supervised, equal steps", "mining"


@dataclass(frozen=True)
class CompareConfig:
    """Everything `python -m kmine.compare` can be told."""

    runs: list[str] = field(default_factory=list)
    """Run folders; more than one: seeds of one experiment, with one test split."""
    out: str | None = None
    """Folder for test_table.md and test_cases.csv; default: the first run's folder."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    data_root: str | None = None
    """Where the data lie now, if not where the runs found them."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    prog, words = "kmine compare", sys.argv[1:] if argv is None else argv
    cfg = cli.parse(CompareConfig, words, prog=prog, description=DESCRIPTION, positional="runs")
    return cli.guarded(prog, lambda: compare(cfg))


def compare(cfg: CompareConfig) -> int:
    """Print the table of the runs and write it, with the figures of every case."""
    terminal = cli.Terminal()
    found = [_open_run(Path(run), cfg, terminal) for run in cfg.runs]
    _refuse_mixtures(cfg.runs, found)
    segmenters = sorted({run["segmenter"] for run in found})
    table = markdown([run["arms"] for run in found], ", ".join(segmenters))
    out = RunStore(Path(cfg.out or cfg.runs[0]))
    out.write_text("test_table.md", table)
    out.write_csv(
        "test_cases.csv",
        ("run", "arm", "checkpoint", "sample_id", "dice", "iou", "hd95", "num_missed"),
        _cases(cfg, found),
    )
    sys.stdout.write(table)
    return 0


def _open_run(path: Path, cfg: CompareConfig, terminal: cli.Terminal) -> dict[str, Any]:
    """One run's metrics on its test split, from its folder or computed now."""
    if not (path / "run.json").is_file() or not (path / "config.yaml").is_file():
        raise UserError(f"{path}: expected a run folder with config.yaml and run.json, got none; run kmine.loop first")
    store = RunStore(path)
    run = store.run()
    if run.get("stopped_by") not in STOPPED_BY:
        raise UserError(f"{path}: the run is not finished (stopped_by {run.get('stopped_by')}); resume it first")
    words = ["--config", str(path / "config.yaml"), "--device", cfg.device]
    words += ["--data.root", cfg.data_root] if cfg.data_root else []
    loop = cli.parse(LoopConfig, words, prog="kmine compare", description=DESCRIPTION)
    arms = _evaluate_arms(store, run, loop, terminal)
    store.close()
    return {"arms": arms, "segmenter": run["segmenter"], "fingerprint": run["data_fingerprint"]}


def _evaluate_arms(store: RunStore, run: dict[str, Any], loop: LoopConfig, terminal: cli.Terminal) -> dict[str, Any]:
    folders = _arm_folders(store, run, loop)
    signature = sign(*((name, round_idx, arm) for name, (round_idx, arm) in folders.items()), run["adopted_round"])
    saved = store.load_json(store.root / "test_metrics.json", signature)
    if saved:
        return saved["arms"]
    from kmine.preflight import preflight

    source = preflight(loop)
    from kmine.runs import open_for_test

    pool, model, how = open_for_test(loop, source, store)
    terminal.start(f"{store.root.name}: test split", len(folders))
    arms = {}
    for done, (name, (round_idx, arm)) in enumerate(folders.items(), start=1):
        arms[name] = _both_checkpoints(store, round_idx, arm, pool, model, how)
        terminal.advance(done)
    terminal.stop()
    opened = [*run.get("test_opened", []), datetime.now(timezone.utc).isoformat(timespec="seconds")]
    store.update_run(test_opened=opened)
    store.save_json(store.root / "test_metrics.json", {"arms": arms}, signature)
    return arms


def _arm_folders(store: RunStore, run: dict[str, Any], loop: LoopConfig) -> dict[str, tuple[int, str]]:
    """Arm -> (round, folder): of each chain of rounds, the one that was adopted last."""
    folders = {ROUND_0: (0, "")}
    adopted = [
        n
        for n in range(1, loop.rounds + 1)
        if (store.read_json(store.round_dir(n, "supervised") / "metrics.json") or {}).get("adopted")
    ]
    if (store.root / "supervised").is_dir():
        folders[BASELINE] = (adopted[-1], "supervised") if adopted else (0, "")
    if loop.rounds:
        folders[MINING] = (run["adopted_round"], "")
    return folders


def _both_checkpoints(
    store: RunStore, round_idx: int, arm: str, pool: Pool, model: Any, how: dict[str, Any]
) -> dict[str, Any]:
    from kmine.methods import evaluate_on

    out = {}
    for checkpoint, name in (("chosen", "model"), ("final", "model_final")):
        path = store.round_dir(round_idx, arm) / f"{name}.safetensors"
        weights = store.load_tensors(path, None)
        if weights is None:
            raise UserError(f"{path}: missing or damaged; run the loop's command again, it makes it anew")
        out[checkpoint] = asdict(evaluate_on(pool, model, weights[0], **how))
    return out


def _refuse_mixtures(names: Sequence[str], found: Sequence[dict[str, Any]]) -> None:
    def key(run: dict[str, Any]) -> tuple[Any, ...]:
        return run["fingerprint"], tuple(c["sample_id"] for c in run["arms"][ROUND_0]["chosen"]["cases"])

    for name, run in zip(names, found, strict=True):
        if key(run) != key(found[0]) or run["arms"].keys() != found[0]["arms"].keys():
            raise UserError(f"{name} and {names[0]} differ in data, test split or arms; compare them one at a time")


def markdown(runs: Sequence[dict[str, Any]], segmenter: str) -> str:
    """The table of one experiment: mean over cases and seeds, sd over seeds, paired difference to the baseline."""
    names = list(runs[0])
    baseline = BASELINE if BASELINE in names else ROUND_0
    num_cases = len(runs[0][ROUND_0]["chosen"]["cases"])
    lines = [
        f"Test split: {num_cases} images, {len(runs)} seed(s), segmenter {segmenter}. Mean per-image Dice of the",
        "checkpoint chosen on validation, that of the last step beside it; the difference is paired, with a 95 %",
        f"bootstrap interval over images and seeds, to *{baseline}*.",
        "",
        "| method | Dice | sd over seeds | Dice, last step | IoU | HD95 (px or mm) | missed | difference in Dice |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in names:
        label = f"{name} ({segmenter})" if name == MINING else name
        difference = _difference_text(runs, baseline, name) if name != baseline else "–"
        lines.append("| " + " | ".join([label, *_figures([run[name] for run in runs]), difference]) + " |")
    return "\n".join(lines) + "\n"


def _figures(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Dice, its sd over runs, Dice of the last step, IoU, HD95, missed: each a mean over runs."""

    def mean(checkpoint: str, figure: str) -> float:
        return float(np.mean([run[checkpoint][figure] for run in runs]))

    sd = f"{np.std([r['chosen']['dice'] for r in runs], ddof=1):.3f}" if len(runs) > 1 else "–"
    head = [f"{mean('chosen', 'dice'):.3f}", sd, f"{mean('final', 'dice'):.3f}", f"{mean('chosen', 'iou'):.3f}"]
    return [*head, f"{mean('chosen', 'hd95'):.1f}", f"{mean('chosen', 'num_missed'):.1f}"]


def _difference_text(runs: Sequence[dict[str, Any]], baseline: str, name: str) -> str:
    found: Paired = paired_difference(_dice(runs, baseline), _dice(runs, name), seed=0)
    verdict = "" if found.low > 0 or found.high < 0 else "; no difference shown"
    return f"{found.difference:+.3f} [{found.low:+.3f}, {found.high:+.3f}]{verdict}"


def _dice(runs: Sequence[dict[str, Any]], name: str) -> NDArray[np.float64]:
    """(R, N) Dice; NaN where a case has none."""
    rows = [[c["dice"] for c in run[name]["chosen"]["cases"]] for run in runs]
    return np.array([[np.nan if v is None else v for v in row] for row in rows], float)


def _cases(cfg: CompareConfig, found: Sequence[dict[str, Any]]) -> list[list[Any]]:
    return [
        [run, arm, checkpoint, *(case[k] for k in ("sample_id", "dice", "iou", "hd95", "num_missed"))]
        for run, entry in zip(cfg.runs, found, strict=True)
        for arm, checkpoints in entry["arms"].items()
        for checkpoint, metrics in checkpoints.items()
        for case in metrics["cases"]
    ]


if __name__ == "__main__":
    sys.exit(main())

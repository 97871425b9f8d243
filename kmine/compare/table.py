"""One table from the test figures of many runs: cases, pairs, intervals, and notes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from kmine.config.sweep import LABELS_ONLY, MINING, ORACLE
from kmine.errors import UserError, unknown_name
from kmine.ops.label_efficiency import LabelsNeeded, labels_to_match
from kmine.ops.metrics import lesion_metrics, nanmean, of_one_kind, pool_cases, summarise
from kmine.ops.statistics import holm, paired_difference
from kmine.report.comparison import Comparison, ComparisonRow
from kmine.report.curve import CurvePoint
from kmine.types import EQUAL_STEPS, ONE_SCHEDULE, ROUND_0, SLICE_ID, CaseMetrics, Floats, Metrics, labels_only_method

AUTO = "auto"
SUPERVISED, ONCE = LABELS_ONLY
AVERAGED = ("dice", "iou", "hd95", "num_missed", "num_empty")
"""Fields of `Metrics` whose mean over seeds is in the table."""
NAN = float("nan")

Key = tuple[str, float, str]
"""Model, label fraction, method: one row of the table."""


@dataclass(frozen=True)
class Cost:
    """Costs of a method; NaN where unknown."""

    seconds: float = NAN
    peak_memory_mb: float = NAN
    num_parameters: float = NAN


@dataclass(frozen=True)
class Result:
    """One method, trained with one seed, on the test split."""

    run: str
    """The run folder."""
    method: str
    model: str
    label_fraction: float
    num_labeled: int | None
    seed: int
    segmenter: str
    chosen: Metrics
    """Metrics of the checkpoint in use (`fit.checkpoint`), one case per image."""
    final: Metrics
    """Metrics of the last step's checkpoint."""
    groups: Mapping[str, str]
    """Group by sample id."""
    cost: Cost = Cost()
    val_score: float = NAN
    """Mean `CaseMetrics.score` on validation of the checkpoint in use; NaN if unknown."""

    @property
    def key(self) -> Key:
        """Its row of the table."""
        return self.model, self.label_fraction, self.method


@dataclass(frozen=True)
class LabelsSaved:
    """Number of labels that the baseline needs for the Dice of a method."""

    method: str
    model: str
    label_fraction: float
    num_labels: float
    """Labels of the method."""
    needed: LabelsNeeded
    fewest: float
    """First number of labels of the baseline's curve."""
    most: float
    """Last number of labels of the baseline's curve."""
    num_seeds: int

    @property
    def key(self) -> tuple[str, str, float]:
        """Its row of the table: method, model, label fraction."""
        return self.method, self.model, self.label_fraction

    def words(self) -> str:
        """`28 [≤ 20, 125]`: the number and its interval, with ≤ and > beyond the ends of the curve."""
        low, needed, high = (self._count(n) for n in (self.needed.low, self.needed.needed, self.needed.high))
        return f"{needed} [{low}, {high}]"

    def _count(self, number: float) -> str:
        if not np.isfinite(number):
            return f"> {self.most:g}" if number > 0 else "?"
        return f"≤ {self.fewest:g}" if number <= self.fewest else f"{number:.0f}"


def with_labels_saved(table: Comparison, saved: Sequence[LabelsSaved]) -> Comparison:
    """The table with a column for the labels saved and a note on it; unchanged if `saved` is empty."""
    if not saved:
        return table
    note = (
        f"Labels for the same Dice: how many *{table.baseline}* needs for the Dice of the row, read off its curve "
        "over the seeds that both have; in brackets the 95 % bootstrap interval over groups and seeds. "
        "≤ and > are the ends of the curve. In the curve, silence on a clean image counts 1."
    )
    return replace(table, notes=[*table.notes, note], labels_needed={saving.key: saving.words() for saving in saved})


def join_folds(folds: Sequence[Sequence[Result]]) -> list[Result]:
    """One result per method from the results of each fold of a folder of folds; of a single run, its results.

    A fold without a method, as where mining kept no mask, counts with its round 0: the method trained nothing more.
    """
    by_method = [{result.method: result for result in results} for results in folds]
    methods = dict.fromkeys(name for results in by_method for name in results)
    return [_joined(name, [results.get(name) or results[ROUND_0] for results in by_method]) for name in methods]


def _joined(method: str, folds: Sequence[Result]) -> Result:
    """One result of all folds; costs are sums, memory is the highest."""

    def pooled(name: str) -> Metrics:
        cases = [case for fold in folds for case in getattr(fold, name).cases]
        return summarise(sorted(cases, key=lambda case: case.sample_id))

    first, costs = folds[0], [fold.cost for fold in folds]
    if len(folds) == 1:
        return first
    memory = max((cost.peak_memory_mb for cost in costs), key=lambda value: (value == value, value))
    return replace(
        first,
        method=method,
        num_labeled=round(nanmean([fold.num_labeled for fold in folds])) if first.num_labeled else None,
        segmenter=", ".join(sorted({fold.segmenter for fold in folds})),
        chosen=pooled("chosen"),
        final=pooled("final"),
        groups={name: group for fold in folds for name, group in fold.groups.items()},
        cost=Cost(sum(cost.seconds for cost in costs), memory, costs[0].num_parameters),
        val_score=float(np.mean([fold.val_score for fold in folds])),
    )


def volume_of(sample_id: str) -> str | None:
    """Volume of a slice; None for an image that is not a slice."""
    match = SLICE_ID.fullmatch(sample_id)
    return match[1] if match else None


def tabulate(results: Sequence[Result], baseline: str, extra_notes: Sequence[str] = ()) -> Comparison:
    """Table of all results; `extra_notes` are appended to its notes.

    Raises:
        UserError: an unknown baseline; two results of one method, model, label fraction and seed; different images.
    """
    cases, of_volumes = _cases(results)
    rows = _by_row(cases)
    base = _resolve(baseline, cases)
    table = [_row(by_seed, rows.get((*key[:2], base)), key[2] == base) for key, by_seed in rows.items()]
    corrected = holm([row.p_value for row in table])
    table = [replace(row, p_holm=p) for row, p in zip(table, corrected, strict=True)]
    segmenter = ", ".join(sorted({r.segmenter for r in results} - {"none"}) or ["none"])
    notes, unit = _notes(cases, table, base, segmenter, of_volumes), "volume" if of_volumes else "image"
    return Comparison(table, base, segmenter, [*notes, *extra_notes], unit=unit)


def _cases(results: Sequence[Result]) -> tuple[list[Result], bool]:
    """The results, pooled to volumes if all cases are slices, and whether they are.

    Mining is named after all its segmenters (one may be adapted under some seeds only), so it keeps one row and curve.
    """
    of_volumes = all(volume_of(case.sample_id) for result in results for case in result.chosen.cases)
    segmenters = ", ".join(sorted({result.segmenter for result in results if result.method == MINING}))
    named = [replace(result, segmenter=segmenters) if result.method == MINING else result for result in results]
    pooled = [_by_volume(result) if of_volumes else result for result in named]
    metrics = of_one_kind(*(m for result in pooled for m in (result.chosen, result.final)))
    pairs = zip(pooled, metrics[::2], metrics[1::2], strict=True)
    return [replace(result, chosen=chosen, final=final) for result, chosen, final in pairs], of_volumes


def _by_row(cases: Sequence[Result]) -> dict[Key, dict[int, Result]]:
    """The results by row of the table and by seed."""
    rows: dict[Key, dict[int, Result]] = {}
    for result in cases:
        existing = rows.setdefault(result.key, {}).setdefault(result.seed, result)
        if existing is not result:
            raise UserError(
                f"{existing.run} and {result.run} both hold {result.method} with {result.model}, label fraction "
                f"{result.label_fraction:g}, seed {result.seed}; expected one run per seed: compare them one at a time"
            )
    return rows


def label_curve(results: Sequence[Result], baseline: str) -> tuple[list[CurvePoint], list[LabelsSaved]]:
    """Points of the label-efficiency curve, and the labels that each method saves; empty with one label fraction."""
    cases, _ = _cases(results)
    if len({result.label_fraction for result in cases}) < 2:
        return [], []
    base, rows = _resolve(baseline, cases), _by_row(cases)
    points = [_point(list(by_seed.values())) for by_seed in rows.values()]
    saved = []
    for (model, _, method), by_seed in rows.items():
        if method not in (base, ORACLE, ROUND_0, *LABELS_ONLY):
            curve = {key[1]: row for key, row in rows.items() if (key[0], key[2]) == (model, base)}
            saved.append(_saved(by_seed, curve))
    return points, [saving for saving in saved if saving]


def _point(results: Sequence[Result]) -> CurvePoint:
    first, labels = results[0], [result.num_labeled for result in results]
    ids = [case.sample_id for case in first.chosen.cases]
    scores, groups = _scores(results, ids), [first.groups[i] for i in ids]
    mean = paired_difference(np.zeros_like(scores), scores, seed=0, groups=groups, num_flips=0)
    return CurvePoint(
        method=_label(first),
        model=first.model,
        label_fraction=first.label_fraction,
        num_labels=first.label_fraction if None in labels else float(np.mean([n for n in labels if n is not None])),
        dice=mean.difference,
        low=mean.low,
        high=mean.high,
        num_seeds=len(results),
    )


def _saved(own_by_seed: Mapping[int, Result], curve: Mapping[float, Mapping[int, Result]]) -> LabelsSaved | None:
    """Labels that the baseline needs for this row's Dice, over the seeds that all have; None without a curve."""
    seeds = sorted(set(own_by_seed).intersection(*curve.values())) if len(curve) > 1 else []
    if not seeds:
        return None
    ids = [case.sample_id for case in own_by_seed[seeds[0]].chosen.cases]
    rows = [[by_seed[s] for s in seeds] for _, by_seed in sorted(curve.items())]
    points = [_point(row) for row in rows]
    own = [own_by_seed[s] for s in seeds]
    groups = [own[0].groups[i] for i in ids]
    counts = [point.num_labels for point in points]
    needed = labels_to_match(counts, [_scores(row, ids) for row in rows], _scores(own, ids), groups, seed=0)
    point = _point(own)
    key = (point.method, point.model, point.label_fraction, point.num_labels)
    return LabelsSaved(*key, needed, counts[0], counts[-1], len(seeds))


def _by_volume(result: Result) -> Result:
    """The result with one case per volume. Groups stay: a patient may have two volumes."""

    def pooled(metrics: Metrics) -> Metrics:
        slices: dict[str, list[CaseMetrics]] = {}
        for case in metrics.cases:
            slices.setdefault(volume_of(case.sample_id) or case.sample_id, []).append(case)
        return summarise(pool_cases(name, parts) for name, parts in slices.items())

    groups = {volume_of(i) or i: group for i, group in result.groups.items()}
    return replace(result, chosen=pooled(result.chosen), final=pooled(result.final), groups=groups)


def _resolve(baseline: str, results: Sequence[Result]) -> str:
    """Full name of the baseline: for runs of kmine.loop, `supervised` is that at equal steps, if it was trained.

    `AUTO` is the better of the supervised ones by mean score on validation, if the same runs have both.
    """
    scores: dict[str, dict[tuple[str, float, int], float]] = {}
    for r in results:
        scores.setdefault(r.method, {})[r.model, r.label_fraction, r.seed] = r.val_score
    wanted = LABELS_ONLY if baseline == AUTO else (baseline,)
    full_names = {SUPERVISED: (EQUAL_STEPS, ROUND_0), ONCE: (ONE_SCHEDULE,)}
    candidates = [(name, *full_names.get(name, (labels_only_method(name),))) for name in wanted]
    found = [known[0] for names in candidates if (known := [name for name in names if name in scores])]
    if not found:
        raise unknown_name("baseline", baseline, set(scores))
    first, last = (scores[found[n]] for n in (0, -1))
    return found[-1] if first.keys() == last.keys() and sum(last.values()) > sum(first.values()) else found[0]


def _row(by_seed: Mapping[int, Result], baseline: Mapping[int, Result] | None, is_baseline: bool) -> ComparisonRow:
    """One row from the results of a method and of the baseline, by seed."""
    results = list(by_seed.values())
    dice, first = [result.chosen.dice for result in results], results[0]
    by_truth = [lesion_metrics(r.chosen) for r in results]
    metrics = {name: nanmean([getattr(r.chosen, name) for r in results]) for name in AVERAGED}
    metrics |= {name: nanmean([getattr(m, name) for m in by_truth]) for name in ("dice_lesion", "false_alarm_rate")}
    costs = {cost.name: nanmean([getattr(r.cost, cost.name) for r in results]) for cost in fields(Cost)}
    row = ComparisonRow(
        method=_label(first),
        model=first.model,
        label_fraction=first.label_fraction,
        num_labeled=first.num_labeled,
        seeds=tuple(sorted(by_seed)),
        dice_sd=float(np.std(dice, ddof=1)) if len(dice) > 1 else NAN,
        dice_final=nanmean([result.final.dice for result in results]),
        is_baseline=is_baseline,
        num_clean=by_truth[0].num_clean,
        **metrics,
        **costs,
    )
    if is_baseline or not baseline or not by_seed.keys() & baseline.keys():
        return row
    seeds = sorted(by_seed.keys() & baseline.keys())
    return _with_difference(row, [baseline[s] for s in seeds], [by_seed[s] for s in seeds])


def _with_difference(row: ComparisonRow, before: Sequence[Result], after: Sequence[Result]) -> ComparisonRow:
    """The row with its paired difference over seeds and cases."""
    ids = [case.sample_id for case in before[0].chosen.cases]
    a, b = _scores(before, ids), _scores(after, ids)
    # A fixed seed for the sign flips makes the table reproducible.
    gap = paired_difference(a, b, seed=0, groups=[before[0].groups[i] for i in ids])
    return replace(row, **{name: getattr(gap, name) for name in ("difference", "low", "high", "p_value", "num_pairs")})


def _scores(results: Sequence[Result], ids: Sequence[str]) -> Floats:
    """(R, N) `CaseMetrics.score`: Dice, in which silence on a clean image counts 1 and a false alarm 0."""
    score_by_id = [{case.sample_id: case.score for case in result.chosen.cases} for result in results]
    for result, scores in zip(results, score_by_id, strict=True):
        if scores.keys() != set(ids):
            raise UserError(
                f"{result.run}: its test figures are of other images; compare it with runs of the same split"
            )
    return np.array([[scores[i] for i in ids] for scores in score_by_id], float)


def _label(result: Result) -> str:
    """Name of the method in the table, with the segmenter of mining."""
    if result.method == MINING:
        return f"{MINING} ({result.segmenter})"
    return f"{ORACLE} (true masks: a ceiling)" if result.method == ORACLE else result.method


def _notes(
    cases: Sequence[Result], rows: Sequence[ComparisonRow], baseline: str, segmenter: str, of_volumes: bool
) -> list[str]:
    """Notes on the test split and the statistics."""
    first, seeds = cases[0], {result.seed for result in cases}
    num_cases, unit = len(first.chosen.cases), "volume" if of_volumes else "image"
    units = {first.groups[case.sample_id] for case in first.chosen.cases}
    grouped = len(units) < num_cases
    named = f"groups of {unit}s that belong together" if grouped else f"{unit}s"
    compared = sum(np.isfinite(row.p_value) for row in rows)
    notes = [
        f"Test split: {num_cases} {unit}s, {len(seeds)} seed(s), segmenter {segmenter}. Mean Dice per {unit} of the "
        "checkpoint in use (fit.checkpoint), that of the last step beside it.",
        f"The difference is paired, {unit} by {unit} and seed by seed, with *{baseline}*: 95 % t-interval over "
        f"{named} and seeds, p of a sign-flip test over {named}, Holm-corrected for the {compared} comparison(s) of "
        "this table.",
    ]
    if of_volumes:
        notes += ["Dice, IoU and missed from the pixels of all slices of a volume; HD95 is the mean over its slices."]
    if any(row.num_clean or row.num_empty for row in rows):
        notes.append(
            f"{unit.title()}s with empty truth and prediction have no Dice; the means of Dice, IoU and HD95 omit them, "
            f"and may then be over other {unit}s from row to row. Dice where there is a lesion, and false alarms as "
            f"a share of the clean {unit}s (of several classes: of those that the truth lacks), are over the same ones "
            f"in all rows. In the difference, silence on a clean {unit} counts 1 and a false alarm 0."
        )
    if grouped:
        notes.append(f"The {num_cases} {unit}s form {len(units)} groups; a group is one unit of interval and test.")
    if len(units) == 1:
        notes.append(f"With a single {'group' if grouped else unit} there is neither an interval nor a test.")
    elif len(units) < 6:
        notes.append(f"With {len(units)} units no p below {2 / 2 ** len(units):.2f} is possible in a sign-flip test.")
    if len(seeds) == 1:
        notes.append("One seed: neither interval nor p includes the variation between seeds.")
    return notes

"""The table of methods: means, pairs, volumes, groups, corrections, and what is said of them; no run is needed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kmine.compare.table import (
    Cost,
    Result,
    join_folds,
    label_curve,
    tabulate,
    volume_of,
    with_labels_saved,
)
from kmine.config.sweep import MINING
from kmine.errors import UserError
from kmine.ops.metrics import case_metrics, summarise
from kmine.report import comparison
from kmine.types import EQUAL_STEPS, ONE_SCHEDULE, ROUND_0, CaseMetrics

NAN = float("nan")


def result(method: str, dice, seed: int = 0, **more) -> Result:
    """A result with the given Dice of images i0, i1, ...; half of it with the last step's checkpoint."""
    cases = [CaseMetrics(f"i{n}", float(d), float(d), 1.0, 0) for n, d in enumerate(dice)]
    half = [replace(case, dice=case.dice / 2) for case in cases]
    groups = {case.sample_id: case.sample_id for case in cases}
    base = Result(f"runs/{seed}", method, "unet", 0.1, 6, seed, "ellipse", summarise(cases), summarise(half), groups)
    return replace(base, **more)


def by_method(table) -> dict:
    return {row.method: row for row in table.rows}


def test_means_over_cases_and_seeds_by_hand():
    table = tabulate(
        [result("supervised", [0.4, 0.6]), result("supervised", [0.8, 0.8], seed=1, cost=Cost(60.0))], "supervised"
    )
    (row,) = table.rows
    assert (row.dice, row.iou, row.dice_final, row.seeds) == (pytest.approx(0.65), 0.65, 0.325, (0, 1))
    assert row.dice_sd == pytest.approx(np.std([0.5, 0.8], ddof=1))
    assert row.is_baseline and np.isnan(row.difference) and row.seconds == 60.0


@pytest.mark.parametrize(("there", "base"), [((ROUND_0, EQUAL_STEPS), EQUAL_STEPS), ((ROUND_0,), ROUND_0)])
def test_supervised_of_a_loop_is_the_arm_at_equal_steps_where_there_is_one(there, base):
    table = tabulate([result(name, [0.5, 0.6]) for name in (*there, MINING)], "supervised")
    assert table.baseline == base
    assert [row.method for row in table.rows if row.is_baseline] == [base]
    assert "mining (ellipse)" in by_method(table)


@pytest.mark.parametrize("names", [(EQUAL_STEPS, ONE_SCHEDULE), ("supervised", "supervised_once")])
def test_by_default_the_baseline_is_the_better_supervised_one_on_validation(names):
    def base(*scores: tuple[float, float], baseline: str = "auto", seeds: int = 2) -> str:
        found = [result(MINING, [0.5, 0.6], seed) for seed in range(2)]
        for name, of_seeds in zip(names, scores, strict=False):
            found += [result(name, [0.9, 0.1], seed, val_score=s) for seed, s in enumerate(of_seeds[:seeds])]
            seeds = 2
        return tabulate(found, baseline).baseline

    assert base((0.5, 0.7), (0.6, 0.7)) == names[1] and base((0.5, 0.7), (0.6, 0.5)) == names[0]
    assert base((0.5, 0.7), (0.5, 0.7)) == base((0.5, 0.7)) == names[0]
    assert base((0.5, 0.7), (0.6, 0.7), seeds=1) == names[0], "not all runs have both"
    assert base((0.5, NAN), (0.6, 0.7)) == names[0], "unknown"
    assert base((0.5, 0.7), (0.6, 0.7), baseline="supervised") == names[0]
    assert base((0.9, 0.9), (0.6, 0.7), baseline="supervised_once") == names[1]


def test_any_method_can_be_the_baseline_and_an_unknown_one_is_refused():
    found = [result(name, [0.5, 0.6]) for name in ("supervised", "oracle")]
    table = tabulate(found, "oracle")
    assert by_method(table)["oracle (true masks: a ceiling)"].is_baseline
    with pytest.raises(UserError, match="'superwised'; did you mean supervised"):
        tabulate(found, "superwised")


def test_a_clear_gap_is_shown_and_one_within_the_noise_is_not():
    rng = np.random.default_rng(0)
    base = rng.uniform(0.4, 0.9, 40)
    found = [
        result("supervised", base),
        result("better", base + 0.05),
        result("noisy", base + rng.normal(0, 0.2, 40)),
    ]
    rows = by_method(tabulate(found, "supervised"))
    assert rows["better"].difference == pytest.approx(0.05) and rows["better"].is_shown
    assert rows["noisy"].low < 0 < rows["noisy"].high and not rows["noisy"].is_shown


def test_the_correction_counts_all_comparisons_of_the_table():
    rng = np.random.default_rng(5)
    base = rng.uniform(0.4, 0.9, 30)
    noise = rng.normal(0, 0.1, 30)
    near = base + noise - noise.mean() + 0.046
    alone = tabulate([result("supervised", base), result("near", near)], "supervised")
    crowd = [result(f"m{n}", base + rng.normal(0, 0.1, 30)) for n in range(6)]
    among = tabulate([result("supervised", base), result("near", near), *crowd], "supervised")
    one, other = by_method(alone)["near"], by_method(among)["near"]
    assert one.p_value == one.p_holm == other.p_value and other.p_holm >= 4 * one.p_value
    assert one.is_shown and other.low > 0 and not other.is_shown, "an interval without 0 is not enough among many"
    assert "the 7 comparison(s) of this table" in " ".join(among.notes)


def test_pairs_are_formed_within_model_and_label_fraction_and_over_common_seeds():
    base = np.linspace(0.4, 0.9, 20)
    found = [
        result("supervised", base),
        result("supervised", base + 0.02, seed=1),
        result("mining", base + 0.03, seed=1),
        result("mining", base + 0.5, seed=2),
        result("supervised", base, label_fraction=0.5),
        result("mining", base - 0.01, label_fraction=0.5),
        result("mining", base, model="sks"),
    ]
    first, *_ = [row for row in tabulate(found, "supervised").rows if row.method.startswith("mining")]
    assert first.difference == pytest.approx(0.01) and first.num_pairs == 20, "of seed 1 alone"
    rows = [row for row in tabulate(found, "supervised").rows if row.method.startswith("mining")]
    assert [row.label_fraction for row in rows] == [0.1, 0.5, 0.1]
    assert rows[1].difference == pytest.approx(-0.01) and np.isnan(rows[2].difference), "sks has no baseline"


def test_cases_are_paired_by_name_not_by_order():
    base, better = result("supervised", [0.2, 0.9, 0.5]), result("mining", [0.3, 1.0, 0.6])
    turned = replace(better, chosen=summarise(reversed(better.chosen.cases)))
    row = by_method(tabulate([base, turned], "supervised"))["mining (ellipse)"]
    assert row.difference == pytest.approx(0.1) and row.high == pytest.approx(0.1)
    other = replace(better, chosen=summarise(better.chosen.cases[:2]))
    with pytest.raises(UserError, match="runs/0: its test figures are of other images"):
        tabulate([base, other], "supervised")


def test_a_false_alarm_on_an_empty_image_costs_in_the_difference_too():
    found = [result("supervised", [0.5, NAN, 0.7]), result("mining", [0.5, 0.0, 0.7])]
    assert by_method(tabulate(found, "supervised"))["mining (ellipse)"].difference == pytest.approx(-1 / 3)


def counted(name: str, both: int, found: int, true: int) -> CaseMetrics:
    """A case of ten pixels with these counts."""
    pred, truth = np.zeros((2, 1, 10), np.uint8)
    truth[0, :true] = 1
    pred[0, true - both : true - both + found] = 1
    return case_metrics(name, pred, truth, 2)


def test_every_image_counts_in_the_difference_and_clean_images_have_figures_of_their_own():
    """One lesion, seen by both alike, and three clean images: the baseline raises an alarm on one, mining on two."""
    lesion, silent, alarm = (2, 4, 4), (0, 0, 0), (0, 3, 0)
    results = []
    for method, clean in (("supervised", (alarm, silent, silent)), (MINING, (silent, alarm, alarm))):
        cases = summarise(counted(f"i{n}", *counts) for n, counts in enumerate((lesion, *clean)))
        results.append(result(method, [0.5] * 4, chosen=cases, final=cases))
    table = tabulate(results, "supervised")
    base, mining = table.rows
    assert (base.dice, mining.dice) == (0.25, pytest.approx(0.5 / 3)), "left out where empty, as ever"
    assert (base.num_empty, mining.num_empty) == (2, 1)
    assert (base.dice_lesion, mining.dice_lesion, base.num_clean, mining.num_clean) == (0.5, 0.5, 3, 3)
    assert (base.false_alarm_rate, mining.false_alarm_rate) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert mining.difference == pytest.approx(-1 / 4) and mining.num_pairs == 4
    text = comparison.markdown(table)
    assert (
        "| left out | Dice where there is a lesion | false alarms |" in text and "| 1.0 | 0.500 | 67 % of 3 |" in text
    )
    assert "silence on a clean image counts 1 and a false alarm 0" in text


def test_silence_of_both_is_a_pair_without_difference():
    found = [result("supervised", [0.5, NAN, 0.7, NAN]), result("mining", [0.6, NAN, 0.7, 0.0])]
    row = by_method(tabulate(found, "supervised"))["mining (ellipse)"]
    assert row.difference == pytest.approx((0.1 + 0 + 0 - 1) / 4) and row.num_pairs == 4


def test_the_curve_counts_silence_as_the_difference_does():
    few, many = ({"label_fraction": f, "num_labeled": n} for f, n in ((0.01, 10), (1.0, 1000)))
    found = [
        *(result("supervised", [0.4, NAN], seed, **few) for seed in (0, 1)),
        *(result("supervised", [0.8, NAN], seed, **many) for seed in (0, 1)),
        *(result(MINING, [0.6, NAN], seed, **few) for seed in (0, 1)),
        *(result("fixmatch", [0.9, 0.0], seed, **few) for seed in (0, 1)),
    ]
    points, saved = label_curve(found, "supervised")
    assert [point.dice for point in points] == pytest.approx([0.7, 0.9, 0.8, 0.45])
    assert [one.needed.needed for one in saved] == [pytest.approx(100), 10], "a false alarm costs there, too"


def test_two_runs_of_one_seed_are_refused():
    twice = [result("supervised", [0.5]), result("supervised", [0.6], run="runs/again")]
    with pytest.raises(UserError, match=r"runs/0 and runs/again both hold supervised with unet.*seed 0"):
        tabulate(twice, "supervised")


def slices(name: str, *pairs: tuple[int, int]) -> list[CaseMetrics]:
    """Slices of 10 pixels: (predicted, true) numbers of the first ones."""
    column = np.arange(10)[None]
    return [
        case_metrics(f"{name}/slice-{n:04}", *((column < count).astype(np.uint8) for count in pair), 2)
        for n, pair in enumerate(pairs)
    ]


def volumes(method: str, *cases: list[CaseMetrics]) -> Result:
    flat = summarise([case for part in cases for case in part])
    groups = {case.sample_id: case.sample_id.split("/")[0] for case in flat.cases}
    return result(method, [0.5], chosen=flat, final=flat, groups=groups)


def test_slices_are_counted_as_volumes_and_the_table_says_so():
    base = volumes("supervised", slices("a", (10, 10), (0, 2)), slices("b", (5, 10), (0, 0)), slices("c", (0, 4)))
    table = tabulate([base, replace(base, method="twin")], "supervised")
    row = table.rows[0]
    assert row.dice == pytest.approx((20 / 22 + 10 / 15 + 0) / 3)
    assert row.num_missed == 1, "of volume c; the missed slice of a is no missed volume"
    notes = " ".join(table.notes)
    assert "3 volumes" in notes and "Mean Dice per volume" in notes and "slices of a volume" in notes
    assert table.rows[1].num_pairs == 3
    assert "With 3 units no p below 0.25" in notes


def test_what_is_no_slice_of_a_volume():
    assert volume_of("liver/volume-3/slice-0012") == "liver/volume-3"
    assert volume_of("slice-0012") is None and volume_of("a/slice-12") is None and volume_of("a/b") is None


def test_groups_of_images_are_units_and_the_table_says_so():
    rng = np.random.default_rng(0)
    base, gain = rng.uniform(0.4, 0.9, 30), np.repeat(rng.normal(0.03, 0.06, 10), 3)
    alone = [result("supervised", base), result("better", base + gain)]
    groups = {f"i{n}": f"patient-{n // 3}" for n in range(30)}
    together = [replace(one, groups=groups) for one in alone]
    free, held = (by_method(tabulate(found, "supervised"))["better"] for found in (alone, together))
    assert held.difference == free.difference
    assert held.high - held.low > 1.4 * (free.high - free.low)
    assert "The 30 images form 10 groups" in " ".join(tabulate(together, "supervised").notes)
    assert "groups" not in " ".join(tabulate(alone, "supervised").notes)


def test_a_single_seed_and_what_is_missing_are_said():
    table = tabulate([result("supervised", [0.5, 0.6])], "supervised", ["2 of 4 cells failed."])
    assert "One seed" in " ".join(table.notes) and table.notes[-1] == "2 of 4 cells failed."


def test_mining_is_named_after_all_its_segmenters_and_stays_one_curve():
    few, many = ({"label_fraction": f, "num_labeled": n} for f, n in ((0.1, 10), (1.0, 100)))
    found = [
        *(result("supervised", [0.4, 0.6], seed, **n) for n in (few, many) for seed in (0, 1)),
        *(result(MINING, [0.6, 0.8], s, segmenter=name, **few) for s, name in enumerate(("tiny", "tiny+adapted"))),
        result(MINING, [0.6, 0.8], 0, segmenter="tiny", **many),
    ]
    names = {row.method for row in tabulate(found, "supervised").rows}
    assert names == {point.method for point in label_curve(found, "supervised")[0]}
    assert names == {"supervised", "mining (tiny, tiny+adapted)"}


def test_one_label_fraction_makes_no_curve():
    assert label_curve([result("supervised", [0.5, 0.6]), result(MINING, [0.6, 0.7])], "supervised") == ([], [])


def test_the_curve_and_the_labels_saved_by_hand():
    """Supervised has .4 with 10 labels and .8 with 1,000; mining's .6 with 10 is half way: 100 labels."""
    few, many = ({"label_fraction": f, "num_labeled": n} for f, n in ((0.01, 10), (1.0, 1000)))
    found = [
        *(result("supervised", [0.4, 0.4], seed, **few) for seed in (0, 1)),
        *(result("supervised", [0.8, 0.8], seed, **many) for seed in (0, 1)),
        *(result(MINING, [0.6, 0.6], seed, **few) for seed in (0, 1)),
        *(result("fixmatch", [0.9, 0.9], seed, **few) for seed in (0, 1)),
        *(result("oracle", [0.7, 0.7], seed, **few) for seed in (0, 1)),
    ]
    points, saved = label_curve(found, "supervised")
    assert [(p.method, p.num_labels, p.dice, p.num_seeds) for p in points[:3]] == [
        ("supervised", 10.0, 0.4, 2),
        ("supervised", 1000.0, 0.8, 2),
        ("mining (ellipse)", 10.0, 0.6, 2),
    ]
    assert [one.method for one in saved] == ["mining (ellipse)", "fixmatch"]  # an oracle saves nobody a label
    assert saved[0].needed.needed == saved[0].needed.low == pytest.approx(100)
    assert [one.words() for one in saved] == ["100 [100, 100]", "> 1000 [> 1000, > 1000]"]
    table = with_labels_saved(tabulate(found, "supervised"), saved)
    lines = [line.strip("| ").split(" | ") for line in comparison.markdown(table).splitlines()]
    column = next(cells for cells in lines if cells[0] == "labels").index("labels for the same Dice")
    assert [cells[column] for cells in lines[-5:]] == ["–", "–", *(one.words() for one in saved), "–"]
    assert "Labels for the same Dice: how many *supervised* needs" in table.notes[-1]
    assert with_labels_saved(table, []) is table


def test_labels_saved_rest_on_the_seeds_that_all_have():
    few, many = ({"label_fraction": f, "num_labeled": n} for f, n in ((0.01, 10), (1.0, 1000)))
    found = [result("supervised", [0.4, 0.4], 0, **few), result("supervised", [0.8, 0.8], 0, **many)]
    found += [result(MINING, [0.6, 0.6], 0, **few), result(MINING, [0.0, 0.0], 1, **few)]
    (one,) = label_curve(found, "supervised")[1]
    assert (one.num_seeds, one.needed.needed) == (1, pytest.approx(100))
    assert label_curve([*found[1:], result("fixmatch", [0.5, 0.5], 0, **few)], "supervised")[1] == []  # no curve left


def fold(number: int, *dice: float, method: str = ROUND_0, segmenter: str = "tiny", **more) -> Result:
    """A result of one fold, on images of its own."""
    cases = summarise(CaseMetrics(f"f{number}i{n}", d, d, 1.0, 0) for n, d in enumerate(dice))
    groups = {case.sample_id: "one" for case in cases.cases}
    return Result("out", method, "unet", 1.0, 10 + number, 0, segmenter, cases, cases, groups, **more)


def test_folds_are_joined_image_by_image_by_hand():
    costs = [Cost(60.0, NAN, 5.0), Cost(30.0, 200.0, 5.0)]
    parts = [[fold(0, 0.2, 0.4, cost=costs[0])], [fold(1, 0.9, cost=costs[1], segmenter="tiny+adapted")]]
    (joined,) = join_folds(parts)
    assert joined.chosen.dice == pytest.approx(0.5), "every image counts once, not every fold"
    assert [case.sample_id for case in joined.chosen.cases] == ["f0i0", "f0i1", "f1i0"] == sorted(joined.groups)
    assert (joined.cost.seconds, joined.cost.peak_memory_mb, joined.num_labeled) == (90.0, 200.0, 10)
    assert joined.segmenter == "tiny, tiny+adapted"
    assert join_folds(parts[:1]) == parts[0]
    (joined,) = join_folds([[fold(n, 0.5, val_score=score)] for n, score in enumerate((0.4, 0.6))])
    assert joined.val_score == pytest.approx(0.5)


def test_a_fold_that_kept_no_mask_counts_with_its_round_0():
    parts = [
        [fold(0, 0.2, 0.4), fold(0, 0.3, 0.5, method=EQUAL_STEPS), fold(0, 0.6, 0.7, method=MINING)],
        [fold(1, 0.9), fold(1, 0.9, method=MINING)],
    ]
    table = tabulate(join_folds(parts), "supervised")
    assert {row.method: round(row.dice, 4) for row in table.rows} == {
        ROUND_0: 0.5,
        EQUAL_STEPS: round((0.3 + 0.5 + 0.9) / 3, 4),
        "mining (tiny)": round((0.6 + 0.7 + 0.9) / 3, 4),
    }
    assert table.baseline == EQUAL_STEPS
    assert by_method(table)["mining (tiny)"].difference == pytest.approx((0.3 + 0.2 + 0) / 3)

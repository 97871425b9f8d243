"""Plan and table of a sweep: nested labels, impossible trials, rows of sweep.csv, remaining time."""

from __future__ import annotations

import pytest
from helpers.sweep_command import A0, A1, B0, B1, record_state, settings

from kmine.errors import UserError
from kmine.sweep.plan import make_plan, time_left, write_table
from kmine.sweep.trials import save_failure


def planned(tmp_path, *words: str):
    return make_plan(settings(tmp_path / "out", tmp_path / "cache", *words))[0]


def test_trials_are_ordered_by_seed_and_impossible_ones_are_skipped(tmp_path):
    words = ("--fractions", "0.3", "1", "--seeds", "0", "1", "--methods", "supervised", "mining", "oracle")
    plan = planned(tmp_path, *words)
    assert [(t.seed, t.label_fraction, t.method) for t in plan.trials[:4]] == [
        *((0, 0.3, method) for method in ("supervised", "mining", "oracle")),
        (0, 1.0, "supervised"),
    ]
    assert {(t.label_fraction, t.method) for t, _ in plan.skipped} == {(1.0, "mining"), (1.0, "oracle")}
    assert plan.sizes[0.3, 0] == (4, 9) and plan.sizes[1.0, 1] == (13, 0)


def test_labels_of_fractions_are_nested_and_the_test_split_is_one(tmp_path):
    from kmine.sweep.plan import _preflight_all, _splits

    words = ("--fractions", "0.1", "0.25", "0.5", "1", "--seeds", "0", "1", "2")
    cfg = settings(tmp_path / "out", tmp_path / "cache", *words)
    drawn = dict(_splits(cfg, _preflight_all(cfg)))
    for seed in (0, 1, 2):
        labeled = [set(drawn[fraction, seed].labeled) for fraction in (0.1, 0.25, 0.5, 1.0)]
        assert labeled[0] < labeled[1] < labeled[2] < labeled[3]
    assert drawn[0.25, 0].labeled != drawn[0.25, 1].labeled
    assert len({(split.val, split.test) for split in drawn.values()}) == 1


def test_the_splits_of_a_run_are_refused_as_split_file(tmp_path):
    rows = [f"polyp_{n:06},polyp_{n:06},{('labeled', 'unlabeled', 'val', 'test')[n % 4]}" for n in range(24)]
    (tmp_path / "splits.csv").write_text("\n".join(["sample_id,group_id,split", *rows]))
    with pytest.raises(UserError, match="got the splits of a run with its labeled images"):
        planned(tmp_path, "--data.split_file", str(tmp_path / "splits.csv"))


def test_the_table_holds_finished_trials_in_the_order_of_the_plan(tmp_path):
    record_state(tmp_path, A0, "running")
    record_state(tmp_path, A1, "done", steps=7, val_dice=0.5, val_dice_final=None)
    save_failure(tmp_path, B0, "two\nlines, and a comma")
    write_table(tmp_path, [B0, A0, A1, B1])
    lines = (tmp_path / "sweep.csv").read_text().splitlines()
    assert lines[1:] == [
        'supervised,unetpp,0.2,0,failed,"two lines, and a comma",cells/unetpp-0.2-0-supervised,,,,,,,,,',
        "mining,unetpp,0.1,0,done,,cells/unetpp-0.1-0-mining,,,7,0.5,,,,,",
    ]


def test_time_left_is_the_mean_of_finished_trials_of_the_method():
    done, waiting = {"status": "done", "took": 60.0}, {}
    assert time_left({A0: waiting, A1: waiting}, 0, 1).startswith("not known yet")
    assert time_left({A0: done, A1: waiting}, 0, 1).startswith("not known yet")
    assert time_left({A0: done, B0: waiting}, 0, 1) == "about 1.0 min"
    assert time_left({A0: done, B0: waiting, B1: waiting}, 0, 2) == "about 30 s without mining, not known yet"
    assert time_left({A0: done}, 0, 1) == "none"
    assert time_left({A0: {"status": "done", "took": 7000.0}, B0: waiting}, 0, 4) == "about 1.9 h"

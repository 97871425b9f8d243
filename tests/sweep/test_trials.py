"""The parts of a sweep by themselves: who is next, what a cell is told, what is left; nothing is trained here."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.sweep_command import settings

from kmine import cli
from kmine.errors import UserError
from kmine.io.files import write_json
from kmine.store.run_folder import RunFolder
from kmine.sweep import trials as cells
from kmine.sweep import workers as sweep_workers
from kmine.sweep.plan import time_left, write_table
from kmine.sweep.ray_backend import (
    BUSY,
    _outcome,
    interleave,
    run_remote_trial,
)
from kmine.sweep.training import num_steps
from kmine.sweep.trials import (
    Trial,
    claim_next,
    config_of,
    record_crash,
    save_failure,
    state_of,
    trial_dir,
)
from kmine.sweep.workers import least_used
from kmine.types import Metrics, RoundResult, stopped_by

A0, A1, B0, B1 = (Trial(m, "unetpp", f, 0) for f in (0.1, 0.2) for m in ("supervised", "mining"))
"""Two cells of one kin and two of another."""


def says(out: Path, cell: Trial, status: str, **more: object) -> None:
    write_json(trial_dir(out, cell) / "cell.json", {**vars(cell), "status": status, **more})


def taken(out: Path, cells: list[Trial], since: float = 0.0) -> Trial | None:
    """Who is next; let go at once."""
    found = claim_next(out, cells, since)
    if found:
        found[1].close()
    return found and found[0]


# -- settings of a cell


def test_a_cell_has_the_settings_of_the_sweep_and_what_is_varied(tmp_path):
    cfg = settings(tmp_path, tmp_path, "--fit.lr", "0.5", "--models", "unet", "unetpp", "--data.val_fraction", "0.3")
    cell = config_of(cfg, Trial("mining", "unet", 0.25, 7))
    assert (cell.seed, cell.model.name, cell.data.label_fraction, cell.fit.lr) == (7, "unet", 0.25, 0.5)
    assert (cell.data.val_fraction, cell.data.split_seed, cell.baseline) == (0.3, cfg.data.split_seed, False)
    assert Path(cell.out) == tmp_path / "cells" / "unet-0.25-7-mining"


def test_fractions_are_shares_of_groups_where_the_config_counts_groups(tmp_path):
    cfg = settings(tmp_path, tmp_path, "--data.fine_groups", "0.5")
    some, whole = (config_of(cfg, Trial("supervised", "unet", f, 0)).data for f in (0.25, 1.0))
    assert some.fine_groups == 0.25
    assert (whole.fine_groups, whole.label_fraction) == (None, 1.0), "fine_groups 1 would be a single one"


def test_own_settings_reach_their_method_or_model_alone(tmp_path):
    own = ("mining.fit.lr=0.5", "mining.gate.mode=thresholds", "sks.model.encoder=mobilenetv2_100", "sks.fit.lr=0.25")
    cfg = settings(tmp_path, tmp_path, "--models", "unet", "sks", "--set", *own[:2], "--set", *own[2:])
    found = {(m, n): config_of(cfg, Trial(m, n, 0.3, 0)) for m in ("supervised", "mining") for n in ("unet", "sks")}
    assert {key: value.fit.lr for key, value in found.items()} == {
        ("supervised", "unet"): cfg.fit.lr,
        ("supervised", "sks"): 0.25,
        ("mining", "unet"): 0.5,
        ("mining", "sks"): 0.5,
    }
    assert found["mining", "unet"].gate.mode == "thresholds" != found["supervised", "unet"].gate.mode
    assert found["mining", "sks"].model.encoder == "mobilenetv2_100"


def test_each_model_has_its_own_default_encoder():
    from kmine.config.sweep import SweepConfig

    cfg = SweepConfig(models=["unet", "sks"])
    assert config_of(cfg, Trial("supervised", "unet", 0.3, 0)).model.encoder == "mobilenet_v2"
    assert config_of(cfg, Trial("supervised", "sks", 0.3, 0)).model.encoder == "swinv2_tiny_window8_256"


def test_lists_on_the_command_line_and_in_yaml_are_the_same(tmp_path):
    (tmp_path / "c.yaml").write_text("seeds: [3, 4]\nfractions: [0.5]\nmethods: [mining]\nset: [mining.fit.lr=1]\n")
    from_file = settings(tmp_path, tmp_path, "--config", str(tmp_path / "c.yaml"))
    words = "--seeds 3 --fractions [0.5] --methods mining --set mining.fit.lr=1 --seeds=4"
    assert settings(tmp_path, tmp_path, *words.split()) == from_file
    assert settings(tmp_path, tmp_path, "--seeds", "5", "--config", str(tmp_path / "c.yaml")).seeds == [5]


def test_override_leaves_the_rest_and_says_what_is_wrong():
    from kmine.config import DataConfig

    before = DataConfig(size=64, window=(-1.0, 2.0))
    after = cli.override(DataConfig, cli.to_dict(before), {"val_fraction": "0.3"}, "here")
    assert (after.size, after.window, after.val_fraction) == (64, (-1.0, 2.0), 0.3)
    for name, value, said in (("sise", "1", "here: unknown setting sise; did you mean size?"), ("size", "1", "32 to")):
        with pytest.raises(UserError, match=said.replace("?", r"\?")):
            cli.override(DataConfig, cli.to_dict(before), {name: value}, "here")


# -- who is next


def test_cells_are_taken_in_the_order_of_the_plan_and_done_ones_never_again(tmp_path):
    assert taken(tmp_path, [A0, A1]) == A0
    says(tmp_path, A0, "done")
    assert taken(tmp_path, [A0, A1]) == A1
    says(tmp_path, A1, "failed", ended=5.0)
    assert taken(tmp_path, [A0, A1], since=6.0) == A1, "failed before this command"
    assert taken(tmp_path, [A0, A1], since=4.0) is None, "failed in this command"


def test_what_another_process_is_at_is_left_to_it(tmp_path):
    held = RunFolder(trial_dir(tmp_path, A0))
    assert taken(tmp_path, [A0]) is None
    assert taken(tmp_path, [A0, A1]) == A1
    held.close()
    assert taken(tmp_path, [A0]) == A0


def test_a_round_0_in_the_making_is_waited_for_while_there_is_other_work(tmp_path):
    plan = [A0, A1, B0, B1]
    says(tmp_path, A0, "running")
    held = RunFolder(trial_dir(tmp_path, A0))
    assert taken(tmp_path, plan) == B0
    for name in cells.ROUND0_FILES:
        (trial_dir(tmp_path, A0) / name).parent.mkdir(exist_ok=True)
        (trial_dir(tmp_path, A0) / name).touch()
    assert taken(tmp_path, plan) == A1
    says(tmp_path, B0, "done"), says(tmp_path, B1, "done")
    (trial_dir(tmp_path, A0) / cells.ROUND0_FILES[0]).unlink()
    assert taken(tmp_path, plan) == A1, "rather than nothing"
    held.close()


def test_what_another_command_is_at_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep_workers, "POLL_SECONDS", 0.01)
    held, said = RunFolder(trial_dir(tmp_path, A0)), []

    def other() -> None:
        time.sleep(0.1)
        says(tmp_path, A0, "done")
        held.close()

    thread = threading.Thread(target=other)
    thread.start()
    cfg = SimpleNamespace(out=str(tmp_path))
    sweep_workers.work(cfg, [A0], [A0], 0.0, SimpleNamespace(log=said.append), None)
    thread.join()
    assert len(said) == 1 and "1 trials are running in another process" in said[0]


def test_a_crash_is_booked_on_the_cell_of_that_process(tmp_path):
    import platform

    says(tmp_path, A0, "running", pid=1, host="elsewhere")
    says(tmp_path, A1, "running", pid=1, host=platform.node())
    assert record_crash(tmp_path, [A0, A1, B0], 2, "why") is None
    assert record_crash(tmp_path, [A0, A1, B0], 1, sweep_workers.ended_by(-9)) == A1
    assert state_of(tmp_path, A1)["error"] == "its process was killed (SIGKILL): out of memory?"
    assert state_of(tmp_path, A0)["status"] == "running"
    assert sweep_workers.ended_by(3) == "its process ended with exit code 3"


# -- the table, and what is told


def test_the_table_holds_what_the_cells_say_in_the_order_of_the_plan(tmp_path):
    says(tmp_path, A0, "running")
    says(tmp_path, A1, "done", steps=7, val_dice=0.5, val_dice_final=None)
    save_failure(tmp_path, B0, "two\nlines, and a comma")
    write_table(tmp_path, [B0, A0, A1, B1])
    lines = (tmp_path / "sweep.csv").read_text().splitlines()
    assert lines[1:] == [
        'supervised,unetpp,0.2,0,failed,"two lines, and a comma",cells/unetpp-0.2-0-supervised,,,,,,,,',
        "mining,unetpp,0.1,0,done,,cells/unetpp-0.1-0-mining,,,7,0.5,,,,",
    ]


def test_the_time_left_is_said_from_what_cells_of_the_method_took():
    done, waiting = {"status": "done", "took": 60.0}, {}
    assert time_left([A0, A1], {A0: waiting, A1: waiting}, 0, 1).startswith("not known yet")
    assert time_left([A0, A1], {A0: done, A1: waiting}, 0, 1).startswith("not known yet")
    assert time_left([A0, B0], {A0: done, B0: waiting}, 0, 1) == "about 60 s"
    assert (
        time_left([A0, B0, B1], {A0: done, B0: waiting, B1: waiting}, 0, 2)
        == "about 30 s without mining, not known yet"
    )
    assert time_left([A0], {A0: done}, 0, 1) == "none"
    long = {"status": "done", "took": 7000.0}
    assert time_left([A0, B0], {A0: long, B0: waiting}, 0, 4) == "about 1 h 57 min"


def test_steps_are_those_that_were_taken():
    metrics = Metrics((), 0.5, 0.5, 0.0, 0, 0)
    rounds = [RoundResult(n, 4, pseudo, metrics, metrics, True, {}) for n, pseudo in ((0, 0), (1, 3), (2, 0))]
    of = SimpleNamespace(cfg=SimpleNamespace(fit=SimpleNamespace(steps=100, round_steps=10)))
    assert num_steps(of, rounds, by_pseudo_masks=True) == 110
    assert stopped_by(rounds, 3) == "no_pseudo_masks"
    assert num_steps(of, rounds, by_pseudo_masks=False) == 120, "supervised has no pseudo masks to begin with"
    assert num_steps(of, rounds[:1], by_pseudo_masks=True) == 100


# -- ray, without a cluster


def test_the_first_of_each_kin_goes_first():
    assert interleave([A0, A1, B0, B1]) == [A0, B0, A1, B1]


def test_a_task_leaves_a_cell_that_is_taken_or_done(tmp_path):
    cfg = SimpleNamespace(out=str(tmp_path))
    held = RunFolder(trial_dir(tmp_path, A0))
    assert run_remote_trial(cfg, A0, [], 0.0, str(Path.cwd())) == BUSY
    held.close()
    says(tmp_path, A0, "done")
    assert run_remote_trial(cfg, A0, [], 0.0, str(Path.cwd())) == "done"


def test_a_task_that_broke_off_is_a_failed_cell(tmp_path):
    class RayError(Exception):
        cause = None

    def get(done: object) -> str:
        raise RayError("The worker died unexpectedly.\nmore")

    ray = SimpleNamespace(get=get, exceptions=SimpleNamespace(RayError=RayError))
    assert _outcome(ray, None, SimpleNamespace(out=str(tmp_path)), A0) == "failed"
    assert state_of(tmp_path, A0)["error"] == "RayError: The worker died unexpectedly."


def test_workers_are_dealt_out_among_the_gpus_there_are(tmp_path, monkeypatch):
    seen = []

    class Worker:
        sentinel, exitcode = 0, 0

        def __init__(self, **how: object) -> None: ...

        def start(self) -> None:
            seen.append((os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ["OMP_NUM_THREADS"]))

        def is_alive(self) -> bool:
            return False

        def join(self) -> None: ...

    def begin(device: str) -> list[tuple[str | None, str]]:
        seen.clear()
        cfg = settings(tmp_path, tmp_path, "--processes", "3", "--device", device)
        sweep_workers.work_in_processes(cfg, [A0, A1, B0, B1], [], 0.0, SimpleNamespace(log=print))
        return list(seen)

    monkeypatch.setattr(sweep_workers, "multiprocessing", SimpleNamespace(get_context=lambda _: fake))
    monkeypatch.setattr(sweep_workers, "wait", lambda *_, **__: None)
    fake = SimpleNamespace(Process=Worker)
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, 7")
    assert begin("auto") == [("4", "2"), ("7", "2"), ("4", "2")]
    assert begin("cpu") == [("4, 7", "2")] * 3, "nothing to deal out"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert begin("auto") == [("", "2")] * 3
    assert os.environ["OMP_NUM_THREADS"] == "6", "ours stays as it was"


def test_a_worker_takes_the_gpu_that_the_fewest_have():
    assert least_used(["0", "1", "2"], ["0", "2", "0"]) == "1"
    assert least_used(["0", "1"], ["1", "0"]) == "0" and least_used([], [None]) is None

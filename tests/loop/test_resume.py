"""Runs that are killed, interrupted, resumed, extended or repeated have the same results."""

from __future__ import annotations

import csv
import hashlib
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from helpers.loop_command import (
    FEW_STEPS,
    OPEN_GATE,
    SMALL,
    UNET,
    move_pictures,
    run_loop,
    words,
    write_pictures,
)
from helpers.masks import mask_ids
from PIL import Image

from kmine.data.datasets.phantom.dataset import PhantomSource
from kmine.methods import mining
from kmine.setup import open as setup_open
from kmine.store import run_folder as run_store
from kmine.store.run_folder import RunFolder
from kmine.training.checkpoints import Checkpointer
from kmine.training.task import Task
from kmine.types import RoundResult

TINY = {
    **SMALL,
    **UNET,
    **FEW_STEPS,
    **OPEN_GATE,
    "rounds": 2,
    "data.num_samples": 44,
    "data.label_fraction": 0.2,
    "data.val_fraction": 0.1,
    "adopt_tolerance": 1,
}


def set_batch_size(patch: pytest.MonkeyPatch, size: int) -> None:
    patch.setattr(setup_open, "Task", partial(Task, mining_batch_size=size))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    set_batch_size(monkeypatch, 6)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def undisturbed(cache, tmp_path_factory):
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    with pytest.MonkeyPatch.context() as patch:
        set_batch_size(patch, 6)
        assert run(out, cache, with_pictures=True) == 0
    return out


@pytest.fixture(scope="module")
def one_round(cache, tmp_path_factory):
    """An uninterrupted run of the first of the two rounds; tests go on in copies."""
    out = tmp_path_factory.mktemp("one_round") / "run"
    with pytest.MonkeyPatch.context() as patch:
        set_batch_size(patch, 6)
        assert run(out, cache, rounds=1) == 0
    return out


@pytest.fixture(scope="module")
def other_seed(cache, tmp_path_factory):
    out = tmp_path_factory.mktemp("other_seed") / "run"
    assert run(out, cache, seed=1, rounds=0) == 0
    return out


def run(out: Path, cache: Path, **changes: object) -> int:
    return run_loop(TINY, out, cache, **changes)


def results(out: Path) -> list[dict[str, str]]:
    """results.csv without the seconds."""
    with (out / "results.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if not k.startswith("seconds_")} for row in csv.DictReader(file)]


def content(out: Path) -> dict[str, str]:
    """Hashes of the results by file: pseudo masks byte for byte, weights without their header, which holds seconds."""
    found = {}
    for path in sorted(p for p in out.rglob("*") if p.suffix == ".safetensors" or p.parent.name == "pseudo_masks"):
        data = path.read_bytes()
        if path.suffix == ".safetensors":  # eight bytes with the length of the header, which holds the seconds
            data = data[8 + int.from_bytes(data[:8], "little") :]
        found[path.relative_to(out).as_posix()] = hashlib.sha256(data).hexdigest()
    return found


def history(out: Path) -> list[list[str]]:
    """history.csv without the clock times."""
    with (out / "history.csv").open(newline="") as file:
        return sorted(row[:-1] for row in csv.reader(file))


def times(out: Path) -> dict[str, int]:
    kinds = (".safetensors", ".parquet")
    files = [p for p in out.rglob("*") if p.suffix in kinds or p.name in ("metrics.json", "changes.json", "splits.csv")]
    return {p.relative_to(out).as_posix(): p.stat().st_mtime_ns for p in files}


def finished(found: dict[str, int]) -> dict[str, int]:
    """Without what a session leaves half done: checkpoints and tables are done when the second of the two is there."""
    last = {"model_final.safetensors": "model.safetensors", "prompts.parquet": "decisions.parquet"}
    found = {
        f: t for f, t in found.items() if "pseudo_masks" not in f or f"{f.split('/')[0]}/decisions.parquet" in found
    }
    return {
        file: time
        for file, time in found.items()
        if file.startswith("round_") and "fit_state" not in file and ".parts" not in file
        if str(Path(file).with_name(last.get(Path(file).name, Path(file).name))) in found
    }


def assert_same(out: Path, other: Path) -> None:
    assert results(out) == results(other)
    assert content(out) == content(other)
    assert history(out) == history(other)
    assert not [p for p in out.rglob("*") if p.name.startswith(".") and p.name != ".lock"], "nothing half written"


def score_of(out: Path, round_idx: int) -> float:
    store = RunFolder(out, follows=True)
    return RoundResult.from_json(store.read_json(store.round_dir(round_idx) / "metrics.json")).metrics.score


def interrupt_after(patch: pytest.MonkeyPatch, owner: object, name: str, calls: int) -> None:
    """Ctrl-C at the end of the call number `calls`."""
    real, count = getattr(owner, name), [0]

    def counted(*args, **kwargs):
        value = real(*args, **kwargs)
        count[0] += 1
        if count[0] == calls:
            raise KeyboardInterrupt
        return value

    patch.setattr(owner, name, counted)


# -- a whole run


def test_a_finished_run_folder_has_exactly_the_documented_files(undisturbed):
    found = {p.relative_to(undisturbed).as_posix() for p in undisturbed.rglob("*") if p.is_file()} - {".lock"}
    masks = {f for f in found if "/pseudo_masks/" in f}
    trained = ("model.safetensors", "model_final.safetensors", "metrics.json")
    mined = ("prompts.parquet", "decisions.parquet", "changes.json")
    assert found - masks == {
        *(
            "config.yaml",
            "run.json",
            "splits.csv",
            "contents.csv",
            "results.csv",
            "report.html",
            "history.csv",
            "curves.svg",
            "log.txt",
        ),
        "calibration/calibration.json",
        *(f"round_{n:02d}/{name}" for n in range(3) for name in trained),
        *(f"round_{n:02d}/{name}" for n in (1, 2) for name in mined),
    }
    assert masks == {f"round_{n:02d}/pseudo_masks/00000.parquet" for n in (1, 2)}
    rows = results(undisturbed)
    assert [row["round"] for row in rows] == ["0", "1", "2"]
    for n, row in enumerate(rows):
        assert int(row["num_pseudo"]) == len(mask_ids(undisturbed / f"round_{n:02d}/pseudo_masks"))
    page = (undisturbed / "report.html").read_text()
    drawn = [page.count(f'class="{name}"') for name in ("chart", "bars")]
    assert drawn == [2, 2] and page.count("data:image/webp") > 5, "drawn in whole runs, here alone"
    run_json = RunFolder(undisturbed).run()
    assert run_json["stopped_by"] == "rounds" and run_json["seed"] == 0 and run_json["segmenter"] == "ellipse"
    assert {"command", "git_commit", "versions", "device", "data_fingerprint", "segmenter_sha256"} <= run_json.keys()


def test_every_split_is_disjoint_and_complete(undisturbed):
    with (undisturbed / "splits.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({r["sample_id"] for r in rows}) == len(rows) == TINY["data.num_samples"]
    sides: dict[str, set[str]] = {}
    for row in rows:
        sides.setdefault(row["group_id"], set()).add(row["split"].replace("unlabeled", "labeled"))
    assert all(len(side) == 1 for side in sides.values())


def test_the_same_command_again_computes_nothing(undisturbed, cache):
    before, rows = times(undisturbed), (undisturbed / "results.csv").read_text()
    assert run(undisturbed, cache) == 0
    assert times(undisturbed) == before
    assert (undisturbed / "results.csv").read_text() == rows, "seconds included: they are those of the first time"


def test_the_same_seed_twice_is_the_same_run_and_another_is_not(undisturbed, one_round, other_seed):
    assert results(one_round) == results(undisturbed)[:2]
    assert content(one_round).items() <= content(undisturbed).items()
    assert (one_round / "splits.csv").read_bytes() == (undisturbed / "splits.csv").read_bytes()
    assert (other_seed / "splits.csv").read_bytes() != (undisturbed / "splits.csv").read_bytes()
    first = "round_00/model_final.safetensors"
    assert content(other_seed)[first] != content(undisturbed)[first]


def test_seeds_share_validation_and_test(undisturbed, other_seed):
    def held_back(out: Path) -> list[str]:
        return [line for line in (out / "splits.csv").read_text().splitlines() if line.endswith((",val", ",test"))]

    assert held_back(other_seed) == held_back(undisturbed)


# -- interrupted


MOMENTS = [
    (RunFolder, "claim", 1, ""),
    (RunFolder, "save_tensors", 1, "round_00/fit_state.safetensors"),  # in the middle of the first training
    (RunFolder, "save_tensors", 1, "round_00/model_final.safetensors"),  # between its two checkpoints
    (RunFolder, "save_tensors", 2, "round_00/model.safetensors"),  # after them, before its state is put away
    (RunFolder, "save_json", 2, "round_00/metrics.json"),  # after round 0; the first is calibration.json
    (RunFolder, "save_batch", 2, "round_01/.parts/000/00001.decisions.parquet"),  # in the middle of mining
    (mining, "mine_batches", 1, ""),  # all mined, not joined
    (run_store, "join_tables", 1, "round_01/prompts.parquet"),  # one of the two joined tables is written
    (RunFolder, "close_round", 1, "round_01/decisions.parquet"),
    (RunFolder, "save_json", 2, "round_01/changes.json"),  # after what it changed is told
    (RunFolder, "save_tensors", 1, "round_01/fit_state.safetensors"),  # in the middle of the training of round 1
    (RunFolder, "save_json", 2, "round_01/metrics.json"),  # after round 1
    (RunFolder, "save_batch", 1, "round_02/.parts/000/00000.decisions.parquet"),
]
"""Of one session after the other: what it does last, at which call, and a file that is there from then on."""


def test_a_run_interrupted_again_and_again_equals_an_undisturbed_one(undisturbed, cache, tmp_path, capsys):
    out, before, kept = tmp_path / "run", {}, {}
    for owner, name, calls, new in MOMENTS:
        with pytest.MonkeyPatch.context() as patch:
            interrupt_after(patch, owner, name, calls)
            assert run(out, cache) == 130, new
        assert "the same command resumes where it stopped" in capsys.readouterr().err
        after = times(out)
        assert {f: after[f] for f in kept} == kept, f"finished files are not written again, {new}"
        assert not new or (new in after and new not in before), f"{new}: {sorted(after)}"
        before, kept = after, finished(after)
    assert run(out, cache) == 0
    assert_same(out, undisturbed)
    after = times(out)
    assert {f: after[f] for f in kept} == kept, "finished files are not written again"


@pytest.fixture(scope="module")
def with_all_models(cache, tmp_path_factory):
    """An uninterrupted run with a retrained model and the baselines."""
    out = tmp_path_factory.mktemp("all") / "run"
    with pytest.MonkeyPatch.context() as patch:
        set_batch_size(patch, 6)
        assert run(out, cache, rounds=1, retrain="true", baseline="true") == 0
    return out


def test_a_run_has_a_retrained_model_and_both_baselines(with_all_models, one_round):
    rows, info = results(with_all_models), RunFolder(with_all_models, follows=True).run()
    assert [row["retrained"] for row in rows] == ["False", "False", "True"]
    assert [row["dice"] for row in rows[:2]] == [row["dice"] for row in results(one_round)], "mining is the same"
    assert rows[2]["supervised_once_dice"] and not rows[1]["supervised_once_dice"] and rows[1]["supervised_dice"]
    assert info["stopped_by"] == "rounds" and info["kept_rounds"].keys() == {"supervised", "supervised_once"}
    scores = {n: score_of(with_all_models, n) for n, row in enumerate(rows) if row["adopted"] == "True"}
    assert info["adopted_round"] == max(scores, key=lambda n: (scores[n], n))
    assert [n for n, row in enumerate(rows) if row["kept"] == "True"] == [info["adopted_round"]]
    page = (with_all_models / "report.html").read_text()
    assert "Round 2 is a new model, trained once" in page and "in one schedule" in page
    assert (with_all_models / "supervised_once/round_01/model.safetensors").is_file()


def test_a_kill_in_one_of_the_long_trainings_costs_its_last_checkpoint(with_all_models, cache, tmp_path):
    """Rounds save their states 1 and 2, the retrained model 3 to 5, supervised 6, supervised_once 7 to 9."""
    settings, out = {"rounds": 1, "retrain": "true", "baseline": "true"}, tmp_path / "run"
    for calls, where in ((4, "round_02"), (8 - 4, "supervised_once/round_01")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Checkpointer, "SAVE_EVERY_S", 0)
            interrupt_after(patch, Checkpointer, "save_state", calls)
            assert run(out, cache, **settings) == 130
        states = [path.relative_to(out).as_posix() for path in out.rglob("fit_state.safetensors")]
        assert states == [f"{where}/fit_state.safetensors"]
    assert run(out, cache, **settings) == 0
    assert_same(out, with_all_models)


def test_a_run_of_before_retraining_is_refused_by_that_setting_or_resumes(undisturbed, cache, tmp_path, capsys):
    out = shutil.copytree(undisturbed, tmp_path / "run")
    text = (out / "config.yaml").read_text()
    (out / "config.yaml").write_text("".join(x for x in text.splitlines(True) if not x.startswith("retrain:")))
    assert run(out, cache, retrain="true") == 2
    assert "retrain = False, this command has True" in (said := capsys.readouterr().err) and "--retrain false" in said
    assert run(out, cache) == 0
    assert content(out) == content(undisturbed)


def test_a_training_resumes_from_its_last_validation(one_round, cache, tmp_path):
    from kmine.training import train_steps as training

    out, steps = tmp_path / "run", []
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, RunFolder, "save_tensors", 1)
        assert run(out, cache, rounds=1) == 130
    with pytest.MonkeyPatch.context() as patch:
        real = training.set_rate
        patch.setattr(training, "set_rate", lambda *a: steps.append(1) or real(*a))
        assert run(out, cache, rounds=0) != 0, "fewer rounds than the folder was begun with are refused"
        assert run(out, cache, rounds=1) == 0
    assert len(steps) == (TINY["fit.steps"] - TINY["fit.val_every"]) + TINY["fit.round_steps"]
    assert_same(out, one_round)


def test_only_a_damaged_checkpoint_is_trained_again(undisturbed, cache, tmp_path):
    out = shutil.copytree(undisturbed, tmp_path / "run")
    before = times(out)
    victim = out / "round_01" / "model.safetensors"
    victim.write_bytes(victim.read_bytes()[:1000])
    assert run(out, cache) == 0
    assert_same(out, undisturbed)
    changed = {f for f, t in times(out).items() if t != before[f]}
    assert changed == {"round_01/model.safetensors", "round_01/model_final.safetensors"}


def test_a_lost_pseudo_mask_is_mined_again(undisturbed, cache, tmp_path):
    out = shutil.copytree(undisturbed, tmp_path / "run")
    (out / "round_02" / "pseudo_masks" / "00000.parquet").unlink()
    assert run(out, cache) == 0
    assert_same(out, undisturbed)


def test_one_round_extended_to_two_equals_two_from_the_start(undisturbed, one_round, cache, tmp_path):
    out = shutil.copytree(one_round, tmp_path / "run")
    before = times(out)
    assert run(out, cache) == 0
    assert_same(out, undisturbed)
    after = times(out)
    assert {f: after[f] for f in before} == before


def test_the_supervised_baseline_may_be_added_later(one_round, watched, cache, tmp_path):
    out = shutil.copytree(one_round, tmp_path / "run")
    assert run(out, cache, rounds=1, baseline="true") == 0
    assert_same(out, watched.out)
    assert results(out)[1]["supervised_dice"] != ""
    assert (out / "supervised" / "round_01" / "model.safetensors").exists()


def test_a_killed_process_resumes_to_the_same_results(cache, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "killed"
    with pytest.MonkeyPatch.context() as patch:
        set_batch_size(patch, 16)  # as the other process has it
        assert run(whole, cache, rounds=1) == 0
        command = [sys.executable, "-m", "kmine.loop", *words(TINY, out, cache, rounds=1)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            for line in process.stderr:
                if line.startswith("round 1: mining: 16/"):
                    process.kill()
        assert process.returncode == -signal.SIGKILL
        assert not (out / "report.html").exists()
        assert run(out, cache, rounds=1) == 0
    assert_same(out, whole)


# -- nothing kept


def test_a_round_without_pseudo_masks_ends_the_run(cache, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(out, cache, prompts__min_area_px=10_000) == 0
    err = " ".join(capsys.readouterr().err.split())
    assert "round 1: no pseudo mask was kept, so the loop stops" in err
    assert RunFolder(out).run()["stopped_by"] == "no_pseudo_masks"
    assert [(row["round"], row["num_pseudo"], row["adopted"]) for row in results(out)] == [
        ("0", "0", "True"),
        ("1", "0", "False"),
    ]
    assert "no pseudo mask was kept" in (out / "report.html").read_text()
    assert not mask_ids(out / "round_01/pseudo_masks")


def test_a_run_of_zero_rounds_equals_round_0_of_a_longer_one(undisturbed, cache, tmp_path):
    out = tmp_path / "run"
    assert run(out, cache, rounds=0) == 0
    assert results(out) == [{**results(undisturbed)[0], "segmenter": ""}]
    first = {f: h for f, h in content(undisturbed).items() if f.startswith("round_00/")}
    assert content(out) == first


# -- masks and images that are read


class Watched(NamedTuple):
    """A run with a baseline: masks that were read, images that were decoded after the cache was built, its task."""

    out: Path
    masks: set[str]
    images: list[str]
    task: Task


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    masks, images, tasks = set(), [], []
    real_open, real_image, real_mask = setup_open.open_task, PhantomSource.image, PhantomSource.mask

    def opened(*args, **more):
        tasks.append(real_open(*args, **more))
        images.clear()  # what was decoded for the cache, test images included
        return tasks[-1]

    out = tmp_path_factory.mktemp("watched") / "run"
    with pytest.MonkeyPatch.context() as patch:
        set_batch_size(patch, 6)
        patch.setattr(setup_open, "open_task", opened)
        patch.setattr(PhantomSource, "image", lambda self, i: images.append(i) or real_image(self, i))
        patch.setattr(PhantomSource, "mask", lambda self, i: masks.add(i) or real_mask(self, i))
        assert run(out, out.parent / "cache", rounds=1, baseline="true") == 0
    (task,) = tasks
    return Watched(out, masks, images, task)


def splits_of(out: Path) -> dict[str, str]:
    with (out / "splits.csv").open(newline="") as file:
        return {row["sample_id"]: row["split"] for row in csv.DictReader(file)}


def test_masks_of_unlabeled_and_test_images_are_never_opened(watched):
    split = splits_of(watched.out)
    assert watched.masks == {i for i, name in split.items() if name in ("labeled", "val")}


def test_no_pool_of_a_task_holds_the_test_split_and_only_two_have_masks(watched):
    from kmine.errors import WithheldMaskError

    task = watched.task
    test = {i for i, name in splits_of(watched.out).items() if name == "test"}
    assert test
    assert not test & {*task.labeled.ids, *task.unlabeled.ids, *task.val.ids, *watched.images}
    for sample_id in task.unlabeled.ids:
        assert task.unlabeled.sample(sample_id).mask is None
        with pytest.raises(WithheldMaskError):
            task.unlabeled.mask_resized(sample_id)


# -- the data were copied


def test_a_run_resumes_with_copied_data_and_refuses_changed_ones(tmp_path, capsys):
    out, cache = tmp_path / "run", tmp_path / "cache"
    write_pictures(tmp_path / "here", TINY["data.num_samples"])

    def go_on(folder: Path, rounds: int) -> int:
        places = {"data__images": folder / "images", "data__masks": folder / "masks"}
        return run(out, cache, data__name="folder", data__duplicate_distance=-1, rounds=rounds, **places)

    assert go_on(tmp_path / "here", 0) == 0
    before, fingerprint = times(out), RunFolder(out).run()["data_fingerprint"]
    move_pictures(tmp_path / "here", tmp_path / "there")
    assert go_on(tmp_path / "there", 1) == 0
    assert "comparing their content" in capsys.readouterr().err
    assert before.items() <= times(out).items() and (out / "round_01" / "model.safetensors").exists()
    assert RunFolder(out).run()["data_fingerprint"] == fingerprint
    labeled = next(r["sample_id"] for r in RunFolder(out).read_csv("splits.csv") if r["split"] == "labeled")
    Image.fromarray(np.full((32, 32), 255, np.uint8)).save(tmp_path / "there" / "masks" / f"{labeled}.png")
    assert go_on(tmp_path / "there", 1) != 0
    assert f"samples have another content: {labeled};" in capsys.readouterr().err

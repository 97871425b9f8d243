"""Mining by workers with copies of a round: what they save, their failures; with ray installed, a cluster of two."""

from __future__ import annotations

import pickle
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.loop_command import FEW_STEPS, OPEN_GATE, SMALL, words
from helpers.small import CFG, truth_of
from helpers.sweep_command import one_thread

from kmine.errors import UserError
from kmine.loop.__main__ import main
from kmine.mining import pipeline, ray_mining
from kmine.mining.pipeline import mine_batches
from kmine.mining.ray_mining import CHUNKS, LONGEST, chunks_of, mine_on_ray
from kmine.mining.round import close_round, open_round
from kmine.setup.preflight import preflight
from kmine.store.run_folder import RunFolder
from kmine.training.checkpoints import Checkpoints
from kmine.training.model_setup import new_model
from kmine.types import Probs


class RayError(Exception):
    cause: Exception | None = None


class Actor:
    """An actor of `fake_ray`: built from pickled arguments, its calls give pickled results."""

    def __init__(self, kind, *args) -> None:
        worker = kind(*pickle.loads(pickle.dumps(args)))
        self.mine = SimpleNamespace(remote=lambda batches: pickle.loads(pickle.dumps(worker.mine(batches))))


def fake_ray(num_cpus: int) -> SimpleNamespace:
    """What `mine_on_ray` uses of ray, in this process."""

    def pool(actors):
        return SimpleNamespace(map_unordered=lambda call, items: (call(actors[0], item) for item in reversed(items)))

    return SimpleNamespace(
        cluster_resources=lambda: {"CPU": float(num_cpus)},
        put=lambda value: value,
        remote=lambda **_: lambda kind: SimpleNamespace(remote=lambda *args: Actor(kind, *args)),
        util=SimpleNamespace(ActorPool=pool),
        exceptions=SimpleNamespace(RayError=RayError),
    )


@pytest.fixture
def opened(task_of, monkeypatch):
    """Opens a round in a run folder, in batches of 3; its local model sees the true objects."""

    @contextmanager
    def cluster(*_):
        yield fake_ray(2)

    monkeypatch.setattr(ray_mining, "ray_cluster", cluster)
    truth = truth_of(task_of(CFG, "truth")[0])

    def see(ctx, batch):
        seen = [0.05 + 0.9 * (truth.sample(i).mask > 0).astype(np.float32) for i in batch.ids]
        return [Probs(i, np.stack([1 - p, p])) for i, p in zip(batch.ids, seen, strict=True)]

    monkeypatch.setattr(pipeline, "predict_probs", see)

    def opened_round(name: str):
        task = replace(task_of(CFG, name)[0], mining_batch_size=3)
        model = new_model(task)
        return open_round(task, model, Checkpoints("student", dict(model.state_dict()), {}, 0.0), None, 1)

    return opened_round


def test_copies_of_a_round_save_what_one_process_does(opened):
    alone, shared = opened("one"), opened("ray")
    mine_batches(alone)
    mine_on_ray(shared)
    one, other = close_round(alone), close_round(shared)
    assert list(one) == list(other) and len(one) > 5
    assert repr(list(alone.task.run.decisions(1))) == repr(list(shared.task.run.decisions(1))), "NaN is not itself"
    assert all(np.array_equal(one[i].mask, other[i].mask) for i in one)
    assert set(other.seconds) == set(one.seconds)


def test_what_a_lost_worker_leaves_is_mined_by_the_next_command(opened, monkeypatch):
    ctx, calls = opened("ray"), []

    def lost(worker_ctx):
        calls.append(worker_ctx)
        if len(calls) > 1:
            raise RayError("The actor died.\nmore")
        mine_batches(worker_ctx)

    monkeypatch.setattr(ray_mining, "mine_batches", lost)
    with pytest.raises(UserError, match=r"backend ray: a worker was lost \(RayError: The actor died.\); what is mined"):
        mine_on_ray(ctx)
    monkeypatch.setattr(ray_mining, "mine_batches", mine_batches)
    ctx.task.run.close()
    again = opened("ray")
    assert len(again.pending) == len(ctx.pending) - 1
    mine_on_ray(again)
    mine_on_ray(replace(again, pending=()))
    assert len(close_round(again)) > 5


def test_an_error_of_a_worker_is_raised_as_it_is(opened, monkeypatch):
    failed = RayError("trace")
    failed.cause = UserError("a.png: expected an image")
    monkeypatch.setattr(ray_mining, "mine_batches", lambda ctx: (_ for _ in ()).throw(failed))
    with pytest.raises(UserError, match=r"^a.png: expected an image$"):
        mine_on_ray(opened("ray"))


@pytest.mark.parametrize(("count", "workers", "longest"), [(1, 8, 1), (20, 2, 2), (20, 40, 1), (9000, 2, LONGEST)])
def test_chunks_are_all_batches_in_order_and_several_for_each_worker(count, workers, longest):
    batches = [(n, [str(n)]) for n in range(count)]
    chunks = chunks_of(batches, workers)
    assert [batch for chunk in chunks for batch in chunk] == batches and max(map(len, chunks)) == longest
    assert len(chunks) >= min(count, CHUNKS * workers)


def test_a_run_folder_that_was_pickled_follows(tmp_path):
    run = RunFolder(tmp_path / "run")
    copy = pickle.loads(pickle.dumps(run))
    assert copy.follows and not run.follows and copy.root == run.root
    copy.close()


def test_several_processes_do_not_also_mine_on_ray(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("kmine.setup.preflight.import_ray", lambda instead: None)
    with pytest.raises(UserError, match="backend: expected local in a launch of several processes"):
        preflight(replace(CFG, backend="ray"))


def test_a_missing_ray_is_one_line_before_training(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'kmine\[ray\]', or use --backend local"):
        preflight(replace(CFG, backend="ray"))


@pytest.mark.slow
def test_workers_of_a_cluster_make_the_run_of_one_process(tmp_path):
    ray = pytest.importorskip("ray")
    settings, runs = {**SMALL, **OPEN_GATE, **FEW_STEPS}, {}
    with one_thread():
        for backend in ("ray", "local"):
            out = tmp_path / backend
            assert main([*words(settings, out, tmp_path / "cache"), f"--backend={backend}"]) == 0
            runs[backend] = [repr(row) for row in RunFolder(out, follows=True).decisions(1)]
    assert not ray.is_initialized()
    assert runs["ray"] == runs["local"] and len(runs["ray"]) > 5

"""Several processes on one run: shards are complete and disjoint, a step equals that of one process."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.loop_command import FEW_STEPS, OPEN_GATE, SMALL, run_loop, words
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.optimizer import register_optimizer_step_pre_hook

from kmine.config import FitConfig, ModelConfig
from kmine.data.batches import Batch
from kmine.errors import UserError
from kmine.loop import __main__ as loop
from kmine.models.build import build_model
from kmine.store.run_folder import RunFolder
from kmine.training.distributed import forward, gather_shards, is_distributed_launch, make_fabric, rank_slice, shard
from kmine.training.fit import fit
from kmine.training.train_steps import Callbacks
from kmine.types import PseudoLabel


def process(rank: int, size: int) -> SimpleNamespace:
    """A process among `size`."""
    return SimpleNamespace(global_rank=rank, world_size=size)


@given(st.integers(0, 50), st.integers(1, 9))
def test_slices_are_contiguous_and_differ_in_length_by_one_at_most(count: int, size: int) -> None:
    slices = [rank_slice(count, process(rank, size)) for rank in range(size)]
    assert [n for own in slices for n in range(count)[own]] == list(range(count))
    lengths = [own.stop - own.start for own in slices]
    assert max(lengths) - min(lengths) <= 1


@given(st.integers(0, 50), st.integers(1, 9))
def test_every_item_is_in_exactly_one_shard(count: int, size: int) -> None:
    shares = [shard(range(count), process(rank, size)) for rank in range(size)]
    assert sorted(n for share in shares for n in share) == list(range(count))


@given(st.integers(0, 30), st.integers(2, 5))
def test_gathered_shards_are_in_the_original_order(count: int, size: int) -> None:
    shares = [shard(range(count), process(rank, size)) for rank in range(size)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.distributed, "all_gather_object", lambda out, share: out.__setitem__(slice(None), shares), False
        )
        assert gather_shards(shares[0], process(0, size)) == list(range(count))


def test_a_batch_smaller_than_the_processes_is_refused() -> None:
    with pytest.raises(UserError, match=r"each of 4 processes in a batch, got 3"):
        forward(torch.nn.Identity(), torch.zeros(3, 1), process(0, 4))


def test_a_numbered_device_is_refused_in_a_distributed_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_distributed_launch()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "here")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"several processes share the work, got 'cuda:1'"):
        make_fabric("cuda:1", "32")


def test_a_process_of_rank_above_0_writes_only_the_batches_it_mined(tmp_path: Path) -> None:
    store = RunFolder(tmp_path, follows=True)
    store.update_run(seed=1)
    store.write_text("config.yaml", "a: 1")
    store.save_tensors(tmp_path / "model.safetensors", {"w": torch.zeros(1)}, "signature")
    assert list(tmp_path.iterdir()) == []
    store.save_batch(1, "signature", 0, [], [], {"a": PseudoLabel(np.zeros((2, 2), np.uint8))})
    assert [path.name for path in (tmp_path / "round_01/.parts/000").glob("*masks*")] == ["00000.masks.parquet"]
    store.close()


def first_step() -> dict[str, torch.Tensor]:
    """Loss, averaged gradients and running statistics of one step on an uneven batch, in any number of processes.

    The network computes in float64, which separates rounding errors from wrong formulas.
    """
    rng = np.random.default_rng(0)
    masks = (rng.random((3, 32, 32)) < 0.4).astype(np.uint8)
    masks[:, :3] = 255
    images = rng.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    batch = Batch(images, masks, np.array([1.0, 0.5, 0.2], np.float32))
    batches = SimpleNamespace(stream=lambda start, stop, num_workers: [batch])
    encoder = {"encoder": "tu-mobilenetv3_small_050", "encoder_depth": 3, "decoder_channels": 8}
    model = build_model(ModelConfig(**encoder), 2, seed=0).double()
    found = {}

    def keep_gradients(*_: object) -> None:
        found.update(
            {f"gradient of {name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        )

    hook = register_optimizer_step_pre_hook(keep_gradients)
    callbacks = Callbacks(validate=lambda model: 0.0)
    result = fit(model, batches, FitConfig(steps=1), fabric=make_fabric("cpu", "32"), seed=0, callbacks=callbacks)
    hook.remove()
    found["loss"] = torch.tensor(result.history[0][1])
    return found | {name: value for name, value in result.final.items() if "running_" in name}


def under_torchrun(*command: str) -> str:
    """Standard error of `python COMMAND` in two processes."""
    ended = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", *command],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stderr


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> tuple[Path, dict[str, object], str]:
    """A step and then a run in two processes: their folder, the run's settings, its standard error."""
    folder = tmp_path_factory.mktemp("launched")
    settings = SMALL | FEW_STEPS | OPEN_GATE | {"fit.val_every": 1}
    settings |= {"data.num_samples": 56, "data.label_fraction": 0.2, "fit.batch_size": 3, "gate.mode": "ranked"}
    return folder, settings, under_torchrun(__file__, str(folder), *words(settings, folder / "two"))


@pytest.mark.slow
def test_a_step_in_two_processes_equals_the_step_in_one(launched) -> None:
    """Only one step: rounding errors grow with each step, and differ between machines.

    In float64 gradients of 1e-3 agree to 1e-14. The loss takes the logits as float32, whose last digit (6e-8) may flip.
    """
    folder, _, _ = launched
    expected = first_step()
    for rank in range(2):
        torch.testing.assert_close(torch.load(folder / f"{rank}.pt"), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.slow
def test_a_run_in_two_processes_mines_and_writes_everything_once(launched) -> None:
    """25 images are mined in two batches. Of the training only the loss before the first update is compared."""
    folder, settings, output = launched
    assert run_loop(settings, folder / "one") == 0
    assert output.count("results: ") == 1, "only process 0 reports"
    one, two = (RunFolder(folder / name) for name in ("one", "two"))
    assert one.read_csv("splits.csv") == two.read_csv("splits.csv")
    mined = [sample_id for sample_id, _ in groupby(row.sample_id for row in two.decisions(1))]
    assert len(mined) == len(set(mined)) == two.run()["splits"]["unlabeled"] > 16
    assert sorted(mined) == sorted({row.sample_id for row in one.decisions(1)})
    histories = [
        store.load_tensors(store.round_dir(0) / "model.safetensors", None)[1]["history"] for store in (one, two)
    ]
    assert [step for step, *_ in histories[1]] == [1, 2, 3, 4]
    # Rounding of float32 is about 1e-6; other images or weights in the batch would change the loss by per cents.
    assert histories[1][0][1] == pytest.approx(histories[0][0][1], rel=1e-4)
    rows = [list(csv.DictReader((folder / name / "results.csv").open())) for name in ("one", "two")]
    assert [row["round"] for row in rows[0]] == [row["round"] for row in rows[1]]
    assert two.run()["stopped_by"] == "rounds"
    one.close(), two.close()


if __name__ == "__main__":  # a process started by `under_torchrun`
    torch.save(first_step(), Path(sys.argv[1]) / f"{os.environ['RANK']}.pt")
    sys.exit(loop.main(sys.argv[2:]))

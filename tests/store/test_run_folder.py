"""The run folder: files complete or absent, signed, locked, and never overwritten by another run."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.masks import older_layout

from kmine.cli import to_dict
from kmine.config import DataConfig, LoopConfig
from kmine.errors import UserError
from kmine.io import files
from kmine.setup import provenance
from kmine.store import mask_files
from kmine.store import run_folder as run_store
from kmine.store.run_folder import RunFolder
from kmine.store.table_files import encode_table
from kmine.store.tables import DecisionRow, MaskRow, PromptRow
from kmine.types import PseudoLabel

IDS = ("a/b", "../x", "Normal (1)", "ä", ".", "..", "", ".hidden", "a b%2Fc", "x" * 250, "ä" * 250, "y" * 201)


@pytest.fixture
def store(tmp_path):
    store = RunFolder(tmp_path / "run")
    yield store
    store.close()


def failing(number: int):
    def fail(*_args, **_kwargs):
        raise OSError(number, os.strerror(number))

    return fail


# -- atomic writes


@pytest.mark.parametrize(
    ("number", "cure"),
    [
        (errno.ENOSPC, "the disk is full; free some space and run the same command again"),
        (errno.EDQUOT, "quota is used up; free some space and run the same command again"),
        (errno.EACCES, "no permission to write there; choose another --out"),
        (errno.EROFS, "read-only; choose another --out"),
    ],
)
def test_a_refused_write_names_the_cure_and_keeps_the_old_file(store, monkeypatch, number, cure):
    path = store.root / "round_00" / "model.safetensors"
    store.save_tensors(path, {"w": torch.ones(3)}, "s")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing(number))
        with pytest.raises(UserError, match=cure) as error:
            store.save_tensors(path, {"w": torch.zeros(3)}, "s")
    assert str(error.value).startswith(str(path))
    assert store.load_tensors(path, "s")[0]["w"].tolist() == [1, 1, 1]


def test_unfinished_files_of_a_killed_write_are_removed_and_no_others(store):
    unfinished = [
        store.root / f"{folder}.model.safetensors.4711{files.UNFINISHED}"
        for folder in ("", "round_00/", "round_01/pseudo_masks/", "supervised/round_01/", "classifier/", "calibration/")
    ]
    others = [
        store.root / "notes.tmp",
        store.root / ".mine.tmp",
        store.root / "deep" / "er" / f".a{unfinished[0].suffix}",
    ]
    for path in (*unfinished, *others):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    store.claim({"rounds": 1}, "f")
    assert not any(path.exists() for path in unfinished)
    assert all(path.exists() for path in others)


# -- the lock


def test_a_second_process_is_refused_until_the_lock_is_released(store):
    code = "import sys, pathlib; from kmine.store.run_folder import RunFolder; RunFolder(pathlib.Path(sys.argv[1]))"
    first = subprocess.run([sys.executable, "-c", code, str(store.root)], capture_output=True, text=True)
    assert "another process is working in this run folder; choose another --out" in first.stderr
    store.close()
    assert subprocess.run([sys.executable, "-c", code, str(store.root)], check=False).returncode == 0


def test_a_file_at_the_path_of_the_folder_is_an_error(tmp_path):
    (tmp_path / "taken").write_text("mine")
    for path in (tmp_path / "taken", tmp_path / "taken" / "below"):
        with pytest.raises(UserError, match="a file stands where a folder is needed; choose another --out"):
            RunFolder(path)
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_folder_that_cannot_be_created_is_an_error(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="too long for this file system; choose another --out"):
        RunFolder(tmp_path / ("n" * 300))
    monkeypatch.setattr(Path, "mkdir", failing(errno.EACCES))
    with pytest.raises(UserError, match="no permission to write there; choose another --out"):
        RunFolder(tmp_path / "run")


# -- claim


def begin(store: RunFolder, config: dict, fingerprint: str = "f" * 64) -> None:
    """A run with a training."""
    store.claim(config, fingerprint)
    store.write_csv("splits.csv", ("sample_id", "group_id", "split"), [("a", "a", "labeled")])
    store.save_tensors(store.round_dir(0) / "fit_state.safetensors", {"w": torch.ones(1)}, "s")


def config(**changes) -> dict:
    data = {k.removeprefix("data_"): v for k, v in changes.items() if k.startswith("data_")}
    rest = {k: v for k, v in changes.items() if not k.startswith("data_")}
    return to_dict(LoopConfig(data=DataConfig(**data), **rest))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"seed": 1}, "seed = 0, this command has 1"),
        ({"data_size": 64}, "data.size = 96, this command has 64"),
        ({"data_kind": "ct"}, "data.kind = 'polyp', this command has 'ct'"),
        ({"rounds": 2}, "rounds = 3, this command has 2"),
    ],
)
def test_another_config_is_an_error_with_the_setting_and_both_values(store, changes, text):
    begin(store, config())
    before = {p: p.read_bytes() for p in store.root.rglob("*") if p.is_file()}
    with pytest.raises(UserError) as error:
        store.claim(config(**changes), "f" * 64)
    assert text in str(error.value) and "choose another --out" in str(error.value)
    assert {p: p.read_bytes() for p in store.root.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rounds": 5},
        {"out": "elsewhere", "device": "cpu", "offline": True, "baseline": False},
        {"data_root": "moved", "data_cache_dir": "cache", "data_on_error": "skip"},
        {"data_task": "tumour", "data_normal_images": "moved"},  # covered by the fingerprint of the data
    ],
)
def test_settings_that_change_no_result_may_differ_and_rounds_may_grow(store, changes):
    begin(store, config())
    store.claim(config(**changes), "f" * 64)
    assert (store.root / "splits.csv").exists()


def test_other_data_are_refused(store):
    begin(store, config(), "f" * 64)
    with pytest.raises(UserError, match=r"the data are not those this run began with \(fingerprint e{12}, was f{12}\)"):
        store.claim(config(), "e" * 64)


def test_copied_data_keep_the_fingerprint_of_the_run(store):
    begin(store, config(), "f" * 64)
    contents = {"images": "i" * 64, "masks": "m" * 64}
    with pytest.raises(UserError, match="the data are not those this run began with"):
        store.claim(config(), "e" * 64, lambda: contents)  # without recorded contents
    store.update_run(data_contents=contents)
    with pytest.raises(UserError, match="the data are not those this run began with"):
        store.claim(config(), "e" * 64, lambda: contents | {"masks": "n" * 64})
    store.claim(config(), "e" * 64, lambda: contents)
    assert store.run()["data_fingerprint"] == "f" * 64 and (store.root / "splits.csv").exists()


def test_contents_are_compared_only_when_needed(store):
    def never() -> dict[str, str]:
        raise AssertionError("reads every image")

    store.claim(config(), "f" * 64, never)
    store.claim(config(), "e" * 64, never)  # nothing was trained yet
    begin(store, config(), "e" * 64)
    store.claim(config(), "e" * 64, never)


@pytest.mark.parametrize(("changes", "fingerprint"), [({"data_label_fraction": 0.5}, "f" * 64), ({}, "e" * 64)])
def test_before_a_training_changed_settings_or_data_replace_the_old_ones(store, changes, fingerprint):
    store.claim(config(), "f" * 64)
    store.write_csv("splits.csv", ("sample_id", "group_id", "split"), [])
    store.write_csv("contents.csv", ("sample_id", "image_crc32", "mask_crc32"), [("a", 1, 2)])
    store.claim(config(**changes), fingerprint)
    assert not (store.root / "splits.csv").exists(), "drawn for other settings or data"
    assert not (store.root / "contents.csv").exists(), "checksums at another size, or of other data"
    assert store.run()["data_fingerprint"] == fingerprint


def test_splits_put_into_a_new_folder_are_kept(store):
    store.write_text("splits.csv", "sample_id,group_id,split\n")
    store.claim(config(), "f" * 64)
    store.claim(config(), "f" * 64)
    assert (store.root / "splits.csv").exists()


@pytest.mark.parametrize("text", ["- a\n", "", "a: [1\n", "name: another tool\n"])
def test_a_config_of_another_tool_is_not_overwritten(store, text):
    (store.root / "config.yaml").write_text(text)
    with pytest.raises(UserError, match="choose another --out"):
        store.claim(config(), "f" * 64)
    assert (store.root / "config.yaml").read_text() == text


# -- tensors, JSON, CSV


def test_tensors_and_their_metadata_round_trip_bit_for_bit(store):
    path = store.root / "a.safetensors"
    tensors = {"w": torch.randn(3, 4).t(), "n": torch.tensor(7), "half": torch.randn(2).bfloat16()}
    store.save_tensors(path, tensors, "s", seconds=1.5, history=[[1, 0.1 + 0.2]])
    loaded, meta = store.load_tensors(path, "s")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[k], tensors[k]) and loaded[k].dtype == tensors[k].dtype for k in tensors)
    assert meta == {"seconds": 1.5, "history": [[1, 0.1 + 0.2]]}


def test_another_signature_reads_as_none(store):
    store.save_tensors(store.root / "a.safetensors", {"w": torch.ones(1)}, "s")
    store.save_json(store.root / "a.json", {"x": 1}, "s")
    assert store.load_tensors(store.root / "a.safetensors", "t") is None
    assert store.load_json(store.root / "a.json", "t") is None
    assert store.load_tensors(store.root / "a.safetensors", None) is not None
    assert store.load_json(store.root / "a.json", "s") == {"signature": "s", "x": 1}


@pytest.mark.parametrize("length", [0, 1, 9, 0.5, 0.99])
def test_truncated_tensors_and_json_read_as_missing(store, length):
    for name in ("a.safetensors", "a.json"):
        path = store.root / name
        if name == "a.json":
            store.save_json(path, {"x": [1.0] * 50}, "s")
        else:
            store.save_tensors(path, {"w": torch.ones(50)}, "s")
        whole = path.read_bytes()
        path.write_bytes(whole[: length if isinstance(length, int) else int(len(whole) * length)])
    assert store.load_tensors(store.root / "a.safetensors", "s") is None
    assert store.load_json(store.root / "a.json", "s") is None


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[1, 2]", b"3", b"null", b""])
def test_json_of_another_kind_is_damaged(store, content):
    (store.root / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.json: .*run the command that made the run again"):
        store.read_json(store.root / "a.json")
    assert store.load_json(store.root / "a.json", "s") is None


def test_nan_and_infinity_become_null_at_any_depth(store):
    value = {"a": math.nan, "b": [1.0, math.inf, {"c": -math.inf}], "d": (0.1, None)}
    store.save_json(store.root / "a.json", value, "s")
    strict = json.loads((store.root / "a.json").read_text(), parse_constant=pytest.fail)
    del strict["check"]
    assert strict == {"signature": "s", "a": None, "b": [1.0, None, {"c": None}], "d": [0.1, None]}


def test_updates_of_run_json_keep_other_fields(store):
    store.update_run(a=1, b=2)
    store.update_run(b=3)
    assert store.run() == {"a": 1, "b": 3}


def test_csv_round_trip(store):
    assert store.read_csv("t.csv") is None
    store.write_csv("t.csv", ("id", "x"), [('a,"b"\nc', 1), ("ä", "")])
    assert store.read_csv("t.csv") == [{"id": 'a,"b"\nc', "x": "1"}, {"id": "ä", "x": ""}]


# -- mining


def decision(sample_id: str, in_training: bool = True, object_idx: int = 0) -> DecisionRow:
    reason = "kept" if in_training else "low_agreement"
    return DecisionRow(sample_id, object_idx, 1, in_training, reason, in_training=in_training)


def prompt(sample_id: str, object_idx: int = 0) -> PromptRow:
    return PromptRow(sample_id, object_idx, 1, [0.0, 0.0, 3.0, 3.0], None, None, False, [])


def mask_of(sample_id: str, side: int = 6) -> np.ndarray:
    rng = np.random.default_rng(len(sample_id))
    return rng.choice(np.array([0, 1, 255], np.uint8), (side, side + 1))


def label_of(sample_id: str) -> PseudoLabel:
    return PseudoLabel(mask_of(sample_id))


def save_batch(
    store: RunFolder, batch_idx: int, ids: list[str], signature: str = "s", kept: tuple[str, ...] = ()
) -> None:
    kept = kept or tuple(ids)
    rows = [prompt(i) for i in ids], [decision(i, i in kept) for i in ids]
    store.save_batch(1, signature, batch_idx, *rows, {i: label_of(i) for i in ids if i in kept})


def test_pseudo_masks_round_trip_bit_for_bit_under_any_id(store):
    save_batch(store, 0, list(IDS))
    store.close_round(1, "s", 1)
    for sample_id in IDS:
        back = store.pseudo_mask(1, sample_id)
        assert back.dtype == np.uint8 and np.array_equal(back, mask_of(sample_id))
    assert [file.name for file in (store.round_dir(1) / "pseudo_masks").iterdir()] == ["00000.parquet"]


def test_a_round_without_any_object_has_empty_tables(store):
    store.save_batch(1, "s", 0, [], [], {})
    assert not store.close_round(1, "s", 1)
    assert list(store.pending_batches(1, "s", ["a"], 4)) == []


def test_only_missing_batches_are_pending(store):
    ids = [f"i{n}" for n in range(10)]
    assert [n for n, _ in store.pending_batches(1, "s", ids, 4)] == [0, 1, 2]
    save_batch(store, 1, ids[4:8])
    assert list(store.pending_batches(1, "s", ids, 4)) == [(0, ids[:4]), (2, ids[8:])]
    assert [n for n, _ in store.pending_batches(1, "other", ids, 4)] == [0, 1, 2]
    save_batch(store, 0, ids[:4])
    save_batch(store, 2, ids[8:])
    assert list(store.pending_batches(1, "s", ids, 4)) == []
    assert [row.sample_id for row in store.close_round(1, "s", 3)] == ids
    assert [row.sample_id for row in store.prompts(1)] == ids
    assert list(store.pending_batches(1, "s", ids, 4)) == []
    assert [n for n, _ in store.pending_batches(1, "other", ids, 4)] == [0, 1, 2]
    assert not (store.round_dir(1) / ".parts").exists()


def test_closing_a_round_twice_gives_the_same_rows(store):
    save_batch(store, 0, ["a", "b"], kept=("a",))
    first = store.close_round(1, "s", 1)
    assert [r.sample_id for r in store.close_round(1, "s", 1)] == [r.sample_id for r in first] == ["a", "b"]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.9])
@pytest.mark.parametrize("victim", ["prompts", "decisions", "masks"])
@pytest.mark.parametrize("finished", [False, True], ids=["part", "joined"])
def test_a_batch_with_a_damaged_artifact_is_pending(store, share, victim, finished):
    ids = [f"i{n}" for n in range(4)]
    for part in (0, 1):
        save_batch(store, part, ids[2 * part : 2 * part + 2])
    if finished:
        store.close_round(1, "s", 2)
    table = f"{victim}.parquet" if finished else f".parts/000/00001.{victim}.parquet"
    path = store.round_dir(1) / ("pseudo_masks/00000.parquet" if finished and victim == "masks" else table)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    store.masks.cache_clear()  # as in the next session
    todo = list(store.pending_batches(1, "s", ids, 2))
    assert todo == ([(0, ids[:2])] if finished else []) + [(1, ids[2:])]
    for batch_idx, batch_ids in todo:
        save_batch(store, batch_idx, batch_ids)
    assert [r.sample_id for r in store.close_round(1, "s", 2)] == ids
    assert [r.sample_id for r in store.prompts(1)] == ids
    assert all(np.array_equal(store.pseudo_mask(1, i), mask_of(i)) for i in ids)


def test_a_flipped_byte_of_a_table_raises_no_error(store):
    save_batch(store, 0, ["a"])
    path = store.round_dir(1) / ".parts/000/00000.decisions.parquet"
    whole = path.read_bytes()
    for n in range(0, len(whole), 41):
        path.write_bytes(whole[:n] + bytes([whole[n] ^ 0xFF]) + whole[n + 1 :])
        assert len(list(store.pending_batches(1, "s", ["a"], 1))) in (0, 1)


def test_masks_of_a_closed_round_that_are_lost_or_of_another_signature_make_its_batches_pending(store):
    save_batch(store, 0, ["a"])
    store.close_round(1, "s", 1)
    path = store.round_dir(1) / "pseudo_masks" / "00000.parquet"
    for change in (
        lambda: path.write_bytes(encode_table([MaskRow.from_mask("a", mask_of("a"))], MaskRow, "t")),
        path.unlink,
    ):
        change()
        store.masks.cache_clear()
        assert list(store.pending_batches(1, "s", ["a"], 4)) == [(0, ["a"])]


def test_another_process_sees_the_masks_that_the_first_has_joined(store):
    save_batch(store, 0, ["a"])
    store.close_round(1, "s", 1)
    (store.round_dir(1) / "pseudo_masks" / "00000.parquet").unlink()
    other = RunFolder(store.root, follows=True)
    assert (
        list(other.pending_batches(1, "s", ["a"], 1)) == list(store.pending_batches(1, "s", ["a"], 1)) == [(0, ["a"])]
    )
    save_batch(store, 0, ["a"])
    store.close_round(1, "s", 1)
    assert len(other.close_round(1, "s", 1)) == 1 and np.array_equal(other.pseudo_mask(1, "a"), mask_of("a"))


def test_masks_of_earlier_mining_are_removed(store):
    save_batch(store, 0, ["a", "b"], signature="old")
    store.close_round(1, "old", 1)
    save_batch(store, 0, ["a", "b"], signature="new", kept=("b",))
    store.close_round(1, "new", 1)
    assert store.masks(1).missing(["a", "b"]) == ["a"]


@pytest.mark.parametrize(
    ("where", "name"), [(run_store, "join_tables"), (mask_files, "join_tables"), (run_store.shutil, "rmtree")]
)
def test_a_round_whose_joining_was_interrupted_is_joined_again(store, monkeypatch, where, name):
    save_batch(store, 0, ["a", "b"], signature="old")
    store.close_round(1, "old", 1)
    older_layout(store, 1)
    save_batch(store, 0, ["a", "b"], signature="new", kept=("b",))
    with monkeypatch.context() as patch:
        patch.setattr(where, name, failing(errno.EINTR))
        with pytest.raises(OSError, match="Interrupted"):
            store.close_round(1, "new", 1)
    assert list(store.pending_batches(1, "new", ["a", "b"], 2)) == []
    assert [row.in_training for row in store.close_round(1, "new", 1)] == [False, True]
    assert store.masks(1).missing(["a", "b"]) == ["a"] and np.array_equal(store.pseudo_mask(1, "b"), mask_of("b"))
    assert [file.name for file in (store.round_dir(1) / "pseudo_masks").iterdir()] == ["00000.parquet"]


def test_a_full_disk_costs_only_the_batch_being_saved(store, monkeypatch):
    ids = ["a", "b"]
    save_batch(store, 0, ids[:1])
    with monkeypatch.context() as patch:
        patch.setattr(run_store, "encode_table", failing(errno.ENOSPC))
        with pytest.raises(OSError, match="No space"):
            save_batch(store, 1, ids[1:])
    assert list(store.pending_batches(1, "s", ids, 1)) == [(1, ["b"])]


def test_rounds_and_methods_have_separate_folders(store):
    folders = [store.round_dir(0), store.round_dir(1), store.round_dir(1, "supervised"), store.round_dir(100)]
    assert [f.relative_to(store.root).as_posix() for f in folders] == [
        "round_00",
        "round_01",
        "supervised/round_01",
        "round_100",
    ]


def test_preparation_seconds_are_those_of_the_block_and_of_the_folds(store, monkeypatch):
    """A fold took 40 s before; a fold of 50 s and round 0 of 60 s are trained in a block of 125 s: 15 s remain."""

    def train(method_dir, seconds):
        store.save_tensors(
            store.round_dir(0, method_dir) / "model.safetensors", {"w": torch.zeros(1)}, "s", seconds=seconds
        )

    clock = iter([1000.0, 1125.0, 2000.0, 2002.0])
    monkeypatch.setattr(provenance.time, "perf_counter", lambda: next(clock))
    train("fold_0", 40.0)
    assert store.training_seconds("fold_*/round_00") == 40 and store.preparation_seconds() == 40
    with provenance.preparing(store):
        train("fold_1", 50.0)
        train("", 60.0)
    assert store.run()["preparation_seconds"] == 15
    assert store.preparation_seconds() == 15 + 40 + 50
    with provenance.preparing(store):  # a later session adds its seconds
        pass
    assert store.preparation_seconds() == 17 + 40 + 50
    (store.round_dir(0, "fold_0") / "model.safetensors").write_bytes(b"damaged")
    assert store.training_seconds("fold_*/round_00") == 50


def test_a_round_without_tables_has_no_rows_by_sample(store):
    decisions, prompts = store.by_sample(1)
    assert not decisions and not prompts and decisions.firsts("in_training") == {} and "a" not in prompts


@pytest.mark.parametrize("name", [".lock", "run.json", "report.html", "round_01", "audit/audit.csv"])
def test_a_link_in_a_run_is_refused_and_what_it_names_stays(tmp_path, name):
    RunFolder(tmp_path / "run").update_run(seed=0)
    outside, link = tmp_path / "precious", tmp_path / "run" / name
    outside.write_text("years of work")
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(outside)
    with pytest.raises(UserError, match=f"{name}: .*symbolic link to .*precious"):
        RunFolder(tmp_path / "run")
    assert outside.read_text() == "years of work"


def test_links_that_a_tracker_makes_in_its_own_folder_are_no_links_of_kmine(tmp_path):
    RunFolder(tmp_path / "run").update_run(seed=0)
    (tmp_path / "run/wandb").mkdir()
    (tmp_path / "run/wandb/latest-run").symlink_to(tmp_path)
    RunFolder(tmp_path / "run").close()

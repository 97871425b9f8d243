"""The loop with a reviewer's verdicts on an earlier run: rejected, accepted and corrected masks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.loop_command import (
    FEW_STEPS,
    OPEN_GATE,
    SMALL,
    run_loop,
)

from kmine.audit import __main__ as audit
from kmine.cli import Terminal, parse
from kmine.config import LoopConfig
from kmine.feedback.verdicts import FORMAT
from kmine.io.files import encode_png, safe_name
from kmine.setup.open import open_task
from kmine.setup.preflight import preflight
from kmine.store.run_folder import RunFolder

SETTINGS = {**SMALL, **FEW_STEPS, **OPEN_GATE, "gate.mode": "ranked", "data.label_fraction": 0.4}


def said(sample_id: str, verdict: str, kind: str = "pseudo") -> dict[str, str]:
    return {"sample_id": sample_id, "kind": kind, "verdict": verdict, "mask_signature": "", "note": ""}


def page_file(path: Path, rows: list[dict[str, str]]) -> Path:
    """A file as the audit page saves it."""
    path.write_text(json.dumps({"format": FORMAT, "run": "r", "run_signature": "", "verdicts": rows}))
    return path


def ids_of(run: Path, split: str) -> list[str]:
    store = RunFolder(run)
    rows = store.read_csv("splits.csv")
    store.close()
    return [row["sample_id"] for row in rows if row["split"] == split]


def task_of(run: Path):
    cfg = parse(LoopConfig, ["--config", str(run / "config.yaml")], prog="test", description="")
    store = RunFolder(run)
    task = open_task(cfg, preflight(cfg), store, Terminal(quiet=True))
    store.close()
    return task


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> Path:
    """A finished run with verdicts taken in: two pseudo masks judged, one drawn anew, two labels judged."""
    folder = tmp_path_factory.mktemp("verdicts")
    run = folder / "first"
    assert run_loop(SETTINGS, run, folder / "cache") == 0
    mined, given = ids_of(run, "unlabeled"), ids_of(run, "labeled")
    (folder / "drawn").mkdir()
    for number, sample_id in enumerate((mined[2], given[1])):
        mask = np.zeros(task_of(run).unlabeled.native_shape(sample_id), np.uint8)
        mask[3 : 9 + number, 4:12] = 1
        (folder / "drawn" / f"{safe_name(sample_id)}.png").write_bytes(encode_png(mask, "", 0))
    rows = [said(mined[0], "accept"), said(mined[1], "reject"), said(mined[2], "reject"), said(mined[3], "unsure")]
    rows += [said(given[0], "reject", "labeled"), said(given[1], "reject", "labeled")]
    file = page_file(folder / "verdicts.json", rows)
    assert audit.main([str(run), "--verdicts", str(file), "--corrected", str(folder / "drawn"), "--device=cpu"]) == 0
    return run


@pytest.fixture(scope="module")
def second(first) -> Path:
    """The next run, with these verdicts."""
    run = first.parent / "second"
    more = {"rounds": 2, "adopt_tolerance": 1, "verdicts": first / "verdicts.json"}
    assert run_loop(SETTINGS | more, run, first.parent / "cache") == 0
    return run


def test_rejected_masks_are_never_trained_on_and_accepted_ones_always(first, second):
    accepted, rejected, drawn, unsure = ids_of(first, "unlabeled")[:4]
    was = RunFolder(first).pseudo_mask(1, accepted)
    store = RunFolder(second)
    for round_idx in (1, 2):
        rows = {row.sample_id: row for row in store.decisions(round_idx)}
        assert (rows[rejected].reason, rows[rejected].in_training) == ("rejected", False)
        assert store.masks(round_idx).missing([rejected, accepted]) == [rejected]
        assert (rows[accepted].reason, rows[accepted].in_training) == ("accepted", True)
        assert np.array_equal(store.pseudo_mask(round_idx, accepted), was)
        assert rejected not in {row.sample_id for row in store.prompts(round_idx)}  # and no prompt is made
        assert rows[unsure].reason not in ("accepted", "rejected")
        assert drawn not in rows
    store.close()


def test_a_corrected_mask_becomes_a_label_and_a_rejected_label_is_dropped(first, second):
    task, drawn = task_of(second), ids_of(first, "unlabeled")[2]
    dropped, redrawn = ids_of(first, "labeled")[:2]
    assert drawn in task.labeled.ids and drawn not in task.unlabeled.ids
    assert dropped not in task.labeled.ids and dropped not in task.unlabeled.ids
    for number, sample_id in enumerate((drawn, redrawn)):
        mask = task.labeled.sample(sample_id).mask
        assert mask[3 : 9 + number, 4:12].all() and mask.sum() == (6 + number) * 8
        assert task.labeled.weight(sample_id) == 1
        assert task.labeled.mask_resized(sample_id).any()
        assert task.labeled.subset([sample_id]).sample(sample_id).mask.sum() == mask.sum()


def test_run_json_records_the_verdicts(first, second):
    about = json.loads((second / "run.json").read_text())
    counts = {"accepted": 1, "rejected": 1, "corrected": 2, "dropped": 1, "elsewhere": 0}
    assert about["verdicts"] == {"file": str(first / "verdicts.json"), **counts}
    assert about["splits"]["labeled"] == len(ids_of(first, "labeled"))  # one gone, one come
    assert [p.name for p in (first / "accepted").iterdir()] == [f"{safe_name(ids_of(first, 'unlabeled')[0])}.png"]


def test_masks_without_verdict_are_unchanged(first, tmp_path):
    """Verdicts without effect leave pseudo masks equal, bit for bit."""
    name = ids_of(first, "unlabeled")[0]
    file = page_file(tmp_path / "v.json", [said(name, "unsure")])
    assert run_loop(SETTINGS, tmp_path / "run", first.parent / "cache", verdicts=file) == 0
    one, two = RunFolder(first), RunFolder(tmp_path / "run")
    assert np.array_equal(one.pseudo_mask(1, name), two.pseudo_mask(1, name))
    one.close(), two.close()


def test_a_begun_run_refuses_changed_verdicts(first, second, capsys):
    kept = (first / "verdicts.json").read_text()
    value = json.loads(kept)
    value["verdicts"] = [row for row in value["verdicts"] if row["verdict"] != "reject"]
    more = {"rounds": 2, "adopt_tolerance": 1, "verdicts": first / "verdicts.json"}
    try:
        (first / "verdicts.json").write_text(json.dumps(value))
        assert run_loop(SETTINGS | more, second, first.parent / "cache") == 2
    finally:
        (first / "verdicts.json").write_text(kept)
    assert "verdicts has changed since this run began" in capsys.readouterr().err


def test_verdicts_on_all_images_leave_only_accepted_masks(first, tmp_path):
    """No prompt is left; only the accepted masks are trained on."""
    mined = ids_of(first, "unlabeled")
    run = Path(shutil.copytree(first, tmp_path / "first"))
    file = page_file(tmp_path / "v.json", [said(i, "accept" if n < 3 else "reject") for n, i in enumerate(mined)])
    (run / "verdicts.json").unlink()
    assert audit.main([str(run), "--verdicts", str(file), "--device=cpu"]) == 0
    assert run_loop(SETTINGS, tmp_path / "run", first.parent / "cache", verdicts=run / "verdicts.json") == 0
    store = RunFolder(tmp_path / "run")
    assert {row.reason for row in store.decisions(1)} == {"accepted", "rejected"} and not store.prompts(1)
    assert store.read_csv("results.csv")[1]["num_pseudo"] == "3"
    store.close()


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        ([said("nowhere", "reject")], "expected verdicts on images of this data set, got nowhere"),
        ([said("VAL", "reject"), said("TEST", "reject")], "none of its 2 verdicts is on an image that this run labels"),
        ([said("MINED", "accept")], "first import the file with kmine audit RUN --verdicts FILE"),
    ],
)
def test_unfit_verdicts_are_refused_in_one_line(first, tmp_path, capsys, rows, error):
    places = {"VAL": "val", "TEST": "test", "MINED": "unlabeled"}
    rows = [
        row | {"sample_id": ids_of(first, places[row["sample_id"]])[0] if row["sample_id"] in places else "nowhere"}
        for row in rows
    ]
    file = page_file(tmp_path / "v.json", rows)
    assert run_loop(SETTINGS, tmp_path / "run", first.parent / "cache", verdicts=file) == 2
    said_so = capsys.readouterr().err
    assert error in said_so and len(said_so.strip().splitlines()) == 1
    assert not list((tmp_path / "run").glob("round_*"))


def test_a_missing_file_is_named(tmp_path, capsys):
    assert run_loop(SETTINGS, tmp_path / "run", verdicts=tmp_path / "none.json") == 2
    assert "none.json: expected verdicts, cannot be read" in capsys.readouterr().err

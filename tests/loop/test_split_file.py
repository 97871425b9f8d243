"""The loop and the check with data.split_file: splits of an earlier run, and lists of ids."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
from helpers.loop_command import SMALL, UNET, run_loop

from kmine.check import __main__ as check
from kmine.compare import __main__ as compare

TINY = {
    **SMALL,
    **UNET,
    "rounds": 0,
    "data.num_samples": 40,
    "data.label_fraction": 0.2,
    "data.val_fraction": 0.1,
    "fit.steps": 2,
    "fit.val_every": 2,
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def earlier(cache, tmp_path_factory):
    """A run whose splits are given to others."""
    out = tmp_path_factory.mktemp("earlier") / "run"
    assert run(out, cache) == 0
    return out


def run(out: Path, cache: Path, **changes: object) -> int:
    return run_loop(TINY, out, cache, **changes)


def splits(out: Path) -> dict[str, str]:
    with (out / "splits.csv").open(newline="") as file:
        return {row["sample_id"]: row["split"] for row in csv.DictReader(file)}


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return err.splitlines()[-1]


def test_splits_of_a_run_are_used_unchanged_and_may_not_change_later(earlier, cache, tmp_path, capsys):
    given, out = tmp_path / "given.csv", tmp_path / "run"
    shutil.copy(earlier / "splits.csv", given)
    other = {"data__split_file": given, "data__split_seed": 5, "data__label_fraction": 1, "seed": 3}
    assert run(out, cache, **other) == 0
    assert (out / "splits.csv").read_bytes() == (earlier / "splits.csv").read_bytes()
    text = given.read_text()
    first = next(line for line in text.splitlines() if line.endswith(",unlabeled"))
    given.write_text(text.replace(first, first.replace("unlabeled", "labeled")))
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != ".lock"}
    assert run(out, cache, **other) == 2
    assert "data.split_file has changed since this run began" in last_line(capsys)
    del before[out / "config.yaml"]  # written anew, the same
    assert {p: p.read_bytes() for p in before} == before
    given.write_text(text + "\n\n")
    assert run(out, cache, **other) == 0, "white space does not count"
    assert run(out, cache, **(other | {"data__split_file": earlier / "splits.csv"})) == 2
    assert "holds a run with data.split_file = " in last_line(capsys)
    given.unlink()
    assert run(out, cache, **other) == 2
    line = last_line(capsys)
    assert f"data.split_file: {given}" in line and "give the splits.csv of a run" in line
    assert compare.main([str(out), "--device", "cpu"]) == 0, "a finished run does not need the file"


def test_lists_are_the_sides_and_a_mended_list_needs_no_new_folder(earlier, cache, tmp_path, capsys):
    ids = sorted(splits(earlier))
    lists, out = tmp_path / "lists", tmp_path / "run"
    lists.mkdir()
    (lists / "test.txt").write_text("\n".join(ids[:10]))
    (lists / "train.txt").write_text("\n".join([f"{name}.jpg" for name in ids[9:36]]))
    assert run(out, cache, data__split_file=lists) == 2
    assert f"got {ids[9]} (test) again" in last_line(capsys)
    (lists / "train.txt").write_text("\n".join([f"{name}.jpg" for name in ids[10:36]]))
    assert run(out, cache, data__split_file=lists, data__label_fraction=0.0001) == 2
    (lists / "test.txt").write_text("\n".join(ids[:8]))
    capsys.readouterr()
    assert run(out, cache, data__split_file=lists) == 0
    found = splits(out)
    assert [name for name in ids if found.get(name) == "test"] == ids[:8]
    assert set(found) == {*ids[:8], *ids[10:36]} and list(found.values()).count("val") == 3
    assert "6 images that data.split_file does not name: left out of every split" in capsys.readouterr().err


def test_check_examines_the_given_split(earlier, cache, tmp_path, capsys):
    given = tmp_path / "given.csv"
    shutil.copy(earlier / "splits.csv", given)
    words = ["--data.num_samples=40", "--data.size=32", f"--data.split_file={given}", f"--out={tmp_path / 'out'}"]
    assert check.main(words) == 0
    found = json.loads((tmp_path / "out/check.json").read_text())
    sides = list(splits(earlier).values())
    assert {side: row["samples"] for side, row in found["counts"].items()} == {
        "train": sides.count("labeled") + sides.count("unlabeled"),
        "val": sides.count("val"),
        "test": sides.count("test"),
    }
    assert found["splits"] == f"of {given}"
    given.write_text("sample_id,split\nnobody,val\n")
    assert check.main(words) == 1
    assert "FAULT splits: kmine.loop would stop: " in capsys.readouterr().out

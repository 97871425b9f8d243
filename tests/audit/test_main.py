"""kmine audit as a command: withheld masks, flags, one-line errors."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from helpers.masks import mask_ids

from kmine.audit import __main__ as audit
from kmine.data.cache.sample_cache import SampleCache
from kmine.store.run_folder import RunFolder


def test_withheld_masks_are_opened_only_on_request(run, rows, monkeypatch):
    mined = {row["sample_id"] for row in rows(run / "audit") if row["kind"] == "pseudo"}
    opened: list[str] = []
    for name in ("mask_resized", "mask_native"):
        real = getattr(SampleCache, name)
        monkeypatch.setattr(SampleCache, name, lambda self, i, real=real: opened.append(i) or real(self, i))
    assert audit.main([str(run), "--device", "cpu", "--out", str(run / "closed")]) == 0
    assert opened and not mined.intersection(opened)
    assert "withheld_opened" not in json.loads((run / "run.json").read_text())
    assert audit.main([str(run), "--device", "cpu", "--with-withheld"]) == 0
    assert mined.intersection(opened)
    assert len(json.loads((run / "run.json").read_text())["withheld_opened"]) == 1
    found = [row for row in rows(run / "audit") if row["kind"] == "pseudo"]
    assert all(0 <= float(row["withheld_dice"]) <= 1 for row in found)
    assert (run / "audit" / "strata.csv").read_text().startswith("stratum,value,count,mean_dice\nsize,small")


def test_the_pixels_that_pseudo_masks_correct_are_on_the_page_a_dash_where_unknown(run):
    line = "wrong pixels of the local model corrected / newly broken"
    assert audit.main([str(run), "--device", "cpu", "--no-labeled"]) == 0
    page = (run / "audit" / "audit.html").read_text()
    assert f"{line}, labeled images by fold models" in page and "withheld masks" not in page, "the gate is uncalibrated"
    assert "corrections" not in json.loads((run / "run.json").read_text())
    assert audit.main([str(run), "--device", "cpu", "--no-labeled", "--with-withheld"]) == 0
    found = json.loads((run / "run.json").read_text())["corrections"]
    rounds = [RunFolder(run, follows=True).round_signature(n) for n in (1, 2)]
    assert list(found) == rounds and all(re.fullmatch(r"\d+ % / \d+ %", text) for text in found.values())
    page = (run / "audit" / "audit.html").read_text()
    lines = [f"{line}, round {n}, withheld masks" for n in (1, 2)]
    assert all(text in page for text in (*lines, *found.values()))


def test_no_labeled_leaves_out_given_masks_and_trains_no_fold_models(run, rows):
    for folder in run.glob("fold_*"):
        shutil.rmtree(folder)
    assert audit.main([str(run), "--device", "cpu", "--no-labeled"]) == 0
    assert not list(run.glob("fold_*")) and {row["kind"] for row in rows(run / "audit")} == {"pseudo"}


def refused(words: list[str], capsys: pytest.CaptureFixture[str], text: str) -> None:
    capsys.readouterr()
    assert audit.main([*words, "--device", "cpu"]) == 2
    err = capsys.readouterr().err
    last = err.splitlines()[-1]
    assert last.startswith("kmine audit: error: ") and text in last and "Traceback" not in err


def test_bad_input_is_one_line(run, tmp_path, capsys):
    refused([str(tmp_path)], capsys, "expected a run folder")
    refused([str(run), str(run)], capsys, "one run folder")
    refused([str(run), "--round", "9"], capsys, "--round 9: expected one of 1, 2")
    refused([str(run), "--verdicts", str(tmp_path / "none.json")], capsys, "no such file")
    refused([str(run), "--corrected", str(tmp_path / "none")], capsys, "no such file")


def test_damaged_and_unfinished_runs_are_refused(run, rows, capsys):
    path = next((run / f"round_{rows(run / 'audit')[0]['round']:0>2}" / "pseudo_masks").glob("*.parquet"))
    whole, (first, *_) = path.read_bytes(), mask_ids(path.parent)
    path.write_bytes(whole[:40])
    refused([str(run)], capsys, f"{path}: damaged or edited")
    path.unlink()
    refused([str(run)], capsys, f"that of {first} is missing")
    path.write_bytes(whole)
    info = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(info | {"stopped_by": "interrupted"}))
    refused([str(run)], capsys, "not finished")
    (run / "run.json").write_text(json.dumps(info))
    for folder in run.glob("round_0[12]"):
        shutil.rmtree(folder)
    refused([str(run)], capsys, "found no pseudo masks")

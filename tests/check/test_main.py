"""kmine check as a command: files, exit codes, errors."""

from __future__ import annotations

import json

import pytest

from kmine import __main__ as dispatcher
from kmine.check import __main__ as check


@pytest.mark.parametrize("kind", ["polyp", "ct", "xray"])
def test_the_phantoms_have_no_fault(tmp_path, kind):
    out = tmp_path / "out"
    argv = ["check", "--data.kind", kind, "--data.num_samples", "80", "--data.size", "64", "--out", str(out)]
    assert dispatcher.main(argv) == 0
    found = json.loads((out / "check.json").read_text())
    assert found["pairing"]["z"] > 2
    empty = sum(row.get("empty mask", 0) for row in found["counts"].values())
    assert empty == found["masks"]["num_empty"] == sum(row.get("image label 0", 0) for row in found["counts"].values())


def test_a_fault_is_exit_code_1_and_printed(tmp_path, capsys):
    (tmp_path / "split.csv").write_text("sample_id,split\nnone_such,train\n")
    argv = ["--data.num_samples=8", "--data.size=32", f"--data.split_file={tmp_path / 'split.csv'}"]
    assert check.main([*argv, f"--out={tmp_path / 'out'}"]) == 1
    shown = capsys.readouterr().out
    assert "FAULT splits: kmine.loop would stop: " in shown and "1 fault; written: " in shown


def test_a_missing_folder_is_one_line(tmp_path, capsys):
    words = ["--data.name=kvasir_seg", f"--data.root={tmp_path / 'nothing'}", f"--out={tmp_path / 'out'}"]
    assert check.main(words) == 2
    assert capsys.readouterr().err.count("\n") == 1

"""The Python example of the README runs and yields what its comments state."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[1] / "README.md"


@pytest.mark.slow
def test_the_python_example_of_the_readme_runs(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KMINE_CACHE", str(tmp_path / "cache"))
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["mask"].shape == (64, 64) and set(names["mask"].ravel()) <= {0, 1}
    table = names["table"]
    assert set(table["kind"]) == {"pseudo", "labeled"} and len(table) == len(set(table["sample_id"])) > 11
    for _, group in table.groupby("kind"):
        assert group["suspicion"].is_monotonic_decreasing
    assert (tmp_path / "runs" / "arrays" / "report.html").is_file()

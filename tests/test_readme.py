"""The Python example of the README runs and keeps its comments' promises; doctests of the public API pass."""

from __future__ import annotations

import doctest
import importlib
import re
import subprocess
import sys
from pathlib import Path

import kmine

README = Path(__file__).resolve().parents[1] / "README.md"


def test_the_readme_s_python_example_runs(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KMINE_CACHE", str(tmp_path / "cache"))
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["mask"].shape == (64, 64) and set(names["mask"].ravel()) <= {0, 1}
    scores = names["table"]["suspicion"]
    assert len(scores) >= 8 and scores.is_monotonic_decreasing
    assert (tmp_path / "runs" / "arrays" / "report.html").is_file()


def test_every_public_name_loads_and_its_doctests_pass():
    assert set(kmine.__all__) <= set(dir(kmine))
    for name in kmine.__all__:
        assert getattr(kmine, name) is not None
    modules = {importlib.import_module(module) for module in kmine._PUBLIC.values()}
    attempted = [doctest.testmod(module) for module in modules]
    assert sum(result.failed for result in attempted) == 0 and sum(result.attempted for result in attempted) >= 5


def test_importing_kmine_loads_no_heavy_library():
    heavy = {"torch", "pandas", "cv2", "lightning", "albumentations"}
    program = f"import sys, kmine; print(sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

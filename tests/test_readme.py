"""The Python example of the README runs, on a smaller model, and yields what its comments state."""

from __future__ import annotations

import re
from pathlib import Path

STEPS = "fit__steps=60, fit__round_steps=30"
FEW = "baseline=False, fit__steps=4, fit__round_steps=2, fit__val_every=2, crossfit=1, adapt__enabled=False, "
FEW += "gate__mode='ranked', gate__keep=1.0, model__name='unet', model__encoder='tu-resnet10t', "
FEW += "model__encoder_weights=None, model__encoder_depth=3, model__decoder_channels=8"
"""In the place of `STEPS`: a poor model, and a gate that lets its masks through."""
README = Path(__file__).resolve().parents[1] / "README.md"


def test_the_python_example_of_the_readme_runs(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    assert STEPS in code
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KMINE_CACHE", str(tmp_path / "cache"))
    names: dict = {}
    exec(compile(code.replace(STEPS, FEW), "README.md", "exec"), names)
    assert names["mask"].shape == (64, 64) and set(names["mask"].ravel()) <= {0, 1}
    table = names["table"]
    assert set(table["kind"]) == {"pseudo", "labeled"} and len(table) == len(set(table["sample_id"])) > 11
    for _, group in table.groupby("kind"):
        assert group["suspicion"].is_monotonic_decreasing
    assert (tmp_path / "runs" / "arrays" / "report.html").is_file()

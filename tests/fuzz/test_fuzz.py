"""A quick share of the fuzz cases; all of them: `python tests/fuzz/harness.py`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_damaged_input_gives_one_error_line_that_names_the_file():
    words = [sys.executable, str(Path(__file__).with_name("harness.py")), "--undamaged", "18", "--cases", "36"]
    done = subprocess.run([*words, "--jobs", "1"], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]

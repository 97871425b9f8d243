"""Public names load, their doctests pass, and importing kmine stays light."""

from __future__ import annotations

import doctest
import importlib
import subprocess
import sys

import kmine


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

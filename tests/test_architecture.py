"""The floors of docs/architecture.md, kept by parsing every import; the checker is itself checked on small sources."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "kmine"
MAX_LINES = 400

FLOORS = {
    **dict.fromkeys(("records", "config"), 0),
    **dict.fromkeys(("masks", "metrics", "statistics", "efficiency", "download", "calibrator", "brush"), 1),
    **dict.fromkeys(("data", "models", "segmenters", "report", "store", "cli"), 2),
    **dict.fromkeys(("corrections", "verdicts"), 2.5),  # what comes back from a person: files in, plain values out
    "judged": 2.6,  # what verdicts mean for the next run
    "stages": 3,
    "rounds": 3.5,  # what the rounds of every method are made of
    "methods": 4,
    **dict.fromkeys(("preparation", "cheap_check"), 4.2),
    "arms": 4.3,  # mining and self-training as a whole: a method, and the preparation that it takes
    **dict.fromkeys(
        ("check_report", "compare_table", "finished", "preflight", "runs", "summary"), 4.5
    ),  # what the commands share
    "audit_evidence": 4.5,
    **dict.fromkeys(
        ("audit_story", "audit_truth", "audit_export", "audit_verdicts"), 4.6
    ),  # what the audit makes of its evidence
    "deploy": 4.6,  # a finished run put to work: reads and writes files around the stages, for kmine.predict
    "cells": 4.6,
    "sweep_plan": 4.7,
    "sweep_workers": 4.8,
    "sweep_ray": 4.9,
    **dict.fromkeys(("loop", "compare", "sweep", "audit", "predict", "check", "fetch", "weights", "__main__"), 5),
}
FREE_INSIDE = {"config", "data", "models", "segmenters", "report", "store", "rounds", "preparation", "deploy"}
"""Packages whose files may import one another."""

HOMES = {
    "albumentations": "data",
    "nibabel": "data",
    "pydicom": "data",
    "timm": "models",
    "segmentation_models_pytorch": "models",
    "segment_anything": "segmenters",
    "jinja2": "report",
    "matplotlib": "report",
    "jsonargparse": "cli",
    "requests": "download",
    "onnx": "models",
    "onnxscript": "models",
    "onnxruntime": "models",
    "ray": "sweep_ray",
}
PICKLES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "shelve"}
FILE_MODULES = {"pathlib", "os", "io", "json", "pandas", "shutil", "tempfile"}
FILE_CALLS = {"open", "imread", "imwrite"}


def part(module: str) -> str:
    """`kmine.stages.fit` -> `stages`; the package itself -> empty."""
    return [*module.split("."), ""][1]


def imports(tree: ast.Module, module: str, is_package: bool) -> Iterator[tuple[str, bool, int]]:
    """Yield (full name, whether inside a function, line) of every import, relative and dynamic ones included.

    `from a import b` yields `a.b`: b may be a module, and if it is a name, the rules read the same.
    """
    lazy = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) for n in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = resolve(node, module, is_package)
            names = [f"{base}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and called(node) in {"import_module", "__import__"}:
            names = [a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        else:
            continue
        for name in names:
            yield name, id(node) in lazy, node.lineno


def resolve(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    if not node.level:
        return node.module or ""
    package = module.split(".")
    package = package[: len(package) - node.level + is_package]
    return ".".join(package + ([node.module] if node.module else []))


def called(node: ast.Call) -> str:
    function = node.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def floor_fault(module: str, target: str, lazy: bool, modules: frozenset[str]) -> str | None:
    """Say what is wrong with `module` importing kmine's own `target`, or None.

    What a package's `__init__` itself defines, its modules may import: it imports none of them, so it lies below.
    """
    here, there = part(module), part(target)
    if there in {"", "__version__"}:
        return None
    if there not in FLOORS:
        return f"imports {target}, which has no floor in {Path(__file__).name}"
    if here == "":
        return f"imports {target}, but the root package is below every floor"
    if here == there:
        sibling = target in modules or target.rpartition(".")[0] in modules - {f"kmine.{here}"}
        return f"imports its sibling {target}" if sibling and here not in FREE_INSIDE else None
    if FLOORS[here] > FLOORS[there] or (here, there) == ("config", "records"):
        return None
    if here == "__main__" and FLOORS[there] == 5:
        return None if lazy else f"imports {target} at the top; commands are imported where they are asked for"
    which = "its sibling" if FLOORS[here] == FLOORS[there] else "upwards,"
    return f"imports {which} {target}"


def foreign_fault(module: str, target: str) -> str | None:
    """Say what is wrong with `module` importing `target` of another distribution, or None."""
    root = target.split(".")[0]
    if root in PICKLES:
        return f"imports {root}: no pickles"
    if root in HOMES and part(module) != HOMES[root]:
        return f"imports {root}, whose only home is kmine/{HOMES[root]}"
    if part(module) == "stages" and root in FILE_MODULES:
        return f"imports {root}: stages do no file handling"
    return None


def check_source(module: str, source: str, is_package: bool, modules: frozenset[str]) -> list[str]:
    """Return every fault of one file, as `kmine.module:line: fault`; `modules` are the names of all files."""
    if module != "kmine" and part(module) not in FLOORS:
        return [f"{module}:1: has no floor in {Path(__file__).name}"]
    tree, faults = ast.parse(source), []
    for target, lazy, line in imports(tree, module, is_package):
        ours = target.split(".")[0] == "kmine"
        fault = floor_fault(module, target, lazy, modules) if ours else foreign_fault(module, target)
        faults += [f"{module}:{line}: {fault}"] if fault else []
    if part(module) == "stages":
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and called(node) in FILE_CALLS]
        faults += [f"{module}:{node.lineno}: calls {called(node)}(): stages do no file handling" for node in calls]
    lines = source.count("\n") + (not source.endswith("\n"))
    return faults + ([f"{module}: {lines} lines, at most {MAX_LINES}"] if lines > MAX_LINES else [])


def name_of(path: Path, root: Path) -> tuple[str, bool]:
    """Dotted name of a file below `root`, and whether it is a package's `__init__`."""
    parts = ["kmine", *path.relative_to(root).with_suffix("").parts]
    return (".".join(parts[:-1]), True) if parts[-1] == "__init__" else (".".join(parts), False)


SOURCES = sorted(ROOT.rglob("*.py"))
MODULES = frozenset(name_of(path, ROOT)[0] for path in SOURCES)


def test_the_tree_is_found():
    assert {ROOT / "__init__.py", ROOT / "records.py", ROOT / "config" / "__init__.py"} <= set(SOURCES)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_file_keeps_the_floors(path):
    module, is_package = name_of(path, ROOT)
    assert check_source(module, path.read_text("utf-8"), is_package, MODULES) == []


def test_other_files_are_short_too():
    texts = [path for path in ROOT.rglob("*") if path.suffix in {".jinja", ".yaml", ".md"}]
    assert [path.name for path in texts if len(path.read_text("utf-8").splitlines()) > MAX_LINES] == []


MADE_UP = frozenset(
    f"kmine.{name}"
    for name in ("stages", "stages.fit", "stages.infer", "methods", "methods.mining", "methods.supervised", "records")
)

BROKEN = [
    ("kmine.records", "import kmine.config", "sibling"),
    ("kmine.masks", "from kmine.metrics import dice", "sibling"),
    ("kmine.masks", "from kmine import store", "upwards"),
    ("kmine.data.folder", "from kmine.models import build", "sibling"),
    ("kmine.data.folder", "from ..models import build", "sibling"),
    ("kmine.report.html", "import kmine.store", "sibling"),
    ("kmine.store", "def f():\n    from kmine.cli import main", "sibling"),
    ("kmine.data.folder", "from kmine.stages.fit import fit", "upwards"),
    ("kmine.stages.fit", "from kmine.stages.infer import infer", "sibling"),
    ("kmine.stages.fit", "from .infer import infer", "sibling"),
    ("kmine.stages.fit", "from . import infer", "sibling"),
    ("kmine.stages.fit", "if TYPE_CHECKING:\n    from kmine.methods import mining", "upwards"),
    ("kmine.methods.mining", "from kmine.methods.supervised import x", "sibling"),
    ("kmine.methods.mining", "import kmine.methods.supervised as s", "sibling"),
    ("kmine.methods.mining", "import importlib\nimportlib.import_module('kmine.loop')", "upwards"),
    ("kmine.summary", "from kmine.runs import open_task", "sibling"),
    ("kmine.methods.mining", "from kmine.runs import open_task", "upwards"),
    ("kmine.compare", "def f():\n    import kmine.loop", "sibling"),
    ("kmine.methods.mining", "def f():\n    from kmine.arms import METHODS", "upwards"),
    ("kmine.__main__", "from kmine.loop import main", "at the top"),
    ("kmine.loop", "import kmine.newcomer", "no floor"),
    ("kmine.util", "", "no floor"),
    ("kmine", "from kmine.records import Sample", "root package"),
    ("kmine.stages.fit", "import albumentations as A", "only home is kmine/data"),
    ("kmine.runs", "import nibabel as nib", "only home is kmine/data"),
    ("kmine.stages.fit", "def f():\n    import timm.models", "only home is kmine/models"),
    ("kmine.data.folder", "from segmentation_models_pytorch import Unet", "only home is kmine/models"),
    ("kmine.models.build", "from segment_anything import sam_model_registry", "only home is kmine/segmenters"),
    ("kmine.compare", "import jinja2", "only home is kmine/report"),
    ("kmine.loop", "import matplotlib.pyplot as plt", "only home is kmine/report"),
    ("kmine.segmenters.weights", "def f():\n    import requests", "only home is kmine/download"),
    ("kmine.download", "from kmine.cli import Terminal", "upwards"),
    ("kmine.config", "from jsonargparse import ArgumentParser", "only home is kmine/cli"),
    ("kmine.store", "import pickle", "no pickles"),
    ("kmine.store", "__import__('pickle')", "no pickles"),
    *(("kmine.stages.gate", f"import {name}", "no file handling") for name in sorted(FILE_MODULES)),
    ("kmine.stages.gate", "import os.path as p", "no file handling"),
    ("kmine.stages.gate", "def f(p):\n    with open(p) as s: return s", "calls open()"),
    ("kmine.stages.gate", "def f(p):\n    return p.open()", "calls open()"),
    ("kmine.stages.gate", "\n" * (MAX_LINES + 1), "401 lines"),
]


@pytest.mark.parametrize(("module", "source", "said"), BROKEN)
def test_checker_finds_each_fault(module, source, said):
    faults = check_source(module, source, False, MADE_UP)
    assert len(faults) == 1
    assert said in faults[0]


SOUND = [
    ("kmine.config", "from kmine.records import UserError", False),
    ("kmine.masks", "import cv2\nfrom kmine.records import Probs", False),
    ("kmine.data.folder", "from kmine.data.splits import split\nfrom . import phantom\nimport albumentations", False),
    ("kmine.data", "from kmine.data.folder import Folder\nfrom .splits import split", True),
    ("kmine.stages.fit", "from kmine import masks, __version__\nfrom kmine.models import build\nimport torch", False),
    ("kmine.methods", "from kmine.stages.fit import fit", True),
    ("kmine.methods.mining", "from kmine.rounds.task import Task\nfrom kmine.rounds import training", False),
    ("kmine.methods.mining", "from kmine.stages import fit, infer\nimport kmine.store", False),
    ("kmine.loop", "from kmine.methods.mining import mine\nimport kmine\nimport json", False),
    ("kmine.arms", "from kmine.preparation.calibration import calibrate\nfrom kmine.methods.mining import mine", False),
    ("kmine.__main__", "def main():\n    from kmine import loop\n    from kmine.cli import run", False),
    ("kmine.cli", "import jsonargparse", False),
    ("kmine.download", "import requests\nfrom kmine.records import UserError", False),
    ("kmine.data.archive", "from kmine.download import check_space", False),
    ("kmine.stages.gate", "\n" * MAX_LINES, False),
]


@pytest.mark.parametrize(("module", "source", "is_package"), SOUND)
def test_checker_lets_sound_files_pass(module, source, is_package):
    assert check_source(module, source, is_package, MADE_UP) == []


def test_package_does_not_import_its_own_stages():
    said = check_source("kmine.stages", "from kmine.stages.fit import fit", True, MADE_UP)
    assert said == ["kmine.stages:1: imports its sibling kmine.stages.fit.fit"]


def test_line_and_module_are_named():
    said = check_source("kmine.store", "import os\nimport pickle\n", False, MADE_UP)
    assert said == ["kmine.store:2: imports pickle: no pickles"]

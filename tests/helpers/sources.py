"""What sources and fresh interpreters show: documented fields, modules that are loaded."""

from __future__ import annotations

import ast
import itertools
import json
import subprocess
import sys
from pathlib import Path

from kmine import config

HEAVY = (
    "torch",
    "lightning",
    "albumentations",
    "monai",
    "segmentation_models_pytorch",
    "segment_anything",
    "pandas",
    "matplotlib",
)


def documented(class_name: str) -> dict[str, str]:
    """The string below each field of a class."""
    trees = [ast.parse(path.read_text()) for path in Path(config.__file__).parent.glob("*.py")]
    body = next(n.body for t in trees for n in t.body if isinstance(n, ast.ClassDef) and n.name == class_name)
    pairs = itertools.pairwise(body)
    return {
        field.target.id: ast.literal_eval(text.value)
        for field, text in pairs
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }


def loaded_by(*codes: str) -> list[tuple[int, list[str]]]:
    """Of each of `codes`, one after the other in one fresh interpreter: exit code, and the heavy modules there then."""
    program = (
        "import json, sys\n"
        f"for text in {codes!r}:\n"
        "    try:\n"
        "        code = eval(text)\n"
        "    except SystemExit as stop:\n"
        "        code = stop.code\n"
        f"    print('\\nLOADED' + json.dumps([code, [m for m in {HEAVY!r} if m in sys.modules]]), flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    lines = [line.removeprefix("LOADED") for line in done.stdout.splitlines() if line.startswith("LOADED")]
    assert len(lines) == len(codes)
    return [tuple(json.loads(line)) for line in lines]

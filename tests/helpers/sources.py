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


def loaded_by(code: str) -> tuple[int, list[str]]:
    """Exit code of `code` in a fresh interpreter, and the heavy modules that it imported."""
    program = (
        "import json, sys\n"
        "try:\n"
        f"    code = {code}\n"
        "except SystemExit as stop:\n"
        "    code = stop.code\n"
        f"print('\\n' + json.dumps([code, [m for m in {HEAVY!r} if m in sys.modules]]))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    code, modules = json.loads(done.stdout.splitlines()[-1])
    return code, modules

"""What the package imports is what pyproject.toml declares: a clean environment must not miss any of it."""

from __future__ import annotations

import ast
import re
import sys
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def declared() -> set[str]:
    """Names of the plain dependencies and of the extras that are not for tests (tomllib is not in Python 3.10)."""
    text = (ROOT / "pyproject.toml").read_text()
    block = re.search(r"^dependencies = \[(.*?)^\]", text, re.DOTALL | re.MULTILINE)
    extras = re.search(r"^\[project.optional-dependencies\]\n(.*?)\n\n", text, re.DOTALL | re.MULTILINE)
    plain = [line.partition("=")[2] for line in extras[1].splitlines() if not line.startswith("test")]
    return {name for part in (block[1], *plain) for name in _names(part)}


def _names(part: str) -> set[str]:
    return {re.split(r"[\[<>=!~ ]", name)[0].lower().replace("_", "-") for name in re.findall(r'"([^"]+)"', part)}


def optional() -> set[str]:
    """Names of the extras `onnx`, `ray` and `hf`: imported inside functions alone."""
    lines = re.findall(r"^(?:onnx|ray|hf) = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    return {name for line in lines for name in _names(line)}


@cache
def trees() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text()) for path in sorted((ROOT / "kmine").rglob("*.py"))}


@cache
def imported() -> dict[str, str]:
    """Top-level module -> a file that imports it, third parties only."""
    found = {}
    for path, tree in trees().items():
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            found |= {name.split(".")[0]: path.name for name in names}
    return {name: path for name, path in found.items() if name not in sys.stdlib_module_names | {"kmine"}}


def test_every_import_is_declared():
    owners = packages_distributions()  # of what is installed; an extra that is not has its module's name
    missing = {
        name: path
        for name, path in imported().items()
        if not {owner.lower().replace("_", "-") for owner in owners.get(name, [name])} & declared()
    }
    assert not missing, f"add to the dependencies in pyproject.toml: {missing}"


def test_what_is_optional_is_asked_for_where_it_is_used():
    for path, tree in trees().items():
        top = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
        names = [alias.name for n in top if isinstance(n, ast.Import) for alias in n.names]
        names += [n.module or "" for n in top if isinstance(n, ast.ImportFrom)]
        needed = optional() & {found.split(".")[0] for found in names}
        assert not needed, f"{path.name} needs {needed} to be imported"


def test_the_check_can_fail():
    assert "pycocotools" in declared() and "pycocotools" in imported()
    assert {"onnx", "onnxruntime", "onnxscript", "ray", "transformers"} <= optional() <= declared()
    assert "hypothesis" not in declared(), "a test dependency is none of the package's"

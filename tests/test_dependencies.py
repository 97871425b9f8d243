"""What the package imports is what pyproject.toml declares: a clean environment must not miss any of it."""

from __future__ import annotations

import ast
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def declared() -> set[str]:
    """Names of the plain dependencies (tomllib is not in Python 3.10)."""
    block = re.search(r"^dependencies = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)
    return {re.split(r"[\[<>=!~ ]", name)[0].lower().replace("_", "-") for name in re.findall(r'"([^"]+)"', block[1])}


def imported() -> dict[str, str]:
    """Top-level module -> a file that imports it, third parties only."""
    found = {}
    for path in sorted((ROOT / "kmine").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            found |= {name.split(".")[0]: path.name for name in names}
    return {name: path for name, path in found.items() if name not in sys.stdlib_module_names | {"kmine"}}


def test_every_import_is_declared():
    owners = packages_distributions()
    missing = {
        name: path
        for name, path in imported().items()
        if not {owner.lower().replace("_", "-") for owner in owners.get(name, ["?"])} & declared()
    }
    assert not missing, f"add to the dependencies in pyproject.toml: {missing}"


def test_the_check_can_fail():
    assert "pycocotools" in declared() and "pycocotools" in imported()
    assert "hypothesis" not in declared(), "a test dependency is none of the package's"

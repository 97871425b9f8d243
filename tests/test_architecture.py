"""The import rule of docs/architecture.md, the size of the map, names and shapes, read from the sources."""

from __future__ import annotations

import ast
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "kmine"
LAYERS = (
    {"__init__", "__main__", "command", "fetch", "next", "weights"},
    {"api"},
    {"loop", "plan", "sweep", "compare", "audit", "check", "predict"},
    {"setup", "methods"},
    {"mining"},
    {"training"},
    {"data", "models", "segmenters", "feedback", "store", "report"},
    {"types", "errors", "cli", "config", "ops", "io"},
)
"""A room imports rooms of later layers; neighbours only within the last layer, the core. `command` stands for the
`__main__` of the packages that are commands: a thin shell over the public API."""
HOMES = {
    **dict.fromkeys(("albumentations", "nibabel", "pydicom", "highdicom"), "data"),
    **dict.fromkeys(("timm", "segmentation_models_pytorch", "onnx", "onnxscript", "onnxruntime"), "models"),
    **dict.fromkeys(("jinja2", "matplotlib"), "report"),
    "segment_anything": "segmenters/sam",
    "transformers": "segmenters/hf",
    "jsonargparse": "cli",
    "requests": "io/download",
    "ray": "io/ray_cluster",
}
PICKLES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "shelve"}
PURE = ("ops/", "mining/prompts", "mining/proposals", "mining/segment", "mining/gate", "mining/refine")
PURE += ("mining/adaptation/finetune", "mining/calibration/fit", "training/fit", "training/loss")
FILE_MODULES = {"pathlib", "os", "io", "json", "pandas", "shutil", "tempfile"}
SOURCES = {path.relative_to(ROOT).with_suffix("").as_posix(): path for path in sorted(ROOT.rglob("*.py"))}
"""By the path below kmine/, without suffix: `mining/gate`, `mining/__init__`, `errors`."""


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(SOURCES[module].read_text("utf-8"))


def functions(module: str) -> Iterator[ast.FunctionDef]:
    yield from (n for n in ast.walk(tree(module)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))


def imported(module: str) -> Iterator[str]:
    """Full dotted names of all imports, those inside functions and under TYPE_CHECKING included."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}:{node.lineno}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(module: str) -> set[str]:
    """Files of the package that a file imports, by their keys in `SOURCES`."""
    names = (name.split(".")[1:] for name in imported(module) if name.split(".")[0] == "kmine")
    keys = ("/".join(parts[:end]) for parts in names for end in (len(parts), len(parts) - 1) if end > 0)
    found = {key if key in SOURCES else f"{key}/__init__" for key in keys}
    return {key for key in found if key in SOURCES and key != module}


def room(module: str) -> str:
    return "command" if module.endswith("/__main__") else module.split("/")[0]


ARROWS = {module: own_imports(module) for module in SOURCES}
ROOMS = sorted({module.split("/")[0] for module in SOURCES})
ROOM_ARROWS = {(room(a), room(b)) for a, targets in ARROWS.items() for b in targets if room(a) != room(b)}


def cycle(arrows: dict[str, set[str]]) -> list[str]:
    """Members of cycles: what is left once everything that imports only removed nodes has been removed."""
    left = {node: set(targets) for node, targets in arrows.items()}
    while free := [node for node, targets in left.items() if not targets & left.keys()]:
        for node in free:
            del left[node]
    return sorted(left)


def longest_chain(arrows: dict[str, set[str]]) -> list[str]:
    @cache
    def chain(node: str) -> tuple[str, ...]:
        return (node, *max((chain(target) for target in arrows.get(node, ())), key=len, default=()))

    return list(max((chain(node) for node in arrows), key=len))


def layer(name: str) -> int:
    return next(index for index, names in enumerate(LAYERS) if name in names)


def test_imports_point_to_the_right(capsys):
    core = len(LAYERS) - 1
    upward = sorted((a, b) for a, b in ROOM_ARROWS if layer(a) > layer(b) or core > layer(a) == layer(b))
    grouped: dict[str, set[str]] = defaultdict(set)
    for a, b in ROOM_ARROWS:
        grouped[a].add(b)
    members, chain = cycle(grouped), longest_chain(grouped)
    top_files = [module for module in SOURCES if "/" not in module]
    with capsys.disabled():
        print(f"\nrooms {len(ROOMS)}, arrows {len(ROOM_ARROWS)}, chain {len(chain)} ({' > '.join(chain)})", end=", ")
        print(f"cycles {len(members)}, upward {len(upward)}, top-level files {len(top_files)}", end=", ")
        print(f"lines {package_lines()}")
    assert (upward, members) == ([], [])
    assert len(ROOMS) <= 29
    assert len(chain) <= 9
    assert len(top_files) <= 9


def test_files_import_one_another_without_cycles():
    # A package's __init__ may load its own files lazily by name, and they may import what it defines.
    assert cycle({a: {b for b in targets if not a.endswith("__init__")} for a, targets in ARROWS.items()}) == []


@pytest.mark.parametrize("module", SOURCES)
def test_libraries_stay_at_home(module):
    libraries = {name.split(".")[0] for name in imported(module)}
    strangers = {library for library in libraries & HOMES.keys() if not f"{module}/".startswith(f"{HOMES[library]}/")}
    assert strangers == set()
    assert libraries & PICKLES == set()


@pytest.mark.parametrize("module", SOURCES)
def test_nothing_that_windows_lacks_is_imported_at_the_top(module):
    at_top = {alias.name for node in tree(module).body if isinstance(node, ast.Import) for alias in node.names}
    assert at_top & {"fcntl", "resource", "termios", "pwd", "grp"} == set()


@pytest.mark.parametrize("module", [module for module in SOURCES if module.startswith(PURE)])
def test_pure_modules_handle_no_files(module):
    calls = [n.func for n in ast.walk(tree(module)) if isinstance(n, ast.Call)]
    names = {getattr(function, "attr", getattr(function, "id", "")) for function in calls}
    assert {name.split(".")[0] for name in imported(module)} & FILE_MODULES == set()
    assert names & {"open", "imread", "imwrite"} == set()


@pytest.mark.parametrize("module", SOURCES)
def test_files_and_functions_are_short(module):
    def body_lines(function: ast.FunctionDef) -> int:
        return function.end_lineno - function.body[ast.get_docstring(function) is not None].lineno + 1

    def parameters(function: ast.FunctionDef) -> int:
        args = function.args
        every = [*args.posonlyargs, *args.args, *args.kwonlyargs]
        return len([arg for arg in every if arg.arg not in {"self", "cls"}]) + bool(args.vararg) + bool(args.kwarg)

    with_body = [f for f in functions(module) if len(f.body) > (ast.get_docstring(f) is not None)]
    assert [f.name for f in with_body if body_lines(f) > 45] == []
    assert [f.name for f in functions(module) if parameters(f) > 8] == []
    assert len(SOURCES[module].read_text("utf-8").splitlines()) <= 400


def package_lines() -> int:
    return sum(len(path.read_text("utf-8").splitlines()) for path in SOURCES.values())


def test_the_package_stays_small():
    assert package_lines() <= 38_400


def test_no_public_name_stands_twice():
    kinds = (ast.FunctionDef, ast.ClassDef)
    where = defaultdict(list)
    for module in SOURCES:
        for node in tree(module).body:
            if isinstance(node, kinds) and not node.name.startswith("_") and node.name != "main":
                where[node.name].append(re.sub(r"segmenters/(sam|tiny)/", "segmenters/adapter/", module))
    assert {name: modules for name, modules in where.items() if len(set(modules)) > 1} == {}


def test_no_function_bears_the_name_of_a_package():
    packages = {module.split("/")[0] for module in SOURCES if "/" in module}
    top = (node for module in SOURCES for node in tree(module).body)
    public = {node.name for node in top if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assert packages & public == set()


SPEECH = re.compile(
    r"\b(nobody|whoever|heed\w*|judged|witness\w*|innocent|teller|pupil|lesson|echo|kin|arms|asked|asking|taught)\b"
)
FROZEN = {"witness", "witness_fold_0", "judged", "arms", "echo", "taught", "asked"}
"""Keys and folder names on disk, words of signatures."""


@pytest.mark.parametrize("module", SOURCES)
def test_words_are_the_fields(module):
    words = [
        found
        for found in SPEECH.findall(SOURCES[module].read_text("utf-8"))
        if found not in FROZEN and not found.startswith("witness_")
    ]
    assert words == []


def test_tests_mirror_the_package(capsys):
    tests = Path(__file__).parent
    modules = [module for module in SOURCES if not module.endswith("__init__")]

    def mirror(module: str) -> Path:
        folder, stem = Path(module).parent, Path(module).name.strip("_")
        return tests / folder / f"test_{stem}.py"

    missing = [module for module in modules if not mirror(module).exists()]
    with capsys.disabled():
        print(f"\nmodules with the test file of their name: {len(modules) - len(missing)} of {len(modules)}")
    assert len(missing) <= len(modules) // 10, missing


def test_the_checkers_find_what_they_look_for():
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]
    assert longest_chain({"a": {"b"}, "b": {"c"}, "d": {"c"}}) == ["a", "b", "c"]
    assert {"errors", "mining/gate", "config/__init__"} <= SOURCES.keys()
    assert Counter(map(room, SOURCES))["mining"] > 10
    assert ("loop", "training") in ROOM_ARROWS

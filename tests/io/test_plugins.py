"""Names of a registry: built-in ones, registered ones, entry points of installed packages."""

from __future__ import annotations

import sys

import pytest

from kmine.errors import UserError
from kmine.io.plugins import Registry


@pytest.fixture
def registry() -> Registry[str]:
    return Registry("animal.name", "kmine.test_animals", {"cat": "felis"})


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A distribution `my-zoo` with the entry points `cat` and `dog`; its module is `my_zoo`."""
    folder = tmp_path / "my_zoo-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Name: my-zoo\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[kmine.test_animals]\ncat = my_zoo:lion\ndog = my_zoo:wolf\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_zoo", raising=False)
    return tmp_path / "my_zoo.py"


def test_an_entry_point_is_imported_when_its_name_is_used(registry, package) -> None:
    package.write_text("wolf = 'canis'\n")
    assert registry.names() == ["cat", "dog"]
    assert registry.get("cat") == "felis", "a built-in name is not an entry point's"
    assert "my_zoo" not in sys.modules
    assert registry.get("dog") == "canis"
    assert "my_zoo" in sys.modules


@pytest.mark.parametrize(
    ("module", "words"),
    [("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"), ("fox = 1", "wolf")],
)
def test_a_broken_package_is_an_error_in_one_line_with_its_name(registry, package, module, words) -> None:
    package.write_text(module)
    with pytest.raises(UserError, match=rf"animal\.name: 'dog' of my-zoo \(my_zoo:wolf\).*{words}") as caught:
        registry.get("dog")
    assert "\n" not in str(caught.value) and "another name" in str(caught.value)


def test_registered_names_may_be_replaced_and_built_in_ones_not(registry) -> None:
    for value in ("canis", "lupus"):
        registry.register("dog", value)
        assert registry.get("dog") == value
    assert not registry.is_builtin("dog") and registry.is_builtin("cat")
    for name in ("cat", ""):
        with pytest.raises(UserError, match=r"animal\.name: expected a new name"):
            registry.register(name, "lynx")


def test_an_unknown_name_is_refused_with_all_names(registry) -> None:
    registry.register("dog", "canis")
    with pytest.raises(UserError, match=r"animal\.name: unknown name 'dgo'; did you mean dog\? Known: cat, dog"):
        registry.get("dgo")

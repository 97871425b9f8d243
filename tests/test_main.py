"""`kmine COMMAND`: dispatch, and no heavy library before the work begins."""

from __future__ import annotations

import pytest
from helpers.sources import loaded_by

from kmine import __main__ as dispatcher
from kmine import __version__


def loaded_by_command(*words: str) -> tuple[int, list[str]]:
    """Exit code of `kmine WORDS` in a fresh interpreter, and the heavy modules that it imported."""
    return loaded_by(f"__import__('kmine.__main__').__main__.main({list(words)!r})")


@pytest.mark.parametrize("command", dispatcher.COMMANDS)
def test_help_of_every_command_imports_nothing_heavy(command):
    assert loaded_by_command(command, "--help") == (0, [])


def test_help_of_kmine_and_the_list_of_weights_import_nothing_heavy(tmp_path):
    assert loaded_by_command("--help") == (0, [])
    assert loaded_by_command("weights", "list", "--cache_dir", str(tmp_path)) == (0, [])


@pytest.mark.parametrize(
    "words",
    [
        ["--data.sise", "3"],
        ["--model.name", "unet+"],
        ["--segmenter.name", "sam_vit_x"],
        ["--device", "gpu"],
        ["--data.name", "kvasir_seg"],
        ["--data.name", "kvasir_seg", "--data.root", "no/such/folder"],
    ],
    ids=" ".join,
)
def test_early_errors_import_nothing_heavy(words):
    assert loaded_by_command("loop", *words) == (2, [])


def test_help_lists_all_commands(capsys):
    assert dispatcher.main([]) == dispatcher.main(["--help"]) == dispatcher.main(["-h"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name}" in shown for name in dispatcher.COMMANDS)


def test_version_is_printed(capsys):
    assert dispatcher.main(["--version"]) == 0
    assert capsys.readouterr().out == f"kmine {__version__}\n"


def test_an_unknown_command_suggests_the_nearest(capsys):
    assert dispatcher.main(["lop"]) == 2
    err = capsys.readouterr().err
    assert "unknown name 'lop'; did you mean loop?" in err and err.count("\n") == 1


def test_arguments_after_the_command_are_passed_on(capsys):
    with pytest.raises(SystemExit) as stop:
        dispatcher.main(["loop", "--data.sise", "3"])
    assert stop.value.code == 2
    assert "kmine loop: error: unknown setting data.sise" in capsys.readouterr().err

"""`kmine COMMAND`: dispatch, and no heavy library before the work begins."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.sources import loaded_by

from kmine import __main__ as dispatcher
from kmine import __version__

HELPS = [[command, "--help"] for command in dispatcher.COMMANDS]
HELPS += [["--help"], ["weights", "list", "--cache_dir", "no/such/folder"]]
ERRORS = [
    ["loop", "--data.sise", "3"],
    ["loop", "--model.name", "unet+"],
    ["loop", "--segmenter.name", "sam_vit_x"],
    ["loop", "--device", "gpu"],
    ["loop", "--data.name", "kvasir_seg"],
    ["loop", "--data.name", "kvasir_seg", "--data.root", "no/such/folder"],
]


@pytest.fixture(scope="module")
def loaded() -> dict[str, tuple[int, list[str]]]:
    """Exit code of each command line, in one interpreter, and the heavy modules that are loaded after it."""
    lines = HELPS + ERRORS
    found = loaded_by(*(f"__import__('kmine.__main__').__main__.main({words!r})" for words in lines))
    return dict(zip(map(" ".join, lines), found, strict=True))


@pytest.mark.parametrize("line", map(" ".join, HELPS))
def test_help_and_the_list_of_weights_import_nothing_heavy(loaded, line):
    assert loaded[line] == (0, [])


@pytest.mark.parametrize("line", map(" ".join, ERRORS))
def test_early_errors_import_nothing_heavy(loaded, line):
    assert loaded[line] == (2, [])


def test_help_lists_all_commands(capsys):
    assert dispatcher.main([]) == dispatcher.main(["--help"]) == dispatcher.main(["-h"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name}" in shown for name in dispatcher.COMMANDS)


def test_version_is_printed(capsys):
    assert dispatcher.main(["--version"]) == 0
    assert capsys.readouterr().out == f"kmine {__version__}\n"


def completed(*words: str) -> set[str]:
    """What bash offers for the last of the words after `kmine`."""
    line = " ".join(["kmine", *words[:-1]])
    script = f"""kmine() {{ {sys.executable} -m kmine "$@"; }}
    eval "$(kmine --completion)"
    COMP_WORDS=({line} "{words[-1]}"); COMP_CWORD={len(words)}; _kmine kmine; printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    return {*done.stdout.split()}


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_the_tab_key_offers_commands_flags_and_files(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(dispatcher.__file__).parents[1]))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert completed("pl") == {"plan"}
    assert completed("audit", "--ver") == {"--verdicts"}
    assert completed("audit", "ru") == {"runs"}


def test_an_unknown_command_suggests_the_nearest(capsys):
    assert dispatcher.main(["lop"]) == 2
    err = capsys.readouterr().err
    assert "unknown name 'lop'; did you mean loop?" in err and err.count("\n") == 1


def test_arguments_after_the_command_are_passed_on(capsys):
    with pytest.raises(SystemExit) as stop:
        dispatcher.main(["loop", "--data.sise", "3"])
    assert stop.value.code == 2
    assert "kmine loop: error: unknown setting data.sise" in capsys.readouterr().err

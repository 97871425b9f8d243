"""What is done is not made again; what is not ours is not replaced."""

from __future__ import annotations

import subprocess
import sys
from contextlib import contextmanager

import pytest

from kmine.errors import UserError
from kmine.predict.log import LOG_FILE, OutputLog


@pytest.fixture
def out(tmp_path):
    (tmp_path / "a.png").write_bytes(b"mask")
    ledger = OutputLog(tmp_path)
    ledger.add("a", "s1", ["a.png"], {"file": "a"})
    ledger.close()
    return tmp_path


@contextmanager
def reopened(out):
    ledger = OutputLog(out)
    try:
        yield ledger
    finally:
        ledger.close()


def done(out, name: str, signature: str):
    with reopened(out) as ledger:
        return ledger.done(name, signature)


def test_a_whole_output_of_the_same_signature_is_done(out):
    assert done(out, "a", "s1") == {"file": "a"}
    assert done(out, "a", "s2") is None and done(out, "b", "s1") is None


def test_an_output_that_is_gone_or_cut_short_is_not_done(out):
    (out / "a.png").write_bytes(b"mas")
    assert done(out, "a", "s1") is None
    (out / "a.png").unlink()
    assert done(out, "a", "s1") is None


def test_a_line_that_a_kill_cut_short_costs_that_image_alone(out):
    with (out / LOG_FILE).open("a") as file:
        file.write('{"name": "b", "sig')
    with reopened(out) as ledger:
        ledger.add("c", "s1", [], {})
    assert done(out, "a", "s1") == {"file": "a"} and done(out, "c", "s1") == {}
    assert done(out, "b", "s1") is None


def test_files_of_others_are_not_replaced(out):
    (out / "theirs.png").write_bytes(b"photo")
    with reopened(out) as ledger:
        ledger.claim(["a.png", "new.png"])
        with pytest.raises(UserError, match=r"theirs\.png, which kmine predict did not write"):
            ledger.claim(["a.png", "theirs.png"])


def test_files_written_before_a_kill_are_kmines_own(out):
    with reopened(out) as ledger:
        ledger.claim(["new.png"])
    (out / "new.png").write_bytes(b"mask without a line")
    with reopened(out) as ledger:
        ledger.claim(["new.png"])
        assert ledger.done("new", "s1") is None


@pytest.mark.parametrize("line", ["\x00", "[1]", "7", "[" * 20_000, '{"name": ["a"], "check": ""}', '{"files": 3}'])
def test_a_damaged_line_is_not_read(out, line):
    with (out / LOG_FILE).open("a") as file:
        file.write(line + "\n")
    assert done(out, "a", "s1") == {"file": "a"}


def test_a_changed_line_no_longer_counts_but_its_files_stay_kmines_own(out):
    log = out / LOG_FILE
    log.write_text(log.read_text().replace('{"file": "a"}', '{"file": "b"}'))
    assert done(out, "a", "s1") is None
    with reopened(out) as ledger:
        ledger.claim(["a.png"])


@pytest.mark.parametrize("name", [LOG_FILE, "masks"])
def test_a_link_out_of_the_folder_is_refused(out, tmp_path, name):
    (tmp_path / "elsewhere").mkdir()
    (out / name).unlink(missing_ok=True)
    (out / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"{name}.*symbolic link to .*elsewhere"):
        OutputLog(out)


def test_one_process_at_a_time(out):
    with reopened(out), pytest.raises(UserError, match="another process"):
        OutputLog(out)
    with reopened(out):
        pass


def test_a_limit_of_file_size_names_the_log(tmp_path):
    program = (
        "import resource, sys; from contextlib import closing; from pathlib import Path\n"
        "from kmine.cli import guarded; from kmine.predict.log import OutputLog\n"
        "def work():\n"
        "    with closing(OutputLog(Path(sys.argv[1]))) as log: log.claim(['masks/a.png'])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9, 9)); sys.exit(guarded('kmine x', work))"
    )
    words = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    said = f"kmine x: error: {tmp_path / '.kmine-predict.jsonl'}: the file would be larger than the limit for one file;"
    assert done.returncode == 2 and done.stderr.startswith(said) and done.stderr.count("\n") == 1

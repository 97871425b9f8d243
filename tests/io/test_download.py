"""Downloads that break off, are refused, or bring something else."""

from __future__ import annotations

import errno
import hashlib
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from helpers.local_server import serving

from kmine.errors import UserError
from kmine.io import download
from kmine.io.errors import storage_errors
from kmine.io.files import lock

CONTENT = np.random.default_rng(0).bytes(700_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
OTHERWISE = "ask a friend"


@pytest.fixture
def server(monkeypatch):
    with serving(CONTENT, monkeypatch) as running:
        yield running


@pytest.fixture
def get(server, tmp_path):
    """Download `CONTENT` to a path; what came."""

    def call(path: Path = tmp_path / "file.bin") -> bytes:
        download.download(server.url("file.bin"), SHA256, path, otherwise=OTHERWISE)
        return path.read_bytes()

    return call


@pytest.fixture
def part(tmp_path):
    return tmp_path / "file.bin.part"


def test_a_file_arrives_whole_in_a_new_folder_with_nothing_beside_it(server, get, tmp_path):
    path = tmp_path / "new" / "er" / "file.bin"
    assert get(path) == CONTENT
    assert list(path.parent.iterdir()) == [path]
    assert server.ranges == [None]


def test_a_broken_download_goes_on_where_it_broke_off(server, get):
    server.breaks = [200_000, 300_000]
    assert get() == CONTENT
    first, second, third = server.starts
    assert first == 0
    assert 100_000 < second <= 200_000 < third <= 500_000


def test_a_later_run_goes_on_too(server, get, part):
    part.write_bytes(CONTENT[:123_456])
    assert get() == CONTENT
    assert server.ranges == ["bytes=123456-"]


def test_a_break_without_a_stated_length_is_told_by_the_hash(server, get, part):
    server.says_length = False
    server.breaks = [200_000]
    with pytest.raises(UserError, match="expected SHA-256"):
        get()
    assert not part.exists()
    assert get() == CONTENT


def test_an_early_end_that_the_http_library_lets_pass_is_a_break(server, get, monkeypatch):
    """As urllib3 before 2.0 does."""
    import requests

    whole, asked = requests.Response.iter_content, []

    def lenient(self, size):
        asked.append(size)
        content = b"".join(whole(self, size))
        yield content[:1000] if len(asked) == 1 else content

    monkeypatch.setattr(requests.Response, "iter_content", lenient)
    assert get() == CONTENT
    assert server.starts == [0, 1000]


def test_a_complete_part_is_only_checked(server, get, part):
    part.write_bytes(CONTENT)
    assert get() == CONTENT
    assert server.ranges == [f"bytes={len(CONTENT)}-"]


def test_a_part_longer_than_the_file_is_discarded(get, part):
    part.write_bytes(CONTENT + b"more")
    with pytest.raises(UserError, match="expected SHA-256"):
        get()
    assert get() == CONTENT


def test_a_server_without_range_starts_over(server, get, part):
    server.knows_range = False
    part.write_bytes(b"x" * 123_456)
    assert get() == CONTENT


def test_another_part_than_asked_for_is_not_appended(server, get, part):
    part.write_bytes(CONTENT[:5000])
    server.shift = 10
    assert get() == CONTENT
    assert server.starts == [5000, 0]


def test_a_server_that_always_breaks_keeps_what_came(server, get, part, tmp_path):
    server.breaks = [200_000] + [0] * 9
    with pytest.raises(UserError, match=rf"bytes are kept, run the command again to go on, or {OTHERWISE}"):
        get()
    assert len(part.read_bytes()) > 100_000
    assert CONTENT.startswith(part.read_bytes())
    assert list(tmp_path.iterdir()) == [part]
    assert len(server.ranges) == 1 + download.MAX_FAILURES - 1


def test_breaks_are_forgiven_as_long_as_bytes_come(server, get):
    server.breaks = [90_000] * (download.MAX_FAILURES + 2)
    assert get() == CONTENT


@pytest.mark.parametrize(("status", "calls"), [(404, 1), (403, 1), (416, 1), (500, 4), (503, 4)])
def test_a_refusal_is_not_asked_twice_a_fault_of_the_server_is(server, get, tmp_path, status, calls):
    assert download.MAX_FAILURES == 4
    server.statuses = [status]
    with pytest.raises(UserError, match=rf"{status}.*, or {OTHERWISE}") as caught:
        get()
    assert server.url("file.bin") in str(caught.value)
    assert len(server.ranges) == calls
    assert list(tmp_path.iterdir()) == [], "an empty part is of no use"


def test_a_fault_that_passes_is_waited_for(server, get):
    server.statuses = [500, 502, 200]
    assert get() == CONTENT


def test_no_server_at_all_is_one_error(server, get, tmp_path):
    server.server_close()
    with pytest.raises(UserError, match="the download failed"):
        get()
    assert list(tmp_path.iterdir()) == []


def test_wrong_content_is_discarded(server, get, tmp_path):
    server.content = b"<html>please log in</html>"
    with pytest.raises(UserError, match=rf"expected SHA-256 {SHA256}, got .*, or {OTHERWISE}"):
        get()
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_part_is_discarded_and_then_replaced(get, part):
    part.write_bytes(b"x" * 1000)
    with pytest.raises(UserError, match="discarded"):
        get()
    assert get() == CONTENT


def test_an_interruption_keeps_what_came(server, get, part, monkeypatch):
    import requests

    whole = requests.Response.iter_content

    def interrupted(self, size):
        yield next(whole(self, size))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(requests.Response, "iter_content", interrupted)
        get()
    assert 0 < len(part.read_bytes()) < len(CONTENT)
    assert get() == CONTENT
    assert server.starts[1] > 0


# -- the disk


def left(monkeypatch, free):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(download.shutil, "disk_usage", lambda folder: usage(10**9, 0, free))


def test_space_is_checked_before_the_first_byte(get, tmp_path, monkeypatch):
    left(monkeypatch, 699_999)
    with pytest.raises(UserError, match=r"the download needs 0.7 MB, and the disk has 0.7 MB left"):
        get()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("knows_range", [True, False])
def test_only_what_is_missing_needs_space(server, get, part, monkeypatch, knows_range):
    server.knows_range = knows_range
    part.write_bytes(CONTENT[:600_000])
    left(monkeypatch, 100_000)
    assert get() == CONTENT


@pytest.mark.parametrize("free", [0, 99, 100])
def test_check_space_lets_pass_what_just_fits(tmp_path, monkeypatch, free):
    left(monkeypatch, free)
    if free < 100:
        with pytest.raises(UserError, match="another disk"):
            download.check_space(tmp_path, 100, "it")
    else:
        download.check_space(tmp_path, 100, "it")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "quota"),
        (errno.EACCES, "no permission"),
        (errno.EROFS, "read-only"),
        (errno.EIO, "cannot be read or written .Input/output error"),
    ],
)
def test_what_the_file_system_says_is_explained(code, said):
    import os

    with pytest.raises(UserError, match=f"^some/file: .*{said}"), storage_errors(Path("some/file")):
        raise OSError(code, os.strerror(code))


def test_a_file_where_the_folder_should_be_is_one_error(get, tmp_path):
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"file.bin.part: .*choose another folder"):
        get(tmp_path / "file" / "file.bin")
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_two_processes_do_not_write_one_file(server, get, part):
    with part.open("ab") as other:
        lock(other, wait=True)
        with pytest.raises(UserError, match="another process is downloading it"):
            get()
    assert server.ranges == []
    assert get() == CONTENT

"""`kmine fetch`: once, whole, resumed, and never over files that are there."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile

import numpy as np
import pytest
from helpers.local_server import serving
from helpers.sources import loaded_by

from kmine import __main__ as dispatcher
from kmine import fetch
from kmine.data import DATASETS
from kmine.data.datasets.covid_qu_ex_index import PUBLISHED
from kmine.data.datasets.kvasir_seg import URL as KVASIR_URL
from kmine.data.datasets.lits_index import URL as LITS_URL
from kmine.io import archive
from kmine.io.files import lock, open_lock

FILES = {f"Kvasir-SEG/{part}/{n}.jpg": np.random.default_rng(n).bytes(20_000) for part in "im" for n in range(3)}


def zipped(files) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as opened:
        for name, content in files.items():
            opened.writestr(name, content)
    return stream.getvalue()


ZIP = zipped(FILES)
SHA256 = hashlib.sha256(ZIP).hexdigest()


@pytest.fixture
def server(monkeypatch):
    with serving(ZIP, monkeypatch) as running:
        published = fetch.Published(running.url("kvasir-seg.zip"), SHA256, "Kvasir-SEG")
        monkeypatch.setitem(fetch.DOWNLOADS, "kvasir_seg", lambda: published)
        yield running


@pytest.fixture
def out(tmp_path):
    return tmp_path / "my data"


@pytest.fixture
def call(out, capsys):
    """Runs the command; exit code, stdout and stderr."""

    def run(*argv: str, name: str = "kvasir_seg") -> tuple[int, str, str]:
        capsys.readouterr()
        code = fetch.main([name, "--out", str(out), *argv])
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err
        return code, shown.out, shown.err

    return run


@pytest.fixture
def refused(call):
    """The one line that the command is refused with."""

    def run(*argv: str, name: str = "kvasir_seg") -> str:
        code, shown, err = call(*argv, name=name)
        assert (code, shown) == (2, "")
        (line,) = [line for line in err.splitlines() if line.startswith("kmine fetch: error: ")]
        assert err.endswith(f"{line}\n")
        return line

    return run


def content(folder) -> dict[str, bytes]:
    """Visible files below a folder."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if not name.startswith(".")}


def hidden(out) -> list[str]:
    return sorted(path.name for path in (out / fetch.STATE_DIR).iterdir())


# -- the road


def test_a_data_set_arrives_with_the_command_that_uses_it(server, call, out):
    code, shown, _ = call()
    assert code == 0
    assert content(out) == FILES
    assert shown == (f"kvasir_seg is now in {out}\nkmine check --config kvasir_seg --data.root '{out}'\n"), (
        "the folder is quoted"
    )
    assert hidden(out) == [f"{SHA256}.json"], "the archive is not kept"


def test_the_second_time_nothing_is_downloaded(server, call, out):
    call()
    code, shown, _ = call("--offline")
    assert code == 0
    assert f"kvasir_seg is there and whole, nothing was done: {out}" in shown
    assert "kmine check --config kvasir_seg" in shown
    assert len(server.ranges) == 1


def test_a_broken_download_goes_on_in_the_next_call(server, call, refused, out):
    server.breaks = [100_000] + [0] * 9
    assert "the download failed" in refused()
    assert content(out) == {}
    (part,) = hidden(out)
    assert part == "kvasir-seg.zip.part"
    server.breaks, asked = [], len(server.ranges)
    assert call()[0] == 0
    assert content(out) == FILES
    assert server.starts[asked] > 10_000


def test_an_interruption_keeps_the_part_and_the_next_call_goes_on(server, call, out, monkeypatch):
    import requests

    whole = requests.Response.iter_content

    def interrupted(self, size):
        yield next(whole(self, size))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(requests.Response, "iter_content", interrupted)
        code, _, err = call()
    assert code == 130
    assert "the same command resumes" in err
    assert hidden(out) == ["kvasir-seg.zip.part"]
    assert call()[0] == 0
    assert server.starts[1] > 0


def test_an_interruption_while_unpacking_keeps_the_archive_only(server, call, out, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(archive, "_publish", lambda folder, target: (_ for _ in ()).throw(KeyboardInterrupt))
        assert call()[0] == 130
    assert [path.name for path in out.iterdir()] == [fetch.STATE_DIR]
    assert hidden(out) == ["kvasir-seg.zip"]
    assert call("--offline")[0] == 0
    assert content(out) == FILES
    assert len(server.ranges) == 1


def test_a_kill_before_the_record_was_written_is_mended(server, call, out, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(fetch, "write_atomic", lambda path, data: (_ for _ in ()).throw(KeyboardInterrupt))
        assert call()[0] == 130
    assert content(out) == FILES
    code, shown, _ = call("--offline")
    assert code == 0
    assert "is there and whole" in shown
    assert hidden(out) == [f"{SHA256}.json"]


def test_what_a_killed_process_left_half_unpacked_is_removed(server, call, out):
    (out / f"{archive.UNFINISHED}x").mkdir(parents=True)
    assert call()[0] == 0
    assert {path.name for path in out.iterdir()} == {fetch.STATE_DIR, "Kvasir-SEG"}


def test_a_damaged_archive_of_our_own_is_fetched_anew(server, call, out):
    (out / fetch.STATE_DIR).mkdir(parents=True)
    (out / fetch.STATE_DIR / "kvasir-seg.zip").write_bytes(ZIP[:-1])
    assert call()[0] == 0
    assert content(out) == FILES


@pytest.mark.parametrize(("status", "said"), [(404, "404"), (500, "500"), (416, "416")])
def test_a_refusal_of_the_server_is_one_line_and_leaves_nothing(server, refused, tmp_path, status, said):
    server.statuses = [status]
    line = refused()
    assert said in line and "--archive FILE" in line
    assert list(tmp_path.iterdir()) == []


def test_wrong_content_is_not_unpacked(server, refused, tmp_path):
    server.content = zipped(FILES | {"Kvasir-SEG/more.jpg": b""})
    assert "expected SHA-256" in refused()
    assert list(tmp_path.iterdir()) == []


def test_too_little_space_is_told_before_the_download(server, refused, monkeypatch, tmp_path):
    from kmine.io import download

    monkeypatch.setattr(download.shutil, "disk_usage", lambda folder: type("usage", (), {"free": 10}))
    assert "the download needs 0.1 MB" in refused()
    assert list(tmp_path.iterdir()) == []


def test_offline_asks_nobody_and_leaves_nothing(server, refused, tmp_path):
    line = refused("--offline")
    assert "--offline forbids it" in line and "--archive FILE" in line and server.url("kvasir-seg.zip") in line
    assert server.ranges == []
    assert list(tmp_path.iterdir()) == []


def test_two_processes_do_not_fill_one_folder(server, call, refused, out):
    (out / fetch.STATE_DIR).mkdir(parents=True)
    with open_lock(out / fetch.STATE_DIR / ".lock") as file:
        lock(file, wait=True)
        assert "another process is fetching" in refused()
    assert server.ranges == []
    assert call()[0] == 0


# -- what is there


def test_files_of_the_user_stay(server, call, out):
    out.mkdir()
    (out / "notes.txt").write_bytes(b"mine")
    assert call()[0] == 0
    assert content(out) == FILES | {"notes.txt": b"mine"}


def test_a_folder_of_that_name_is_not_overwritten_and_nothing_is_downloaded(server, refused, out):
    (out / "Kvasir-SEG").mkdir(parents=True)
    (out / "Kvasir-SEG" / "mine.jpg").write_bytes(b"mine")
    line = refused()
    assert "were left alone" in line and "kmine check --config kvasir_seg --data.root" in line
    assert server.ranges == []
    assert content(out) == {"Kvasir-SEG/mine.jpg": b"mine"}
    assert not (out / fetch.STATE_DIR).exists()


@pytest.mark.parametrize("harm", ["missing", "changed", "shorter"])
def test_data_that_are_no_longer_whole_are_named_and_left(server, call, refused, out, harm):
    call()
    first = out / min(FILES)
    if harm == "missing":
        first.unlink()
    else:
        first.write_bytes(bytes(20_000 if harm == "changed" else 3))
    line = refused()
    assert f"expected 6 files as they were fetched, found 1 of them missing or changed ({min(FILES)})" in line
    assert f"move {out / 'Kvasir-SEG'} away and run the same command again" in line
    assert len(server.ranges) == 1
    (out / "Kvasir-SEG").rename(out / "away")
    assert call()[0] == 0
    assert {name: data for name, data in content(out).items() if name in FILES} == FILES


def test_a_damaged_record_is_no_record(server, call, refused, out):
    call()
    for text in ("", "[]", '{"a": 1}', '{"a": [1, null]}', json.dumps({"a": ["x", 2]})):
        (out / fetch.STATE_DIR / f"{SHA256}.json").write_text(text)
        assert "has no record of" in refused()
    assert content(out) == FILES


@pytest.mark.parametrize("below", ["", "/deeper"])
def test_a_file_where_the_folder_should_be_is_one_line(server, out, capsys, below):
    out.write_bytes(b"mine")
    assert fetch.main(["kvasir_seg", "--out", f"{out}{below}"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "choose another folder" in err
    assert out.read_bytes() == b"mine"


# -- an archive of the user's


def test_the_published_archive_is_unpacked_without_a_download(server, call, out, tmp_path):
    path = tmp_path / "got by mail.zip"
    path.write_bytes(ZIP)
    assert call("--archive", str(path), "--offline")[0] == 0
    assert content(out) == FILES
    assert path.read_bytes() == ZIP
    assert "is there and whole" in call("--archive", str(path))[1]
    assert "is there and whole" in call()[1]
    assert server.ranges == []


def test_files_unpacked_by_hand_are_recognised_by_the_archive(server, call, refused, out, tmp_path):
    for name, data in FILES.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(data)
    path = tmp_path / "kvasir-seg.zip"
    path.write_bytes(ZIP)
    assert "with --archive FILE they are compared" in refused()
    assert "is there and whole" in call("--archive", str(path))[1]
    assert "is there and whole" in call("--offline")[1]


def test_another_archive_is_not_taken_for_the_published_one(server, refused, tmp_path):
    path = tmp_path / "kvasir-seg.zip"
    path.write_bytes(zipped({"Kvasir-SEG/x": b"x"}))
    line = refused("--archive", str(path))
    assert SHA256 in line and "--data.root" in line
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["lits", "covid_qu_ex"])
def test_an_archive_of_another_data_set_is_unpacked_too(call, out, tmp_path, name):
    path = tmp_path / "archive.zip"
    path.write_bytes(zipped({"Training Batch 1/volume-0.nii": b"x"}))
    code, shown, _ = call("--archive", str(path), name=name)
    assert code == 0
    assert shown.endswith(f"kmine check --config {name} --data.root '{out}'\n")
    assert content(out) == {"Training Batch 1/volume-0.nii": b"x"}
    more = tmp_path / "archive2.zip"
    more.write_bytes(zipped({"Training Batch 2/volume-28.nii": b"y"}))
    assert call("--archive", str(more), name=name)[0] == 0
    assert len(content(out)) == 2
    assert "is there and whole" in call("--archive", str(path), name=name)[1]


def test_a_hostile_archive_is_one_line_and_leaves_nothing(refused, tmp_path):
    path = tmp_path / "archive.zip"
    path.write_bytes(zipped({"../../x": b"x"}))
    assert "leads out of the folder" in refused("--archive", str(path), name="lits")
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_archive_and_a_folder_are_named(refused, tmp_path):
    for path, came in ((tmp_path, "a folder"), (tmp_path / "no.zip", "nothing")):
        assert f"--archive {path}: expected a zip file, found {came}" in refused("--archive", str(path))


# -- names


def test_what_kmine_may_not_download_is_told_where_it_is(refused, tmp_path):
    line = refused(name="lits")
    assert LITS_URL in line and "an account or a licence" in line and "volume-N.nii" in line
    assert "kmine check --config lits --data.root FOLDER" in line
    line = refused(name="covid_qu_ex")
    assert PUBLISHED in line and "account" in line and "Infection and Lung Segmentation Data" in line
    assert "kmine check --config covid_qu_ex --data.root FOLDER" in line
    assert list(tmp_path.iterdir()) == []


def test_phantom_needs_nothing_and_folder_is_the_users(call, refused, tmp_path):
    code, shown, err = call(name="phantom")
    assert (code, err) == (0, "") and "nothing to fetch" in shown
    assert "your own images" in refused(name="folder")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_name_suggests_the_nearest(refused):
    assert "data set: unknown name 'kvasir'; did you mean kvasir_seg? Known: covid_qu_ex" in refused(name="kvasir")


def test_two_names_are_refused(capsys):
    assert fetch.main(["lits", "kvasir_seg"]) == 2
    assert "expected the name of one data set, got lits, kvasir_seg" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [[], ["lits", "--ouput", "x"]])
def test_bad_flags_are_one_line(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        fetch.main(argv)
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_every_data_set_has_an_answer():
    assert set(DATASETS.names()) == {*fetch.DOWNLOADS, *fetch.MANUAL_SOURCES, "phantom", "folder", "nnunet"}


def test_the_address_is_the_published_one():
    published = fetch.DOWNLOADS["kvasir_seg"]()
    assert published.url == KVASIR_URL
    assert published.filename == "kvasir-seg.zip"
    assert published.sha256 == "03b30e21d584e04facf49397a2576738fd626815771afbbf788f74a7153478f7"


def test_the_default_folder_is_named_like_the_data_set(server, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert fetch.main(["kvasir_seg"]) == 0
    assert content(tmp_path / "data" / "kvasir_seg") == FILES
    assert capsys.readouterr().out.endswith("--data.root data/kvasir_seg\n")


def test_kmine_lists_it_and_hands_over(capsys):
    assert dispatcher.main([]) == 0
    assert "  fetch " in capsys.readouterr().out
    assert dispatcher.main(["fetch", "folder"]) == 2
    assert "kmine fetch: error: folder: these are your own images" in capsys.readouterr().err


def test_nothing_heavy_is_imported():
    assert loaded_by("__import__('kmine.fetch').fetch.main(['lits'])") == [(2, [])]

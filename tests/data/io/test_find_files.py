"""Search of folders: stems, hidden files, links, names."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kmine.data.io.find_files import index_images, named, printable, walk
from kmine.errors import SampleError, UserError


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_images_are_indexed_by_stem(tmp_path):
    touch(*(tmp_path / name for name in ("a.jpg", "b.PNG", "c.JPEG", "._a.jpg", "notes.txt")))
    paths, others = index_images(tmp_path, "stop")
    assert {stem: path.name for stem, path in paths.items()} == {"a": "a.jpg", "b": "b.PNG", "c": "c.JPEG"}
    assert [Path(skipped.path).name for skipped in others] == ["notes.txt"]
    touch(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"one file a name, found a\.jpg and a\.png"):
        index_images(tmp_path, "skip")


def test_an_unreadable_folder_is_one_error(tmp_path):
    with pytest.raises(UserError, match=r"cannot be read .*; check its permissions"):
        index_images(tmp_path / "nowhere", "skip")


@pytest.mark.skipif(os.name != "posix", reason="names are bytes on POSIX only")
def test_a_name_that_is_not_utf_8_stops_or_is_listed(tmp_path):
    path = tmp_path / os.fsdecode(b"gr\xf6.png")
    touch(path)
    assert printable(path).endswith(r"gr\xf6.png")
    with pytest.raises(SampleError, match="expected a name in UTF-8"):
        index_images(tmp_path, "stop")
    assert [skipped.sample_id for skipped in index_images(tmp_path, "skip")[1]] == [r"gr\xf6"]


def test_walk_is_sorted_skips_hidden_names_and_can_be_pruned(tmp_path):
    touch(*(tmp_path / name for name in ("b/x", "a/y", "a/deep/z", ".hidden/x", "__MACOSX/x", "a/.y")))
    seen = []
    for folder, folders, names in walk(tmp_path):
        seen.append((folder.relative_to(tmp_path).as_posix(), names))
        folders[:] = [name for name in folders if name != "deep"]
    assert seen == [(".", []), ("a", ["y"]), ("b", ["x"])]


def test_walk_follows_links_but_not_in_circles(tmp_path):
    touch(tmp_path / "a/x", tmp_path / "target/y")
    (tmp_path / "a/up").symlink_to(tmp_path)
    (tmp_path / "a/link").symlink_to(tmp_path / "target")
    assert [folder.relative_to(tmp_path).as_posix() for folder, *_ in walk(tmp_path)] == [".", "a", "a/link", "target"]
    for n in range(12):
        (tmp_path / f"d{n}").mkdir()
        for other in range(12):
            (tmp_path / f"d{n}" / f"l{other}").symlink_to(tmp_path / f"d{other}")
    with pytest.raises(UserError, match="again and again"):
        list(walk(tmp_path))


def test_messages_name_the_first_five():
    assert named("ab") == "a, b"
    assert named("abcdefg") == "a, b, c, d, e and 2 more"

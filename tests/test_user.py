"""Importing kmine under a user id without an entry in the system's list (docker run --user)."""

from __future__ import annotations

import getpass
import os
import pwd

import kmine

NAMES = ("LOGNAME", "USER", "LNAME", "USERNAME", "HOME", "KMINE_CACHE")


def test_a_user_without_an_entry_has_a_name_and_a_home(monkeypatch, tmp_path):
    def unknown(uid: int) -> None:
        raise KeyError(uid)

    for name in NAMES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    kmine._name_the_user()
    assert "LOGNAME" not in os.environ  # an entry is there
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setenv("KMINE_CACHE", str(tmp_path))
    kmine._name_the_user()
    assert getpass.getuser() == f"uid{os.getuid()}"
    assert os.environ["HOME"] == str(tmp_path)
    monkeypatch.setenv("USER", "x")
    monkeypatch.setenv("HOME", "/h")
    kmine._name_the_user()
    assert os.environ["HOME"] == "/h"

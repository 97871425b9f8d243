"""The short and the full help of a command."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import pytest

from kmine.config import LoopConfig
from kmine.errors import UserError
from kmine.io.settings_help import SHORT, help_text, help_topic, settings_of


@dataclass(frozen=True)
class Part:
    """A part.

    More on it.
    """

    kind: Literal["a", "b"] = "a"
    """Which of the two. And why."""
    limits: tuple[float, float] | None = None
    """Lower and upper limit; default: those of the data."""


@dataclass(frozen=True)
class Base:
    """Words."""

    count: int = 3
    """How many there are
    of all."""
    words: list[str] = field(default_factory=list)
    """Some words."""


@dataclass(frozen=True)
class Command(Base):
    """Words."""

    count: int = 5
    """How many there are here."""
    quiet: bool = False
    """Print nothing."""
    part: Part = field(default_factory=Part)


def text(topic: str = "", **options) -> str:
    return help_text(Command, topic, usage="kmine x [--SETTING VALUE ...]", description="Does x.", **options)


def test_settings_are_those_of_the_class_its_bases_and_sections():
    assert [(s.flag, s.default, s.text) for s in settings_of(Command)] == [
        ("--count N", "5", "How many there are here."),
        ("--words [TEXT,...]", "", "Some words."),
        ("--quiet", "false", "Print nothing."),
        ("--part.kind {a,b}", "a", "Which of the two. And why."),
        ("--part.limits [X,X]", "", "Lower and upper limit; default: those of the data."),
    ]


def test_the_short_help_has_the_main_settings_the_full_one_all(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    short, full = text(main=["quiet", "part.limits"]), text("all")
    assert short.startswith("usage: kmine x [--SETTING VALUE ...]\n\nDoes x.\n\n  --config")
    assert "  --quiet               Print nothing [false]\n" in short
    assert "  --part.limits         Lower and upper limit\n" in short
    assert "--count" not in short and "--help all: all 6 settings in full. --help part: those of" in short
    assert "\npart: A part.\n  --part.kind {a,b}\n      Which of the two. And why. Default: a.\n" in full
    assert "      Lower and upper limit; default: those of the data.\n" in full


def test_a_section_has_its_own_help_and_others_are_refused():
    assert "--part.kind" in text("part") and "--count" not in text("part")
    with pytest.raises(UserError, match=r"--help: unknown name 'prt'; did you mean part\?"):
        text("prt")


def test_the_short_help_fits_a_screen_as_long_as_a_line_a_setting_does(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    names = [setting.name for setting in settings_of(LoopConfig)][:24]
    shown = help_text(LoopConfig, "", usage="kmine x", description="Does x.", main=names)
    assert shown.count("\n") <= SHORT
    assert all(f"--{name}" in shown for name in names)
    assert max(map(len, shown.splitlines())) <= 60


@pytest.mark.parametrize(
    ("words", "topic"),
    [
        (["--rounds", "1"], None),
        (["--help"], ""),
        (["run", "-h", "--rounds", "1"], ""),
        (["--help", "all"], "all"),
        (["--", "--help"], None),
    ],
)
def test_the_topic_is_the_word_after_help(words, topic):
    assert help_topic(words) == topic

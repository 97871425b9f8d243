"""`kmine next` as a command line; what it chooses is tested in tests/audit/test_next_images.py."""

from __future__ import annotations

import math

import pytest

from kmine import next as command
from kmine.audit.next_images import NextImage


def test_n_is_the_number_of_images(monkeypatch):
    seen = []
    monkeypatch.setattr(command, "run_next", lambda cfg: seen.append(cfg) or 0)
    assert command.main(["RUN", "-n", "7", "--format", "cvat"]) == 0
    assert command.main(["RUN"]) == 0
    assert [(cfg.run, cfg.count, cfg.format) for cfg in seen] == [
        (["RUN"], 7, ["cvat"]),
        (["RUN"], 10, ["labelstudio", "cvat"]),
    ]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["a", "-n", "0"], "count: expected at least 1, got 0"),
        (["a", "--format", "coco"], "format"),
        (["a", "b"], "expected one run folder, got 2"),
        (["nowhere"], "nowhere: expected a run folder with config.yaml and run.json, found nothing"),
    ],
)
def test_bad_words_are_one_line(words, text, capsys):
    try:
        code = command.main(words)
    except SystemExit as stop:
        code = stop.code
    err = capsys.readouterr().err
    assert code == 2 and text in err and err.count("\n") == 1


def test_the_table_has_a_line_an_image_and_a_dash_for_what_is_unknown():
    image = NextImage(1, "nano_1", "nano_1", 0.5, math.nan, 0.25, 1.0, 3, "no_component")
    head, line = command.next_table([image]).splitlines()
    assert head.split()[:3] == ["rank", "gain", "Dice"] and head.index("image") == line.index("nano_1")
    assert line.split() == ["1", "0.50", "-", "0.25", "1.00", "3", "nano_1:", "no_component"]

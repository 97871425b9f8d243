"""Messages of jsonargparse rewritten; tests/test_cli.py has those of real command lines."""

from __future__ import annotations

import pytest

from kmine.io.argument_errors import plain_error, unknown_setting


@pytest.mark.parametrize(
    ("message", "plain"),
    [
        ("unrecognized arguments: --roudns=3 x", "unknown setting roudns; did you mean rounds?"),
        ("Parser key \"fit.lr\": Expected a <class 'float'>. Got value: abc", "fit.lr: expected float, got 'abc'"),
        (
            "Parser key \"m\": Expected a typing.Literal['squash', 'letterbox']. Got value: \"sqash\"",
            "m: expected one of squash, letterbox, got 'sqash'; did you mean squash?",
        ),
        ("argument --rounds: expected one argument", "--rounds: expected a value after it, got none"),
        ('Parser key "a.b":\n  other  words', "a.b: other words"),
    ],
)
def test_a_message_becomes_one_line(message, plain):
    assert plain_error(message, ["rounds", "fit.lr"]) == plain


def test_a_setting_that_nothing_is_like_points_to_the_list():
    assert unknown_setting("xyzzy", ["rounds"]) == "unknown setting xyzzy; --help all lists those there are"

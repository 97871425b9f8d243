"""Errors that a user can mend."""

from __future__ import annotations

import pytest

from kmine.errors import SampleError, UserError, unknown_name


def test_an_unknown_name_gets_the_nearest_and_all_choices():
    error = unknown_name("model.name", "unetp", ["unet", "sks", "unetpp"])
    assert str(error) == "model.name: unknown name 'unetp'; did you mean unetpp? Known: sks, unet, unetpp"


def test_far_from_every_choice_there_is_no_suggestion():
    assert "did you mean" not in str(unknown_name("x", "zzz", ["unet"]))


def test_a_damaged_sample_is_a_user_error_with_path_and_problem():
    error = SampleError("a/b.png", "truncated")
    assert (error.path, error.problem, str(error)) == ("a/b.png", "truncated", "a/b.png: truncated")
    with pytest.raises(UserError):
        raise error

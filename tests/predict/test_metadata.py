"""Metadata of a model as JSON text, and the colours of its classes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from helpers.made_up_run import ABOUT, ALONE

from kmine.errors import UserError
from kmine.predict.metadata import ModelMetadata, colours


def test_what_is_known_of_a_model_survives_its_file():
    about = replace(ABOUT, window=(-1.0, 2.5), intensity={"num_images": 0}, card="# ü", local_quality=ALONE)
    assert ModelMetadata.from_json(about.to_json(), "x") == about


def test_a_file_from_before_estimates_is_read():
    older = json.loads(ABOUT.to_json()) | {"format": 1}
    del older["alone"], older["no_estimate"]
    assert ModelMetadata.from_json(json.dumps(older), "x") == ABOUT


@pytest.mark.parametrize("text", ["null", "[]", "no json", '{"format": 2}', '{"format": 1, "strange": 3}'])
def test_text_of_another_program_is_refused_with_the_name_of_the_file(text):
    with pytest.raises(UserError, match=r"^x\.onnx: expected a file of `kmine predict RUN --export"):
        ModelMetadata.from_json(text, "x.onnx")


def test_a_newer_version_is_refused():
    with pytest.raises(UserError, match="another version of kmine"):
        ModelMetadata.from_json(json.dumps({"format": 99}), "x.onnx")


def test_the_background_is_black_and_a_single_class_is_red():
    black, red = colours(2).tolist()
    assert black == [0, 0, 0] and red[0] == 255 and red[1] == red[2] < 30

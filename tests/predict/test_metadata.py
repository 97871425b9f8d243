"""Metadata of a model as JSON text."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from helpers.made_up_run import ABOUT, ALONE

from kmine.errors import UserError
from kmine.predict.metadata import ModelMetadata


def test_what_is_known_of_a_model_survives_its_file():
    about = replace(ABOUT, window=(-1.0, 2.5), intensity={"num_images": 0}, card="# ü", local_quality=ALONE)
    about = replace(about, channels=((0, "T2"), (2, "ADC")))
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


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("size", value) for value in (0, -1, 2**31, 1.5, True, "32", None)),
        *(("class_names", value) for value in (["a"], ["a", 3], ["a", "\x1b[31m"], "ab", {}, ["a", ""])),
        *(("window", value) for value in ([1], [2, 1], ["a", "b"], [1, 2, 3], "ab")),
        *(("intensity", value) for value in ([], {"ranges": {"brightness": 3}}, {"ranges": {"brightness": ["a", {}]}})),
        *(("alone", value) for value in (7, {}, ALONE | {"by_tta": []}, ALONE | {"labeled_area": {"x": 1}})),
        *(("channels", value) for value in ([[0, "a"]] * 2, [[-1, "a"]], [[0, 1]], [[n, "a"] for n in range(4)])),
        *(("batch_size", 10**9), ("round_idx", -1), ("signature", None), ("name", "a\nb"), ("card", 3)),
    ],
)
def test_a_field_of_another_kind_is_named(field, value):
    values = json.loads(ABOUT.to_json()) | {field: value}
    with pytest.raises(UserError, match=rf"^x\.onnx: .*({field}|local_quality).*; export the run again$"):
        ModelMetadata.from_json(json.dumps(values), "x.onnx")

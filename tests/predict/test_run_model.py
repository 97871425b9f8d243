"""Models of a run folder: which checkpoint is located, its metadata, refusals."""

from __future__ import annotations

import json

import pytest
from helpers.made_up_run import calibrated, make_run

from kmine.config import DataConfig
from kmine.errors import UserError
from kmine.predict.run_model import load_model, open_run_model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "run", with_weights=False)


@pytest.mark.parametrize(
    ("round_idx", "checkpoint", "file"),
    [
        (None, "best", "round_01/model.safetensors"),
        (None, "final", "round_01/model_final.safetensors"),
        (0, "best", "round_00/model.safetensors"),
    ],
)
def test_round_and_checkpoint_locate_the_weights(run, round_idx, checkpoint, file):
    found = open_run_model(run, round_idx, checkpoint)
    assert found.weights == run / file
    assert (found.metadata.round_idx, found.metadata.checkpoint) == (int(file[7]), checkpoint)


def test_a_trial_has_its_rounds_in_the_folder_of_its_method(tmp_path):
    trial = make_run(tmp_path / "trial", with_weights=False, arm="mining")
    assert open_run_model(trial, None, "best").weights == trial / "mining" / "round_01" / "model.safetensors"
    assert open_run_model(trial, 0, "best").weights == trial / "round_00" / "model.safetensors"


def test_an_absent_round_is_refused_with_those_there_are(run):
    with pytest.raises(UserError, match="no best model of round 7; there are round_00, round_01"):
        open_run_model(run, 7, "best")


def test_an_unfinished_run_needs_a_round(tmp_path):
    unfinished = make_run(tmp_path / "run", with_weights=False, stopped_by="interrupted")
    with pytest.raises(UserError, match=r"not finished .*--round N"):
        open_run_model(unfinished, None, "best")
    assert open_run_model(unfinished, 0, "best").metadata.round_idx == 0


def test_a_run_without_class_names_is_refused(tmp_path):
    older = make_run(tmp_path / "run", with_weights=False)
    (older / "run.json").write_text(json.dumps({"stopped_by": "rounds", "adopted_round": 1}))
    with pytest.raises(UserError, match="expected class names"):
        open_run_model(older, None, "best")


def test_metadata_come_from_settings_and_run(tmp_path):
    root = make_run(tmp_path / "run", with_weights=False, data=DataConfig(name="lits", root="x", size=48))
    metadata = open_run_model(calibrated(root), None, "best").metadata
    assert (metadata.name, metadata.dataset, metadata.segmenter) == ("run", "made up", "ellipse")
    assert (metadata.size, metadata.batch_size, metadata.window) == (48, 3, (-160.0, 240.0))
    assert metadata.class_names == ("background", "polyp") and metadata.local_quality["num_parts"] == 3


def test_the_signature_changes_with_the_weights(tmp_path):
    root = make_run(tmp_path / "run", with_weights=False)
    before = open_run_model(root, None, "best").metadata.signature
    (root / "round_01" / "model.safetensors").write_bytes(b"other")
    after = open_run_model(root, None, "best")
    assert after.metadata.signature != before
    with pytest.raises(UserError, match=r"model\.safetensors: damaged or edited"):
        load_model(after)

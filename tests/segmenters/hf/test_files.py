"""Files of a model: folders, the hub, and every way in which they are not there; transformers is not needed."""

from __future__ import annotations

import json
from contextlib import nullcontext

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from kmine.errors import UserError
from kmine.segmenters import fetch_weights
from kmine.segmenters.hf import files
from kmine.segmenters.hf.files import model_folder


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr(files, "hub_session", lambda offline: nullcontext())


def saved(folder, model_type="sam", names=("config.json", "preprocessor_config.json", "model.safetensors")):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_text(json.dumps({"model_type": model_type}))
    return folder


def test_a_local_folder_is_taken_as_it_is(tmp_path) -> None:
    assert model_folder(str(saved(tmp_path / "sam")), offline=True) == tmp_path / "sam"


@pytest.mark.parametrize("name", ["processor_config.json", "preprocessor_config.json"])
def test_either_name_of_the_processor_will_do(tmp_path, name) -> None:
    model_folder(str(saved(tmp_path / "m", names=("config.json", name, "pytorch_model.bin"))), offline=True)


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        (("config.json", "preprocessor_config.json", "medsam_vit_b.pth"), "model.safetensors is missing"),
        (("preprocessor_config.json", "model.safetensors"), "config.json is missing"),
        (("config.json", "model.safetensors"), "preprocessor_config.json is missing"),
    ],
)
def test_a_folder_of_another_layout_is_one_line_with_the_cure(tmp_path, names, missing) -> None:
    with pytest.raises(UserError, match=rf"{missing}.*--segmenter.name medsam --segmenter.checkpoint FILE"):
        model_folder(str(saved(tmp_path / "m", names=names)), offline=True)


def test_another_kind_of_model_is_refused_by_its_type(tmp_path) -> None:
    with pytest.raises(UserError, match=r"is a model of type 'bert', expected a promptable one, .*sam3_tracker"):
        model_folder(str(saved(tmp_path / "m", "bert")), offline=True)


@pytest.mark.parametrize("name", ["nowhere", "a/b/c", "", "medsam_vit_b.pth"])
def test_neither_folder_nor_id(tmp_path, monkeypatch, name) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "medsam_vit_b.pth").write_bytes(b"x")
    with pytest.raises(UserError, match=r"expected hf: and an id of the hub.*--segmenter.checkpoint FILE"):
        model_folder(name, offline=True)


def answering(monkeypatch, *answers):
    """The hub's library answers with these, one a call; returns the patterns that it is given."""
    asked, queue = [], list(answers)

    def download(model, allow_patterns):
        asked.append(allow_patterns)
        answer = queue.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


def test_safetensors_are_preferred_and_pickles_the_way_out(tmp_path, monkeypatch) -> None:
    safe = saved(tmp_path / "safe")
    asked = answering(monkeypatch, safe)
    assert model_folder("a/b", offline=False) == safe
    assert len(asked) == 1 and not any(".bin" in pattern for pattern in asked[0])
    pickled = saved(tmp_path / "p", names=("config.json", "preprocessor_config.json", "pytorch_model.bin"))
    asked = answering(monkeypatch, pickled, pickled)
    fetch_like = model_folder("a/b", offline=False)
    assert fetch_like == pickled and "pytorch_model*.bin" in asked[1]


@pytest.mark.parametrize(
    ("error", "offline", "message"),
    [
        (GatedRepoError.__new__(GatedRepoError), False, r"a/b is gated: accept its licence at .*hf auth login"),
        (
            RepositoryNotFoundError.__new__(RepositoryNotFoundError),
            False,
            r"found none of that name, or a private one; check",
        ),
        (
            LocalEntryNotFoundError.__new__(LocalEntryNotFoundError),
            True,
            r"not in the hub's cache and --offline forbids .*hf download a/b --local-dir b, .* hf:b",
        ),
        (
            LocalEntryNotFoundError.__new__(LocalEntryNotFoundError),
            False,
            r"not in the hub's cache and the hub does not answer",
        ),
        (OSError("disk"), False, r"could not be downloaded \(OSError\); .*--segmenter.name hf:FOLDER"),
    ],
)
def test_a_failed_download_is_one_line_with_the_cure(monkeypatch, error, offline, message) -> None:
    answering(monkeypatch, error)
    with pytest.raises(UserError, match=message) as refused:
        model_folder("a/b", offline=offline)
    assert "\n" not in str(refused.value)


def test_weights_are_fetched_ahead_for_several_runs(tmp_path, monkeypatch) -> None:
    from kmine.config import SegmenterConfig

    monkeypatch.setattr("kmine.segmenters.registry.require_transformers", lambda: None)
    asked = answering(monkeypatch, saved(tmp_path / "m"), saved(tmp_path / "m"))
    fetch_weights(SegmenterConfig("hf:a/b"), offline=False)
    fetch_weights(SegmenterConfig("medsam"), offline=False)
    assert len(asked) == 2

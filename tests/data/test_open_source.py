"""Data sets by name: built-in ones, registered ones."""

from __future__ import annotations

import pytest

from kmine.config import DataConfig
from kmine.data import DATASETS, open_source, register_dataset
from kmine.data.datasets.phantom.dataset import PhantomSource
from kmine.errors import UserError

BUILTIN = ("covid_qu_ex", "folder", "kvasir_seg", "lits", "nnunet", "phantom")


def test_names_are_those_of_the_data_sets():
    assert tuple(DATASETS.names()) == BUILTIN
    assert open_source(DataConfig(name="phantom", num_samples=3)).name == "phantom"


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=rf"'kvasir'; did you mean kvasir_seg\? Known: {', '.join(BUILTIN)}"):
        open_source(DataConfig(name="kvasir"))
    with pytest.raises(UserError, match=f"'zzz'; Known: {', '.join(BUILTIN)}"):
        open_source(DataConfig(name="zzz"))


@pytest.mark.parametrize("name", ["kvasir_seg", "lits", "covid_qu_ex"])
def test_a_downloaded_data_set_needs_a_folder(name):
    with pytest.raises(UserError, match=r"data.root: expected the folder that holds .*--data.root FOLDER \(published"):
        open_source(DataConfig(name=name))


def test_a_registered_data_set_is_opened_with_the_settings(monkeypatch):
    monkeypatch.setattr(DATASETS, "_registered", {})
    register_dataset("mine", lambda cfg: PhantomSource("ct", cfg.num_samples, cfg.size))
    source = open_source(DataConfig(name="mine", num_samples=4, size=32))
    assert len(source.refs()) == 4 and source.image("ct_000000").shape == (32, 32, 3)
    with pytest.raises(UserError, match="expected a new name"):
        register_dataset("lits", PhantomSource)

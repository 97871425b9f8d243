"""Pseudo masks of a round in files of many, and those of older code in a PNG each."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from helpers.masks import older_layout

from kmine.errors import UserError
from kmine.store import mask_files
from kmine.store.mask_files import MaskFiles
from kmine.store.run_folder import RunFolder
from kmine.store.table_files import GROUP_ROWS, encode_table
from kmine.store.tables import DecisionRow, MaskRow
from kmine.types import PseudoLabel

NUM = 2 * GROUP_ROWS + 9


def mask_of(n: int) -> np.ndarray:
    return np.random.default_rng(n).choice(np.array([0, 1, 2, 255], np.uint8), (6, 4 + n % 3))


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A round of `NUM` masks in files of `GROUP_ROWS`."""
    monkeypatch.setattr(mask_files, "FILE_GROUPS", 1)
    run = RunFolder(tmp_path / "run", follows=True)
    for part in range(2):
        own = range(part, NUM, 2)
        rows = [DecisionRow(f"i{n}", 0, 1, True, "kept", in_training=True) for n in own]
        run.save_batch(1, "s", part, [], rows, {f"i{n}": PseudoLabel(mask_of(n)) for n in own})
    run.close_round(1, "s", 2)
    return run


def test_masks_are_in_few_files_and_read_in_any_order(store):
    folder = store.round_dir(1) / "pseudo_masks"
    assert sorted(path.name for path in folder.iterdir()) == [f"{n:05}.parquet" for n in range(3)]
    for n in (0, 1, NUM - 1, 17, NUM - 2):
        assert np.array_equal(store.pseudo_mask(1, f"i{n}"), mask_of(n))
    assert store.masks(1).path("i1") == folder / "00001.parquet", "the second part follows the first"
    assert store.masks(1).missing(["i0", "x", f"i{NUM}"]) == ["x", f"i{NUM}"]
    with pytest.raises(UserError, match="expected a pseudo mask of x, found none; remove it and run the command"):
        store.pseudo_mask(1, "x")


def test_a_round_of_older_code_is_read_and_resumed_from_its_png_files(store):
    folder = older_layout(store, 1)
    assert len(list(folder.glob("*.png"))) == len(list(folder.iterdir())) == NUM
    assert all(np.array_equal(store.pseudo_mask(1, f"i{n}"), mask_of(n)) for n in (0, 5, NUM - 1))
    assert store.masks(1).missing(["i0", "x"]) == ["x"]
    ids = [f"i{n}" for n in range(NUM)]
    assert list(store.pending_batches(1, "s", ids, 300)) == []
    assert len(store.close_round(1, "s", 2)) == NUM and len(list(folder.glob("*.png"))) == NUM, "left as they are"
    assert len(list(store.pending_batches(1, "t", ids, 300))) == 2
    (folder / "i7.png").unlink()
    assert len(list(store.pending_batches(1, "s", ids, 300))) == 2, "mined again as a whole"
    with pytest.raises(UserError, match=r"i7\.png: .*remove it and run the command"):
        store.pseudo_mask(1, "i7")


def test_edited_run_lengths_are_one_line_with_the_file(tmp_path):
    path, row = tmp_path / "00000.parquet", MaskRow.from_mask("a", np.ones((6, 4), np.uint8))
    for changes, problem in (({"rles": ["?"]}, "expected run lengths of 6 x 4"), ({"class_ids": None}, "not iterable")):
        path.write_bytes(encode_table([replace(row, **changes)], MaskRow, "s"))
        with pytest.raises(UserError, match=rf"^{path}: damaged or edited \(a: .*{problem}"):
            MaskFiles(tmp_path).read("a")

"""Export to nnU-Net's layout and back: images, masks, ignored pixels and the split, bit for bit."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.image_files import colour_noise
from helpers.nnunet_files import volumes
from PIL import Image

from kmine.audit import __main__ as audit
from kmine.audit.export_nnunet import export_nnunet
from kmine.config import DataConfig
from kmine.data import open_source
from kmine.errors import UserError
from kmine.feedback.expected import picture_name

NAMES = ("background", "liver")


class FakePool:
    """Images and masks by id."""

    def __init__(self, images, masks=None):
        self.ids, self._images, self._masks = tuple(images), images, masks or {}

    def __contains__(self, sample_id):
        return sample_id in self._images

    def sample(self, sample_id):
        return SimpleNamespace(image=self._images[sample_id], mask=self._masks.get(sample_id))


def audited(source, labeled, val, unlabeled, pseudo):
    task = SimpleNamespace(labeled=FakePool(*labeled), val=FakePool(*val), unlabeled=FakePool(unlabeled))
    mined = SimpleNamespace(pseudo_labeled=tuple(pseudo))
    return SimpleNamespace(name="my run-1", source=source, task=task, audited_round=mined, read=lambda _: pseudo.get)


def opened(folder, **settings):
    return open_source(DataConfig(name="nnunet", root=str(folder), **settings))


def doubtful(shape, seed=0):
    return np.random.default_rng(seed).choice(np.array([0, 1, 255], np.uint8), shape)


def test_pictures_come_back_as_they_went(tmp_path):
    images = {name: colour_noise(n, (9, 7)) for n, name in enumerate(("a", "sub/b", "c", "dropped"))}
    masks = {"a": np.eye(9, 7, dtype=np.uint8), "c": np.zeros((9, 7), np.uint8)}
    pseudo = {"sub/b": doubtful((9, 7))}
    source = SimpleNamespace(class_names=NAMES, name="folder", slice_location=lambda _: None)
    run = audited(source, ({"a": images["a"]}, masks), ({"c": images["c"]}, masks), images, pseudo)
    folder = export_nnunet(run, tmp_path)
    assert folder == tmp_path / "nnunet" / "Dataset501_myrun1"
    back = opened(folder)
    assert back.class_names == NAMES
    by_case = {name: picture_name(name) for name in ("a", "sub/b", "c")}
    assert sorted(by_case.values()) == [ref.sample_id for ref in back.refs()]
    for sample_id, case in by_case.items():
        np.testing.assert_array_equal(back.image(case), images[sample_id])
        np.testing.assert_array_equal(back.mask(case), (masks | pseudo)[sample_id])
    assert json.loads((folder / "splits_final.json").read_text()) == [
        {"train": sorted(case for name, case in by_case.items() if name != "c"), "val": ["c"]}
    ]
    assert json.loads((folder / "dataset.json").read_text())["labels"] == {"background": 0, "liver": 1, "ignore": 2}


def test_volumes_keep_their_channels_and_slices_without_a_mask_are_ignored(tmp_path):
    root = volumes(tmp_path / "raw", channels=("T2", "ADC"), labeled=1)
    source = opened(root, window=(-100.0, 400.0))
    ids = [ref.sample_id for ref in source.refs()]
    labeled, val = ids[:3], ids[3:5]
    masks = {i: source.mask(i) for i in labeled} | {i: np.ones((6, 8), np.uint8) for i in val}
    pseudo = {ids[7]: doubtful((6, 8), 3)}
    images = {i: source.image(i) for i in ids}
    run = audited(
        source, ({i: images[i] for i in labeled}, masks), ({i: images[i] for i in val}, masks), images, pseudo
    )
    back = opened(export_nnunet(run, tmp_path / "out"), window=(-100.0, 400.0))
    for sample_id in ids:
        np.testing.assert_array_equal(back.image(sample_id), images[sample_id])
        expected = (masks | pseudo).get(sample_id, np.full((6, 8), 255, np.uint8))
        np.testing.assert_array_equal(back.mask(sample_id), expected)
    assert back.layout.channels == ("T2", "ADC")


def test_images_and_volumes_in_one_run_are_refused(tmp_path):
    source = open_source(DataConfig(name="nnunet", root=str(volumes(tmp_path))))
    ids = ["a/slice-0000", "picture"]
    run = audited(source, ({ids[0]: None}, {}), ({ids[1]: None}, {}), {}, {})
    with pytest.raises(UserError, match="images or volumes, got both in one run; train them apart"):
        export_nnunet(run, tmp_path / "out")


def test_a_run_is_exported_and_accepted_by_nnunet(run, tmp_path):
    assert audit.main([str(run), "--export", "nnunet", "--no_labeled", "--device", "cpu"]) == 0
    (folder,) = (run / "audit" / "nnunet").iterdir()
    source = opened(folder)
    rows = [line.split(",") for line in (run / "splits.csv").read_text().splitlines()[1:]]
    known = {name for name, _, split in rows if split in ("labeled", "val")}
    cases = {ref.sample_id for ref in source.refs()}
    assert known <= cases and not cases & {name for name, _, split in rows if split == "test"}
    (split,) = json.loads((folder / "splits_final.json").read_text())
    assert {*split["val"]} == {name for name, _, kind in rows if kind == "val"}
    label = Image.open(folder / "labelsTr" / f"{min(known)}.png")
    assert label.mode == "L" and {*np.unique(np.array(label))} <= {0, 1, 2}
    verify = pytest.importorskip("nnunetv2.experiment_planning.verify_dataset_integrity")
    verify.verify_dataset_integrity(str(folder), num_processes=1)

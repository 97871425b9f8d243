"""Masks of volumes that have image-level labels only, and of test volumes, are never opened by a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
from helpers.small import Silent

from kmine.config import DataConfig, FitConfig, LoopConfig, ModelConfig
from kmine.data import open_source
from kmine.data.io import nifti_header as volumes
from kmine.data.splits import make_splits
from kmine.errors import SampleError, WithheldMaskError
from kmine.setup.open import open_task
from kmine.store.run_folder import RunFolder

NUM_VOLUMES, NUM_SLICES = 9, 4
FINE = 2


def write_volumes(root: Path) -> dict[str, int]:
    """Write volumes with a tumour in the odd slices; returns the image-level label of each slice."""
    root.mkdir()
    affine = np.diag([-0.7, -0.7, 2.5, 1])
    mask = np.zeros((40, 40, NUM_SLICES), np.uint8)
    mask[5:30, 5:30] = 1
    mask[10:20, 10:20, 1::2] = 2
    for n in range(NUM_VOLUMES):
        hu = np.random.default_rng(n).integers(-100, 200, mask.shape).astype(np.int16)
        nibabel.save(nibabel.Nifti1Image(hu, affine), root / f"volume-{n}.nii.gz")
        nibabel.save(nibabel.Nifti1Image(mask, affine), root / f"segmentation-{n}.nii.gz")
    return {f"volume-{n:03}/slice-{k:04}": k % 2 for n in range(NUM_VOLUMES) for k in range(NUM_SLICES)}


@pytest.fixture
def cfg(tmp_path) -> LoopConfig:
    labels = write_volumes(tmp_path / "lits")
    rows = "".join(f"{sample_id},{label}\n" for sample_id, label in labels.items())
    (tmp_path / "labels.csv").write_text(f"sample_id,label\n{rows}")
    return LoopConfig(
        rounds=1,
        data=DataConfig(
            name="lits",
            root=str(tmp_path / "lits"),
            cache_dir=str(tmp_path / "cache"),
            image_labels=str(tmp_path / "labels.csv"),
            size=32,
            fine_groups=FINE,
            val_fraction=0.2,
            test_fraction=0.2,
            duplicate_distance=-1,
        ),
        model=ModelConfig(encoder="tu-mobilenetv3_small_050", decoder_channels=8, encoder_depth=3),
        fit=FitConfig(steps=2, batch_size=2),
    )


def damage_withheld_masks(cfg: LoopConfig) -> set[str]:
    """Overwrite the masks that must not be opened; returns their names."""
    data = cfg.data
    splits = make_splits(
        open_source(data).refs(),
        label_fraction=data.label_fraction,
        val_fraction=data.val_fraction,
        test_fraction=data.test_fraction,
        split_seed=data.split_seed,
        seed=cfg.seed,
        fine_groups=data.fine_groups,
    )
    closed = {splits.groups[i] for i in (*splits.unlabeled, *splits.test)}
    names = {f"segmentation-{int(group.removeprefix('volume-'))}.nii.gz" for group in closed}
    for name in names:
        (Path(data.root or "") / name).write_bytes(b"damaged")
    return names


def test_withheld_masks_are_never_opened(cfg, tmp_path, monkeypatch):
    withheld = damage_withheld_masks(cfg)
    assert len(withheld) == NUM_VOLUMES - FINE - 2
    opened: set[str] = set()
    original = volumes.open_nifti

    def recording(path):
        opened.add(path.name)
        return original(path)

    monkeypatch.setattr(volumes, "open_nifti", recording)
    source = open_source(cfg.data)
    task = open_task(cfg, source, RunFolder(tmp_path / "run"), Silent())
    assert len(task.labeled) == FINE * NUM_SLICES and len(task.unlabeled) == (len(withheld) - 2) * NUM_SLICES
    for sample_id in task.unlabeled.ids:
        sample = task.unlabeled.sample(sample_id)
        assert sample.mask is None and sample.image.shape == (40, 40, 3)
        assert sample.image_label == int(sample_id[-1]) % 2
        assert task.unlabeled.image_resized(sample_id).shape == (32, 32, 3)
        with pytest.raises(WithheldMaskError):
            task.unlabeled.mask_resized(sample_id)
    for pool in (task.labeled, task.val):
        assert {int(pool.sample(i).mask.any()) - int(i[-1]) % 2 for i in pool.ids} == {0}
    assert opened & withheld == set()
    assert sum(name.startswith("segmentation") for name in opened) == NUM_VOLUMES - len(withheld)
    with pytest.raises(SampleError, match=r"segmentation-\d.nii.gz: expected a whole NIfTI file"):
        source.mask(task.unlabeled.ids[0])


def test_labeled_volumes_are_nested_and_on_one_side(cfg, tmp_path):
    before: set[str] = set()
    for fine_groups in (1, 2, 4):
        run = replace(cfg, data=replace(cfg.data, fine_groups=fine_groups))
        task = open_task(run, open_source(run.data), RunFolder(tmp_path / f"run{fine_groups}"), Silent())
        sides = [{pool.group_of(i) for i in pool.ids} for pool in (task.labeled, task.unlabeled, task.val)]
        assert len(sides[0]) == fine_groups and len(set.union(*sides)) == sum(map(len, sides))
        assert before < sides[0]
        before = sides[0]

"""Laws of mining with a simulated segmenter of known IoU: pseudo masks improve with it; a perfect one is the oracle.

Only the local model's predictions are replaced, in laws that need prompts on every object.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from helpers.simulated_segmenter import Simulated
from helpers.small import (
    ANYTHING_GOES,
    CFG,
    Silent,
    same,
    weights,
)

from kmine.config import (
    LoopConfig,
    PromptsConfig,
    RefineConfig,
    SegmenterConfig,
)
from kmine.data import open_source
from kmine.data.pool import Pool
from kmine.methods import mining
from kmine.mining.rank import fit_ranking
from kmine.ops.calibrator import FEATURES, Calibration, Calibrator, RiskGuarantee
from kmine.ops.masks import components
from kmine.ops.metrics import dice
from kmine.setup.open import open_cache, open_task
from kmine.store.run_folder import RunFolder
from kmine.training import trainer as training
from kmine.training import veto
from kmine.training.model_setup import new_model
from kmine.types import IGNORE_INDEX, Probs

LEVELS = (0.7, 0.85, 1.0)
SMALL = replace(
    CFG,
    rounds=1,
    segmenter=SegmenterConfig("ellipse"),
    data=replace(CFG.data, num_samples=44, size=64, label_fraction=0.3),
    fit=replace(CFG.fit, steps=80, round_steps=1, val_every=40, lr=3e-3),
)


def opened(cfg: LoopConfig, folder: Path):
    """Task, store, and the unlabeled images with their true masks, which the task withholds."""
    cfg = replace(cfg, data=replace(cfg.data, cache_dir=str(folder / "cache")))
    source, store = open_source(cfg.data), RunFolder(folder / "run")
    task = open_task(cfg, source, store, Silent())
    ids = task.unlabeled.ids
    return task, store, Pool(open_cache(cfg, source), ids, {i: task.unlabeled.group_of(i) for i in ids}, "true")


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A task with a trained local model; every loop in its folder reads round 0 back."""
    task, store, truth = opened(SMALL, tmp_path_factory.mktemp("learned"))
    training.train(task, new_model(task), round_idx=0)
    return task, store, truth


@pytest.fixture
def touching(monkeypatch):
    """Makes the local model predict every object of the pool, shifted by some pixels, and nothing else."""

    def see(truth: Pool, by: int = 2) -> None:
        def infer(model, pool, ids, **how):
            for sample_id in ids:
                seen = np.pad(truth.mask_resized(sample_id), ((by, 0), (by, 0)))[:-by, :-by] == 1
                yield Probs(sample_id, np.where([~seen, seen], 0.9, 0.1).astype(np.float32))

        monkeypatch.setattr(veto, "infer", infer)

    return see


def mined(task, truth, level, **settings) -> dict[str, np.ndarray]:
    """The pseudo masks of round 1 with a segmenter of IoU `level`."""
    segmenter = Simulated.from_pools([truth], level, 0)
    list(mining.mine(replace(task, segmenter=segmenter, cfg=replace(task.cfg, **settings))))
    return {r.sample_id: task.run.pseudo_mask(1, r.sample_id) for r in task.run.decisions(1) if r.in_training}


def mean_dice(masks, truth, *, ignored_is_wrong: bool) -> float:
    """Of pseudo masks; pixels of 255 are left out or count as the class that they are not."""

    def one(mask, true):
        valid = mask != IGNORE_INDEX
        if ignored_is_wrong:
            return dice(np.where(valid, mask == 1, ~true), true)
        return dice((mask == 1) & valid, true & valid)

    return float(np.nanmean([one(masks[i], truth.mask_resized(i) == 1) for i in masks]))


def check_rising(found, truth) -> None:
    """The mean Dice of pseudo masks, one entry per level of the segmenter's IoU, rises with it."""
    assert len(found[0]) >= 5
    for ignored_is_wrong in (False, True):
        scores = [mean_dice(masks, truth, ignored_is_wrong=ignored_is_wrong) for masks in found]
        assert all(low <= high for low, high in pairwise(scores)), scores
        assert scores[-1] > scores[0] + 0.01, scores


@pytest.mark.parametrize("ask_local", [False, True])
def test_dice_of_pseudo_masks_rises_with_the_iou_of_the_segmenter(learned, ask_local) -> None:
    task, store, truth = learned
    found, prompts = [], []
    for level in LEVELS:
        found.append(mined(task, truth, level, refine=RefineConfig(ask_local=ask_local, doubt=None)))
        prompts.append(list(store.prompts(1)))
    assert prompts[0] == prompts[1] == prompts[2], "one local model, the same prompts"
    everywhere = set.intersection(*map(set, found))
    check_rising([{i: masks[i] for i in everywhere} for masks in found], truth)


def test_a_ranking_keeps_more_masks_of_the_better_segmenter(learned, touching) -> None:
    task, _store, truth = learned
    touching(truth, by=1)
    evidence = []
    for level in LEVELS:
        mined(task, truth, level)
        evidence.append([row.evidence for row in task.run.decisions(1) if row.is_object])
    ranking = fit_ranking([e for of_level in evidence for e in of_level], 0.5)
    kept = [float((ranking.scores(of_level) >= ranking.threshold).mean()) for of_level in evidence]
    assert kept[0] + 0.1 < kept[1] and kept[1] + 0.1 < kept[2], kept


EVERY_SIZE = PromptsConfig(min_area_px=1, min_area_fraction=0)


def with_as_many_prompts_as_objects(store, truth) -> set[str]:
    """Images with a prompt for every object: none left the image, no two merged."""
    counts: dict[str, int] = {}
    for row in store.prompts(1):
        counts[row.sample_id] = counts.get(row.sample_id, 0) + 1
    return {i for i in truth.ids if counts.get(i, 0) == len(components(truth.mask_resized(i) == 1))}


@pytest.mark.parametrize("passes", [1, 2])
def test_a_perfect_segmenter_gives_the_true_masks(learned, touching, passes) -> None:
    task, store, truth = learned
    touching(truth)
    prompts = replace(EVERY_SIZE, passes=passes)
    masks = mined(
        task, truth, 1.0, prompts=prompts, gate=ANYTHING_GOES, refine=RefineConfig(ask_local=True, doubt=None)
    )
    ids = with_as_many_prompts_as_objects(store, truth)
    assert len(ids) >= 5
    for sample_id in ids:
        assert np.array_equal(masks[sample_id], truth.mask_resized(sample_id)), sample_id


def test_pixels_on_which_the_local_model_disagrees_are_ignored(learned, touching) -> None:
    task, store, truth = learned
    touching(truth)
    nothing = (0.0,) * len(FEATURES)
    level = Calibrator(nothing, nothing, nothing, 0.0, ((0.0, 0.9), (1.0, 0.9)))  # two masks of equal quality
    calibrated = replace(task, calibration=Calibration(level, level, RiskGuarantee(0.5, True, 0.8, 0.9, 1.0, 30)))
    refine = RefineConfig(ask_local=True, doubt=None)
    masks = mined(calibrated, truth, 1.0, prompts=EVERY_SIZE, refine=refine)
    ids = with_as_many_prompts_as_objects(store, truth) & set(masks)
    assert len(ids) >= 5
    seen = {p.sample_id: p.mask for p in veto.infer(None, truth, sorted(ids))}
    for sample_id in ids:
        true = truth.mask_resized(sample_id)
        ignored = masks[sample_id] == IGNORE_INDEX
        assert np.array_equal(masks[sample_id][~ignored], true[~ignored])
        assert np.array_equal(ignored, seen[sample_id] != true) and ignored.any()


@pytest.mark.parametrize(
    "settings",
    [{}, {"strong_augment": True, "cutmix": 0.5, "feature_perturbation": 0.3, "pseudo_weight": "estimated"}],
)
def test_training_on_perfect_pseudo_masks_equals_that_of_the_oracle(tmp_path, touching, monkeypatch, settings) -> None:
    cfg = replace(SMALL, prompts=EVERY_SIZE, fit=replace(CFG.fit, steps=2, round_steps=4, val_every=2, **settings))
    task, store, truth = opened(cfg, tmp_path)
    touching(truth)
    made, fit = [], training.fit
    monkeypatch.setattr(
        training, "fit", lambda model, batches, *a, **k: made.append(batches) or fit(model, batches, *a, **k)
    )
    masks = mined(task, truth, 1.0)
    ids = with_as_many_prompts_as_objects(store, truth) & set(masks)
    assert ids == set(task.unlabeled.ids), "both train on the same images"
    loop = [weights(store, 1, name=name) for name in ("model", "model_final")]

    model = new_model(task)
    start = training.train(task, model, round_idx=0)
    oracle = training.train(
        task, model, round_idx=1, start=start, pseudo=truth, pseudo_signature="", method_dir="oracle"
    )
    _, by_loop, by_oracle = made
    for step in range(cfg.fit.round_steps):
        ours, theirs = by_loop[step], by_oracle[step]
        for name in ("images", "masks", "weights", "pseudo"):
            assert np.array_equal(getattr(ours, name), getattr(theirs, name)), (step, name)
    assert same(loop[0], oracle.best) and same(loop[1], oracle.final)

    mined(task, truth, 0.7)
    assert not same(weights(store, 1), oracle.final), "worse pseudo masks give other weights"

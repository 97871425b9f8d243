"""Laws of image-level labels in mining, and of the classifier that is trained on them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.small import CFG, context, same

from kmine.config import ClassifierConfig, PromptsConfig
from kmine.data.augment import Augment
from kmine.data.batches import LabelBatches
from kmine.data.pool import Pool
from kmine.methods.mining import mine, pseudo_label
from kmine.mining.candidates import apply_image_labels, gate_batch
from kmine.mining.context import ImageBatch
from kmine.models.build import build_model
from kmine.segmenters.ellipse import Ellipse
from kmine.training.checkpoints import Checkpoints
from kmine.training.model_setup import new_model
from kmine.types import Candidate, Probs, Prompts

SKS = replace(
    CFG,
    rounds=1,
    data=replace(CFG.data, kind="ct", num_samples=30, size=64),
    model=replace(CFG.model, name="sks", encoder="mobilenetv3_small_050", levels=3),
    classifier=ClassifierConfig(steps=3, batch_size=4),
    fit=replace(CFG.fit, steps=4, round_steps=2, val_every=2),
)


class Counting(Ellipse):
    """Counts the prompts of each image."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: list[int] = []

    def decode(self, embeddings, prompts):
        self.counts += [len(image_prompts) for image_prompts in prompts]
        return super().decode(embeddings, prompts)


@pytest.fixture
def sks_task(task_of):
    return task_of(SKS, segmenter=Counting())


def labels(task) -> dict[str, int]:
    return {i: task.unlabeled.image_label(i) for i in task.unlabeled.ids}


def test_a_lesion_free_image_gets_an_empty_mask_and_is_not_prompted(sks_task):
    task, store = sks_task
    list(mine(task))
    rows = {r.sample_id: r for r in store.decisions(1)}
    free = {i for i, label in labels(task).items() if label == 0}
    assert free
    for sample_id in free:
        assert (rows[sample_id].reason, rows[sample_id].object_idx) == ("lesion_free", -1)
        assert rows[sample_id].kept and rows[sample_id].in_training
        assert not store.pseudo_mask(1, sample_id).any()
    assert not {r.sample_id for r in store.prompts(1)} & free


def test_a_lesion_image_never_gets_an_empty_mask(sks_task):
    task, store = sks_task
    list(mine(task))
    with_lesion = {i for i, label in labels(task).items() if label == 1}
    trained = {r.sample_id for r in store.decisions(1) if r.in_training}
    assert with_lesion
    for sample_id in with_lesion & trained:
        assert (store.pseudo_mask(1, sample_id) == 1).any()


def test_a_missed_lesion_is_prompted_by_the_activation_map(sks_task):
    task, _store = sks_task
    batch = ImageBatch([task.unlabeled.sample(i) for i in task.unlabeled.ids])
    images, ctx = batch.images, context(task, new_model(task))
    found = Prompts(1, np.array([1, 1, 9, 9], np.float32))
    prompts = apply_image_labels(ctx, batch, [[] for _ in images])
    assert any(prompts)
    for image, added in zip(images, prompts, strict=True):
        assert len(added) <= image.image_label
        assert all(prompt.mask_input is None and prompt.component.any() for prompt in added)
    kept = apply_image_labels(ctx, batch, [[found] for _ in images])
    assert [len(image_prompts) for image_prompts in kept] == [image.image_label for image in images]
    off = replace(task, cfg=replace(task.cfg, prompts=replace(task.cfg.prompts, seed_from_activation=False)))
    assert not any(apply_image_labels(replace(ctx, task=off), batch, [[] for _ in images]))


def test_an_unknown_label_changes_nothing(sks_task):
    task, _store = sks_task
    image = replace(task.unlabeled.sample(task.unlabeled.ids[0]), image_label=None)
    found = Prompts(1, np.array([1, 1, 9, 9], np.float32))
    ctx, batch = context(task, new_model(task)), ImageBatch([image])
    assert apply_image_labels(ctx, batch, [[found]]) == [[found]]
    assert apply_image_labels(ctx, batch, [[]]) == [[]]


def test_of_three_classes_the_last_is_the_lesion(task_of):
    task, _ = task_of(replace(CFG, data=replace(CFG.data, kind="ct")), segmenter=Counting())
    task = replace(task, num_classes=3)
    image = replace(task.unlabeled.sample(task.unlabeled.ids[0]), image_label=0)
    organ, lesion = (Prompts(c, np.array([1, 1, 9, 9], np.float32)) for c in (1, 2))
    assert apply_image_labels(context(task), ImageBatch([image]), [[organ, lesion]]) == [[organ]]


def test_the_gate_drops_the_lesion_alone_of_an_image_labeled_free_of_it(task_of):
    task, _ = task_of(replace(CFG, data=replace(CFG.data, kind="ct")), segmenter=Counting())
    image = replace(task.unlabeled.sample(task.unlabeled.ids[0]), image_label=0)
    mask = np.zeros(image.image.shape[:2], bool)
    mask[1:10, 1:10] = True
    probs = Probs(image.sample_id, np.full((3, *mask.shape), 1 / 3, np.float32))
    one = np.ones(1, np.float32)
    candidate = Candidate(mask[None], one, one, low_res_logits=None, jittered_masks=mask[None])
    organ, lesion = (Prompts(c, np.array([1, 1, 9, 9], np.float32)) for c in (1, 2))
    found = gate_batch(
        context(replace(task, num_classes=3)),
        ImageBatch([image]),
        [probs],
        [[organ, lesion]],
        [[candidate] * 2],
        [None],
    )
    assert [decision.reason for decision in found[0]] == ["kept", "contradicts_image_label"]


def test_the_classifier_is_trained_once_and_read_back(sks_task, monkeypatch):
    from kmine.training import classifier as fit_classifier

    task, store = sks_task
    first = new_model(task)
    monkeypatch.setattr(fit_classifier, "fit_classifier", None)
    second = new_model(task)
    assert same(first.state_dict(), second.state_dict())
    about = store.read_json(store.root / "classifier" / "metrics.json")
    assert about["num_images"] == len(task.labeled) + len(task.unlabeled)


def test_the_classifier_differs_from_an_untrained_and_from_a_shuffled_one(task_of):
    plain, _store = task_of(SKS)
    shuffled, _other = task_of(replace(SKS, classifier=replace(SKS.classifier, shuffle=True)), "other")
    trained = [new_model(plain).classifier.state_dict(), new_model(shuffled).classifier.state_dict()]
    untrained = build_model(SKS.model, 2, SKS.seed).classifier.state_dict()
    assert not same(trained[0], trained[1]) and not same(trained[0], untrained)


def test_with_every_skip_off_no_classifier_is_trained(task_of):
    alone = replace(SKS.model, skip_feature_share=False, skip_resolution=False, skip_coarse=False)
    task, store = task_of(replace(SKS, model=alone))
    new_model(task)
    assert not (store.root / "classifier").exists()


def test_shuffling_moves_the_labels_to_other_images(task_of):
    task, _ = task_of(SKS)
    settings = {"batch_size": 4, "seed": 0}
    plain, shuffled = (
        LabelBatches([task.labeled, task.unlabeled], Augment(64, False), shuffle=shuffle, **settings)
        for shuffle in (False, True)
    )
    assert len(plain.positive) == len(shuffled.positive) and len(plain.negative) == len(shuffled.negative)
    assert {i for _, i in plain.positive} != {i for _, i in shuffled.positive}


def test_the_frozen_classifier_is_unchanged_by_the_rounds(sks_task):
    task, store = sks_task
    list(mine(task))
    classifier = store.load_tensors(store.root / "classifier" / "model.safetensors", None)[0]
    for round_idx in range(2):
        path = store.round_dir(round_idx) / "model_final.safetensors"
        if path.exists():
            weights = store.load_tensors(path, None)[0]
            ours = {k.removeprefix("coarse."): v for k, v in classifier.items() if k.startswith("coarse.")}
            assert len(ours) > 10
            assert all(torch.equal(weights[f"net.coarse.{k}"], v) for k, v in ours.items())


def test_vetoed_images_are_not_prompted_and_say_so_unless_their_label_reports_a_lesion(task_of, monkeypatch):
    cfg = replace(SKS, model=replace(SKS.model, veto=True), prompts=PromptsConfig(doubtful=0.05))
    task, store = task_of(cfg, segmenter=Counting())
    model, real, ids = new_model(task), Pool.sample, task.unlabeled.ids
    unlabeled = {i for i in ids[::2] if task.unlabeled.image_label(i) == 1}

    def sample(pool, sample_id):
        found = real(pool, sample_id)
        return replace(found, image_label=None) if sample_id in unlabeled else found

    monkeypatch.setattr(Pool, "sample", sample)
    model.net.veto.copy_(torch.tensor([0.0, -10.0, 0.5]))
    student = Checkpoints("vetoes all", model.state_dict(), model.state_dict(), 0.0)
    pseudo_label(task, model, student, None, 1)
    reasons = {row.sample_id: row.reason for row in store.decisions(1)}
    assert unlabeled and {i for i, reason in reasons.items() if reason == "vetoed"} == unlabeled
    assert not {row.sample_id for row in store.prompts(1)} & unlabeled
    assert {reasons[i] for i, label in labels(task).items() if label == 0} == {"lesion_free"}

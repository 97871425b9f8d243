"""Stage 1 of sks: trains on image-level labels, reads no mask, resumes bit for bit, changes only the classifier."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.small import same
from torch import nn

from kmine.config import FitConfig, ModelConfig
from kmine.data.augment import Augment
from kmine.data.batches import LabelBatches
from kmine.data.cache.sample_cache import SampleCache
from kmine.data.pool import Pool
from kmine.models.build import build_model
from kmine.models.sks import SksModel
from kmine.training.classifier import fit_classifier, has_stopped_rising, image_auc, image_scores
from kmine.training.distributed import make_fabric
from kmine.training.train_steps import Callbacks, FitState
from kmine.types import SampleRef

CFG = FitConfig(batch_size=8, lr=0.01, val_every=6)
SIZE = 32


class Spots:
    """Lesions are bright spots on dark noise; every third image has an unknown label. Reading a mask fails."""

    name = "spots"
    class_names = ("background", "spot")
    skipped = ()
    label_of = staticmethod(lambda n: None if n % 3 == 2 else int(n % 3 == 1))

    def refs(self):
        return tuple(SampleRef(f"s{n:03}", f"s{n:03}", image_label=self.label_of(n)) for n in range(60))

    def image(self, sample_id):
        rng = np.random.default_rng(int(sample_id[1:]))
        image = rng.integers(0, 60, (SIZE, SIZE, 3), dtype=np.uint8)
        if int(sample_id[1:]) % 3 == 1:
            row, column = rng.integers(4, SIZE - 16, 2)
            image[row : row + 12, column : column + 12] += 150
        return image

    def mask(self, sample_id):
        raise AssertionError("a mask was read")

    def fingerprint(self):
        return "0" * 64


@pytest.fixture(scope="module")
def pools(tmp_path_factory) -> tuple[Pool, Pool]:
    """36 training and 24 validation images, masks withheld."""
    cache = SampleCache(Spots(), SIZE, tmp_path_factory.mktemp("cache"), "stop")
    ids = [ref.sample_id for ref in cache.refs]
    groups = dict(zip(ids, ids, strict=True))
    return Pool(cache, ids[:36], groups), Pool(cache, ids[36:], groups)


def model(**settings: object) -> SksModel:
    base = {"name": "sks", "encoder": "mobilenetv3_small_050", "decoder_channels": 8, "levels": 3}
    return build_model(ModelConfig(**{**base, **settings}), 2, seed=0)


def train(pools, steps=24, seed=3, val=None, save=None, resume=None, stop=None):
    sks, cfg, fabric = model(), replace(CFG, steps=steps), make_fabric("cpu", "32")
    batches = LabelBatches([pools[0]], Augment(SIZE, enabled=False), batch_size=8, seed=seed)
    callbacks = Callbacks(validate=lambda net: image_auc(net, val or pools[1], fabric.device), save=save, stop=stop)
    return sks, fit_classifier(sks, batches, cfg, fabric=fabric, seed=seed, callbacks=callbacks, resume=resume)


def test_training_ends_when_the_auc_has_stopped_rising():
    def stops(*scores: float, patience: int = 2) -> bool:
        return has_stopped_rising([(n, 0.5, score) for n, score in enumerate(scores)], patience)

    assert not stops(0.6) and not stops(0.6, 0.6) and not stops(0.6, 0.6, 0.7) and not stops(0.9, 0.8)
    assert stops(0.6, 0.6, 0.6) and stops(0.5, 0.9, 0.8, 0.9)
    assert not stops(0.5, 0.9, 0.8, 0.9, patience=0) and not stops(0.0, 0.0, 0.0, 0.0)


def test_training_separates_the_labels(pools):
    sks, result = train(pools, 60)
    sks.classifier.load_state_dict(result.best)
    sks.eval()
    cpu = torch.device("cpu")
    assert image_auc(sks.classifier, pools[1], cpu) == max(auc for _, _, auc in result.history) > 0.95
    assert [step for step, _, _ in result.history] == list(range(6, 61, 6))
    assert [loss for _, loss, _ in result.history][-1] < 0.3


def test_only_the_classifier_changes_and_it_is_frozen_again(pools):
    before = model().state_dict()
    sks, result = train(pools, 6)
    after = sks.state_dict()
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed and all(k.startswith("net.coarse.") for k in changed)
    assert not any(w.requires_grad for w in sks.net.coarse.parameters())
    assert {k.removeprefix("coarse.") for k in result.best} == set(sks.net.coarse.state_dict())


@pytest.mark.parametrize("where", [0, 2])
def test_a_training_resumed_from_any_state_equals_an_uninterrupted_one(pools, where):
    states: list[FitState] = []
    _, whole = train(pools, save=lambda state: states.append(FitState.from_tensors(*state.to_tensors())))
    assert [s.step for s in states] == [6, 12, 18]
    _, resumed = train(pools, resume=states[where])
    assert same(whole.final, resumed.final) and same(whole.best, resumed.best)
    assert whole.best_step == resumed.best_step and whole.history[-1] == resumed.history[-1]


def test_a_training_that_stops_early_resumes_to_the_same_end(pools):
    states: list[FitState] = []
    ends = {"stop": lambda history: len(history) == 3}
    _, whole = train(pools, save=lambda state: states.append(FitState.from_tensors(*state.to_tensors())), **ends)
    assert [s.step for s in states] == [6, 12] and [step for step, *_ in whole.history] == [6, 12, 18]
    _, resumed = train(pools, resume=states[1], **ends)
    assert same(whole.final, resumed.final) and same(whole.best, resumed.best) and whole.history == resumed.history


def test_batches_follow_the_seed(pools):
    (_, a), (_, b), (_, c) = (train(pools, 4, seed=s) for s in (3, 3, 4))
    assert same(a.final, b.final) and not same(a.final, c.final)


def test_without_both_labels_in_validation_the_last_checkpoint_is_selected(pools):
    healthy = pools[1].subset([i for i in pools[1].ids if pools[1].image_label(i) == 0])
    _, result = train(pools, 12, val=healthy)
    assert result.best_step == 12 and same(result.best, result.final)
    assert np.isnan(image_auc(model().classifier, healthy, torch.device("cpu")))
    assert np.isnan(image_auc(model().classifier, pools[1].subset([]), torch.device("cpu")))


class Brightness(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean(dim=(1, 2, 3)) / 255


def test_auc_and_scores_by_hand():
    shade = {"a": 10, "b": 30, "c": 20, "d": 40, "e": 250}
    label = {"a": 0, "b": 0, "c": 1, "d": 2, "e": None}

    class Five:
        ids = tuple(shade)

        def image_resized(self, sample_id):
            return np.full((4, 4, 3), shade[sample_id], np.uint8)

        def image_label(self, sample_id):
            return label[sample_id]

    cpu = torch.device("cpu")
    # Of the four pairs (healthy, lesion) only (30, 20) is in the wrong order; any label above 0 is a lesion.
    assert image_auc(Brightness(), Five(), cpu) == pytest.approx(3 / 4)
    scores = image_scores(Brightness(), Five(), ["d", "a"], cpu)
    assert scores == pytest.approx([1 / (1 + np.exp(-40 / 255)), 1 / (1 + np.exp(-10 / 255))])
    assert image_scores(Brightness(), Five(), [], cpu).shape == (0,)


def test_nan_logits_are_an_error(pools):
    sks = model()
    sks.net.coarse.head.bias.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"lower fit\.lr"):
        image_auc(sks.classifier.eval(), pools[1], torch.device("cpu"))

"""Training: it learns, it resumes bit for bit, it keeps the checkpoint that validation liked best."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from kmine.config import FitConfig
from kmine.data.batches import Batch, Views
from kmine.models.base import LocalModel
from kmine.training.distributed import make_fabric
from kmine.training.fit import ConsistencyTarget, fit
from kmine.training.train_steps import EMA, FitState, learning_rate

CFG = FitConfig(batch_size=4, lr=0.02, val_every=4)


class Bars:
    """Bright pixels are class 1; the left column is to be ignored."""

    def __getitem__(self, step: int) -> Batch:
        rng = np.random.default_rng(step)
        masks = (rng.random((4, 8, 8)) < 0.5).astype(np.uint8)
        images = np.repeat((60 + 130 * masks)[..., None], 3, axis=-1).astype(np.uint8)
        masks[:, :, 0] = 255
        return Batch(images, masks, np.ones(4, np.float32))

    def stream(self, start: int, stop: int, num_workers: int):
        return (self[step] for step in range(start, stop))


def network() -> LocalModel:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2), nn.Conv2d(8, 2, 1)
    )
    return LocalModel(net, 2, 1, "half")


def accuracy(model: LocalModel) -> float:
    batch = Bars()[1000]
    with torch.inference_mode():
        pred = model(torch.from_numpy(batch.images).permute(0, 3, 1, 2)).argmax(dim=1).numpy()
    valid = batch.masks != 255
    return float((pred == batch.masks)[valid].mean())


def train(steps: int = 24, validate=accuracy, cfg=CFG, **more):
    model = network()
    return model, fit(
        model, Bars(), cfg, steps=steps, fabric=make_fabric("cpu", "auto"), seed=3, validate=validate, **more
    )


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(a[k], b[k]) for k in a)


def test_it_learns_what_is_there_to_learn():
    before = accuracy(network().eval())
    model, result = train(60)
    assert accuracy(model.eval()) > max(0.95, before)
    losses = [loss for _, loss, _ in result.history]
    assert losses[-1] < 0.5 * losses[0]
    assert [step for step, _, _ in result.history] == list(range(4, 61, 4))


def test_a_training_stopped_anywhere_goes_on_bit_for_bit():
    _, whole = train()
    states: list[FitState] = []
    train(save=lambda state: states.append(FitState.from_tensors(*state.to_tensors())))
    assert [s.step for s in states] == [4, 8, 12, 16, 20], "the last validation needs no state: the result follows"
    for state in states:
        _, resumed = train(resume=state)
        assert same(whole.final, resumed.final) and same(whole.best, resumed.best)
        assert whole.best_step == resumed.best_step
        assert whole.history[-2:] == resumed.history[-2:]


def test_the_best_checkpoint_is_the_one_validation_chose_and_the_final_is_the_last():
    scores = iter([0.1, 0.9, 0.9, 0.3, float("nan"), 0.2])
    model, result = train(validate=lambda _: next(scores))
    assert result.best_step == 12, "of equals, the later one"
    assert same(result.final, dict(model.state_dict().items()))
    assert not same(result.final, result.best)
    assert [dice for _, _, dice in result.history] == [0.1, 0.9, 0.9, 0.3, 0.0, 0.2]


def test_the_seed_decides_about_dropout():
    _, a = train(8)
    _, b = train(8)
    model = network()
    other = fit(model, Bars(), CFG, steps=8, fabric=make_fabric("cpu", "32"), seed=4, validate=accuracy)
    assert same(a.final, b.final) and not same(a.final, other.final)


def test_learning_rate_rises_then_decays_to_zero():
    cfg = FitConfig(lr=1.0, warmup=0.1)
    rates = [learning_rate(step, 100, cfg) for step in range(100)]
    assert rates[:10] == sorted(rates[:10]) and max(rates) == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] < 0.001
    assert learning_rate(0, 1, FitConfig(warmup=0.0)) == pytest.approx(1e-3)
    assert not any(math.isnan(r) for r in rates)


# -- the averaged model

AVERAGED = replace(CFG, ema_decay=0.9)


def test_an_average_by_hand():
    """Shares kept by steps 0, 1, 2: 1/10, 2/11, 3/12, and never more than the decay."""
    net = nn.BatchNorm1d(1, affine=False)
    net.running_mean.fill_(1.0)
    average = EMA(net, 0.2)
    expected = 1.0
    for step, (value, kept) in enumerate([(2.0, 1 / 10), (5.0, 2 / 11), (-3.0, 0.2), (4.0, 0.2)]):
        net.running_mean.fill_(value)
        net.num_batches_tracked.fill_(step + 7)
        average.update(step)
        expected = kept * expected + (1 - kept) * value
        assert average.state()["running_mean"].item() == pytest.approx(expected, rel=1e-6)
    assert average.state()["num_batches_tracked"] == 10, "a counter is counted, not averaged"
    assert average.state()["running_var"].item() == 1.0, "what stands still stands still"
    with average.applied():
        assert net.running_mean.item() == pytest.approx(expected, rel=1e-6)
    assert net.running_mean.item() == 4.0


def test_the_average_only_looks_on():
    model, plain = train()
    averaged_model, averaged = train(cfg=AVERAGED)
    assert same(model.state_dict(), averaged_model.state_dict()), "the training is the same with and without it"
    assert [loss for _, loss, _ in plain.history] == [loss for _, loss, _ in averaged.history]
    assert not same(plain.final, averaged.final)


def test_the_averaged_model_is_what_is_validated_chosen_and_kept():
    seen = []

    def validate(model) -> float:
        seen.append({k: v.clone() for k, v in model.state_dict().items()})
        return {3: 1.0}.get(len(seen), 0.5)

    _, result = train(cfg=AVERAGED, validate=validate)
    assert same(seen[2], result.best) and result.best_step == 12
    assert same(seen[-1], result.final)
    last = train(cfg=AVERAGED, validate=lambda _: 0.0)[1]
    assert same(last.best, last.final), "chosen at the last step: one and the same model"


def test_a_decay_of_almost_nothing_is_the_model_itself():
    model, result = train(cfg=replace(CFG, ema_decay=1e-9))
    assert all(torch.allclose(v, result.final[k], atol=1e-6) for k, v in model.state_dict().items())


def test_an_averaged_training_stopped_anywhere_goes_on_bit_for_bit():
    model, whole = train(cfg=AVERAGED)
    states: list[FitState] = []
    train(cfg=AVERAGED, save=lambda state: states.append(FitState.from_tensors(*state.to_tensors())))
    assert len(states) == 5 and all(state.average for state in states)
    for state in states:
        resumed_model, resumed = train(cfg=AVERAGED, resume=state)
        assert same(whole.final, resumed.final) and same(whole.best, resumed.best)
        assert same(model.state_dict(), resumed_model.state_dict())
        assert whole.history == resumed.history


def test_perturbed_features_are_asked_for_pseudo_labeled_images_in_training_alone():
    asked = []

    class Watching(LocalModel):
        def feature_dropout(self, images, rate):
            asked.append((None if images is None else images.tolist(), rate, self.training))
            return super().feature_dropout(None, rate)

    class Mixed(Bars):
        def __getitem__(self, step):
            return replace(super().__getitem__(step), pseudo=np.array([False, True, True, False]) & (step > 0))

    model = Watching(network().net, 2, 1, "half")
    cfg = replace(CFG, feature_perturbation=0.3)
    fit(model, Mixed(), cfg, steps=2, fabric=make_fabric("cpu", "auto"), seed=3, validate=accuracy)
    assert asked == [(None, 0.3, True), ([False, True, True, False], 0.3, True)]


# -- unlabeled images beside the labeled ones


class BesideBars(Bars):
    """The same, with two unlabeled images."""

    def __getitem__(self, step: int) -> Batch:
        other = super().__getitem__(step + 500).images[:2]
        known = np.ones((2, 8, 8), bool)
        return replace(super().__getitem__(step), views=Views(other, other, known, np.zeros((2, 8, 8), np.int64)))


def with_unlabeled(ask, cfg=CFG, steps=24, model=None, **more):
    model = model or network()
    how = {"steps": steps, "fabric": make_fabric("cpu", "auto"), "seed": 3, "validate": accuracy}
    return model, fit(model, BesideBars(), cfg, consistency_fn=ask, **how, **more)


def agree(net, seen, step, average):
    """To be what the average is."""
    with average.applied():
        taught = net(seen.weak).softmax(1)
    return ConsistencyTarget(seen.strong, lambda logits: (logits.softmax(1) - taught).square().mean())


def test_the_teacher_is_the_average_of_the_weights_by_hand():
    """Before step 0 it is the start; after step 0 a tenth of it is left, after step 1 two elevenths of what was."""
    own, taught = [], []

    def ask(net, seen, step, average):
        assert not model.training and not torch.is_grad_enabled()
        own.append(model.net[0].weight.detach().clone())
        with average.applied():
            taught.append(model.net[0].weight.detach().clone())
        assert torch.equal(model.net[0].weight, own[-1])
        return ConsistencyTarget(seen.strong, lambda logits: 0 * logits.sum())

    model = network()
    with_unlabeled(ask, replace(CFG, ema_decay=0.99), steps=3, model=model)
    assert torch.equal(taught[0], own[0])
    once = own[0] / 10 + own[1] * 9 / 10
    torch.testing.assert_close(taught[1], once)
    torch.testing.assert_close(taught[2], once * 2 / 11 + own[2] * 9 / 11)


def test_a_training_with_a_teacher_stopped_anywhere_goes_on_bit_for_bit():
    model, whole = with_unlabeled(agree, AVERAGED)
    states: list[FitState] = []
    with_unlabeled(agree, AVERAGED, save=lambda state: states.append(FitState.from_tensors(*state.to_tensors())))
    assert len(states) == 5
    for state in states:
        resumed_model, resumed = with_unlabeled(agree, AVERAGED, resume=state)
        assert same(whole.final, resumed.final) and same(whole.best, resumed.best)
        assert same(model.state_dict(), resumed_model.state_dict()) and whole.history == resumed.history
    assert not same(whole.final, train(cfg=AVERAGED)[1].final)


def test_what_is_asked_is_seen_once_beside_the_labels_and_is_no_label():
    """The logits that come back are those of what was asked; ignoring them leaves the loss on the labels."""
    shapes, rates = [], []

    class Watching(LocalModel):
        def feature_dropout(self, images, rate):
            rates.append((None if images is None else images.tolist(), rate))
            return super().feature_dropout(None, rate)

    def ask(net, seen, step, average):
        assert average is None
        perturbed = torch.tensor([False, True])
        return ConsistencyTarget(
            seen.strong, lambda logits: shapes.append(logits.shape) or 0 * logits.sum(), perturbed, 0.4
        )

    model = Watching(network().net, 2, 1, "half")
    _, result = with_unlabeled(ask, steps=1, model=model)
    assert shapes == [(2, 2, 8, 8)] and rates == [([False] * 5 + [True], 0.4)]
    heavy = with_unlabeled(
        lambda *given: ConsistencyTarget(given[1].strong, lambda logits: 7 + 0 * logits.sum()), steps=1
    )[1]
    assert heavy.history[0][1] == pytest.approx(result.history[0][1] + 7, rel=1e-5), "the same draws, 7 more"

"""The running average of the weights: by hand, without effect on the training, selected and resumed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.bars import AVERAGED, CFG, saved_states, train
from helpers.small import same
from torch import nn

from kmine.training.ema import EMA


def test_an_average_by_hand():
    """Shares kept by steps 0, 1, 2, 3: 1/10, 2/11, then 3/12 and 4/13 limited to the decay of 0.2."""
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
    assert average.state()["num_batches_tracked"] == 10, "counters are copied, not averaged"
    assert average.state()["running_var"].item() == 1.0, "the average of a constant is the constant"
    with average.applied():
        assert net.running_mean.item() == pytest.approx(expected, rel=1e-6)
    assert net.running_mean.item() == 4.0


def test_the_average_does_not_affect_the_training():
    model, plain = train()
    averaged_model, averaged = train(AVERAGED)
    assert same(model.state_dict(), averaged_model.state_dict())
    assert [loss for _, loss, _ in plain.history] == [loss for _, loss, _ in averaged.history]
    assert not same(plain.final, averaged.final)


def test_the_averaged_model_is_validated_selected_and_kept():
    validated = []

    def validate(model) -> float:
        validated.append({k: v.clone() for k, v in model.state_dict().items()})
        return {3: 1.0}.get(len(validated), 0.5)

    _, result = train(AVERAGED, validate=validate)
    assert same(validated[2], result.best) and result.best_step == 12
    assert same(validated[-1], result.final)
    last = train(AVERAGED, validate=lambda _: 0.0)[1]
    assert same(last.best, last.final), "selected at the last step: the same model"


def test_a_decay_near_zero_gives_the_current_weights():
    model, result = train(replace(CFG, ema_decay=1e-9))
    assert all(torch.allclose(v, result.final[k], atol=1e-6) for k, v in model.state_dict().items())


def test_an_averaged_training_resumed_from_any_state_equals_an_uninterrupted_one():
    model, whole = train(AVERAGED)
    states = saved_states(lambda **how: train(AVERAGED, **how))
    assert len(states) == 5 and all(state.average for state in states)
    for state in states:
        resumed_model, resumed = train(AVERAGED, resume=state)
        assert same(whole.final, resumed.final) and same(whole.best, resumed.best)
        assert same(model.state_dict(), resumed_model.state_dict())
        assert whole.history == resumed.history

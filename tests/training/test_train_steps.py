"""The training loop: schedule, checkpoint selection, resuming bit for bit."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from helpers.bars import CFG, accuracy, network, saved_states, train
from helpers.small import Silent, same

from kmine.config import FitConfig
from kmine.training.train_steps import FitState, learning_rate, show_progress


def test_training_reduces_the_loss_and_raises_accuracy():
    before = accuracy(network().eval())
    model, result = train(replace(CFG, steps=60))
    assert accuracy(model.eval()) > max(0.95, before)
    losses = [loss for _, loss, _ in result.history]
    assert losses[-1] < 0.5 * losses[0]
    assert [step for step, _, _ in result.history] == list(range(4, 61, 4))


def test_a_training_resumed_from_any_state_equals_an_uninterrupted_one():
    _, whole = train()
    states = saved_states(train)
    assert [s.step for s in states] == [4, 8, 12, 16, 20], "no state at the end, where the result follows"
    for state in states:
        _, resumed = train(resume=state)
        assert same(whole.final, resumed.final) and same(whole.best, resumed.best)
        assert whole.best_step == resumed.best_step
        assert whole.history[-2:] == resumed.history[-2:]


def test_a_state_of_older_code_is_scored_again_before_it_goes_on():
    """Its best score left out images with empty truth and prediction, so it cannot be compared with today's."""
    state = next(s for s in saved_states(train) if s.step == 8)
    old = FitState.from_tensors(*state.to_tensors())
    assert old.scores_empty
    tensors, plain = state.to_tensors()
    del plain["scores_empty"]
    old = FitState.from_tensors(tensors, plain | {"best_score": 0.99})
    assert not old.scores_empty
    scores = iter([0.5, 0.6, 0.4, 0.3, 0.2])
    _, result = train(resume=old, validate=lambda _: next(scores))
    assert result.best_step == 12, "0.6 is better than the 0.5 of the old best, whatever that was called before"


def test_best_has_the_highest_score_and_final_is_the_last_step():
    scores = iter([0.1, 0.9, 0.9, 0.3, float("nan"), 0.2])
    model, result = train(validate=lambda _: next(scores))
    assert result.best_step == 12, "the later of equals"
    assert same(result.final, dict(model.state_dict().items()))
    assert not same(result.final, result.best)
    assert [dice for _, _, dice in result.history] == [0.1, 0.9, 0.9, 0.3, 0.0, 0.2]


def test_dropout_follows_the_seed():
    short = replace(CFG, steps=8)
    (_, a), (_, b), (_, c) = train(short), train(short), train(short, seed=4)
    assert same(a.final, b.final) and not same(a.final, c.final)


def test_learning_rate_rises_then_decays_to_zero():
    cfg = FitConfig(lr=1.0, warmup=0.1, steps=100)
    rates = [learning_rate(step, cfg) for step in range(100)]
    assert rates[:10] == sorted(rates[:10]) and max(rates) == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] < 0.001
    assert learning_rate(0, FitConfig(warmup=0.0, steps=1)) == pytest.approx(1e-3)
    assert not any(math.isnan(r) for r in rates)


def test_progress_shows_the_score_once_there_is_one():
    shown = []
    reporter = Silent()
    reporter.advance = lambda done, text="": shown.append((done, text))
    progress = show_progress(reporter, "Dice")
    progress(10, 0.5, math.nan)
    progress(20, 0.25, 0.75)
    assert shown == [(10, "loss 0.500"), (20, "loss 0.250  validation Dice 0.750")]

"""The training loop: schedule, checkpoint selection, resuming bit for bit."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from helpers.bars import CFG, accuracy, network, saved_states, train
from helpers.small import Silent, same

from kmine.training.train_steps import FitState, show_progress

BEST = replace(CFG, checkpoint="best")


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
    _, result = train(BEST, resume=old, validate=lambda _: next(scores))
    assert result.best_step == 12, "0.6 is better than the 0.5 of the old best, whatever that was called before"


def test_best_has_the_highest_score_and_final_is_the_last_step():
    scores = iter([0.1, 0.9, 0.9, 0.3, float("nan"), 0.2])
    model, result = train(replace(BEST, ema_decay=0.0), validate=lambda _: next(scores))
    assert result.best_step == 12, "the later of equals"
    assert same(result.final, dict(model.state_dict().items()))
    assert not same(result.final, result.best)
    assert [dice for _, _, dice in result.history] == [0.1, 0.9, 0.9, 0.3, 0.0, 0.2]


def of_each_image(*means):
    """A validation of 30 images that gives each of these means in turn; images differ from one another."""
    spread = np.linspace(-0.2, 0.2, 30)
    scores = iter(means)
    return lambda _: list(next(scores) + spread)


@pytest.mark.parametrize(
    ("scores", "step", "has_diverged"),
    [
        ([0.5, 0.6, 0.6, 0.7, 0.6, 0.66], 24, False),
        ([0.5, 0.6, 0.6, 0.7, 0.6, 0.64], 16, True),
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], 24, False),
    ],
)
def test_the_last_step_is_used_unless_its_score_fell(scores, step, has_diverged):
    _, result = train(validate=of_each_image(*scores))
    assert (result.best_step, result.has_diverged) == (step, has_diverged)
    assert same(result.best, result.final) != has_diverged


@pytest.mark.parametrize(
    ("scores_of", "has_diverged"), [(float, True), (lambda x: [x], False), (lambda x: [x] * 3, False)]
)
def test_of_few_images_a_fall_to_less_than_half_counts_and_of_another_score_one_by_the_tolerance(
    scores_of, has_diverged
):
    scores = iter([0.5, 0.6, 0.6, 0.7, 0.6, 0.6])
    assert train(validate=lambda _: scores_of(next(scores)))[1].has_diverged == has_diverged


def test_a_fall_within_the_noise_of_the_images_is_no_divergence():
    rng, calls = np.random.default_rng(0), iter(range(9))
    noise = rng.normal(0, 0.5, 30)
    _, result = train(validate=lambda _: 0.6 + (noise - noise.mean() - 0.1) * (next(calls) == 5))
    assert result.history[-1][2] == pytest.approx(0.5) and not result.has_diverged


def test_a_network_without_finite_values_is_never_used():
    def validate(_):
        if next(calls) > 2:
            raise FloatingPointError
        return 0.01

    calls = iter(range(9))
    _, result = train(validate=validate)
    assert result.best_step == 12 and result.has_diverged and same(result.best, result.final)
    calls = iter(range(3, 9))
    with pytest.raises(FloatingPointError):
        train(validate=validate)


def test_the_gradient_is_clipped():
    one = replace(CFG, steps=1, lr=1.0, weight_decay=0.0, ema_decay=0.0)
    model, _ = train(replace(one, clip_grad=1e-9))
    free, _ = train(replace(one, clip_grad=0.0))
    before = network().net[0].weight
    # AdamW divides by the gradient's size + 1e-8, so that only one far below it makes a small step.
    assert (model.net[0].weight - before).abs().max() < 0.2 < (free.net[0].weight - before).abs().max()


def test_dropout_follows_the_seed():
    short = replace(CFG, steps=8)
    (_, a), (_, b), (_, c) = train(short), train(short), train(short, seed=4)
    assert same(a.final, b.final) and not same(a.final, c.final)


def test_progress_shows_the_score_once_there_is_one():
    shown = []
    reporter = Silent()
    reporter.advance = lambda done, text="": shown.append((done, text))
    progress = show_progress(reporter, "Dice")
    progress(10, 0.5, math.nan)
    progress(20, 0.25, 0.75)
    assert shown == [(10, "loss 0.500"), (20, "loss 0.250  validation Dice 0.750")]

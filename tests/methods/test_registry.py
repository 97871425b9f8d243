"""What mining is compared with: the same steps, the same labels, and no mask that is not given."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.small import CFG, same, weights
from torch import nn

from kmine.config import FixmatchConfig, TeacherConfig
from kmine.data.pool import Pool
from kmine.errors import UserError, WithheldMaskError
from kmine.methods import fixmatch as fixmatch_file
from kmine.methods import mean_teacher as teacher_file
from kmine.methods import registry as arms
from kmine.methods.fixmatch import apply_cutmix, fixmatch, masked_cross_entropy
from kmine.methods.mean_teacher import mean_teacher, ramp_up, squared_difference
from kmine.methods.mining import mine
from kmine.methods.oracle import REASON_PREFIX, oracle
from kmine.methods.supervised import supervised
from kmine.segmenters.identity import IdentitySegmenter
from kmine.training import trainer as training
from kmine.training.checkpoints import Checkpointer
from kmine.training.ema import EMA
from kmine.training.fit import UnlabeledViews

ONE = replace(CFG, rounds=1)
UNSURE = FixmatchConfig(threshold=0.5)
"""A model that has hardly begun is sure of nothing more."""


def truth_of(task, ids=None) -> Pool:
    pool = task.unlabeled
    return Pool(pool._cache, ids or pool.ids, pool._groups, "true")


# -- as whole methods


@pytest.fixture
def watched(monkeypatch):
    """Counts the optimizer steps of every training, and notes each image-level label that is asked for."""
    steps, asked, real = [], [], training.fit
    monkeypatch.setattr(training, "fit", lambda *a, **how: (steps.append(a[2].steps), real(*a, **how))[1])
    label = Pool.image_label
    monkeypatch.setattr(Pool, "image_label", lambda pool, i: (asked.append(i), label(pool, i))[1])
    return steps, asked


@pytest.mark.parametrize("method", [fixmatch, mean_teacher])
def test_equal_steps_from_one_round_0_on_images_whose_masks_and_labels_nobody_asks_for(task_of, watched, method):
    steps, asked = watched
    task, store = task_of(replace(CFG, fixmatch=UNSURE), segmenter=IdentitySegmenter())
    assert task.unlabeled._masks == "withheld"
    rounds, counted = list(method(task)), list(steps)
    assert not asked and counted == [12, 6, 6] and [r.round_idx for r in rounds] == [0, 1, 2]
    baseline = list(supervised(task))
    assert steps[3:] == [6, 6], "round 0 is shared"
    assert rounds[0].metrics == baseline[0].metrics and all(r.num_pseudo == 0 for r in rounds)
    arm = method.__name__
    assert not same(weights(store, 1, arm), weights(store, 1, "supervised")), "the unlabeled images taught something"


@pytest.mark.parametrize(
    ("method", "off"), [(fixmatch, {"fixmatch": FixmatchConfig(0.0)}), (mean_teacher, {"teacher": TeacherConfig(0.0)})]
)
def test_unlabeled_images_that_weigh_nothing_leave_supervised_training_bit_for_bit(task_of, method, off):
    task, store = task_of(replace(ONE, **off))
    last = [list(m(task))[-1] for m in (method, supervised)]
    assert last[0].metrics == last[1].metrics
    for name in ("model", "model_final"):
        assert same(weights(store, 1, method.__name__, name), weights(store, 1, "supervised", name))


@pytest.mark.parametrize("method", [fixmatch, mean_teacher])
def test_a_killed_method_goes_on_bit_for_bit(task_of, monkeypatch, method):
    cfg = replace(ONE, fit=replace(CFG.fit, val_every=2), fixmatch=UNSURE)
    task, store = task_of(cfg)
    list(method(task))
    other, other_store = task_of(cfg, "killed")
    rounds = method(other)
    next(rounds)
    real = Checkpointer.save_state

    def save_and_die(*args):
        real(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(Checkpointer, "save_state", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        next(rounds)
    monkeypatch.setattr(Checkpointer, "save_state", real)
    assert (other_store.round_dir(1, method.__name__) / "fit_state.safetensors").exists()
    list(method(other))
    for name in ("model", "model_final"):
        assert same(weights(store, 1, method.__name__, name), weights(other_store, 1, method.__name__, name))


def test_a_changed_setting_is_another_training_for_its_own_method_alone(task_of, watched):
    steps, _ = watched
    task, _store = task_of(replace(ONE, fixmatch=UNSURE))
    for method in (fixmatch, mean_teacher):
        list(method(task))
    steps.clear()
    other = replace(task, cfg=replace(task.cfg, fixmatch=replace(UNSURE, cutmix=0.9)))
    list(mean_teacher(other))
    assert steps == []
    list(fixmatch(other))
    assert steps == [6]


@pytest.mark.parametrize("method", [fixmatch, mean_teacher])
def test_without_room_for_unlabeled_images_nothing_is_trained(task_of, watched, method):
    task, _store = task_of(replace(ONE, fit=replace(CFG.fit, labeled_share=1.0)))
    with pytest.raises(UserError, match=r"fit\.labeled_share"):
        list(method(task))
    assert watched[0] == []


def test_fixmatch_needs_two_views(task_of):
    task, _store = task_of(replace(ONE, fit=replace(CFG.fit, augment=False)))
    with pytest.raises(UserError, match=r"fit\.augment"):
        fixmatch(task)


# -- the oracle


def test_the_oracle_is_mining_with_true_masks_and_says_so(task_of, watched):
    task, store = task_of(CFG)
    truth = truth_of(task)
    rounds = list(oracle(task, truth))
    assert watched[0] == [12, 6, 6]
    assert [r.num_pseudo for r in rounds] == [0, len(truth), len(truth)]
    assert not rounds[0].reason.startswith(REASON_PREFIX) and all(
        r.reason.startswith(REASON_PREFIX) for r in rounds[1:]
    )
    assert not same(weights(store, 1, "oracle"), weights(store, 0))
    list(oracle(task, truth_of(task, truth.ids[:2])))
    assert watched[0][3:] == [6, 6], "other masks, another training"


def test_the_oracle_refuses_a_closed_pool_and_images_of_another_split(task_of, watched):
    task, _store = task_of(ONE)
    with pytest.raises(WithheldMaskError):
        oracle(task, task.unlabeled)
    with pytest.raises(ValueError, match="1 of another split"):
        oracle(task, Pool(task.val._cache, task.val.ids[:1], task.val._groups, "true"))
    with pytest.raises(ValueError, match="got 0"):
        oracle(task, truth_of(task).subset([]))
    assert watched[0] == []


def test_no_other_method_can_be_handed_the_truth(task_of):
    task, _store = task_of(replace(ONE, rounds=0))
    truth = truth_of(task)
    for name in arms.METHODS:
        with pytest.raises(ValueError, match="for the oracle alone"):
            arms.method(name, truth)
        with pytest.raises(TypeError):
            arms.METHODS[name](task, truth)
    with pytest.raises(ValueError, match="for the oracle alone"):
        arms.method("oracle")
    with pytest.raises(UserError, match="did you mean fixmatch"):
        arms.method("fixmach")
    assert len(list(arms.method("oracle", truth)(task))) == 1


# -- self-training, and all by name


def test_self_training_is_mining_with_an_echo_whatever_the_segmenter_was_to_be_asked(task_of):
    auto = replace(CFG.prompts, source="auto", passes=2)
    task, store = task_of(replace(ONE, prompts=auto))
    rounds = list(arms.METHODS["self_training"](task))
    other, other_store = task_of(ONE, "echo", segmenter=IdentitySegmenter())
    assert rounds[1].num_pseudo > 0
    assert [r.metrics for r in rounds] == [r.metrics for r in mine(other)]
    assert same(weights(store, 1), weights(other_store, 1))


def test_a_calibrated_gate_is_calibrated_with_the_echo(task_of, monkeypatch):
    from kmine.mining.calibration import step as calibration

    task, _store = task_of(replace(ONE, gate=replace(CFG.gate, mode="calibrated")))
    seen = []
    monkeypatch.setattr(calibration, "calibrate", lambda task, base: seen.append((task.segmenter, base)) or task)
    arms.METHODS["self_training"](task)
    assert seen[0][0] is seen[0][1] and isinstance(seen[0][0], IdentitySegmenter)


def test_every_method_writes_where_it_says_and_starts_from_the_same_round_0(task_of):
    cfg = replace(ONE, segmenter=replace(CFG.segmenter, name="ellipse"))
    starts = []
    for name in arms.METHODS:
        task, store = task_of(cfg, name)
        rounds = list(arms.METHODS[name](task))
        assert store.round_dir(rounds[-1].round_idx, arms.method_dir_of(name)).joinpath("metrics.json").exists()
        starts.append(weights(store, 0))
    assert all(same(starts[0], other) for other in starts[1:])


# -- what fixmatch and the mean teacher ask, by hand


class Says(nn.Module):
    """Logits of class 1 are the images' first channel, of class 0 nothing; a weight makes it trainable."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, images):
        first = images[:, :1].float() * self.scale
        return torch.cat([torch.zeros_like(first), first], dim=1)


def seen(weak, strong, known=None, source=None) -> UnlabeledViews:
    """Views of one-channel values (U, H, W)."""
    weak, strong = (torch.as_tensor(v)[:, None].repeat(1, 3, 1, 1) for v in (weak, strong))
    shape = (len(weak), *weak.shape[2:])
    own = torch.arange(len(weak))[:, None, None].expand(shape)
    known = torch.ones(shape, dtype=torch.bool) if known is None else torch.as_tensor(known)
    return UnlabeledViews(weak, strong, known, own if source is None else torch.as_tensor(source))


def test_only_sure_known_pixels_teach_and_the_mean_is_over_all_known_ones():
    logits = torch.tensor([[[[0.0, 0.0, 0.0, 0.0]], [[math.log(3), math.log(3), 0.0, 0.0]]]])  # p(1) = .75, .75, .5, .5
    classes = torch.tensor([[[1, 0, 1, 0]]])
    sure = torch.tensor([[[True, False, True, True]]])
    known = torch.tensor([[[True, True, True, False]]])
    expected = (-math.log(0.75) - math.log(0.5)) / 3
    assert masked_cross_entropy(logits, classes, sure, known).item() == pytest.approx(expected)
    assert masked_cross_entropy(logits, classes, sure, known & False).item() == 0


def test_planes_move_as_the_strong_views_were_mixed():
    planes = torch.tensor([[[1, 2]], [[3, 4]]])
    assert apply_cutmix(planes, torch.tensor([[[0, 1]], [[-1, 0]]])).tolist() == [[[1, 4]], [[1, 2]]]


def test_fixmatch_asks_about_both_views_what_the_weak_one_says():
    """Pixel 0: surely 1, pixel 1: surely 0, pixel 2: unsure. The strong view has pixel 0 and 1 of the other image."""
    cfg = FixmatchConfig(weight=2.0, threshold=0.9, feature_perturbation=0.3)
    views = seen([[[5, -5, 0]]], [[[1, 1, 1]]])
    asked = fixmatch_file.fixmatch_consistency(cfg)(Says(), views, 0, None)
    assert asked.images[:, 0].tolist() == [[[1, 1, 1]], [[5, -5, 0]]], "strong, then weak"
    assert asked.perturbed.tolist() == [False, True] and asked.rate == 0.3
    undecided = torch.zeros(2, 2, 1, 3)
    # In each stream two of three pixels teach, at log 2 each; half of the weight for each stream.
    assert asked.loss(undecided).item() == pytest.approx(2.0 * (2 / 3) * math.log(2))
    never = fixmatch_file.fixmatch_consistency(replace(cfg, threshold=1.0))(Says(), views, 0, None)
    logits = torch.randn(2, 2, 1, 3, requires_grad=True)
    loss = never.loss(logits)
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any(), "sure beyond certainty is nobody"


def test_fixmatch_teaches_a_rectangle_what_the_image_it_came_from_says():
    views = seen([[[9, 9]], [[-9, -9]]], [[[0, 0]], [[0, 0]]], source=[[[0, 1]], [[1, -1]]])
    asked = fixmatch_file.fixmatch_consistency(FixmatchConfig())(Says(), views, 0, None)

    def loss(strong):
        logits = torch.zeros(4, 2, 1, 2)
        logits[:2, 1] = 30 * torch.tensor(strong, dtype=torch.float32)
        logits[2:, 1] = 30 * views.weak[:, 0].float()
        return asked.loss(logits).item()

    assert loss([[[1, -1]], [[-1, 0]]]) == pytest.approx(0, abs=1e-6)
    assert loss([[[1, -1]], [[-1, 9]]]) == pytest.approx(0, abs=1e-6), "outside the image nothing is taught"
    assert loss([[[1, 1]], [[-1, 0]]]) == pytest.approx(30 / 3 / 2, rel=1e-4)


def test_the_mean_teacher_is_the_average_and_its_weight_rises():
    model = Says()
    average = EMA(model, 0.99)
    with torch.no_grad():
        model.scale.fill_(3.0)
    average.update(0)  # 1/10 x 1 + 9/10 x 3 = 2.8
    views = seen([[[1, -1]]], [[[7, 7]]], known=[[[True, False]]])
    ask = teacher_file.mean_teacher_consistency(TeacherConfig(weight=10.0, ramp_up=0.5), 8)
    taught = 1 / (1 + math.exp(-2.8))
    for step, risen in ((0, math.exp(-5)), (2, math.exp(-5 / 4)), (4, 1.0), (7, 1.0)):
        asked = ask(model, views, step, average)
        assert asked.images[:, 0].tolist() == [[[7, 7]]] and asked.perturbed is None
        found = asked.loss(torch.zeros(1, 2, 1, 2)).item()
        assert found == pytest.approx(10 * risen * (taught - 0.5) ** 2, rel=1e-4), "the unknown pixel is left out"
    assert model.scale.item() == 3.0


def test_ramp_up_and_difference_by_hand():
    assert [ramp_up(step, 0) for step in (0, 5)] == [1.0, 1.0]
    assert np.all(np.diff([ramp_up(step, 10) for step in range(11)]) > 0) and ramp_up(10, 10) == 1.0
    logits = torch.zeros(1, 2, 1, 2)
    taught = torch.tensor([[[[1.0, 0.5]], [[0.0, 0.5]]]])
    known = torch.ones(1, 1, 2, dtype=torch.bool)
    assert squared_difference(logits, taught, known).item() == pytest.approx(0.25 / 2)
    assert squared_difference(logits, taught, known & False).item() == 0

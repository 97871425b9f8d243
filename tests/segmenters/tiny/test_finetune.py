"""Teaching `tiny`: augmentation that keeps things together, a loss by hand, and a segmenter that stays as it was."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from helpers.segmenter_suite import assert_same, box_prompts
from safetensors.torch import load_file, save_file

from kmine.errors import UserError
from kmine.segmenters.base import (
    Embedding,
    FineTunable,
    FineTuneDefaults,
    PromptedExample,
)
from kmine.segmenters.tiny import finetune as tiny_train
from kmine.segmenters.tiny.crops import decoder_queries, network_input
from kmine.segmenters.tiny.finetune import (
    augmented,
    iou_of,
    repainted,
    tiny_loss,
    truth_of,
    turned,
)
from kmine.segmenters.tiny.network import NetworkInput, TinyNet, planes_of
from kmine.segmenters.tiny.segmenter import Tiny
from kmine.segmenters.tiny.weights import signature_of
from kmine.types import Prompts

SIDE = 32


def small_net(seed: int = 0, widths: tuple[int, ...] = (8, 16)) -> TinyNet:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = TinyNet(widths, SIDE)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return net


@pytest.fixture
def tiny():
    return Tiny(small_net(), batch_size=3)


def lesson(image: np.ndarray, mask: np.ndarray, box, **prompts) -> PromptedExample:
    return PromptedExample(
        Embedding(image.shape[:2], image=image), Prompts(1, np.array(box, np.float32), **prompts), mask
    )


def wedge(seed: int = 0) -> PromptedExample:
    """A bright triangle, which no ellipse is, in noise; with a point and a hint."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:40, :60]
    mask = (rows >= 8) & (rows <= 30) & (columns >= 12) & (columns - 12 <= rows - 8)
    image = np.where(mask, 170, 80)[..., None] + rng.integers(-20, 21, (40, 60, 3))
    points = {"point_coords": np.array([[16, 25], [30, 10]], np.float32), "point_labels": np.array([1, 0])}
    hint = np.where(columns < 25, 5, -5).astype(np.float32)
    box = np.add((12, 8, 34, 30), rng.uniform(-2, 2, 4))
    return lesson(image.astype(np.uint8), mask, box, **points, mask_input=hint)


def asked_as(one: PromptedExample) -> tuple[NetworkInput, torch.Tensor]:
    """What the network is shown of a lesson, and its truth."""
    row = next(decoder_queries(one.embedding, one.prompts, side=SIDE, name="tiny"))
    return network_input([row], "cpu"), torch.from_numpy(truth_of(row, one.mask)[0])[None, None]


def by_hand(one: PromptedExample, across: bool, down: bool, swap: bool) -> PromptedExample:
    """The lesson as it would be, had its image been turned before it was encoded."""

    def plane(array):
        array = array[:, ::-1] if across else array
        array = array[::-1] if down else array
        return np.ascontiguousarray(array.swapaxes(0, 1) if swap else array)

    def points(xy):
        height, width = one.mask.shape
        x = width - 1 - xy[:, 0] if across else xy[:, 0]
        y = height - 1 - xy[:, 1] if down else xy[:, 1]
        return np.stack([y, x] if swap else [x, y], 1).astype(np.float32)

    corners = points(one.prompts.box.reshape(2, 2))
    prompts = replace(
        one.prompts,
        box=np.concatenate([corners.min(0), corners.max(0)]),
        point_coords=points(one.prompts.point_coords),
        mask_input=plane(one.prompts.mask_input),
    )
    image = plane(one.embedding.image)
    return PromptedExample(Embedding(image.shape[:2], image=image), prompts, plane(one.mask))


def test_turning_a_batch_is_turning_each_image_with_its_prompts_by_hand() -> None:
    # The box lies near the border, so the window reaches over it and the limits turn, too.
    one = replace(wedge(), prompts=replace(wedge().prompts, box=np.array([2, 3, 31.5, 36], np.float32)))
    turns = list(product([False, True], repeat=3))
    asked, truth = asked_as(one)
    batch = NetworkInput(*(tensor.repeat(8, *[1] * (tensor.ndim - 1)) for tensor in asked))
    ours, our_truth = turned(batch, truth.repeat(8, 1, 1, 1), *torch.tensor(turns).T)
    for index, turn in enumerate(turns):
        theirs, their_truth = asked_as(by_hand(one, *turn))
        # OpenCV rounds grey values after resizing.
        for name, atol in {"image": 1.01, "mask_input": 1e-3, "limits": 1e-4, "boxes": 1e-4, "points": 1e-4}.items():
            torch.testing.assert_close(getattr(ours, name)[index], getattr(theirs, name)[0], atol=atol, rtol=0)
        torch.testing.assert_close(our_truth[index], their_truth[0], atol=1e-4, rtol=0)
        torch.testing.assert_close(ours.point_labels[index], theirs.point_labels[0])
        one_of_ours = planes_of(NetworkInput(*(tensor[index : index + 1] for tensor in ours)))
        assert (one_of_ours - planes_of(theirs)).abs().mean() < 5e-3


def test_augmentation_obeys_its_seed_and_drops_some_hints() -> None:
    asked, truth = asked_as(wedge())
    batch = (
        NetworkInput(*(tensor.repeat(300, *[1] * (tensor.ndim - 1)) for tensor in asked)),
        truth.repeat(300, 1, 1, 1),
    )
    (first, seen), (again, _), (other, _) = (augmented(*batch, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    for a, b in zip(first, again, strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)
    assert (first.image != other.image).any()
    assert 0.6 < first.has_mask_input.mean() < 0.8
    assert (first.mask_input.abs().amax((1, 2, 3)) > 0).eq(first.has_mask_input == 1).all()
    assert len(seen.unique(dim=0)) == 8
    # The point of the object stays in it, the other one beside it.
    x, y = first.points.round().long().unbind(2)
    there = seen[torch.arange(300)[:, None], 0, y, x]
    assert (there[:, 0] > 0.5).all()
    assert (there[:, 1] < 0.5).all()


def test_looks_change_as_much_as_asked() -> None:
    ramp = torch.linspace(0, 255, SIDE).expand(64, 3, SIDE, SIDE)
    moved = []
    for strength in (0.0, 0.3, 1.0):
        seen = repainted(ramp, torch.Generator().manual_seed(0), strength)
        assert seen.min() >= 0
        assert seen.max() <= 255
        moved.append((seen - ramp).abs().mean())
        rising = (seen[..., -4:].mean((1, 2, 3)) > seen[..., :4].mean((1, 2, 3))).float().mean()
        assert rising == 1 if strength <= 0.5 else 0.7 < rising < 1  # inverted ones fall
    assert moved[0] < 0.1 < moved[1] < moved[2]


def test_iou_and_loss_by_hand() -> None:
    mask, truth = torch.zeros(2, 2, 1, 4, 4)
    mask[0, 0, 0] = 1  # the first row, 4 pixels
    truth[0, 0, :2, :2] = 1  # the upper left quarter, 4 pixels, 2 of them in the mask
    torch.testing.assert_close(iou_of(mask, truth), torch.tensor([2 / 6, 0]))
    torch.testing.assert_close(iou_of(mask, truth, torch.tensor([2.0, 0])), torch.tensor([2 / 8, 0]))
    # Logits 0: p = 1/2 everywhere, an empty mask. BCE log 2; Dice 1 - (2 * 2 + 1) / (8 + 4 + 1) = 8 / 13; IoU 0.
    logits = torch.zeros(2, 1, 4, 4, requires_grad=True)
    score = torch.tensor([0.5, 0.4])
    alone = [tiny_loss(logits[i : i + 1], score[i : i + 1], truth[i : i + 1]) for i in (0, 1)]
    torch.testing.assert_close(alone[0], torch.tensor(np.log(2) + 8 / 13 + 2 * 0.25, dtype=torch.float32))
    torch.testing.assert_close(alone[1], torch.tensor(2 * 0.16))  # an empty truth: the predicted IoU alone
    both = tiny_loss(logits, score, truth)
    torch.testing.assert_close(both, (alone[0] + alone[1]) / 2)
    both.backward()
    assert logits.grad[0].abs().min() > 0
    assert logits.grad[1].abs().max() == 0


def test_what_a_crop_shows_of_an_object_by_hand() -> None:
    everywhere = np.ones((40, 60), np.bool_)
    # A box of 4 x 4 round (12, 12) is seen in the 17 x 17 pixels from 4 to 20.
    small = next(decoder_queries(*_asked_for((10, 10, 14, 14)), side=SIDE, name="tiny"))
    crop, unseen = truth_of(small, everywhere)
    np.testing.assert_allclose(crop, 1, atol=1e-6)
    assert unseen == pytest.approx((2400 - 17**2) * SIDE**2 / 17**2, rel=1e-4)
    # The image as a box: beyond its border there is no object, and none is unseen.
    whole = next(decoder_queries(*_asked_for((0, 0, 60, 40)), side=SIDE, name="tiny"))
    crop, unseen = truth_of(whole, everywhere)
    assert (crop[0, 0], unseen) == (0, 0)
    assert crop[16, 16] == pytest.approx(1)
    assert crop.mean() == pytest.approx(2400 / (whole.window.width * whole.window.height), rel=0.1)
    # One pixel keeps its area on the way: 32 / 17 crop pixels either way.
    dot = np.zeros((40, 60), np.bool_)
    dot[12, 12] = True
    assert truth_of(small, dot)[0].sum() == pytest.approx((SIDE / 17) ** 2, rel=0.1)


def _asked_for(box) -> tuple[Embedding, Prompts]:
    return Embedding((40, 60), image=np.zeros((40, 60, 3), np.uint8)), Prompts(1, np.array(box, np.float32))


def test_a_trainee_is_asked_as_the_segmenter_is(tiny, monkeypatch) -> None:
    monkeypatch.setattr(tiny_train, "augmented", lambda asked, truth, rng: (asked, truth))
    lessons = [wedge(), replace(wedge(1), prompts=replace(wedge(1).prompts, mask_input=None, point_coords=None,
                                                          point_labels=None))]  # fmt: skip
    answers = tiny.decode([one.embedding for one in lessons], [[one.prompts] for one in lessons])
    logits = torch.from_numpy(np.stack([candidate.low_res_logits for (candidate,) in answers]))
    score = torch.from_numpy(np.concatenate([candidate.predicted_iou for (candidate,) in answers]))
    truth = torch.cat([asked_as(one)[1] for one in lessons])
    torch.testing.assert_close(tiny.fine_tuner().loss(lessons, 0).detach(), tiny_loss(logits, score, truth))


def test_it_can_be_adapted_and_says_how(tiny) -> None:
    assert isinstance(tiny, FineTunable)
    assert tiny.fine_tune_defaults == FineTuneDefaults(steps=200, batch_size=16, lr=5e-4)
    assert len(tiny.fine_tuner().parameters()) == len(list(small_net().parameters()))


def taught(tiny: Tiny, lessons: list[PromptedExample], steps: int):
    trainee = tiny.fine_tuner()
    optimizer = torch.optim.AdamW(trainee.parameters(), lr=3e-3)
    for step in range(steps):
        optimizer.zero_grad()
        trainee.loss(lessons, step).backward()
        optimizer.step()
    return trainee


def test_the_loss_falls_within_thirty_steps(tiny) -> None:
    lessons = [wedge(seed) for seed in range(4)]
    before, after = (float(taught(tiny, lessons, steps).loss(lessons, 99).detach()) for steps in (0, 30))
    assert after < 0.7 * before


def test_the_loss_is_decided_by_its_seed(tiny) -> None:
    losses = [float(tiny.fine_tuner().loss([wedge(), wedge(1)], seed).detach()) for seed in (5, 5, 6)]
    assert losses[0] == losses[1] != losses[2]


def test_every_weight_learns_and_a_false_alarm_moves_no_mask(tiny) -> None:
    trainee = tiny.fine_tuner()
    trainee.loss([wedge()], 0).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trainee.parameters())
    trainee = tiny.fine_tuner()
    false_alarm = replace(wedge(), mask=np.zeros((40, 60), np.bool_))
    loss = trainee.loss([false_alarm], 0)
    loss.backward()
    assert loss > 0
    gradients = {name: parameter.grad for name, parameter in trainee._net.named_parameters()}
    assert all(gradients[name].abs().sum() == 0 for name in ("head.weight", "head.bias"))
    assert all(gradients[name].abs().sum() > 0 for name in ("score.0.weight", "score.2.weight", "score.2.bias"))


def test_the_original_stays_and_the_adapted_is_another(tiny) -> None:
    prompts = [box_prompts((12, 8, 34, 30), (3, 4, 9, 9), jitters=2)]
    embeddings = tiny.encode([wedge().embedding.image])
    before, signature = tiny.decode(embeddings, prompts)[0], tiny.signature
    adapted = tiny.with_weights(taught(tiny, [wedge()], 2).state())
    for a, b in zip(before, tiny.decode(embeddings, prompts)[0], strict=True):
        assert_same(a, b)
    assert signature_of(tiny._net) == signature != adapted.signature
    assert (adapted.name, adapted.with_weights(adapted.fine_tuner().state()).name) == ("tiny+adapted", "tiny+adapted")
    assert adapted._batch_size == 3
    assert isinstance(adapted, FineTunable)
    ours, again = (adapted.decode(embeddings, prompts)[0] for _ in range(2))
    for a, b, untaught in zip(ours, again, before, strict=True):
        np.testing.assert_array_equal(a.low_res_logits, b.low_res_logits)
        assert np.abs(a.low_res_logits - untaught.low_res_logits).max() > 1e-3


def test_a_state_is_a_copy_and_comes_back_from_disk_bit_by_bit(tiny, tmp_path) -> None:
    trainee = taught(tiny, [wedge()], 1)
    state = trainee.state()
    save_file(state, tmp_path / "state.safetensors")
    with torch.no_grad():
        for parameter in trainee.parameters():
            parameter.zero_()
    ours, theirs = tiny.with_weights(state), tiny.with_weights(load_file(tmp_path / "state.safetensors"))
    assert ours.signature == theirs.signature
    embeddings = tiny.encode([wedge().embedding.image])
    (a,), (b,) = (s.decode(embeddings, [box_prompts((12, 8, 34, 30))])[0] for s in (ours, theirs))
    np.testing.assert_array_equal(a.low_res_logits, b.low_res_logits)
    np.testing.assert_array_equal(a.predicted_iou, b.predicted_iou)
    assert tiny.with_weights(tiny.fine_tuner().state()).signature == tiny.signature  # nothing learnt, nothing changed


def test_a_state_of_another_architecture_is_refused(tiny) -> None:
    wider = Tiny(small_net(widths=(8, 24))).fine_tuner().state()
    lacking = {key: tensor for key, tensor in tiny.fine_tuner().state().items() if key != "head.bias"}
    for state in (wider, lacking, {}, tiny.fine_tuner().state() | {"decoder": torch.zeros(2)}):
        with pytest.raises(ValueError, match="expected the tensors of a trainee of `tiny`"):
            tiny.with_weights(state)


BOX = np.array([12, 8, 34, 30], np.float32)
UNFIT = {
    "box beside the image": (Prompts(1, BOX + 100), "entirely outside the image, 60 wide and 40 high"),
    "box without area": (Prompts(1, np.array([5, 5, 5, 9], np.float32)), "x0 < x1"),
    "point beside the image": (Prompts(1, BOX, np.array([[3, 40]], np.float32), np.array([1])), "outside the image"),
    "hint of another size": (Prompts(1, BOX, mask_input=np.zeros((60, 40), np.float32)), "mask_input"),
}


@pytest.mark.parametrize(("prompts", "words"), UNFIT.values(), ids=UNFIT)
def test_unfit_prompts_are_refused_in_lessons_too(tiny, prompts, words) -> None:
    with pytest.raises(ValueError, match=words):
        tiny.fine_tuner().loss([replace(wedge(), prompts=prompts)], 0)


def test_unfit_lessons_are_refused(tiny) -> None:
    with pytest.raises(ValueError, match="expected at least one, got none"):
        tiny.fine_tuner().loss([], 0)
    with pytest.raises(ValueError, match=r"\(40, 60\), got \(60, 40\)"):
        tiny.fine_tuner().loss([replace(wedge(), mask=wedge().mask.T)], 0)
    with pytest.raises(ValueError, match="encode the image again"):
        tiny.fine_tuner().loss([replace(wedge(), embedding=Embedding((40, 60)))], 0)
    with pytest.raises(UserError, match=r"prompts\.box: the segmenter `tiny`"):
        tiny.fine_tuner().loss([replace(wedge(), prompts=replace(wedge().prompts, box=None))], 0)


ODD = {
    "one pixel": ((40, 60), (7.5, 3.5, 8.5, 4.5), np.s_[4:5, 8:9]),
    "smaller than the crop": ((20, 30), (4, 5, 16, 14), np.s_[6:14, 5:15]),
    "one row": ((1, 50), (10, 0, 20, 1), np.s_[:, 10:20]),
    "one column": ((50, 1), (0, 10, 1, 20), np.s_[10:20, :]),
    "the whole image": ((20, 30), (0, 0, 30, 20), np.s_[:, :]),
    "over the border": ((20, 30), (-9, 4, 99, 70), np.s_[4:, :]),
    "object outside the window": ((90, 90), (2, 2, 6, 6), np.s_[80:, 80:]),
}


@pytest.mark.parametrize(("size", "box", "where"), ODD.values(), ids=ODD)
def test_odd_lessons_are_learnt_without_breaking_a_weight(tiny, size, box, where) -> None:
    image, mask = np.full((*size, 3), 60, np.uint8), np.zeros(size, np.bool_)
    image[where], mask[where] = 180, True
    trainee = tiny.fine_tuner()
    for seed in range(3):
        trainee.loss([lesson(image, mask, box)], seed).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in trainee.parameters())

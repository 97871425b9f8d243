"""Fine-tuning of `tiny`: augmentation and loss by hand, and a segmenter that does not change."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from helpers.segmenter_suite import assert_same, box_prompts, random_net
from safetensors.torch import load_file, save_file

from kmine.errors import UserError
from kmine.segmenters.base import AutomaticMaskGenerator, Embedding, FineTunable, FineTuneDefaults, PromptedExample
from kmine.segmenters.tiny import finetune
from kmine.segmenters.tiny.crops import crop_queries, network_input
from kmine.segmenters.tiny.finetune import augment, color_jitter, flip_and_transpose, iou_of, tiny_loss, truth_in_crop
from kmine.segmenters.tiny.network import NetworkInput, planes_of
from kmine.segmenters.tiny.segmenter import Tiny
from kmine.segmenters.tiny.weights import signature_of
from kmine.types import Prompts

SIDE = 32


@pytest.fixture
def tiny():
    return Tiny(random_net(0, (8, 16), SIDE), batch_size=3)


def example_of(image: np.ndarray, mask: np.ndarray, box, **prompts) -> PromptedExample:
    return PromptedExample(
        Embedding(image.shape[:2], image=image), Prompts(1, np.array(box, np.float32), **prompts), mask
    )


def wedge(seed: int = 0) -> PromptedExample:
    """A bright triangle, unlike any ellipse, in noise; with points and a mask input."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:40, :60]
    mask = (rows >= 8) & (rows <= 30) & (columns >= 12) & (columns - 12 <= rows - 8)
    image = np.where(mask, 170, 80)[..., None] + rng.integers(-20, 21, (40, 60, 3))
    points = {"point_coords": np.array([[16, 25], [30, 10]], np.float32), "point_labels": np.array([1, 0])}
    mask_input = np.where(columns < 25, 5, -5).astype(np.float32)
    box = np.add((12, 8, 34, 30), rng.uniform(-2, 2, 4))
    return example_of(image.astype(np.uint8), mask, box, **points, mask_input=mask_input)


def input_of(example: PromptedExample) -> tuple[NetworkInput, torch.Tensor]:
    """The network's input for an example, and its truth."""
    row = next(crop_queries(example.embedding, example.prompts, side=SIDE, name="tiny"))
    return network_input([row], "cpu"), torch.from_numpy(truth_in_crop(row, example.mask)[0])[None, None]


def turned_by_hand(example: PromptedExample, across: bool, down: bool, swap: bool) -> PromptedExample:
    """The example with image, prompts and mask flipped and transposed before encoding."""

    def plane(array):
        array = array[:, ::-1] if across else array
        array = array[::-1] if down else array
        return np.ascontiguousarray(array.swapaxes(0, 1) if swap else array)

    def points(xy):
        height, width = example.mask.shape
        x = width - 1 - xy[:, 0] if across else xy[:, 0]
        y = height - 1 - xy[:, 1] if down else xy[:, 1]
        return np.stack([y, x] if swap else [x, y], 1).astype(np.float32)

    corners = points(example.prompts.box.reshape(2, 2))
    prompts = replace(
        example.prompts,
        box=np.concatenate([corners.min(0), corners.max(0)]),
        point_coords=points(example.prompts.point_coords),
        mask_input=plane(example.prompts.mask_input),
    )
    image = plane(example.embedding.image)
    return PromptedExample(Embedding(image.shape[:2], image=image), prompts, plane(example.mask))


def test_turning_a_batch_equals_turning_each_image_with_its_prompts() -> None:
    # Near the border: the window reaches over it, so the limits turn, too.
    example = replace(wedge(), prompts=replace(wedge().prompts, box=np.array([2, 3, 31.5, 36], np.float32)))
    turns = list(product([False, True], repeat=3))
    inputs, truth = input_of(example)
    batch = NetworkInput(*(tensor.repeat(8, *[1] * (tensor.ndim - 1)) for tensor in inputs))
    ours, our_truth = flip_and_transpose(batch, truth.repeat(8, 1, 1, 1), *torch.tensor(turns).T)
    for index, turn in enumerate(turns):
        expected, expected_truth = input_of(turned_by_hand(example, *turn))
        # OpenCV rounds grey values after resizing.
        for name, atol in {"image": 1.01, "mask_input": 1e-3, "limits": 1e-4, "boxes": 1e-4, "points": 1e-4}.items():
            torch.testing.assert_close(getattr(ours, name)[index], getattr(expected, name)[0], atol=atol, rtol=0)
        torch.testing.assert_close(our_truth[index], expected_truth[0], atol=1e-4, rtol=0)
        torch.testing.assert_close(ours.point_labels[index], expected.point_labels[0])
        one_of_ours = planes_of(NetworkInput(*(tensor[index : index + 1] for tensor in ours)))
        assert (one_of_ours - planes_of(expected)).abs().mean() < 5e-3


def test_augmentation_is_decided_by_its_seed_and_drops_some_mask_inputs() -> None:
    inputs, truth = input_of(wedge())
    batch = (
        NetworkInput(*(tensor.repeat(300, *[1] * (tensor.ndim - 1)) for tensor in inputs)),
        truth.repeat(300, 1, 1, 1),
    )
    (first, truths), (again, _), (other, _) = (augment(*batch, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    for a, b in zip(first, again, strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)
    assert (first.image != other.image).any()
    assert 0.6 < first.has_mask_input.mean() < 0.8
    assert (first.mask_input.abs().amax((1, 2, 3)) > 0).eq(first.has_mask_input == 1).all()
    assert len(truths.unique(dim=0)) == 8
    # The foreground point stays in the object, the other one outside.
    x, y = first.points.round().long().unbind(2)
    at_points = truths[torch.arange(300)[:, None], 0, y, x]
    assert (at_points[:, 0] > 0.5).all()
    assert (at_points[:, 1] < 0.5).all()


def test_recolouring_grows_with_its_strength() -> None:
    ramp = torch.linspace(0, 255, SIDE).expand(64, 3, SIDE, SIDE)
    changes = []
    for strength in (0.0, 0.3, 1.0):
        image = color_jitter(ramp, torch.Generator().manual_seed(0), strength)
        assert image.min() >= 0
        assert image.max() <= 255
        changes.append((image - ramp).abs().mean())
        rising = (image[..., -4:].mean((1, 2, 3)) > image[..., :4].mean((1, 2, 3))).float().mean()
        assert rising == 1 if strength <= 0.5 else 0.7 < rising < 1  # inverted ones fall
    assert changes[0] < 0.1 < changes[1] < changes[2]


def test_iou_and_loss_by_hand() -> None:
    mask, truth = torch.zeros(2, 2, 1, 4, 4)
    mask[0, 0, 0] = 1  # the first row, 4 pixels
    truth[0, 0, :2, :2] = 1  # the upper left quarter, 4 pixels, 2 of them in the mask
    torch.testing.assert_close(iou_of(mask, truth), torch.tensor([2 / 6, 0]))
    torch.testing.assert_close(iou_of(mask, truth, torch.tensor([2.0, 0])), torch.tensor([2 / 8, 0]))
    # Logits 0: p = 1/2 everywhere, an empty mask. BCE log 2; Dice 1 - (2 * 2 + 1) / (8 + 4 + 1) = 8 / 13; IoU 0.
    logits = torch.zeros(2, 1, 4, 4, requires_grad=True)
    score = torch.tensor([0.5, 0.4])
    separate = [tiny_loss(logits[i : i + 1], score[i : i + 1], truth[i : i + 1]) for i in (0, 1)]
    torch.testing.assert_close(separate[0], torch.tensor(np.log(2) + 8 / 13 + 2 * 0.25, dtype=torch.float32))
    torch.testing.assert_close(separate[1], torch.tensor(2 * 0.16))  # an empty truth: only the predicted IoU
    both = tiny_loss(logits, score, truth)
    torch.testing.assert_close(both, (separate[0] + separate[1]) / 2)
    both.backward()
    assert logits.grad[0].abs().min() > 0
    assert logits.grad[1].abs().max() == 0


def test_the_part_of_an_object_in_a_crop_by_hand() -> None:
    everywhere = np.ones((40, 60), np.bool_)
    # The window of a box of 4 x 4 round (12, 12) is the 17 x 17 pixels from 4 to 20.
    small = next(crop_queries(*_embedded((10, 10, 14, 14)), side=SIDE, name="tiny"))
    crop, area_outside = truth_in_crop(small, everywhere)
    np.testing.assert_allclose(crop, 1, atol=1e-6)
    assert area_outside == pytest.approx((2400 - 17**2) * SIDE**2 / 17**2, rel=1e-4)
    # The image as a box: no object beyond the border, and none outside the crop.
    whole = next(crop_queries(*_embedded((0, 0, 60, 40)), side=SIDE, name="tiny"))
    crop, area_outside = truth_in_crop(whole, everywhere)
    assert (crop[0, 0], area_outside) == (0, 0)
    assert crop[16, 16] == pytest.approx(1)
    assert crop.mean() == pytest.approx(2400 / (whole.window.width * whole.window.height), rel=0.1)
    # One pixel keeps its area: 32 / 17 crop pixels in each direction.
    dot = np.zeros((40, 60), np.bool_)
    dot[12, 12] = True
    assert truth_in_crop(small, dot)[0].sum() == pytest.approx((SIDE / 17) ** 2, rel=0.1)


def _embedded(box) -> tuple[Embedding, Prompts]:
    return Embedding((40, 60), image=np.zeros((40, 60, 3), np.uint8)), Prompts(1, np.array(box, np.float32))


def test_without_augmentation_the_loss_is_that_of_the_decoded_logits(tiny, monkeypatch) -> None:
    monkeypatch.setattr(finetune, "augment", lambda inputs, truth, rng: (inputs, truth))
    examples = [wedge(), replace(wedge(1), prompts=replace(wedge(1).prompts, mask_input=None, point_coords=None,
                                                          point_labels=None))]  # fmt: skip
    candidates = tiny.decode([example.embedding for example in examples], [[example.prompts] for example in examples])
    logits = torch.from_numpy(np.stack([candidate.low_res_logits for (candidate,) in candidates]))
    score = torch.from_numpy(np.concatenate([candidate.predicted_iou for (candidate,) in candidates]))
    truth = torch.cat([input_of(example)[1] for example in examples])
    torch.testing.assert_close(tiny.fine_tuner().loss(examples, 0).detach(), tiny_loss(logits, score, truth))


def test_tiny_is_fine_tunable_with_defaults(tiny) -> None:
    assert isinstance(tiny, FineTunable)
    assert tiny.fine_tune_defaults == FineTuneDefaults(steps=200, batch_size=16, lr=5e-4)
    assert len(tiny.fine_tuner().parameters()) == len(list(random_net(0, (8, 16), SIDE).parameters()))


def fine_tuned(tiny: Tiny, examples: list[PromptedExample], steps: int):
    tuner = tiny.fine_tuner()
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=3e-3)
    for step in range(steps):
        optimizer.zero_grad()
        tuner.loss(examples, step).backward()
        optimizer.step()
    return tuner


def test_the_loss_falls_within_thirty_steps(tiny) -> None:
    examples = [wedge(seed) for seed in range(4)]
    before, after = (float(fine_tuned(tiny, examples, steps).loss(examples, 99).detach()) for steps in (0, 30))
    assert after < 0.7 * before


def test_the_loss_is_decided_by_its_seed(tiny) -> None:
    losses = [float(tiny.fine_tuner().loss([wedge(), wedge(1)], seed).detach()) for seed in (5, 5, 6)]
    assert losses[0] == losses[1] != losses[2]


def test_every_weight_gets_a_gradient_and_from_an_empty_mask_only_the_score(tiny) -> None:
    tuner = tiny.fine_tuner()
    tuner.loss([wedge()], 0).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in tuner.parameters())
    tuner = tiny.fine_tuner()
    without_object = replace(wedge(), mask=np.zeros((40, 60), np.bool_))
    loss = tuner.loss([without_object], 0)
    loss.backward()
    assert loss > 0
    gradients = {name: parameter.grad for name, parameter in tuner._net.named_parameters()}
    assert all(gradients[name].abs().sum() == 0 for name in ("head.weight", "head.bias"))
    assert all(gradients[name].abs().sum() > 0 for name in ("score.0.weight", "score.2.weight", "score.2.bias"))


def test_the_original_does_not_change_and_the_adapted_one_differs(tiny) -> None:
    prompts = [box_prompts((12, 8, 34, 30), (3, 4, 9, 9), jitters=2)]
    embeddings = tiny.encode([wedge().embedding.image])
    before, signature = tiny.decode(embeddings, prompts)[0], tiny.signature
    adapted = tiny.with_weights(fine_tuned(tiny, [wedge()], 2).state())
    for a, b in zip(before, tiny.decode(embeddings, prompts)[0], strict=True):
        assert_same(a, b)
    assert signature_of(tiny._net) == signature != adapted.signature
    assert (adapted.name, adapted.with_weights(adapted.fine_tuner().state()).name) == ("tiny+adapted", "tiny+adapted")
    assert adapted._batch_size == 3
    assert isinstance(adapted, FineTunable) and isinstance(adapted, AutomaticMaskGenerator)
    ours, again = (adapted.decode(embeddings, prompts)[0] for _ in range(2))
    for a, b, original in zip(ours, again, before, strict=True):
        np.testing.assert_array_equal(a.low_res_logits, b.low_res_logits)
        assert np.abs(a.low_res_logits - original.low_res_logits).max() > 1e-3


def test_a_state_is_a_copy_and_survives_a_file_bit_by_bit(tiny, tmp_path) -> None:
    tuner = fine_tuned(tiny, [wedge()], 1)
    state = tuner.state()
    save_file(state, tmp_path / "state.safetensors")
    with torch.no_grad():
        for parameter in tuner.parameters():
            parameter.zero_()
    ours, read = tiny.with_weights(state), tiny.with_weights(load_file(tmp_path / "state.safetensors"))
    assert ours.signature == read.signature
    embeddings = tiny.encode([wedge().embedding.image])
    (a,), (b,) = (s.decode(embeddings, [box_prompts((12, 8, 34, 30))])[0] for s in (ours, read))
    np.testing.assert_array_equal(a.low_res_logits, b.low_res_logits)
    np.testing.assert_array_equal(a.predicted_iou, b.predicted_iou)
    assert tiny.with_weights(tiny.fine_tuner().state()).signature == tiny.signature  # untrained, unchanged


def test_a_state_of_another_architecture_is_refused(tiny) -> None:
    wider = Tiny(random_net(0, (8, 24), SIDE)).fine_tuner().state()
    lacking = {key: tensor for key, tensor in tiny.fine_tuner().state().items() if key != "head.bias"}
    for state in (wider, lacking, {}, tiny.fine_tuner().state() | {"decoder": torch.zeros(2)}):
        with pytest.raises(ValueError, match="expected the tensors of `tiny`"):
            tiny.with_weights(state)


BOX = np.array([12, 8, 34, 30], np.float32)
UNFIT = {
    "box beside the image": (Prompts(1, BOX + 100), "entirely outside the image, 60 wide and 40 high"),
    "box without area": (Prompts(1, np.array([5, 5, 5, 9], np.float32)), "x0 < x1"),
    "point beside the image": (Prompts(1, BOX, np.array([[3, 40]], np.float32), np.array([1])), "outside the image"),
    "mask input of another size": (Prompts(1, BOX, mask_input=np.zeros((60, 40), np.float32)), "mask_input"),
}


@pytest.mark.parametrize(("prompts", "words"), UNFIT.values(), ids=UNFIT)
def test_unfit_prompts_are_refused_in_examples_too(tiny, prompts, words) -> None:
    with pytest.raises(ValueError, match=words):
        tiny.fine_tuner().loss([replace(wedge(), prompts=prompts)], 0)


def test_unfit_examples_are_refused(tiny) -> None:
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
def test_odd_examples_have_finite_gradients(tiny, size, box, where) -> None:
    image, mask = np.full((*size, 3), 60, np.uint8), np.zeros(size, np.bool_)
    image[where], mask[where] = 180, True
    tuner = tiny.fine_tuner()
    for seed in range(3):
        tuner.loss([example_of(image, mask, box)], seed).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in tuner.parameters())

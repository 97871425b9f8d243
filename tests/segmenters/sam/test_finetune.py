"""SAM learns with its mask decoder alone, on embeddings at hand: the loss by hand, and what stays as it was."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.segmenter_suite import (
    assert_same,
    box_prompts,
    images,
    random_sam,
)
from safetensors.torch import load_file, save_file

from kmine.config import AdaptConfig
from kmine.mining.adaptation.finetune import adapt
from kmine.ops import masks, metrics
from kmine.segmenters.base import Embedding, FineTunable, PromptedExample
from kmine.segmenters.ellipse import Ellipse
from kmine.segmenters.sam.finetune import dice_loss, focal_loss
from kmine.segmenters.sam.segmenter import SamSegmenter
from kmine.types import Prompts, Sample

WIDE = (60, 150)  # takes 26 of 64 rows of the logits
BOX = np.array([10, 12, 50, 40], np.float32)
POINTS = {"point_coords": np.array([[30, 20], [5, 50.5]], np.float32), "point_labels": np.array([1, 0])}


@pytest.fixture(scope="module")
def small():
    return random_sam()


@pytest.fixture
def segmenter(small):
    return SamSegmenter(small, name="sam_small")


def disc(size, row: float, column: float, radius: float) -> np.ndarray:
    rows, columns = np.mgrid[: size[0], : size[1]]
    return np.hypot(rows - row, columns - column) <= radius


def lesson(segmenter, mask: np.ndarray, prompts: Prompts | None = None, seed: int = 0) -> PromptedExample:
    (embedding,) = segmenter.encode(images(seed, sizes=[mask.shape]))
    return PromptedExample(embedding, prompts or Prompts(1, BOX), mask)


def learn(trainee, lessons, steps: int, lr: float = 1e-3) -> list[float]:
    optimizer, losses = torch.optim.AdamW(trainee.parameters(), lr=lr), []
    for step in range(steps):
        loss = trainee.loss(lessons, seed=step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def answer_with(trainee, monkeypatch, low_res: torch.Tensor, score: float) -> torch.Tensor:
    """Lets the trainee's decoder answer with these logits and this score, whatever it is asked; returns the score."""
    scores = torch.full((len(low_res), 1), score, requires_grad=True)
    monkeypatch.setattr(trainee._segmenter.decoder, "forward", lambda **kwargs: (low_res, scores))
    return scores


def count_encoded(sam, monkeypatch) -> list[int]:
    counts, forward = [], sam.image_encoder.forward

    def counting(pixels):
        counts.append(len(pixels))
        return forward(pixels)

    monkeypatch.setattr(sam.image_encoder, "forward", counting)
    return counts


def example(number: int) -> tuple[Sample, list[Prompts]]:
    """A bright disc on noise, and a local model's prompts for it, a little off."""
    rng = np.random.default_rng(number)
    size = ((64, 96), (80, 60))[number % 2]
    row, column, radius = rng.uniform(24, 36), rng.uniform(24, 36), rng.uniform(9, 18)
    mask, part = disc(size, row, column, radius), disc(size, row + 2, column - 1, radius)
    image = rng.integers(0, 80, (*size, 3), dtype=np.uint8)
    image[mask] += 150
    sample = Sample(f"s{number}", f"s{number}", image, mask.astype(np.uint8))
    return sample, [Prompts(1, masks.tight_box(part).astype(np.float32), component=part)]


@pytest.mark.parametrize("name", ["sam_small", pytest.param("sam_vit_b", marks=pytest.mark.slow)])
def test_the_stage_encodes_each_image_once_and_the_loss_falls(name, monkeypatch) -> None:
    sam = random_sam(name)
    segmenter = SamSegmenter(sam, name=name)
    counts = count_encoded(sam, monkeypatch)
    cfg = AdaptConfig(steps=18, batch_size=2, lr=1e-3, val_every=6, min_gain=0.0)
    found = adapt(segmenter, [example(0), example(1)], [example(2)], cfg, seed=0)
    assert sum(counts) == 3
    losses = [loss for _, loss, _ in found.history[1:]]
    assert losses[-1] < 0.5 * losses[0]
    assert found.iou_after > found.iou_before + 0.2
    assert found.segmenter.name == f"{name}+adapted"


def test_sam_is_adaptable_and_the_ellipse_is_not(segmenter) -> None:
    assert isinstance(segmenter, FineTunable)
    assert not isinstance(Ellipse(), FineTunable)


def test_a_trainee_runs_no_encoder_and_gives_gradients_to_its_own_decoder_only(small, segmenter, monkeypatch) -> None:
    one = lesson(segmenter, disc(WIDE, 26, 30, 12), Prompts(1, BOX, **POINTS, mask_input=np.ones(WIDE, np.float32)))
    counts, trainee = count_encoded(small, monkeypatch), segmenter.fine_tuner()
    trainee.loss([one], seed=0).backward()
    assert not counts
    assert all(parameter.grad is not None for parameter in trainee.parameters())
    assert sum(bool(parameter.grad.any()) for parameter in trainee.parameters()) > 50
    assert all(parameter.grad is None for parameter in small.parameters())
    shapes = sorted(tuple(parameter.shape) for parameter in trainee.parameters())
    assert shapes == sorted(tuple(parameter.shape) for parameter in small.mask_decoder.parameters())


def test_the_copy_learns_and_the_original_stays_as_it_is(small, segmenter) -> None:
    sample, (prompts,) = example(0)
    one = PromptedExample(segmenter.encode([sample.image])[0], prompts, sample.mask == 1)
    signature = segmenter.signature
    before = segmenter.decode([one.embedding], [[prompts]])[0][0]
    trainee = segmenter.fine_tuner()
    losses = learn(trainee, [one], steps=20)
    assert losses[-1] < 0.2 * losses[0]
    adapted = segmenter.with_weights(trainee.state())
    assert adapted.name == "sam_small+adapted"
    assert_same(before, segmenter.decode([one.embedding], [[prompts]])[0][0])
    # A signature is remembered: another segmenter around the same weights computes it anew.
    assert SamSegmenter(small, name="again").signature == signature != adapted.signature
    after = adapted.decode([one.embedding], [[prompts]])[0][0]
    assert metrics.iou(before.masks[0], one.mask) < 0.5 < 0.8 < metrics.iou(after.masks[0], one.mask)


def test_what_was_learnt_survives_a_file_and_shares_the_encoder(segmenter, tmp_path) -> None:
    one = lesson(segmenter, disc(WIDE, 26, 30, 12))
    trainee = segmenter.fine_tuner()
    learn(trainee, [one], steps=1)
    state = trainee.state()
    save_file(state, tmp_path / "adapted.safetensors")
    assert all(key.startswith("mask_decoder.") for key in state)
    assert all(tensor.device.type == "cpu" and not tensor.requires_grad for tensor in state.values())
    direct, read = segmenter.with_weights(state), segmenter.with_weights(load_file(tmp_path / "adapted.safetensors"))
    assert direct.signature == read.signature
    learn(trainee, [one], steps=1)
    assert segmenter.with_weights(state).signature == direct.signature, "states are copies"
    for part in ("image_encoder", "prompt_encoder"):
        assert getattr(read._sam, part) is getattr(segmenter._sam, part)


def test_an_adapted_segmenter_keeps_its_settings_and_can_learn_again(small) -> None:
    segmenter = SamSegmenter(small, name="s", batch_size=3, multimask=True)
    twice = segmenter.with_weights(segmenter.fine_tuner().state()).fine_tuner()
    again = segmenter.with_weights(segmenter.fine_tuner().state()).with_weights(twice.state())
    assert again.name == "s+adapted"
    assert again._embedder is segmenter._embedder and again._embedder.batch_size == 3
    embeddings = again.encode(images(sizes=[WIDE]))
    np.testing.assert_array_equal(embeddings[0].features, segmenter.encode(images(sizes=[WIDE]))[0].features)
    ours, theirs = (s.decode(embeddings, [box_prompts((3, 4, 90, 55))])[0][0] for s in (again, segmenter))
    assert len(ours.masks) == 3
    assert_same(ours, theirs)


@pytest.mark.parametrize("change", ["missing", "extra", "shape", "prefix", "whole"])
def test_tensors_of_another_architecture_are_refused(small, segmenter, change) -> None:
    state = segmenter.fine_tuner().state()
    key = "mask_decoder.iou_token.weight"
    if change == "missing":
        del state[key]
    elif change == "extra":
        state["mask_decoder.more"] = torch.zeros(1)
    elif change == "shape":
        state[key] = torch.zeros(1, 128)
    elif change == "prefix":
        state = {key.removeprefix("mask_decoder."): tensor for key, tensor in state.items()}
    else:
        state = small.state_dict()
    with pytest.raises(ValueError, match="expected the mask decoder of sam_small"):
        segmenter.with_weights(state)


def test_focal_and_dice_loss_by_hand() -> None:
    logits, share = torch.tensor([[0.0, 0.0], [20.0, -20.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    # p = 1/2: (1/4 + 3/4) / 2 pixels x (1/2)^2 x ln 2.
    torch.testing.assert_close(focal_loss(logits, share), torch.tensor([0.125 * np.log(2), 0]), check_dtype=False)
    torch.testing.assert_close(dice_loss(logits, share), torch.tensor([1 / 3, 0]))
    # Half an object: nothing is better than one half.
    half = focal_loss(torch.tensor([[-0.1], [0.0], [0.1]]), torch.full((3, 1), 0.5))
    assert half.argmin() == 1


def test_a_perfect_mask_leaves_the_error_of_the_predicted_iou(segmenter, monkeypatch) -> None:
    mask = np.zeros((64, 64), bool)  # the frame of the logits itself
    mask[20:40, 10:50] = True
    trainee = segmenter.fine_tuner()
    low_res = torch.where(torch.from_numpy(mask), 20.0, -20.0)[None, None].requires_grad_()
    scores = answer_with(trainee, monkeypatch, low_res, score=0.7)
    loss = trainee.loss([lesson(segmenter, mask)], seed=0)
    loss.backward()
    assert float(loss.detach()) == pytest.approx((0.7 - 1) ** 2, abs=1e-5)
    assert float(scores.grad) == pytest.approx(2 * (0.7 - 1), abs=1e-5)


def test_a_false_alarm_teaches_the_predicted_iou_alone(segmenter, monkeypatch) -> None:
    trainee = segmenter.fine_tuner()
    low_res = torch.randn(1, 1, 64, 64, requires_grad=True)
    scores = answer_with(trainee, monkeypatch, low_res, score=0.7)
    loss = trainee.loss([lesson(segmenter, np.zeros(WIDE, bool))], seed=0)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.7**2)
    assert float(scores.grad) == pytest.approx(2 * 0.7)
    assert low_res.grad is None or not low_res.grad.any()


def test_the_predicted_iou_is_taught_that_of_the_answer(segmenter) -> None:
    one = lesson(segmenter, disc(WIDE, 26, 30, 12))
    answer = segmenter.decode([one.embedding], [[one.prompts]])[0][0]
    iou = segmenter.fine_tuner()._iou(torch.from_numpy(answer.low_res_logits)[None], torch.from_numpy(one.mask)[None])
    assert 0 < float(iou) < 1
    assert float(iou) == pytest.approx(metrics.iou(answer.masks[0], one.mask))


@pytest.mark.parametrize(("size", "rows", "columns"), [(WIDE, 26, 64), (WIDE[::-1], 64, 26)])
def test_padding_takes_no_part(segmenter, monkeypatch, size, rows, columns) -> None:
    one, trainee, losses = lesson(segmenter, disc(size, 20, 20, 12)), segmenter.fine_tuner(), []
    for beyond in (-5.0, -20.0):
        low_res = torch.full((1, 1, 64, 64), beyond)
        low_res[..., :rows, :columns] = -1
        low_res.requires_grad_()
        answer_with(trainee, monkeypatch, low_res, score=0.5)
        loss = trainee.loss([one], seed=0)
        loss.backward()
        assert (low_res.grad[0, 0, :rows, :columns] != 0).all()
        assert low_res.grad.count_nonzero() == rows * columns
        losses.append(float(loss.detach()))
    assert losses[0] == losses[1]


def test_a_lesson_counts_alike_alone_and_in_a_batch(segmenter, monkeypatch) -> None:
    mask = disc(WIDE, 26, 30, 12)
    first = lesson(segmenter, mask)
    hint = np.where(mask, 5, -5).astype(np.float32)
    lessons = [
        first,
        lesson(segmenter, disc(WIDE[::-1], 30, 30, 9), seed=1),
        replace(first, prompts=Prompts(1, BOX, **POINTS)),
        replace(first, mask=np.zeros(WIDE, bool), prompts=Prompts(1, BOX + 3)),
        replace(first, prompts=Prompts(1, BOX, mask_input=hint)),
    ]
    trainee, sizes = segmenter.fine_tuner(), []
    with torch.no_grad():
        alone = [float(trainee.loss([one], seed=0)) for one in lessons]
        forward = trainee._segmenter.decoder.forward

        def listen(**kwargs):
            sizes.append(len(kwargs["sparse_prompt_embeddings"]))
            return forward(**kwargs)

        monkeypatch.setattr(trainee._segmenter.decoder, "forward", listen)
        together = float(trainee.loss(lessons, seed=1))
    assert sizes == [2, 1, 1, 1], "one call for the two boxes on one image"
    assert together == pytest.approx(np.mean(alone), rel=1e-4)
    assert len({round(loss, 4) for loss in alone}) == 5


def test_shaken_boxes_teach_nothing_and_hints_are_seen(segmenter) -> None:
    mask = disc(WIDE, 26, 30, 12)
    plain = lesson(segmenter, mask)
    hinted = replace(plain, prompts=Prompts(1, BOX, mask_input=np.where(mask, 5, -5).astype(np.float32)))
    shaken = replace(plain, prompts=Prompts(1, BOX, jittered_boxes=np.array([BOX + 3, BOX - 3])))
    trainee = segmenter.fine_tuner()
    losses = [float(trainee.loss([one], seed=0).detach()) for one in (plain, hinted, shaken)]
    assert losses[0] == losses[2] != losses[1]


def test_half_precision_features_are_learnt_from(segmenter) -> None:
    one = lesson(segmenter, disc(WIDE, 26, 30, 12))
    half = replace(one, embedding=Embedding(WIDE, one.embedding.features.astype(np.float16)))
    trainee = segmenter.fine_tuner()
    full, rounded = (trainee.loss([each], seed=0) for each in (one, half))
    torch.testing.assert_close(full, rounded, rtol=0.02, atol=0)
    rounded.backward()


def test_unfit_lessons_are_refused(segmenter) -> None:
    one, trainee = lesson(segmenter, disc(WIDE, 26, 30, 12)), segmenter.fine_tuner()
    with pytest.raises(ValueError, match=r"mask of the image's own \(H, W\) = \(60, 150\), got \(150, 60\)"):
        trainee.loss([replace(one, mask=one.mask.T)], seed=0)
    with pytest.raises(ValueError, match="expected features"):
        trainee.loss([replace(one, embedding=Embedding(WIDE))], seed=0)
    with pytest.raises(ValueError, match="x0 < x1"):
        trainee.loss([replace(one, prompts=Prompts(1, BOX[::-1].copy()))], seed=0)

"""Fine-tuning of SAM's mask decoder on precomputed embeddings: the loss by hand, and what must not change."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.segmenter_suite import assert_same, box_prompts, count_encoded, disc, images, random_sam
from safetensors.torch import load_file, save_file

from kmine.config import AdaptConfig
from kmine.mining.adaptation.finetune import adapt
from kmine.ops import masks, metrics
from kmine.segmenters.base import AutomaticMaskGenerator, Embedding, FineTunable, PromptedExample
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


def example_of(segmenter, mask: np.ndarray, prompts: Prompts | None = None, seed: int = 0) -> PromptedExample:
    (embedding,) = segmenter.encode(images(seed, sizes=[mask.shape]))
    return PromptedExample(embedding, prompts or Prompts(1, BOX), mask)


def train(tuner, examples, steps: int, lr: float = 1e-3) -> list[float]:
    optimizer, losses = torch.optim.AdamW(tuner.parameters(), lr=lr), []
    for step in range(steps):
        loss = tuner.loss(examples, seed=step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def fix_output(tuner, monkeypatch, low_res: torch.Tensor, score: float) -> torch.Tensor:
    """Replace the mask decoder by fixed logits and a fixed score; returns the score."""
    scores = torch.full((len(low_res), 1), score, requires_grad=True)
    monkeypatch.setattr(tuner._decoder.mask_decoder, "forward", lambda **kwargs: (low_res, scores))
    return scores


def disc_example(number: int) -> tuple[Sample, list[Prompts]]:
    """A bright disc on noise, with slightly displaced prompts of a local model."""
    rng = np.random.default_rng(number)
    size = ((64, 96), (80, 60))[number % 2]
    row, column, radius = rng.uniform(24, 36), rng.uniform(24, 36), rng.uniform(9, 18)
    mask, part = disc(size, row, column, radius), disc(size, row + 2, column - 1, radius)
    image = rng.integers(0, 80, (*size, 3), dtype=np.uint8)
    image[mask] += 150
    sample = Sample(f"s{number}", f"s{number}", image, mask.astype(np.uint8))
    return sample, [Prompts(1, masks.tight_box(part).astype(np.float32), component=part)]


def test_adapting_encodes_each_image_once_and_lowers_the_loss(monkeypatch) -> None:
    sam = random_sam()
    segmenter = SamSegmenter(sam, name="sam_small")
    counts = count_encoded(sam, monkeypatch)
    cfg = AdaptConfig(steps=18, batch_size=2, lr=1e-3, val_every=6, min_gain=0.0)
    adapted = adapt(segmenter, [disc_example(0), disc_example(1)], [disc_example(2)], cfg, seed=0)
    assert sum(counts) == 3
    losses = [loss for _, loss, _ in adapted.history[1:]]
    assert losses[-1] < 0.5 * losses[0]
    assert adapted.iou_after > adapted.iou_before + 0.2
    assert adapted.segmenter.name == "sam_small+adapted"


def test_sam_is_fine_tunable_and_the_ellipse_is_not(segmenter) -> None:
    assert isinstance(segmenter, FineTunable)
    assert not isinstance(Ellipse(), FineTunable)


def test_only_the_own_mask_decoder_gets_gradients_and_no_image_is_encoded(small, segmenter, monkeypatch) -> None:
    example = example_of(
        segmenter, disc(WIDE, 26, 30, 12), Prompts(1, BOX, **POINTS, mask_input=np.ones(WIDE, np.float32))
    )
    counts, tuner = count_encoded(small, monkeypatch), segmenter.fine_tuner()
    tuner.loss([example], seed=0).backward()
    assert not counts
    assert all(parameter.grad is not None for parameter in tuner.parameters())
    assert sum(bool(parameter.grad.any()) for parameter in tuner.parameters()) > 50
    assert all(parameter.grad is None for parameter in small.parameters())
    shapes = sorted(tuple(parameter.shape) for parameter in tuner.parameters())
    assert shapes == sorted(tuple(parameter.shape) for parameter in small.mask_decoder.parameters())


def test_training_changes_the_copy_and_not_the_original(small, segmenter) -> None:
    sample, (prompts,) = disc_example(0)
    example = PromptedExample(segmenter.encode([sample.image])[0], prompts, sample.mask == 1)
    signature = segmenter.signature
    before = segmenter.decode([example.embedding], [[prompts]])[0][0]
    tuner = segmenter.fine_tuner()
    losses = train(tuner, [example], steps=20)
    assert losses[-1] < 0.2 * losses[0]
    adapted = segmenter.with_weights(tuner.state())
    assert adapted.name == "sam_small+adapted"
    assert_same(before, segmenter.decode([example.embedding], [[prompts]])[0][0])
    # A signature is cached: another segmenter around the same weights computes it again.
    assert SamSegmenter(small, name="again").signature == signature != adapted.signature
    after = adapted.decode([example.embedding], [[prompts]])[0][0]
    assert metrics.iou(before.masks[0], example.mask) < 0.5 < 0.8 < metrics.iou(after.masks[0], example.mask)


def test_a_state_survives_a_file_and_shares_the_encoders(segmenter, tmp_path) -> None:
    example = example_of(segmenter, disc(WIDE, 26, 30, 12))
    tuner = segmenter.fine_tuner()
    train(tuner, [example], steps=1)
    state = tuner.state()
    save_file(state, tmp_path / "adapted.safetensors")
    assert all(key.startswith("mask_decoder.") for key in state)
    assert all(tensor.device.type == "cpu" and not tensor.requires_grad for tensor in state.values())
    direct, read = segmenter.with_weights(state), segmenter.with_weights(load_file(tmp_path / "adapted.safetensors"))
    assert direct.signature == read.signature
    train(tuner, [example], steps=1)
    assert segmenter.with_weights(state).signature == direct.signature, "states are copies"
    for part in ("image_encoder", "prompt_encoder"):
        assert getattr(read._sam, part) is getattr(segmenter._sam, part)


def test_an_adapted_segmenter_keeps_its_settings_and_can_be_adapted_again(small) -> None:
    segmenter = SamSegmenter(small, name="s", batch_size=3, multimask=True)
    twice = segmenter.with_weights(segmenter.fine_tuner().state()).fine_tuner()
    again = segmenter.with_weights(segmenter.fine_tuner().state()).with_weights(twice.state())
    assert again.name == "s+adapted" and isinstance(again, AutomaticMaskGenerator)
    assert again._embedder is segmenter._embedder and again._embedder.batch_size == 3
    embeddings = again.encode(images(sizes=[WIDE]))
    np.testing.assert_array_equal(embeddings[0].features, segmenter.encode(images(sizes=[WIDE]))[0].features)
    ours, expected = (s.decode(embeddings, [box_prompts((3, 4, 90, 55))])[0][0] for s in (again, segmenter))
    assert len(ours.masks) == 3
    assert_same(ours, expected)


def test_focal_and_dice_loss_by_hand() -> None:
    logits, share = torch.tensor([[0.0, 0.0], [20.0, -20.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    # p = 1/2: (1/4 + 3/4) / 2 pixels x (1/2)^2 x ln 2.
    torch.testing.assert_close(focal_loss(logits, share), torch.tensor([0.125 * np.log(2), 0]), check_dtype=False)
    torch.testing.assert_close(dice_loss(logits, share), torch.tensor([1 / 3, 0]))
    # Half a pixel of object: p = 1/2 has the lowest loss.
    half = focal_loss(torch.tensor([[-0.1], [0.0], [0.1]]), torch.full((3, 1), 0.5))
    assert half.argmin() == 1


def test_the_loss_of_a_perfect_mask_is_that_of_the_predicted_iou(segmenter, monkeypatch) -> None:
    mask = np.zeros((64, 64), bool)  # the frame of the logits itself
    mask[20:40, 10:50] = True
    tuner = segmenter.fine_tuner()
    low_res = torch.where(torch.from_numpy(mask), 20.0, -20.0)[None, None].requires_grad_()
    scores = fix_output(tuner, monkeypatch, low_res, score=0.7)
    loss = tuner.loss([example_of(segmenter, mask)], seed=0)
    loss.backward()
    assert float(loss.detach()) == pytest.approx((0.7 - 1) ** 2, abs=1e-5)
    assert float(scores.grad) == pytest.approx(2 * (0.7 - 1), abs=1e-5)


def test_an_empty_mask_has_a_loss_of_the_predicted_iou_only(segmenter, monkeypatch) -> None:
    tuner = segmenter.fine_tuner()
    low_res = torch.randn(1, 1, 64, 64, requires_grad=True)
    scores = fix_output(tuner, monkeypatch, low_res, score=0.7)
    loss = tuner.loss([example_of(segmenter, np.zeros(WIDE, bool))], seed=0)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.7**2)
    assert float(scores.grad) == pytest.approx(2 * 0.7)
    assert low_res.grad is None or not low_res.grad.any()


def test_the_target_of_the_predicted_iou_is_the_iou_of_the_decoded_mask(segmenter) -> None:
    example = example_of(segmenter, disc(WIDE, 26, 30, 12))
    candidate = segmenter.decode([example.embedding], [[example.prompts]])[0][0]
    iou = segmenter.fine_tuner()._iou(
        torch.from_numpy(candidate.low_res_logits)[None], torch.from_numpy(example.mask)[None]
    )
    assert 0 < float(iou) < 1
    assert float(iou) == pytest.approx(metrics.iou(candidate.masks[0], example.mask))


@pytest.mark.parametrize(("size", "rows", "columns"), [(WIDE, 26, 64), (WIDE[::-1], 64, 26)])
def test_padding_has_no_loss(segmenter, monkeypatch, size, rows, columns) -> None:
    example, tuner, losses = example_of(segmenter, disc(size, 20, 20, 12)), segmenter.fine_tuner(), []
    for beyond in (-5.0, -20.0):
        low_res = torch.full((1, 1, 64, 64), beyond)
        low_res[..., :rows, :columns] = -1
        low_res.requires_grad_()
        fix_output(tuner, monkeypatch, low_res, score=0.5)
        loss = tuner.loss([example], seed=0)
        loss.backward()
        assert (low_res.grad[0, 0, :rows, :columns] != 0).all()
        assert low_res.grad.count_nonzero() == rows * columns
        losses.append(float(loss.detach()))
    assert losses[0] == losses[1]


def test_the_loss_of_a_batch_is_the_mean_of_its_examples(segmenter, monkeypatch) -> None:
    mask = disc(WIDE, 26, 30, 12)
    first = example_of(segmenter, mask)
    mask_input = np.where(mask, 5, -5).astype(np.float32)
    examples = [
        first,
        example_of(segmenter, disc(WIDE[::-1], 30, 30, 9), seed=1),
        replace(first, prompts=Prompts(1, BOX, **POINTS)),
        replace(first, mask=np.zeros(WIDE, bool), prompts=Prompts(1, BOX + 3)),
        replace(first, prompts=Prompts(1, BOX, mask_input=mask_input)),
    ]
    tuner, sizes = segmenter.fine_tuner(), []
    with torch.no_grad():
        separate = [float(tuner.loss([example], seed=0)) for example in examples]
        forward = tuner._decoder.mask_decoder.forward

        def recorded(**kwargs):
            sizes.append(len(kwargs["sparse_prompt_embeddings"]))
            return forward(**kwargs)

        monkeypatch.setattr(tuner._decoder.mask_decoder, "forward", recorded)
        together = float(tuner.loss(examples, seed=1))
    assert sizes == [2, 1, 1, 1], "one call for the two boxes on one image"
    assert together == pytest.approx(np.mean(separate), rel=1e-4)
    assert len({round(loss, 4) for loss in separate}) == 5


def test_jittered_boxes_do_not_change_the_loss_and_mask_inputs_do(segmenter) -> None:
    mask = disc(WIDE, 26, 30, 12)
    plain = example_of(segmenter, mask)
    with_mask_input = replace(plain, prompts=Prompts(1, BOX, mask_input=np.where(mask, 5, -5).astype(np.float32)))
    jittered = replace(plain, prompts=Prompts(1, BOX, jittered_boxes=np.array([BOX + 3, BOX - 3])))
    tuner = segmenter.fine_tuner()
    losses = [float(tuner.loss([example], seed=0).detach()) for example in (plain, with_mask_input, jittered)]
    assert losses[0] == losses[2] != losses[1]


def test_float16_features_have_gradients(segmenter) -> None:
    example = example_of(segmenter, disc(WIDE, 26, 30, 12))
    half = replace(example, embedding=Embedding(WIDE, example.embedding.features.astype(np.float16)))
    tuner = segmenter.fine_tuner()
    full, rounded = (tuner.loss([each], seed=0) for each in (example, half))
    torch.testing.assert_close(full, rounded, rtol=0.02, atol=0)
    rounded.backward()


def test_unfit_examples_are_refused(segmenter) -> None:
    example, tuner = example_of(segmenter, disc(WIDE, 26, 30, 12)), segmenter.fine_tuner()
    with pytest.raises(ValueError, match=r"mask of the image's own \(H, W\) = \(60, 150\), got \(150, 60\)"):
        tuner.loss([replace(example, mask=example.mask.T)], seed=0)
    with pytest.raises(ValueError, match="expected features"):
        tuner.loss([replace(example, embedding=Embedding(WIDE))], seed=0)
    with pytest.raises(ValueError, match="x0 < x1"):
        tuner.loss([replace(example, prompts=Prompts(1, BOX[::-1].copy()))], seed=0)

"""SAM on random weights: equal to the official predictor."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.segmenter_suite import SegmenterSuite, box_prompts, images, random_sam, record_prompts
from segment_anything import SamPredictor

from kmine.errors import UserError
from kmine.segmenters import batched
from kmine.segmenters.base import Embedding
from kmine.segmenters.pixels import lite_medsam_pixels, medsam_pixels
from kmine.segmenters.sam.build import build_sam, feed_of
from kmine.segmenters.sam.segmenter import SamSegmenter
from kmine.types import Prompts


class TestSam(SegmenterSuite):
    @pytest.fixture(scope="class")
    def segmenter(self):
        return SamSegmenter(random_sam(), name="sam_small", batch_size=2)

    @pytest.fixture(scope="class")
    def other(self):
        return SamSegmenter(random_sam(seed=1), name="sam_small")


SHAPES = {"wide": (60, 150), "tall": (201, 97), "square": (64, 64)}


BOX = np.array([10, 12, 50, 40], np.float32)


ONE_POINT = {"point_coords": np.array([[30, 20]], np.float32), "point_labels": np.array([1])}


TWO_POINTS = {"point_coords": np.array([[30, 20], [5, 50.5]], np.float32), "point_labels": np.array([1, 0])}


FORMS = {
    "box": Prompts(1, BOX),
    "point": Prompts(1, None, **ONE_POINT),
    "points": Prompts(1, None, **TWO_POINTS),
    "box+points": Prompts(1, BOX, **TWO_POINTS),
}


@pytest.fixture(scope="module")
def small():
    return random_sam()


@pytest.fixture
def spy(small, monkeypatch):
    return record_prompts(small, monkeypatch)


def with_mask_input(prompts: Prompts, size) -> Prompts:
    rows, columns = np.mgrid[: size[0], : size[1]]
    mask_input = (20 - np.hypot(rows - 25, columns - 30)).astype(np.float32)
    return Prompts(1, prompts.box, prompts.point_coords, prompts.point_labels, mask_input=mask_input)


def assert_equals_official(segmenter: SamSegmenter, sam, image, prompts: Prompts, multimask: bool) -> None:
    candidate = segmenter.decode(segmenter.encode([image]), [[prompts]])[0][0]
    predictor = SamPredictor(sam)
    predictor.set_image(image)
    mask_input = None if prompts.mask_input is None else segmenter.decoder.mask_input(prompts.mask_input).numpy()
    masks, iou, low_res = predictor.predict(
        prompts.point_coords, prompts.point_labels, prompts.box, mask_input, multimask_output=multimask
    )
    np.testing.assert_array_equal(candidate.masks, masks)
    np.testing.assert_allclose(candidate.predicted_iou, iou.clip(0, 1), atol=1e-6)
    np.testing.assert_allclose(candidate.low_res_logits, low_res, atol=1e-5)
    assert 0 < masks.mean() < 1, "a mask with a border, so that the comparison means something"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_masks_equal_those_of_the_official_predictor(small, shape, form) -> None:
    (image,) = images(sizes=[SHAPES[shape]])
    assert_equals_official(SamSegmenter(small, name="s"), small, image, FORMS[form], multimask=form == "point")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_masks_equal_those_of_the_official_predictor_with_a_mask_input(small, shape, form) -> None:
    (image,) = images(sizes=[SHAPES[shape]])
    prompts = with_mask_input(FORMS[form], SHAPES[shape])
    assert_equals_official(SamSegmenter(small, name="s"), small, image, prompts, multimask=False)


def test_vit_b_equals_the_official_predictor() -> None:
    sam = random_sam("sam_vit_b")
    (image,) = images(sizes=[(90, 140)])
    assert_equals_official(
        SamSegmenter(sam, name="sam_vit_b"), sam, image, with_mask_input(FORMS["box"], (90, 140)), False
    )


def test_masks_equal_those_of_the_official_predictor_at_1024_px() -> None:
    sam = random_sam(image_size=1024)
    (image,) = images(sizes=[(90, 140)])
    segmenter = SamSegmenter(sam, name="s")
    (embedding,) = segmenter.encode([image])
    assert embedding.features.shape == (256, 64, 64)
    assert segmenter.decoder.mask_input(np.zeros((90, 140), np.float32)).shape == (1, 256, 256)
    assert_equals_official(segmenter, sam, image, with_mask_input(FORMS["box+points"], (90, 140)), False)


def test_stability_equals_the_official_one(small) -> None:
    from segment_anything.utils.amg import calculate_stability_score

    (image,) = images(sizes=[(60, 150)])
    segmenter, predictor = SamSegmenter(small, name="s"), SamPredictor(small)
    candidate = segmenter.decode(segmenter.encode([image]), [[FORMS["point"]]])[0][0]
    predictor.set_image(image)
    logits, _, _ = predictor.predict(**ONE_POINT, return_logits=True)
    official = calculate_stability_score(torch.from_numpy(logits), 0.0, 1.0).numpy()
    np.testing.assert_allclose(candidate.stability_score, official, atol=1e-6)


def test_prompts_of_one_form_share_one_batch(small, spy) -> None:
    size = (60, 150)
    segmenter = SamSegmenter(small, name="s")
    embeddings = segmenter.encode(images(sizes=[size]))
    boxes = box_prompts((3, 4, 20, 25), (30, 10, 55, 38), jitters=3)
    mixed = [boxes[0], FORMS["point"], with_mask_input(FORMS["box"], size), boxes[1], FORMS["points"]]
    (candidates,) = segmenter.decode(embeddings, [mixed])
    assert [None if call["boxes"] is None else len(call["boxes"]) for call in spy] == [8, None, 1, None]
    assert [len(candidate.masks) for candidate in candidates] == [1, 3, 1, 1, 1]
    assert [len(candidate.jittered_masks) for candidate in candidates] == [3, 0, 0, 3, 0]
    for prompt, candidate in zip(mixed, candidates, strict=True):
        separate = segmenter.decode(embeddings, [[prompt]])[0][0]
        np.testing.assert_allclose(separate.low_res_logits, candidate.low_res_logits, atol=1e-4)


def test_splitting_a_batch_changes_nothing(small, spy, monkeypatch) -> None:
    segmenter = SamSegmenter(small, name="s")
    embeddings = segmenter.encode(images(sizes=[(60, 150)]))
    prompts = [box_prompts((3, 4, 20, 25), (30, 10, 55, 38), jitters=2)]
    (whole,) = segmenter.decode(embeddings, prompts)
    monkeypatch.setattr(batched, "MAX_LOGITS", 4 * 256**2)
    (split,) = segmenter.decode(embeddings, prompts)
    assert [len(call["boxes"]) for call in spy] == [6, 4, 2]
    for a, b in zip(whole, split, strict=True):
        np.testing.assert_allclose(a.low_res_logits, b.low_res_logits, atol=1e-4)
        assert len(b.jittered_masks) == 2


def test_a_cpu_decodes_a_few_large_rows_at_a_time() -> None:
    # 2 x 1024^2 floats a row, below 2^23: three; a frame of 100 megapixels leaves one.
    segmenter = SamSegmenter(random_sam(image_size=1024), name="s")
    assert [segmenter._queries_at_once(size, 1) for size in ((700, 940), (10_000, 10_000))] == [3, 1]


@pytest.mark.parametrize(("multimask", "num_masks"), [(True, 3), (False, 1)])
def test_the_number_of_masks_can_be_set(small, multimask, num_masks) -> None:
    segmenter = SamSegmenter(small, name="s", multimask=multimask)
    embeddings = segmenter.encode(images(sizes=[(60, 150)]))
    (candidates,) = segmenter.decode(embeddings, [[*box_prompts((3, 4, 20, 25), jitters=2), FORMS["point"]]])
    assert [len(candidate.masks) for candidate in candidates] == [num_masks, num_masks]
    assert [len(candidate.jittered_masks) for candidate in candidates] == [2, 0]


def test_a_jittered_box_keeps_its_best_mask_and_scores_stay_in_range(small, monkeypatch) -> None:
    segmenter = SamSegmenter(small, name="s", multimask=True)

    def fixed(**kwargs):
        num_rows = len(kwargs["sparse_prompt_embeddings"])
        logits = torch.tensor([-2.0, 2.0, -2.0]).reshape(1, 3, 1, 1).expand(num_rows, 3, 64, 64)
        return logits, torch.tensor([[-0.2, 1.1, 0.3]]).expand(num_rows, 3)

    monkeypatch.setattr(small.mask_decoder, "forward", fixed)
    embedding = Embedding((60, 60), np.zeros((256, 16, 16), np.float32))
    candidate = segmenter.decode([embedding], [box_prompts((3, 4, 20, 25), jitters=2)])[0][0]
    np.testing.assert_allclose(candidate.predicted_iou, [0, 1, 0.3])
    np.testing.assert_array_equal(candidate.stability_score, [np.nan, 1, np.nan])
    assert candidate.masks.mean(axis=(1, 2)).tolist() == [0, 1, 0]
    assert candidate.jittered_masks.all()


@pytest.mark.parametrize("broken", ["output_hypernetworks_mlps", "iou_prediction_head"])
def test_logits_that_are_nan_are_refused_with_the_name(broken) -> None:
    sam = random_sam()
    with torch.no_grad():
        next(getattr(sam.mask_decoder, broken).parameters()).fill_(float("nan"))
    segmenter = SamSegmenter(sam, name="s")
    with pytest.raises(UserError, match=r"segmenter `s`: expected finite logits.*segmenter\.checkpoint"):
        segmenter.decode(segmenter.encode(images(sizes=[(60, 60)])), [box_prompts((3, 4, 20, 25))])


def test_one_changed_weight_changes_the_signature() -> None:
    signatures = set()
    for change in (0.0, 1e-3):
        sam = random_sam()
        with torch.no_grad():
            sam.mask_decoder.iou_token.weight[0, 0] += change
        signatures.add(SamSegmenter(sam, name="s").signature)
    signatures.add(SamSegmenter(random_sam(), name="another name").signature)
    assert len(signatures) == 2


def drawn(name: str, side: int):
    """A TinyViT SAM with every tensor drawn."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sam = build_sam(name, None, side)
        with torch.no_grad():
            for parameter in sam.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return sam


@pytest.fixture(scope="module")
def mobile():
    return drawn("mobile_sam", 128)


@pytest.mark.parametrize("shape", ["wide", "tall"])
def test_mobile_sam_equals_the_official_predictor_with_its_encoder(mobile, shape) -> None:
    segmenter = SamSegmenter(mobile, name="mobile_sam", feed=feed_of("mobile_sam", 128))
    image = images(3, [SHAPES[shape]])[0]
    for prompts in (FORMS["box"], with_mask_input(FORMS["box+points"], SHAPES[shape])):
        assert_equals_official(segmenter, mobile, image, prompts, multimask=False)


def by_steps(sam, pixels: np.ndarray, box: np.ndarray, as_their_postprocessing) -> tuple[np.ndarray, float]:
    """Mask and predicted IoU of MedSAM's and LiteMedSAM's published inference, after the image is prepared."""
    with torch.no_grad():
        features = sam.image_encoder(torch.from_numpy(pixels)[None])
        sparse, dense = sam.prompt_encoder(points=None, boxes=torch.from_numpy(box).float()[None, None], masks=None)
        low_res, iou = sam.mask_decoder(features, sam.prompt_encoder.get_dense_pe(), sparse, dense, False)
        return as_their_postprocessing(low_res)[0, 0].numpy(), float(iou)


def resized(values, size):
    return torch.nn.functional.interpolate(values, size, mode="bilinear", align_corners=False)


def test_medsam_equals_the_steps_of_its_authors() -> None:
    sam, image = random_sam(), images(5, [(60, 150)])[0] // 2 + 30
    feed = feed_of("medsam", 256)
    segmenter = SamSegmenter(sam, name="medsam", feed=feed, multimask=False)
    box = BOX / np.array([150, 60, 150, 60]) * 256
    expected, _ = by_steps(
        sam, medsam_pixels(image, feed.frame), box, lambda low: resized(low.sigmoid(), (60, 150)) > 0.5
    )
    (plain, guided), _ = segmenter.decode(
        segmenter.encode([image, image]), [[FORMS["box"], with_mask_input(FORMS["box+points"], (60, 150))], []]
    )
    assert np.mean(plain.masks[0] != expected) < 1e-3 and 0 < expected.mean() < 1
    np.testing.assert_array_equal(plain.masks, guided.masks)  # neither points nor mask prompts
    assert np.isnan(plain.predicted_iou).all() and not np.isnan(plain.stability_score).any()
    with pytest.raises(UserError, match="expects a box"):
        segmenter.decode(segmenter.encode([image]), [[FORMS["point"]]])
    plain_sam = SamSegmenter(sam, name="s")
    assert (
        segmenter.signature != plain_sam.signature != segmenter.with_weights(segmenter.fine_tuner().state()).signature
    )
    assert segmenter._embedder.signature != plain_sam._embedder.signature


def test_lite_medsam_equals_the_steps_of_its_authors() -> None:
    sam, image = drawn("lite_medsam", 64), images(5, [(60, 150)])[0]
    feed = feed_of("lite_medsam", 64)
    segmenter = SamSegmenter(sam, name="lite_medsam", feed=feed, multimask=False)
    # The longest side, 150, becomes 64: 26 rows, 64 columns; logits have the side of the input.
    steps = by_steps(
        sam,
        lite_medsam_pixels(image, feed.frame),
        BOX * (64 / 150, 26 / 60, 64 / 150, 26 / 60),
        lambda low: resized(low[..., :26, :64], (60, 150)).sigmoid() > 0.5,
    )
    candidate = segmenter.decode(segmenter.encode([image]), [[FORMS["box"]]])[0][0]
    assert np.mean(candidate.masks[0] != steps[0]) < 1e-3
    assert candidate.predicted_iou[0] == pytest.approx(np.clip(steps[1], 0, 1), abs=1e-4)

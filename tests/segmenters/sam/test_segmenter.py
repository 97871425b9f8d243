"""SAM on random weights: equal to the official predictor, frames by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.segmenter_suite import box_prompts, images, random_sam
from segment_anything import SamPredictor, sam_model_registry

from kmine.errors import UserError
from kmine.segmenters.base import Embedding
from kmine.segmenters.sam import segmenter as module
from kmine.segmenters.sam.build import ARCHITECTURES, build_sam
from kmine.segmenters.sam.segmenter import MASK_INPUT_CLIP, SamSegmenter
from kmine.types import Prompts

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
    """What reaches the prompt encoder, call by call."""
    calls, forward = [], small.prompt_encoder.forward

    def listen(**kwargs):
        calls.append(kwargs)
        return forward(**kwargs)

    monkeypatch.setattr(small.prompt_encoder, "forward", listen)
    return calls


def hinted(prompts: Prompts, size) -> Prompts:
    rows, columns = np.mgrid[: size[0], : size[1]]
    hint = (20 - np.hypot(rows - 25, columns - 30)).astype(np.float32)
    return Prompts(1, prompts.box, prompts.point_coords, prompts.point_labels, mask_input=hint)


def assert_equals_official(segmenter: SamSegmenter, sam, image, prompts: Prompts, multimask: bool) -> None:
    candidate = segmenter.decode(segmenter.encode([image]), [[prompts]])[0][0]
    predictor = SamPredictor(sam)
    predictor.set_image(image)
    hint = None if prompts.mask_input is None else segmenter._mask_input(prompts.mask_input).numpy()
    masks, iou, low_res = predictor.predict(
        prompts.point_coords, prompts.point_labels, prompts.box, hint, multimask_output=multimask
    )
    np.testing.assert_array_equal(candidate.masks, masks)
    np.testing.assert_allclose(candidate.predicted_iou, iou.clip(0, 1), atol=1e-6)
    np.testing.assert_allclose(candidate.low_res_logits, low_res, atol=1e-5)
    assert 0 < masks.mean() < 1, "a mask without a border proves little"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_built_as_the_official_models_are(name) -> None:
    with torch.device("meta"):
        ours, official = build_sam(name, None), sam_model_registry[name.removeprefix("sam_")]()
    assert str(ours) == str(official)  # every layer with its settings
    shapes = [{key: value.shape for key, value in sam.state_dict().items()} for sam in (ours, official)]
    assert shapes[0] == shapes[1]
    for attribute in ("window_size", "attn.num_heads", "attn.scale", "attn.use_rel_pos"):
        values = [[_get(block, attribute) for block in sam.image_encoder.blocks] for sam in (ours, official)]
        assert values[0] == values[1]
    for path in ("mask_decoder.num_multimask_outputs", "mask_decoder.transformer.num_heads", "training"):
        assert _get(ours, path) == _get(official, path)


def _get(owner, path: str):
    for part in path.split("."):
        owner = getattr(owner, part)
    return owner


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_official_predictor(small, shape, form) -> None:
    (image,) = images(sizes=[SHAPES[shape]])
    assert_equals_official(SamSegmenter(small, name="s"), small, image, FORMS[form], multimask=form == "point")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_official_predictor_with_a_hint(small, shape, form) -> None:
    (image,) = images(sizes=[SHAPES[shape]])
    prompts = hinted(FORMS[form], SHAPES[shape])
    assert_equals_official(SamSegmenter(small, name="s"), small, image, prompts, multimask=False)


def test_equals_the_official_predictor_at_true_width_and_depth() -> None:
    sam = random_sam("sam_vit_b")
    (image,) = images(sizes=[(90, 140)])
    assert_equals_official(SamSegmenter(sam, name="sam_vit_b"), sam, image, hinted(FORMS["box"], (90, 140)), False)


def test_equals_the_official_predictor_at_full_resolution() -> None:
    sam = random_sam(image_size=1024)
    (image,) = images(sizes=[(90, 140)])
    segmenter = SamSegmenter(sam, name="s")
    (embedding,) = segmenter.encode([image])
    assert embedding.features.shape == (256, 64, 64)
    assert segmenter._mask_input(np.zeros((90, 140), np.float32)).shape == (1, 256, 256)
    assert_equals_official(segmenter, sam, image, hinted(FORMS["box+points"], (90, 140)), False)


def test_stability_is_the_official_one(small) -> None:
    from segment_anything.utils.amg import calculate_stability_score

    (image,) = images(sizes=[(60, 150)])
    segmenter, predictor = SamSegmenter(small, name="s"), SamPredictor(small)
    candidate = segmenter.decode(segmenter.encode([image]), [[FORMS["point"]]])[0][0]
    predictor.set_image(image)
    logits, _, _ = predictor.predict(**ONE_POINT, return_logits=True)
    official = calculate_stability_score(torch.from_numpy(logits), 0.0, 1.0).numpy()
    np.testing.assert_allclose(candidate.stability_score, official, atol=1e-6)


def test_boxes_and_points_reach_the_prompt_encoder_in_its_frame(small, spy) -> None:
    segmenter = SamSegmenter(small, name="s")
    wide = Embedding((100, 200), np.zeros((256, 16, 16), np.float32))  # 256 / 200 = 1.28
    tall = Embedding((400, 100), np.zeros((256, 16, 16), np.float32))  # 256 / 400 = 0.64
    point = {"point_coords": np.array([[50, 25]], np.float32), "point_labels": np.array([1])}
    jitter = np.array([[20, 20, 100, 50]], np.float32)
    prompts = Prompts(1, np.array([10, 20, 110, 60], np.float32), **point, jittered_boxes=jitter)
    segmenter.decode([wide, tall], [[prompts], box_prompts((10, 20, 50, 200))])
    first, second = spy
    torch.testing.assert_close(
        first["boxes"], torch.tensor([[12.8, 25.6, 140.8, 76.8], [25.6, 25.6, 128.0, 64.0]]), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(first["points"][0], torch.tensor([[[64.0, 32.0]]] * 2))
    assert first["points"][1].tolist() == [[1], [1]]
    torch.testing.assert_close(second["boxes"], torch.tensor([[6.4, 12.8, 32.0, 128.0]]), atol=1e-4, rtol=0)
    assert second["points"] is None
    assert second["masks"] is None


def test_a_hint_is_clipped_resized_and_padded_with_background(small, spy) -> None:
    hint = np.full((100, 200), 3, np.float32)
    hint[:, 100:] = 50
    segmenter = SamSegmenter(small, name="s")
    embedding = Embedding((100, 200), np.zeros((256, 16, 16), np.float32))
    jitter = np.array([[20, 20, 100, 50]], np.float32)
    prompts = Prompts(1, np.array([10, 20, 110, 60], np.float32), mask_input=hint, jittered_boxes=jitter)
    segmenter.decode([embedding], [[prompts]])
    masks = spy[0]["masks"]
    assert masks.shape == (2, 1, 64, 64)  # a quarter of 256; the jittered box carries the hint, too
    assert torch.equal(masks[0], masks[1])
    padded = masks[0, 0]
    torch.testing.assert_close(padded[:32, :30], torch.full((32, 30), 3.0))  # 100 rows of 200 become 32 of 64
    torch.testing.assert_close(padded[:32, 34:], torch.full((32, 30), MASK_INPUT_CLIP))
    assert (padded[32:] == -MASK_INPUT_CLIP).all()


def test_a_hint_of_an_extremely_long_image_keeps_one_row(small) -> None:
    assert SamSegmenter(small, name="s")._mask_input(np.zeros((1, 1000), np.float32)).shape == (1, 64, 64)


def test_prompts_of_one_form_share_one_batch(small, spy) -> None:
    size = (60, 150)
    segmenter = SamSegmenter(small, name="s")
    embeddings = segmenter.encode(images(sizes=[size]))
    boxes = box_prompts((3, 4, 20, 25), (30, 10, 55, 38), jitters=3)
    mixed = [boxes[0], FORMS["point"], hinted(FORMS["box"], size), boxes[1], FORMS["points"]]
    (answers,) = segmenter.decode(embeddings, [mixed])
    assert [None if call["boxes"] is None else len(call["boxes"]) for call in spy] == [8, None, 1, None]
    assert [len(answer.masks) for answer in answers] == [1, 3, 1, 1, 1]
    assert [len(answer.jittered_masks) for answer in answers] == [3, 0, 0, 3, 0]
    for one, answer in zip(mixed, answers, strict=True):
        alone = segmenter.decode(embeddings, [[one]])[0][0]
        np.testing.assert_allclose(alone.low_res_logits, answer.low_res_logits, atol=1e-4)


def test_large_batches_are_split_without_a_trace(small, spy, monkeypatch) -> None:
    segmenter = SamSegmenter(small, name="s")
    embeddings = segmenter.encode(images(sizes=[(60, 150)]))
    prompts = [box_prompts((3, 4, 20, 25), (30, 10, 55, 38), jitters=2)]
    (whole,) = segmenter.decode(embeddings, prompts)
    monkeypatch.setattr(module, "MAX_LOGITS", 4 * 256**2)
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
    (answers,) = segmenter.decode(embeddings, [[*box_prompts((3, 4, 20, 25), jitters=2), FORMS["point"]]])
    assert [len(answer.masks) for answer in answers] == [num_masks, num_masks]
    assert [len(answer.jittered_masks) for answer in answers] == [2, 0]


def test_a_jittered_box_keeps_its_best_mask_and_scores_stay_in_range(small, monkeypatch) -> None:
    segmenter = SamSegmenter(small, name="s", multimask=True)

    def answer(**kwargs):
        num_rows = len(kwargs["sparse_prompt_embeddings"])
        logits = torch.tensor([-2.0, 2.0, -2.0]).reshape(1, 3, 1, 1).expand(num_rows, 3, 64, 64)
        return logits, torch.tensor([[-0.2, 1.1, 0.3]]).expand(num_rows, 3)

    monkeypatch.setattr(small.mask_decoder, "forward", answer)
    embedding = Embedding((60, 60), np.zeros((256, 16, 16), np.float32))
    candidate = segmenter.decode([embedding], [box_prompts((3, 4, 20, 25), jitters=2)])[0][0]
    np.testing.assert_allclose(candidate.predicted_iou, [0, 1, 0.3])
    np.testing.assert_array_equal(candidate.stability_score, [np.nan, 1, np.nan])
    assert candidate.masks.mean(axis=(1, 2)).tolist() == [0, 1, 0]
    assert candidate.jittered_masks.all()


def test_half_precision_features_are_read(small) -> None:
    segmenter = SamSegmenter(small, name="s")
    (embedding,) = segmenter.encode(images(sizes=[(60, 150)]))
    half = Embedding(embedding.size, embedding.features.astype(np.float16))
    full, rounded = (segmenter.decode([e], [box_prompts((3, 4, 90, 55))])[0][0] for e in (embedding, half))
    np.testing.assert_allclose(full.low_res_logits, rounded.low_res_logits, atol=0.05)


def test_features_of_another_model_are_refused(small) -> None:
    with pytest.raises(ValueError, match=r"expected features \(256, 16, 16\) of s, got None"):
        SamSegmenter(small, name="s").decode([Embedding((60, 60))], [box_prompts((3, 4, 20, 25))])


@pytest.mark.parametrize("broken", ["output_hypernetworks_mlps", "iou_prediction_head"])
def test_a_decoder_that_answers_nan_is_refused_by_name(broken) -> None:
    sam = random_sam()
    with torch.no_grad():
        next(getattr(sam.mask_decoder, broken).parameters()).fill_(float("nan"))
    segmenter = SamSegmenter(sam, name="s")
    with pytest.raises(UserError, match=r"segmenter `s` gave NaN or infinite logits.*segmenter\.checkpoint"):
        segmenter.decode(segmenter.encode(images(sizes=[(60, 60)])), [box_prompts((3, 4, 20, 25))])


def test_the_signature_sees_one_changed_weight() -> None:
    signatures = set()
    for change in (0.0, 1e-3):
        sam = random_sam()
        with torch.no_grad():
            sam.mask_decoder.iou_token.weight[0, 0] += change
        signatures.add(SamSegmenter(sam, name="s").signature)
    signatures.add(SamSegmenter(random_sam(), name="another name").signature)
    assert len(signatures) == 2

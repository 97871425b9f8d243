"""SAM's proposals equal the official generator's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.segmenter_suite import ProposalSuite, images, random_sam
from segment_anything import SamAutomaticMaskGenerator

from kmine.segmenters.base import proposals_of
from kmine.segmenters.sam import proposals as sam_proposals
from kmine.segmenters.sam.segmenter import SamSegmenter


@pytest.fixture(scope="module")
def sam():
    return random_sam()


@pytest.fixture(autouse=True)
def all_proposed(monkeypatch):
    """No thresholds, which random weights would not reach, and few points."""
    monkeypatch.setattr(sam_proposals, "MIN_PREDICTED_IOU", -9.0)
    monkeypatch.setattr(sam_proposals, "MIN_STABILITY", 0.0)
    monkeypatch.setattr(sam_proposals, "POINTS_PER_SIDE", 3)


class TestProposals(ProposalSuite):
    @pytest.fixture
    def segmenter(self, sam):
        return SamSegmenter(sam, name="sam_small")

    def test_the_image_encoder_does_not_run(self, segmenter, sam, monkeypatch) -> None:
        embeddings = segmenter.encode(images())
        monkeypatch.setattr(sam.image_encoder, "forward", None)
        assert len(list(segmenter.propose(embeddings))) == 3


@pytest.mark.parametrize("size", [(60, 150), (90, 40)])
def test_proposals_equal_those_of_the_official_generator(sam, size) -> None:
    (image,) = images(sizes=[size])
    segmenter = SamSegmenter(sam, name="s")
    (ours,) = segmenter.propose(segmenter.encode([image]))
    official = SamAutomaticMaskGenerator(
        sam, points_per_side=3, pred_iou_thresh=-9.0, stability_score_thresh=0.0, crop_n_layers=0
    ).generate(image)
    official = [record for record in official if record["area"]]
    assert len(ours.masks) == len(official) > 0
    whole = [record["segmentation"] for record in official]
    expected = proposals_of(size, whole, [record["predicted_iou"] for record in official], [0] * len(official))
    np.testing.assert_array_equal(ours.masks, expected.masks)
    np.testing.assert_allclose(ours.predicted_iou, expected.predicted_iou, atol=1e-5)
    np.testing.assert_allclose(ours.stability_score, [record["stability_score"] for record in official], atol=1e-5)


def test_below_the_threshold_of_predicted_iou_nothing_is_proposed(sam, monkeypatch) -> None:
    monkeypatch.setattr(sam_proposals, "MIN_PREDICTED_IOU", 9.0)
    segmenter = SamSegmenter(sam, name="s")
    (proposals,) = segmenter.propose(segmenter.encode(images(sizes=[(60, 150)])))
    assert proposals.masks.shape == (0, 60, 150) and proposals.predicted_iou.shape == (0,)


def test_points_are_decoded_in_batches(sam, monkeypatch) -> None:
    segmenter = SamSegmenter(sam, name="s")
    embeddings, batches, forward = segmenter.encode(images(sizes=[(60, 150)])), [], sam.prompt_encoder.forward

    def recorded(**kwargs):
        batches.append(len(kwargs["points"][0]))
        return forward(**kwargs)

    monkeypatch.setattr(sam.prompt_encoder, "forward", recorded)
    (whole,) = segmenter.propose(embeddings)
    monkeypatch.setattr(segmenter, "_queries_at_once", lambda size, num_masks: 4)
    (split,) = segmenter.propose(embeddings)
    assert batches == [9, 4, 4, 1] and len(whole.masks) == len(split.masks)
    assert torch.is_inference_mode_enabled() is False

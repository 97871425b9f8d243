"""The suite on every segmenter, the checks they share, and opening them by name."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from helpers.segmenter_suite import SMALL, SegmenterSuite, random_sam
from safetensors.torch import save_file

from kmine.config import SegmenterConfig
from kmine.errors import UserError
from kmine.segmenters import REGISTRY, open_segmenter, weights
from kmine.segmenters.base import (
    check_images,
    check_prompts,
    clip_boxes,
    stability_from_logits,
)
from kmine.segmenters.ellipse import Ellipse
from kmine.segmenters.sam.build import ARCHITECTURES
from kmine.segmenters.sam.segmenter import SamSegmenter
from kmine.types import Prompts

BOX = np.array([1, 1, 5, 5], np.float32)


class TestEllipse(SegmenterSuite):
    @pytest.fixture
    def segmenter(self):
        return Ellipse()

    @pytest.fixture
    def other(self):
        return None


class TestSam(SegmenterSuite):
    @pytest.fixture(scope="class")
    def segmenter(self):
        return SamSegmenter(random_sam(), name="sam_small", batch_size=2)

    @pytest.fixture(scope="class")
    def other(self):
        return SamSegmenter(random_sam(seed=1), name="sam_small")


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((4, 5), np.uint8), "grey"),
        (np.zeros((4, 5, 1), np.uint8), "grey"),
        (np.zeros((4, 5, 4), np.uint8), "alpha"),
        (np.zeros((3, 4, 5), np.uint8), "last axis"),
        (np.zeros((0, 5, 3), np.uint8), "no pixels"),
        (np.zeros((4, 5, 3), np.float32), "astype"),
    ],
)
def test_an_unfit_image_is_named_with_its_cure(image, words) -> None:
    with pytest.raises(ValueError, match=f"expected .H, W, 3. uint8 RGB .*{image.dtype}.*{words}"):
        check_images([image])


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        (Prompts(1, None), "got neither"),
        (Prompts(1, None, mask_input=np.zeros((8, 10), np.float32)), "got neither"),
        (Prompts(1, np.array([5, 5, 5, 9], np.float32)), "x0 < x1"),
        (Prompts(1, np.array([np.nan, 5, 7, 9], np.float32)), "x0 < x1"),
        (Prompts(1, np.array([1, 5, np.inf, 9], np.float32)), "x0 < x1"),
        (Prompts(1, np.array([10, 1, 14, 5], np.float32)), "entirely outside the image, 10 wide and 8 high"),
        (Prompts(1, BOX, jittered_boxes=np.array([[-9, 1, 0, 5]], np.float32)), "entirely outside"),
        (Prompts(1, BOX, np.array([[3, 9]], np.float32), np.array([1])), "outside the image"),
        (Prompts(1, BOX, np.array([[3, 3]], np.float32), None), "point_labels"),
        (Prompts(1, None, np.zeros((0, 2), np.float32), np.zeros(0, np.int64)), "P >= 1"),
        (Prompts(1, BOX, np.array([[3, 3]], np.float32), np.array([2])), "1 .foreground."),
        (Prompts(1, BOX, mask_input=np.zeros((10, 8), np.float32)), r"\(8, 10\), got \(10, 8\)"),
        (Prompts(1, BOX, mask_input=np.full((8, 10), np.nan, np.float32)), "NaN"),
        (
            Prompts(1, None, np.array([[3, 3]], np.float32), np.array([1]), jittered_boxes=BOX[None]),
            "jittered boxes without a box",
        ),
    ],
)
def test_unfit_prompts_are_named(prompts, words) -> None:
    with pytest.raises(ValueError, match=words):
        check_prompts(prompts, (8, 10))


def test_points_up_to_the_outer_edge_of_the_last_pixel_are_fit() -> None:
    coords = np.array([[-0.5, -0.5], [9.5, 7.5]], np.float32)
    check_prompts(Prompts(1, None, coords, np.array([1, 0])), (8, 10))


def test_boxes_are_clipped_to_the_image() -> None:
    clipped = clip_boxes(np.array([[-2, 1, 99, 8.5], [1, 2, 3, 4]], np.float32), (8, 10))
    assert clipped.tolist() == [[0, 1, 10, 8], [1, 2, 3, 4]]


def test_stability_by_hand() -> None:
    # Above +1: one pixel; above -1: three. Then nothing above -1; then everything above both.
    logits = np.array([[[2, 0.5], [-0.5, -3]], [[-2, -2], [-2, -1]], [[5, 5], [5, 5]]], np.float32)
    np.testing.assert_allclose(stability_from_logits(logits), [1 / 3, np.nan, 1], rtol=1e-6)
    assert stability_from_logits(logits, threshold=0.5, offset=0.5)[0] == 0.5


def test_opening_the_ellipse() -> None:
    assert open_segmenter(SegmenterConfig("ellipse"), device="cpu", offline=True).name == "ellipse"
    with pytest.raises(UserError, match="has no weights"):
        open_segmenter(SegmenterConfig("ellipse", checkpoint="x.pth"), device="cpu", offline=True)


def test_an_unknown_name_gets_the_nearest_suggested() -> None:
    with pytest.raises(UserError, match=r"unknown name 'sam_vitb'; did you mean sam_vit_b\?"):
        open_segmenter(SegmenterConfig("sam_vitb"), device="cpu", offline=True)
    with pytest.raises(UserError, match=", ".join(sorted(REGISTRY))):
        open_segmenter(SegmenterConfig("zzz"), device="cpu", offline=True)


def test_a_missing_checkpoint_is_named(tmp_path) -> None:
    with pytest.raises(UserError, match="no such file"):
        open_segmenter(SegmenterConfig("sam_vit_b", str(tmp_path / "no.pth")), device="cpu", offline=True)


def test_offline_without_weights_says_where_they_belong(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("KMINE_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"weights/sam_vit_b_01ec64.pth.*--offline.*--segmenter.checkpoint"):
        open_segmenter(SegmenterConfig("sam_vit_b"), device="cpu", offline=True)


def test_a_checkpoint_of_ones_own_is_named_in_tables(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, "sam_vit_b", SMALL)
    path = tmp_path / "medsam.safetensors"
    save_file(random_sam(image_size=1024).state_dict(), path)
    cfg = SegmenterConfig("sam_vit_b", str(path))
    assert open_segmenter(cfg, device="cpu", offline=True).name == "sam_vit_b:medsam"
    official = weights.Weights("http://127.0.0.1/x.pth", weights.sha256_of(path))
    monkeypatch.setitem(weights.OFFICIAL_WEIGHTS, "sam_vit_b", official)
    assert open_segmenter(cfg, device="cpu", offline=True).name == "sam_vit_b"


def test_importing_the_package_costs_no_torch() -> None:
    code = "import sys, kmine.segmenters; sys.exit('torch' in sys.modules or 'segment_anything' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

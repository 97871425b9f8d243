"""`tiny`: the suite on random weights, the ellipse at step 0, geometry by hand, files of weights."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from helpers.segmenter_suite import (
    SegmenterSuite,
    assert_same,
    box_prompts,
    images,
)

from kmine.config import SegmenterConfig
from kmine.errors import UserError
from kmine.ops.masks import tight_box
from kmine.segmenters import open_segmenter
from kmine.segmenters.ellipse import Ellipse
from kmine.segmenters.tiny import weights as tiny_weights
from kmine.segmenters.tiny.crop import Window, window_of
from kmine.segmenters.tiny.network import (
    NUM_PLANES,
    NetworkInput,
    TinyNet,
    ellipse_logits,
    planes_of,
)
from kmine.segmenters.tiny.segmenter import Tiny, open_tiny
from kmine.segmenters.tiny.weights import (
    SHIPPED,
    load_tiny,
    save_tiny,
    signature_of,
)
from kmine.types import Prompts


def random_net(seed: int = 0) -> TinyNet:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = TinyNet()
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return net


def question(boxes, side: int = 96, **other) -> NetworkInput:
    count = len(boxes)
    fields = {
        "image": torch.full((count, 3, side, side), 90.0),
        "limits": torch.tensor([[-0.5, -0.5, side - 0.5, side - 0.5]] * count),
        "boxes": torch.tensor(boxes, dtype=torch.float32),
        "points": torch.zeros(count, 0, 2),
        "point_labels": torch.zeros(count, 0, dtype=torch.long),
        "mask_input": torch.zeros(count, 1, side, side),
        "has_mask_input": torch.zeros(count),
    }
    return NetworkInput(**{**fields, **other})


class TestTiny(SegmenterSuite):
    @pytest.fixture(scope="class")
    def segmenter(self):
        return Tiny(random_net(), batch_size=4)

    @pytest.fixture(scope="class")
    def other(self):
        return Tiny(random_net(seed=1))


class TestShipped(SegmenterSuite):
    @pytest.fixture(scope="class")
    def segmenter(self):
        return open_segmenter(SegmenterConfig("tiny"), device="cpu", offline=True)

    @pytest.fixture(scope="class")
    def other(self):
        return Tiny(random_net())


EDGE_BOXES = {
    "inner": (3, 4, 20, 25),
    "corner": (0, 0, 9, 7),
    "over_the_border": (-9, 4, 99, 70),
    "whole": (0, 0, 60, 40),
    "one_pixel": (7.5, 3.5, 8.5, 4.5),
    "thin": (2, 10, 58, 11.5),
}


@pytest.mark.parametrize("box", EDGE_BOXES.values(), ids=EDGE_BOXES)
def test_untrained_it_is_the_ellipse(box) -> None:
    picture = images()[:1]
    untrained, floor = Tiny(TinyNet()), Ellipse()
    prompts = [box_prompts(box, jitters=2 if box[2] - box[0] > 2 else 0)]
    (ours,), (theirs,) = (s.decode(s.encode(picture), prompts)[0] for s in (untrained, floor))
    np.testing.assert_array_equal(ours.masks, theirs.masks)
    np.testing.assert_array_equal(ours.jittered_masks, theirs.jittered_masks)


@pytest.mark.parametrize("box", EDGE_BOXES.values(), ids=EDGE_BOXES)
def test_any_box_gets_an_answer_inside_its_window(box) -> None:
    segmenter = Tiny(random_net())
    (prompts,) = box_prompts(box)
    candidate = segmenter.decode(segmenter.encode(images()[:1]), [[prompts]])[0][0]
    assert 0 <= candidate.predicted_iou[0] <= 1
    assert np.isfinite(candidate.low_res_logits).all()
    window = window_of(np.clip(box, 0, [60, 40, 60, 40]), 96)
    outside = np.ones((40, 60), bool)
    outside[max(window.top, 0) : window.top + window.height, max(window.left, 0) : window.left + window.width] = False
    assert not (candidate.masks[0] & outside).any()


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (9, 3), (20, 30), (1, 80), (80, 1)])
def test_images_smaller_than_the_crop(size) -> None:
    segmenter = Tiny(random_net())
    embeddings = segmenter.encode([np.zeros((*size, 3), np.uint8)])
    candidate = segmenter.decode(embeddings, [box_prompts((0, 0, size[1], size[0]))])[0][0]
    assert candidate.masks.shape == (1, *size)


def test_batches_of_any_size_answer_alike() -> None:
    prompts = [box_prompts((3, 4, 20, 25), (1, 1, 9, 9), jitters=3), box_prompts((0, 0, 30, 30)), []]
    one, many = (Tiny(random_net(), batch_size=size) for size in (1, 64))
    for a, b in zip(*(s.decode(s.encode(images()), prompts)[0] for s in (one, many)), strict=True):
        assert_same(a, b, flipped=2e-3)


def test_points_and_hints_change_the_answer_and_may_be_mixed_in_a_batch() -> None:
    segmenter = Tiny(random_net())
    box = np.array((10, 5, 40, 30), np.float32)
    point = {"point_coords": np.array([[20, 12], [12, 8]], np.float32), "point_labels": np.array([1, 0])}
    hint = np.where(np.arange(60) < 25, 9, -9).astype(np.float32) * np.ones((40, 1), np.float32)
    asked = [Prompts(1, box), Prompts(1, box, **point), Prompts(1, box, mask_input=hint)]
    embeddings = segmenter.encode(images()[:1])
    together = segmenter.decode(embeddings, [asked])[0]
    for candidate, prompts in zip(together, asked, strict=True):
        assert_same(candidate, segmenter.decode(embeddings, [[prompts]])[0][0], flipped=2e-3)
    plain, pointed, hinted = (candidate.low_res_logits for candidate in together)
    assert np.abs(plain - pointed).max() > 1e-3
    assert np.abs(plain - hinted).max() > 1e-3


UNFIT = {
    "box beside the image": (Prompts(1, np.array([60, 1, 70, 5], np.float32)), "entirely outside the image, 60 wide"),
    "box without area": (Prompts(1, np.array([5, 9, 20, 9], np.float32)), "x0 < x1 and y0 < y1"),
    "corners swapped": (Prompts(1, np.array([20, 20, 5, 9], np.float32)), "swap the corners"),
    "jittered box beside the image": (
        Prompts(1, np.array([3, 4, 20, 25], np.float32), jittered_boxes=np.array([[3, 40, 9, 50]], np.float32)),
        r"box .3.0, 40.0, 9.0, 50.0.: it lies entirely outside",
    ),
    "point beside the image": (
        Prompts(1, np.array([3, 4, 20, 25], np.float32), np.array([[30, 50]], np.float32), np.array([1])),
        "outside the image, 60 wide and 40 high",
    ),
    "hint of another size": (
        Prompts(1, np.array([3, 4, 20, 25], np.float32), mask_input=np.zeros((96, 96), np.float32)),
        r"mask_input: expected the image's own .H, W. = .40, 60., got .96, 96.",
    ),
}


@pytest.mark.parametrize(("prompts", "words"), UNFIT.values(), ids=UNFIT)
def test_unfit_prompts_are_named_with_their_cure(prompts, words) -> None:
    segmenter = Tiny(TinyNet())
    with pytest.raises(ValueError, match=words):
        segmenter.decode(segmenter.encode(images()[:1]), [[*box_prompts((3, 4, 9, 9)), prompts]])


def test_points_alone_name_the_setting() -> None:
    segmenter = Tiny(TinyNet())
    prompts = Prompts(1, None, np.array([[2, 2]], np.float32), np.array([1]))
    with pytest.raises(UserError, match=r"prompts\.box"):
        segmenter.decode(segmenter.encode([np.zeros((5, 5, 3), np.uint8)]), [[prompts]])


def test_embeddings_of_another_segmenter_are_refused() -> None:
    embeddings = Ellipse().encode([np.zeros((5, 5, 3), np.uint8)])
    with pytest.raises(ValueError, match="encode the image again"):
        Tiny(TinyNet()).decode(embeddings, [box_prompts((1, 1, 3, 3))])


def test_the_window_by_hand() -> None:
    # Box 40 wide and 30 high round (30, 45): 1.8 times that is 72 x 54, from -6 to 66 and from 18 to 72.
    # A pixel reaches half a pixel to either side of its centre, so the window starts at -6 and ends after 66.
    window = window_of(np.array([10, 30, 50, 60]), 96)
    assert (window.left, window.top, window.width, window.height) == (-6, 18, 73, 55)
    # Box 100 x 10: shown as if it were 50 high, 90 px; round (60, 45) from 0 to 90.
    flat = window_of(np.array([10, 40, 110, 50]), 96)
    assert (flat.top, flat.height, flat.left, flat.width) == (0, 91, -30, 181)
    # A dot is seen in 16 pixels.
    assert window_of(np.array([4, 4, 5, 5]), 96).width == 16


def test_coordinates_by_hand_on_a_window_that_is_not_square() -> None:
    # 48 x 24 pixels to 96 x 96: factors 2 and 4; the outer corner (9.5, 19.5) is the crop's outer corner.
    window = Window(left=10, top=20, width=48, height=24, side=96)
    np.testing.assert_allclose(window.to_crop(np.array([[9.5, 19.5], [10, 20], [57.5, 43.5]])),
                               [[-0.5, -0.5], [0.5, 1.5], [95.5, 95.5]])  # fmt: skip
    np.testing.assert_allclose(window.limits((30, 40)), [-20.5, -80.5, 59.5, 39.5])


def test_what_is_taken_lies_where_points_say() -> None:
    # One bright pixel at row 25, column 30 of a wide image.
    image = np.zeros((40, 90, 3), np.uint8)
    image[25, 30] = 255
    window = Window(left=10, top=20, width=48, height=24, side=96)
    crop = window.take(image)[..., 0].astype(float)
    x, y = window.to_crop(np.array([30, 25]))
    rows, columns = np.indices(crop.shape)
    assert (crop * columns).sum() / crop.sum() == pytest.approx(x, abs=0.05)
    assert (crop * rows).sum() / crop.sum() == pytest.approx(y, abs=0.05)


def test_taking_and_putting_back_a_slope_changes_nothing_inside() -> None:
    rows, columns = np.mgrid[:40, :60].astype(np.float32)
    slope = 2 * rows - columns
    window = Window(left=20, top=-8, width=64, height=30, side=96)
    part, where = window.put(window.take(slope), slope.shape)
    assert where == (slice(0, 22), slice(20, 60))
    np.testing.assert_allclose(part[2:-2, 2:-2], slope[where][2:-2, 2:-2], atol=0.1)


def test_planes_by_hand() -> None:
    limits = torch.tensor([[-0.5, 9.5, 95.5, 95.5]])
    points, labels = torch.tensor([[[30.0, 40.0], [50.0, 60.0]]]), torch.tensor([[1, -1]])
    planes = planes_of(question([[20, 30, 60, 80]], limits=limits, points=points, point_labels=labels))[0]
    assert planes.shape == (NUM_PLANES, 96, 96)
    assert planes[:3].abs().max() == 0  # a flat crop has no contrast to show
    assert planes[3, 9].max() == 0
    assert planes[3, 10].min() == 1
    assert planes[4, 55, 40] > 0.99
    assert planes[4, 30, 40] == 0.5
    assert planes[5, 55, 40] == 1
    assert planes[5, 55, 20] == pytest.approx(0, abs=1e-6)
    assert planes[6, 40, 30] == 1
    assert planes[6, 60, 50] < 1e-3
    assert planes[7].max() == 0


def test_brightness_and_contrast_do_not_matter() -> None:
    image = torch.rand(1, 3, 96, 96) * 100
    plain, brighter = (planes_of(question([[20, 30, 60, 80]], image=x)) for x in (image, 1.5 * image + 40))
    torch.testing.assert_close(plain, brighter, atol=1e-4, rtol=1e-4)


def test_every_weight_learns_and_the_scores_stay_in_range() -> None:
    net = random_net()
    asked = question([[20, 30, 60, 80], [5, 5, 90, 90]], image=torch.rand(2, 3, 96, 96) * 255)
    added, score = net(planes_of(asked))
    ((ellipse_logits(asked.boxes, 96, 96) + added).sigmoid().mean() + score.mean()).backward()
    assert added.shape == (2, 1, 96, 96)
    assert ((score > 0) & (score < 1)).all()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
    assert 0.8e6 < sum(p.numel() for p in net.parameters()) < 2.5e6
    with pytest.raises(ValueError, match="multiple of 16"):
        TinyNet(side=90)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "tiny.safetensors"
    save_tiny(random_net(), path, {"script": "by hand", "seed": 3})
    return path


def test_weights_come_back_and_are_small(saved) -> None:
    segmenter = open_tiny(saved)
    assert segmenter.name == "tiny"
    assert segmenter.signature == signature_of(load_tiny(saved)) != signature_of(random_net(1))
    assert saved.stat().st_size < 12e6
    note = json.loads(saved.with_suffix(".json").read_text())
    assert (note["seed"], len(note["sha256"])) == (3, 64)
    (candidate,) = segmenter.decode(segmenter.encode(images()[:1]), [box_prompts((3, 4, 20, 25))])[0]
    fresh = Tiny(random_net())
    (same,) = fresh.decode(fresh.encode(images()[:1]), [box_prompts((3, 4, 20, 25))])[0]
    np.testing.assert_allclose(candidate.low_res_logits, same.low_res_logits, atol=0.05)  # half precision on disk


def test_damaged_weights_are_named(saved, tmp_path) -> None:
    content = bytearray(saved.read_bytes())
    content[-5] ^= 1
    saved.write_bytes(content)
    with pytest.raises(UserError, match="expected SHA-256"):
        load_tiny(saved)
    saved.with_suffix(".json").write_text("{}")
    with pytest.raises(UserError, match="key `sha256`"):
        load_tiny(saved)
    saved.with_suffix(".json").unlink()
    load_tiny(saved)  # a file of one's own, without a note
    saved.write_bytes(content[:1000])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load_tiny(saved)
    with pytest.raises(UserError, match="no such file"):
        load_tiny(tmp_path / "none.safetensors")


def test_weights_of_something_else_are_named(tmp_path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="not weights of `tiny`"):
        load_tiny(path)
    save_file({"x": torch.zeros(2)}, path, metadata={"widths": "8 16", "side": "32"})
    with pytest.raises(UserError, match="not weights of `tiny`"):
        load_tiny(path)
    broken = random_net()
    with torch.no_grad():
        broken.head.bias[0] = float("nan")
    save_tiny(broken, path, {})
    with pytest.raises(UserError, match="not finite"):
        load_tiny(path)


def test_the_shipped_weights_are_small_whole_and_need_no_network(monkeypatch) -> None:
    monkeypatch.setattr("socket.socket", None)
    shipped = open_segmenter(SegmenterConfig("tiny"), device="cpu", offline=False)
    assert shipped.name == "tiny"
    assert shipped.signature == signature_of(load_tiny(SHIPPED)) != Tiny(random_net()).signature
    assert SHIPPED.stat().st_size <= 12e6
    note = json.loads(SHIPPED.with_suffix(".json").read_text())
    assert {"script", "commit", "seed", "step", "pool_seed", "sha256"} <= note.keys()


def test_the_shipped_weights_see_more_than_the_ellipse() -> None:
    # An ellipse 64 long and 22 wide, tilted by 45 degrees: it fills little of its box.
    rows, columns = np.mgrid[:80, :100]
    truth = ((columns + rows - 90) / 32) ** 2 + ((columns - rows - 10) / 11) ** 2 <= 2
    noise = np.random.default_rng(0).integers(-15, 16, (80, 100, 3))
    picture = (np.where(truth, 160, 70)[..., None] + noise).astype(np.uint8)
    (box,) = box_prompts(tight_box(truth))
    ious = []
    for segmenter in (Ellipse(), open_tiny(SHIPPED)):
        mask = segmenter.decode(segmenter.encode([picture]), [[box]])[0][0].masks[0]
        ious.append(np.count_nonzero(mask & truth) / np.count_nonzero(mask | truth))
    assert ious[0] < 0.5
    assert ious[1] > 0.8


def test_a_checkpoint_of_ones_own_is_named_in_tables(saved) -> None:
    own = open_segmenter(SegmenterConfig("tiny", str(saved)), device="cpu", offline=True)
    assert own.name == "tiny:tiny"
    assert own.signature == open_tiny(saved).signature
    with pytest.raises(UserError, match=r"none\.safetensors: no such file; .*--segmenter\.checkpoint FILE"):
        open_segmenter(SegmenterConfig("tiny", "none.safetensors"), device="cpu", offline=True)


def test_a_damaged_installation_says_so(saved, monkeypatch) -> None:
    monkeypatch.setattr(tiny_weights, "SHIPPED", saved)

    def refused(words: str) -> None:
        with pytest.raises(UserError, match=f"{words}.*; kmine ships it: reinstall kmine$") as caught:
            open_segmenter(SegmenterConfig("tiny"), device="cpu", offline=True)
        assert "--segmenter.checkpoint" not in str(caught.value)

    note, content = saved.with_suffix(".json"), bytearray(saved.read_bytes())
    content[-5] ^= 1
    saved.write_bytes(content)
    refused("expected SHA-256 [0-9a-f]{64} as tiny.json says, got [0-9a-f]{64}")
    text = note.read_text()
    note.write_text("{")
    refused("expected JSON with the key `sha256`")
    note.unlink()
    refused("tiny.json: no such file, so tiny.safetensors cannot be checked")
    note.write_text(text)
    saved.unlink()
    refused("tiny.safetensors: no such file")


def test_a_network_that_answers_nan_is_refused_by_name() -> None:
    net = random_net()
    with torch.no_grad():
        next(net.parameters()).fill_(float("nan"))
    segmenter = Tiny(net, name="tiny:mine")
    with pytest.raises(UserError, match="segmenter `tiny:mine` gave NaN or infinite logits"):
        segmenter.decode(segmenter.encode(images(sizes=[(60, 60)])), [box_prompts((3, 4, 20, 25))])

"""Pretraining of `tiny`: scenes and batches are decided by their seed, and crops equal those of the segmenter."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kmine.ops.masks import tight_box
from kmine.segmenters.tiny.crops import crop_queries, network_input
from kmine.segmenters.tiny.network import TinyNet, planes_of
from kmine.segmenters.tiny.segmenter import Tiny
from kmine.segmenters.tiny.weights import load_tiny
from kmine.types import Prompts

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tiny_segmenter"))
import batches
import generate
import scenes
import train


@pytest.fixture(scope="module")
def scene():
    return scenes.render_scene(np.random.default_rng(4))


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pool")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "PAIRS_PER_SHARD", 6)
        generate.claim(folder, seed=3)
        for shard in range(3):
            generate.write_shard(folder, 3, shard)
    return folder


def test_a_scene_is_decided_by_its_seed(scene) -> None:
    again, other = (scenes.render_scene(np.random.default_rng(seed)) for seed in (4, 5))
    np.testing.assert_array_equal(scene.image, again.image)
    assert (scene.image != other.image).any()
    assert scene.image.shape == (scenes.SIDE, scenes.SIDE, 3)
    assert scene.image.dtype == np.uint8
    assert all(mask.sum() >= scenes.MIN_AREA for mask in scene.masks)


def test_later_objects_hide_earlier_ones_except_those_they_belong_to() -> None:
    x = np.arange(40, dtype=np.float32)[None, :].repeat(40, 0)
    large, beside, inside = 10 - np.abs(x - 15), 5 - np.abs(x - 25), 2 - np.abs(x - 12)
    first, second, third = scenes.visible_masks([large, beside, inside])
    assert np.flatnonzero(first[0]).tolist() == list(range(5, 20))
    assert np.flatnonzero(second[0]).tolist() == list(range(20, 31))
    assert np.flatnonzero(third[0]).tolist() == list(range(10, 15))


def test_a_training_crop_equals_the_crop_of_the_segmenter(scene) -> None:
    segmenter = Tiny(TinyNet())
    embedding = segmenter.encode([scene.image])[0]
    for mask in scene.masks:
        view, meta = generate.view_of(scene.image, mask)
        views = torch.from_numpy(view).permute(2, 0, 1)[None].float()
        box, meta = torch.from_numpy(meta[None, :4]), torch.from_numpy(meta[None])
        crops, placed, limits = batches._cropped(views, box, meta, 96)
        rows = crop_queries(embedding, Prompts(1, tight_box(mask)), side=96, name="tiny")
        inputs = network_input(list(rows), "cpu")
        # The segmenter's window ends at whole pixels, one at most further out on either side.
        torch.testing.assert_close(placed, inputs.boxes, atol=2.5, rtol=0)
        difference = planes_of(inputs) - planes_of(inputs._replace(image=crops[:, :3], boxes=placed, limits=limits))
        assert difference[:, :3].abs().mean() < 0.15
        assert difference[:, 4:6].abs().mean() < 0.05


def test_a_pool_has_one_seed(pool) -> None:
    generate.claim(pool, seed=3)
    with pytest.raises(SystemExit, match="seed 3, got 4"):
        generate.claim(pool, seed=4)


def test_flips_and_transposes_move_box_and_object_together(scene) -> None:
    view, meta = generate.view_of(scene.image, scene.masks[0])
    views, metas = torch.from_numpy(view).permute(2, 0, 1)[None].float(), torch.from_numpy(meta[None])
    outcomes = set()
    for seed in range(30):
        turned, placed = batches._turned(views, metas, torch.Generator().manual_seed(seed))
        rows, columns = (turned[0, 3] > 127).nonzero().unbind(1)
        tight = torch.stack([columns.min(), rows.min(), columns.max(), rows.max()]).float()
        torch.testing.assert_close(placed[0, :4], tight, atol=1.5, rtol=0)
        outcomes.add(turned.numpy().tobytes())
    assert len(outcomes) > 3


def test_batches_are_decided_by_their_seed_and_hold_every_kind_of_prompt(pool) -> None:
    drawn = batches.Pool(pool, first=1)
    assert (len(drawn), len(batches.Pool(pool, stop=1))) == (12, 6)
    views, meta = drawn.gather(np.arange(12), "cpu")
    (inputs, truth), (same, _) = (
        batches.make_batch(views, meta, 96, torch.Generator().manual_seed(1)) for _ in range(2)
    )
    for a, b in zip(inputs, same, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert set(truth.unique().tolist()) == {0, 1}
    assert 0 < inputs.has_mask_input.mean() < 1
    assert (inputs.boxes[:, 2:] > inputs.boxes[:, :2]).all()
    assert set(inputs.point_labels.unique().tolist()) == {-1, 0, 1}
    plain, _ = batches.make_batch(views, meta, 96, torch.Generator().manual_seed(1), train=False)
    assert plain.has_mask_input.sum() == plain.points.numel() == 0


def test_a_correction_is_a_point_in_an_error_with_the_true_label(pool) -> None:
    views, meta = batches.Pool(pool).gather(np.arange(18), "cpu")
    inputs, truth = batches.make_batch(views, meta, 96, torch.Generator().manual_seed(2), train=False)
    logits = torch.where(truth > 0, 5.0, -5.0).roll(6, 3)
    logits[0] = torch.where(truth[0] > 0, 5.0, -5.0)
    again = batches.corrected(inputs, truth, logits, torch.Generator().manual_seed(3))
    assert again.point_labels[0, -1] == -1  # nothing to correct
    for index in range(1, 18):
        x, y = again.points[index, -1].long().tolist()
        assert truth[index, 0, y, x] == again.point_labels[index, -1]
        assert (logits[index, 0, y, x] > 0) != truth[index, 0, y, x]


def test_an_interrupted_training_gives_the_same_weights(pool, tmp_path, monkeypatch) -> None:
    def run(out: Path, *flags: str) -> dict[str, torch.Tensor]:
        words = ["train.py", str(pool), str(out), "--steps", "5", "--batch", "2", "--side", "32", "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", [*words, *flags])
        train.main()
        return load_file(out / "checkpoint.safetensors")

    whole = run(tmp_path / "whole")
    for _ in range(5):  # every call ends after one step
        parts = run(tmp_path / "parts", "--minutes", "0")
    assert whole.keys() == parts.keys()
    for key, tensor in whole.items():
        torch.testing.assert_close(parts[key], tensor, rtol=0, atol=0)
    note = json.loads((tmp_path / "whole" / "tiny.json").read_text())
    assert {"script", "seed", "step", "commit", "sha256", "pool_seed"} <= note.keys()
    assert load_tiny(tmp_path / "whole" / "tiny.safetensors").side == 32
    with pytest.raises(SystemExit, match=r"--lr 0\.002, got 0\.1; name another OUT"):
        run(tmp_path / "whole", "--lr", "0.1")

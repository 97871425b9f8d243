"""Masks recalled by SAM 2's video model on random weights: equal to the library's own session."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from helpers.hf_models import SIDE, save_random
from safetensors.torch import load_file, save_file

from kmine.errors import UserError
from kmine.segmenters.base import MemorySegmenter
from kmine.segmenters.hf.memory import HfMemorySegmenter
from kmine.segmenters.hf.open import open_hf
from kmine.segmenters.hf.segmenter import HfSegmenter

transformers = pytest.importorskip("transformers")
RNG = np.random.default_rng(0)
FRAMES = [RNG.integers(0, 256, (60 + 10 * n, 90, 3), dtype=np.uint8) for n in range(5)]
MASKS = [np.zeros(frame.shape[:2], bool) for frame in FRAMES]
for n, mask in enumerate(MASKS):
    mask[10 + n : 40, 20:60] = True


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that always sees an object."""
    folder = save_random("sam2_video", tmp_path_factory.mktemp("sam2_video"))
    weights = load_file(folder / "model.safetensors")
    last = max(
        name for name in weights if name.startswith("mask_decoder.pred_obj_score_head") and name.endswith("bias")
    )
    weights[last] += 100
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def opened(folder) -> HfSegmenter:
    return open_hf(f"hf:{folder}", folder, "cpu")


def own_session(folder, memory, frames):
    """Masks by the library's processor and model, as its documentation streams a video."""
    model = transformers.Sam2VideoModel.from_pretrained(folder).eval()
    images = transformers.Sam2ImageProcessor.from_pretrained(folder)
    video = transformers.Sam2VideoVideoProcessor(size={"height": SIDE, "width": SIDE})
    processor = transformers.Sam2VideoProcessor(images, video, target_size=SIDE)
    session, out = processor.init_video_session(inference_device="cpu"), []
    with torch.inference_mode():
        for number, (image, mask) in enumerate([*memory, *((frame, None) for frame in frames)]):
            if mask is not None:
                processor.add_inputs_to_inference_session(session, number, [1], input_masks=[mask])
            shown = images(images=[image], return_tensors="pt")
            logits = model(session, frame=shown["pixel_values"][0], frame_idx=number).pred_masks
            size = [image.shape[:2]]
            out.append(processor.post_process_masks([logits], size, binarize=True)[0][0, 0].numpy())
    return out[len(memory) :]


def test_tracked_masks_are_those_of_the_library(folder):
    segmenter = opened(folder)
    assert isinstance(segmenter, HfMemorySegmenter) and isinstance(segmenter, MemorySegmenter)
    memory = [(FRAMES[0], MASKS[0])]
    found = list(segmenter.recall(memory, iter(FRAMES[1:]), track=True))
    assert [mask.shape for mask in found] == [frame.shape[:2] for frame in FRAMES[1:]]
    assert all(map(np.array_equal, found, own_session(folder, memory, FRAMES[1:])))
    assert 0 < sum(mask.mean() for mask in found) < len(found)


def test_untracked_images_are_seen_with_the_memory_alone(folder):
    segmenter, memory = opened(folder), list(zip(FRAMES[:2], MASKS[:2], strict=True))
    found = list(segmenter.recall(memory, FRAMES[2:], track=False))
    backwards = list(segmenter.recall(memory, FRAMES[:1:-1], track=False))[::-1]
    assert all(map(np.array_equal, found, backwards))
    for frame, mask in zip(FRAMES[2:], found, strict=True):
        assert np.array_equal(mask, own_session(folder, memory, [frame])[0])


def test_the_signature_heeds_the_weights_of_the_memory(folder, tmp_path):
    changed = shutil.copytree(folder, tmp_path / "changed")
    weights = load_file(changed / "model.safetensors")
    weights["memory_encoder.projection.weight"] += 1
    save_file(weights, changed / "model.safetensors", {"format": "pt"})
    one, other = opened(folder), opened(changed)
    assert one.signature == other.signature and one.sign_memory() != other.sign_memory()


def test_a_checkpoint_without_a_memory_is_one_error(folder, tmp_path):
    plain = opened(save_random("sam2", tmp_path / "sam2"))
    assert not isinstance(plain, MemorySegmenter)
    cut = shutil.copytree(folder, tmp_path / "cut")
    weights = load_file(cut / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("memory_encoder")}
    save_file(kept, cut / "model.safetensors", {"format": "pt"})
    assert json.loads((cut / "config.json").read_text())["model_type"] == "sam2_video"
    with pytest.raises(UserError, match=r"expects the weights of SAM 2's video model, .* are missing"):
        next(opened(cut).recall([(FRAMES[0], MASKS[0])], FRAMES[1:], track=True))

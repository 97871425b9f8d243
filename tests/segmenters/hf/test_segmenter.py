"""Models of transformers on random weights: equal to the library's own processor and model."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from helpers.hf_models import KINDS, PROCESSORS, SIDE, save_random
from helpers.segmenter_suite import SegmenterSuite, box_prompts, images

from kmine.config import SegmenterConfig
from kmine.errors import UserError
from kmine.segmenters import open_segmenter
from kmine.segmenters.base import MASK_INPUT_CLIP, Embedding
from kmine.segmenters.embedding_cache import EmbeddingCache
from kmine.segmenters.hf.open import open_hf
from kmine.segmenters.hf.segmenter import HfSegmenter, load_network, stacked, unstacked
from kmine.types import Prompts

transformers = pytest.importorskip("transformers")
SHAPES = {"wide": (60, 150), "tall": (131, 97), "square": (64, 64)}
BOX = np.array([10, 12, 50, 40], np.float32)
ONE = {"point_coords": np.array([[30, 20]], np.float32), "point_labels": np.array([1])}
TWO = {"point_coords": np.array([[30, 20], [5, 50.5]], np.float32), "point_labels": np.array([1, 0])}
FORMS = {"box": Prompts(1, BOX), "point": Prompts(1, None, **ONE), "box+points": Prompts(1, BOX, **TWO)}


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    folders = {}

    def get(kind: str, seed: int = 0):
        if (kind, seed) not in folders:
            folders[kind, seed] = save_random(kind, tmp_path_factory.mktemp(f"{kind}-{seed}"), seed)
        return folders[kind, seed]

    return get


def opened(folder, **settings) -> HfSegmenter:
    return open_hf(f"hf:{folder}", folder, "cpu", **settings)


def ramp(size) -> np.ndarray:
    rows, columns = np.mgrid[: size[0], : size[1]]
    return (20 - np.hypot(rows - 25, columns - 30)).astype(np.float32)


def hint_by_hand(kind: str, logits: np.ndarray) -> torch.Tensor:
    """(1, 1, S, S): clipped; of SAM and SAM-HQ with the longest side S, padded with certain background."""
    side, (height, width) = SIDE // 4, logits.shape
    rows = columns = side
    if kind in ("sam", "sam_hq"):
        rows, columns = (int(n * side / max(height, width) + 0.5) for n in (height, width))
    plane = torch.from_numpy(logits.clip(-MASK_INPUT_CLIP, MASK_INPUT_CLIP))[None, None]
    out = torch.full((1, 1, side, side), -MASK_INPUT_CLIP)
    out[..., :rows, :columns] = torch.nn.functional.interpolate(plane, (rows, columns), mode="bilinear", antialias=True)
    return out


def reference(kind: str, folder, image, prompts: Prompts, multimask: bool):
    """Masks and predicted IoU of the library's processor and model."""
    model = getattr(transformers, KINDS[kind][1]).from_pretrained(folder).eval()
    image_processor = transformers.AutoImageProcessor.from_pretrained(folder)
    processor = getattr(transformers, PROCESSORS[kind])(image_processor)
    given = {}
    if prompts.box is not None:
        given["input_boxes"] = [[prompts.box.tolist()]]
    if prompts.point_coords is not None:
        given |= {"input_points": [[prompts.point_coords.tolist()]], "input_labels": [[prompts.point_labels.tolist()]]}
    inputs = processor(images=image, return_tensors="pt", **given)
    sizes, reshaped = inputs.pop("original_sizes"), inputs.pop("reshaped_input_sizes", None)
    inputs = {key: value.float() if value.is_floating_point() else value for key, value in inputs.items()}
    if prompts.mask_input is not None:
        inputs["input_masks"] = hint_by_hand(kind, prompts.mask_input)
    with torch.inference_mode():
        out = model(**inputs, multimask_output=multimask)
    if reshaped is not None:
        pad = {"pad_size": {"height": SIDE, "width": SIDE}}
        masks = image_processor.post_process_masks(out.pred_masks, sizes, reshaped, **pad)
    else:
        masks = processor.post_process_masks(out.pred_masks, sizes)
    return masks[0][0].numpy(), out.iou_scores[0, 0].numpy(), out.pred_masks[0, 0].numpy()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_masks_scores_and_frames_equal_the_library_s(saved, kind, shape) -> None:
    folder, size = saved(kind), SHAPES[shape]
    image = images(3, [size])[0]
    segmenter = opened(folder)
    (embedding,) = segmenter.encode([image])
    cases = [*FORMS.values(), Prompts(1, BOX, mask_input=ramp(size)), Prompts(1, None, **TWO, mask_input=ramp(size))]
    together = segmenter.decode([embedding], [cases])[0]
    for prompts, candidate in zip(cases, together, strict=True):
        multimask = prompts.box is None and len(prompts.point_labels) == 1 and prompts.mask_input is None
        masks, iou, low_res = reference(kind, folder, image, prompts, multimask)
        assert candidate.masks.shape == masks.shape == (3 if multimask else 1, *size)
        np.testing.assert_allclose(candidate.predicted_iou, iou.clip(0, 1), atol=2e-4)
        np.testing.assert_allclose(candidate.low_res_logits, low_res, atol=2e-3 * np.abs(low_res).max())
        assert np.mean(candidate.masks != masks) < 2e-3
    assert any(0 < candidate.masks.mean() < 1 for candidate in together), "masks with a border"


class TestHfSam(SegmenterSuite):
    @pytest.fixture(scope="class")
    def segmenter(self, saved):
        return opened(saved("sam"), batch_size=2)

    @pytest.fixture(scope="class")
    def other(self, saved):
        return opened(saved("sam", 1))


class TestHfSam2(SegmenterSuite):
    @pytest.fixture(scope="class")
    def segmenter(self, saved):
        return opened(saved("sam2"), batch_size=2)

    @pytest.fixture(scope="class")
    def other(self, saved):
        return opened(saved("sam2", 1))


def test_feature_maps_of_several_sides_are_one_array_and_back() -> None:
    maps = [torch.arange(c * s * s, dtype=torch.float32).view(1, c, s, s) for c, s in ((2, 8), (3, 4), (5, 2))]
    together = stacked(maps)
    assert together.shape == (1, 2 * 16 + 3 * 4 + 5, 2, 2)
    for a, b in zip(unstacked(together, [(2, 4), (3, 2), (5, 1)]), maps, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["sam_hq", "sam2"])
def test_an_image_is_encoded_once_for_all_processes(saved, kind, tmp_path, monkeypatch) -> None:
    cache = EmbeddingCache(tmp_path / "e", 10**9, print)
    first = opened(saved(kind), batch_size=2, cache=cache)
    calls, embed = [], first.decoder._model.network.get_image_embeddings
    monkeypatch.setattr(
        first.decoder._model.network, "get_image_embeddings", lambda p: calls.append(len(p)) or embed(p)
    )
    before = first.encode(images())
    assert calls == [2, 1]
    second = opened(saved(kind), cache=cache)
    monkeypatch.setattr(second.decoder._model.network, "get_image_embeddings", None)
    after = second.encode(images())
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a.features, b.features)
    assert second.signature == first.signature


def test_medsam_is_fed_as_it_was_trained(saved, tmp_path) -> None:
    folder = shutil.copytree(saved("sam"), tmp_path / "medsam-vit-base")
    medsam, sam = opened(folder), opened(saved("sam"))
    image = images(1, [(60, 150)])[0] // 2 + 20
    pixels = medsam.decoder._model.pixels([image])
    assert pixels.shape == (1, 3, SIDE, SIDE) and (pixels.min(), pixels.max()) == (0, 1)
    hinted = Prompts(1, BOX, **TWO, mask_input=ramp((60, 150)))
    (a,), (b,) = (medsam.decode(medsam.encode([image]), [[prompt]])[0] for prompt in (hinted, Prompts(1, BOX)))
    np.testing.assert_array_equal(a.masks, b.masks)  # neither points nor mask prompts
    assert np.isnan(a.predicted_iou).all() and not np.isnan(a.stability_score).any()
    assert medsam.signature != sam.signature
    with pytest.raises(UserError, match="expects a box"):
        medsam.decode(medsam.encode([image]), [[Prompts(1, None, **ONE)]])


def test_embeddings_of_another_model_are_refused(saved) -> None:
    segmenter = opened(saved("sam2"))
    with pytest.raises(ValueError, match=r"embedding: expected features \(128, 8, 8\)"):
        segmenter.decode([Embedding((20, 30))], [box_prompts((1, 1, 9, 9))])


def test_weights_that_lack_tensors_are_refused(saved, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(saved("sam"), tmp_path / "cut")
    state = load_file(folder / "model.safetensors")
    state.pop("mask_decoder.iou_token.weight")
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"1 are missing or of another shape, such as mask_decoder.iou_token.weight"):
        load_network(folder, "cut", "cpu")


def test_a_processor_of_another_size_is_refused(saved, tmp_path) -> None:
    folder = shutil.copytree(saved("sam2"), tmp_path / "resized")
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"size": {"height": 64, "width": 64}}))
    with pytest.raises(UserError, match=r"expected images of 128 px.*preprocessor_config.json has"):
        load_network(folder, "resized", "cpu")


def test_damaged_weights_are_one_line(saved, tmp_path) -> None:
    folder = shutil.copytree(saved("sam"), tmp_path / "damaged")
    (folder / "model.safetensors").write_bytes(b"{")
    with pytest.raises(UserError, match="transformers cannot read it") as refused:
        load_network(folder, "damaged", "cpu")
    assert "\n" not in str(refused.value)


def test_a_model_of_a_local_folder_is_opened_by_name(saved, tmp_path) -> None:
    cfg = SegmenterConfig(f"hf:{saved('sam')}", cache_dir=str(tmp_path))
    assert open_segmenter(cfg, device="cpu", offline=True).name == f"hf:{saved('sam').name}"
    with pytest.raises(UserError, match="has its own weights"):
        open_segmenter(SegmenterConfig(cfg.name, checkpoint="x.pth"), device="cpu", offline=True)


@pytest.mark.parametrize(("video", "image"), [("Sam2Video", "Sam2Model"), ("EdgeTamVideo", "EdgeTamModel")])
def test_a_checkpoint_of_a_video_model_gives_the_part_for_images(saved, tmp_path, video, image) -> None:
    kind = {"Sam2Video": "sam2", "EdgeTamVideo": "edgetam"}[video]
    folder = shutil.copytree(saved(kind), tmp_path / "video")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": f"{kind}_video"}))
    model = load_network(folder, "video", "cpu")
    assert type(model.network).__name__ == image

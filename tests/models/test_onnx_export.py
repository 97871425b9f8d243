"""An exported network gives the probabilities of the network, for any number of images."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kmine.config import ModelConfig
from kmine.models.build import build_model

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
SIZE = 40
"""Not a multiple of any stride, so that padding and cropping are exported."""
MODELS = {
    "unetpp": ModelConfig(
        name="unetpp", encoder="tu-test_resnet", encoder_depth=3, decoder_channels=8, normalization="imagenet"
    ),
    "dpt": ModelConfig(name="dpt", encoder="tu-test_vit", decoder_width=1),
    "sks": ModelConfig(name="sks", encoder="test_resnet", levels=3, decoder_channels=8),
    "sks without features at stride 2": ModelConfig(name="sks", encoder="test_convnext", levels=3, decoder_channels=8),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_probabilities_of_the_file_equal_those_of_the_network(name, tmp_path):
    from kmine.models.onnx_export import encode_onnx
    from kmine.models.onnx_session import open_session

    model = build_model(MODELS[name], 3, 0).eval()
    torch.manual_seed(0)
    for key, tensor in model.state_dict().items():
        if "fusions" in key:  # new fusions ignore the classifier's features
            tensor.copy_(0.1 * torch.randn_like(tensor))
        if key == "net.veto" and "stride" in name:
            tensor.copy_(torch.tensor([1.0, 0.0, 1.0]))  # all images are vetoed
    path = tmp_path / "model.onnx"
    path.write_bytes(encode_onnx(model, SIZE, '{"notes": 1}'))
    session = open_session(path, "cpu")
    assert session.get_modelmeta().custom_metadata_map["kmine"] == '{"notes": 1}'
    assert str(tmp_path).encode() not in path.read_bytes() and b"site-packages" not in path.read_bytes()
    for count in (1, 2, 5):
        images = np.random.default_rng(count).integers(0, 256, (count, SIZE, SIZE, 3), np.uint8)
        with torch.inference_mode():
            ours = model(torch.from_numpy(images).permute(0, 3, 1, 2)).softmax(dim=1).numpy()
        (theirs,) = session.run(None, {"images": images})
        assert theirs.shape == (count, 3, SIZE, SIZE) and theirs.dtype == np.float32
        assert (ours[:, -1].max() == 0) == ("stride" in name)
        assert ours.std() > 1e-3 and np.abs(ours - theirs).max() <= 1e-4

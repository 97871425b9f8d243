"""A local model as one ONNX file: its scaling inside, 8-bit images in, probabilities out."""

from __future__ import annotations

import io
import logging
import warnings
from contextlib import redirect_stdout

import torch
from torch import Tensor, nn

from kmine.errors import UserError
from kmine.models.base import LocalModel

INSTALL = "pip install 'kmine[onnx]'"
OPSET = 18


class _Plain(nn.Module):
    """(B, S, S, 3) uint8 RGB -> (B, K, S, S) float32 probabilities."""

    def __init__(self, model: LocalModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images.permute(0, 3, 1, 2)).float().softmax(dim=1)


def encode_onnx(model: LocalModel, size: int, notes: str) -> bytes:
    """The bytes of an ONNX file: input `images` (B, size, size, 3) uint8, output `probabilities` (B, K, size, size).

    The number of images is free, their side is not: kmine resizes to it. Images are uint8 because that is what files
    hold: nobody who uses the network can scale them wrongly.

    Args:
        model: on the CPU, in whatever mode; it is put to eval.
        size: S.
        notes: metadata, under the key `kmine`.

    Raises:
        UserError: onnx or onnxscript is not installed.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401  what torch's exporter is made of
    except ImportError as error:
        raise UserError(f"--export needs {error.name}, which is not installed; {INSTALL}") from error
    plain = _Plain(model).eval()
    images = torch.zeros((2, size, size, 3), dtype=torch.uint8)
    with torch.inference_mode():
        plain(images)  # windows of attention take the size of what they see: before they are written down
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                plain,
                (images,),
                input_names=["images"],
                output_names=["probabilities"],
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
    finally:
        exporter.setLevel(level)
    proto = program.model_proto
    onnx.helper.set_model_props(proto, {"kmine": notes})
    # Names of modules and lines of source, node by node: larger than small weights, and nobody's business.
    for node in proto.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*proto.graph.value_info, *proto.graph.input, *proto.graph.output, *proto.graph.initializer):
        del value.metadata_props[:]
    del proto.graph.metadata_props[:]
    for function in proto.functions:
        del function.metadata_props[:]
    proto.producer_name = "kmine"
    onnx.checker.check_model(proto)
    return proto.SerializeToString()

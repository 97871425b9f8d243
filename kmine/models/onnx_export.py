"""Export of a local model to one ONNX file: 8-bit images in, probabilities out, scaling included."""

from __future__ import annotations

import io
import logging
import warnings
from contextlib import redirect_stdout

import torch
from torch import Tensor, nn

from kmine.errors import UserError
from kmine.models.base import LocalModel
from kmine.models.onnx_file import BLANK, NOTES, PRODUCER, with_digest
from kmine.models.onnx_session import INSTALL

OPSET = 18


class _Plain(nn.Module):
    """(B, S, S, 3) uint8 RGB -> (B, K, S, S) float32 probabilities."""

    def __init__(self, model: LocalModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images.permute(0, 3, 1, 2)).float().softmax(dim=1)


def encode_onnx(model: LocalModel, size: int, notes: str) -> bytes:
    """Bytes of an ONNX file: input `images` (B, S, S, 3) uint8 RGB, output `probabilities` (B, K, S, S) float32.

    B is dynamic, S = `size` is fixed. Input is uint8, as in image files, so no scaling can go wrong. `model`, on the
    CPU, is set to eval mode; `notes` are stored as metadata under the key `kmine`.

    Raises:
        UserError: onnx or onnxscript is not installed.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401  needed by torch's exporter
    except ImportError as error:
        raise UserError(f"--export needs {error.name}, which is not installed; {INSTALL}") from error
    plain = _Plain(model).eval()
    images = torch.zeros((2, size, size, 3), dtype=torch.uint8)
    with torch.inference_mode():
        plain(images)  # sets the attention windows of Swin-v2 to the image size before the export
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
    onnx.helper.set_model_props(proto, {NOTES: notes})
    # Names of modules and source lines of every node: private, and larger than the weights of a small network.
    graph = proto.graph
    for node in graph.node:
        node.doc_string = ""
    values = (*graph.value_info, *graph.input, *graph.output, *graph.initializer)
    for part in (graph, *graph.node, *values, *proto.functions):
        del part.metadata_props[:]
    proto.producer_name, proto.producer_version = PRODUCER, BLANK.decode()
    onnx.checker.check_model(proto)
    return with_digest(proto.SerializeToString())

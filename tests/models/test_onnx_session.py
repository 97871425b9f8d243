"""Sessions for ONNX files: errors of files and devices, the number of threads."""

from __future__ import annotations

import pytest

from kmine.errors import UserError
from kmine.models.onnx_session import open_session

onnxruntime = pytest.importorskip("onnxruntime")


@pytest.mark.parametrize("content", [b"", b"not an ONNX model"])
def test_a_damaged_file_is_one_error_with_its_cure(tmp_path, content):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.onnx: not a whole ONNX model .*export it again"):
        open_session(path, "cpu")


def test_cuda_without_an_onnxruntime_for_it_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(UserError, match="install onnxruntime-gpu or use --device cpu"):
        open_session(tmp_path / "model.onnx", "cuda:0")


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("cpu", ["CPUExecutionProvider"]),
        ("auto", [("CUDAExecutionProvider", {"device_id": 0}), "CPUExecutionProvider"]),
        ("cuda:1", [("CUDAExecutionProvider", {"device_id": 1}), "CPUExecutionProvider"]),
    ],
)
def test_device_and_threads_reach_onnxruntime(tmp_path, monkeypatch, device, expected):
    opened = []
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(
        onnxruntime, "InferenceSession", lambda path, options, providers: opened.append((options, providers))
    )
    open_session(tmp_path / "model.onnx", device)
    ((options, providers),) = opened
    assert providers == expected and options.intra_op_num_threads == 3

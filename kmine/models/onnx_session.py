"""Inference sessions for ONNX files, without torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from kmine.errors import UserError

INSTALL = "pip install 'kmine[onnx]'"


def open_session(path: Path, device: str, data: bytes | None = None, *, threads: int | None = None) -> Any:
    """An inference session of onnxruntime on `device` (auto, cpu, cuda or cuda:N).

    `data` is the content of `path`, if it was read and examined before (`kmine.models.onnx_file`).

    A call takes `threads` threads; default: OMP_NUM_THREADS, which onnxruntime itself ignores, or onnxruntime's own.

    Raises:
        UserError: onnxruntime or the device is missing, or the file is not an ONNX model.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise UserError(f"{path}: an ONNX file needs onnxruntime, which is not installed; {INSTALL}") from error
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or _omp_num_threads()
    # Spinning threads would take the cores from the threads that read the next images.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return ort.InferenceSession(str(path) if data is None else data, options, providers=_providers(ort, device))
    except UserError:
        raise
    except Exception as error:  # onnxruntime's error classes have no common base
        first_line = "".join(c for c in str(error).split("\n")[0][:200] if c.isprintable())
        raise UserError(f"{path}: not a whole ONNX model ({first_line}); copy or export it again") from error


def num_cores() -> int:
    """Sessions that may be called at once: OMP_NUM_THREADS, or else the number of cores."""
    return _omp_num_threads() or os.cpu_count() or 1


def _omp_num_threads() -> int:
    """0 where it is not set."""
    threads = os.environ.get("OMP_NUM_THREADS", "")
    return int(threads) if threads.isdecimal() else 0


def _providers(ort: Any, device: str) -> list[Any]:
    has_cuda = "CUDAExecutionProvider" in ort.get_available_providers()
    if device.startswith("cuda") and not has_cuda:
        raise UserError(
            f"device: expected an onnxruntime with CUDA for {device!r}, this one has none; install onnxruntime-gpu or "
            "use --device cpu"
        )
    if device == "cpu" or not has_cuda:
        return ["CPUExecutionProvider"]
    number = int(device.partition(":")[2] or 0)
    return [("CUDAExecutionProvider", {"device_id": number}), "CPUExecutionProvider"]

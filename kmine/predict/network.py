"""Networks of PyTorch and ONNX behind one interface.

Letters: B images, K classes, S the side of the square.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from kmine.data.resize import Resizer
from kmine.errors import UserError
from kmine.predict.metadata import ModelMetadata

if TYPE_CHECKING:
    from kmine.models.base import LocalModel

FLIPS: dict[str, tuple[tuple[int, ...], ...]] = {"none": ((),), "hflip": ((), (2,)), "flips": ((), (2,), (1,), (1, 2))}
"""Flipped axes of the (B, S, S, 3) views."""


PART_PIXELS = 2**16
"""Pixels of the images that a core predicts at once: one image of 256 px."""


class BatchProbs(NamedTuple):
    """Prediction of a batch."""

    probs: NDArray[np.float32]
    """(B, K, S, S), sums to 1 over K."""
    std: NDArray[np.float32] | None
    """(B, 1, S, S) standard deviation of the foreground probability over the flips; None without flips."""

    def content(self, resizer: Resizer, shape: tuple[int, int]) -> BatchProbs:
        """The parts (..., h, w) that show images of `shape`."""
        std = None if self.std is None else resizer.content(self.std, *shape)
        return BatchProbs(resizer.content(self.probs, *shape), std)

    def per_image(self) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32] | None]]:
        """(K, S, S) and (1, S, S) of each image."""
        return zip(self.probs, [None] * len(self.probs) if self.std is None else self.std, strict=True)


class Network(Protocol):
    """A network ready to predict."""

    def predict(self, images: NDArray[np.uint8], tta: str) -> BatchProbs:
        """(B, S, S, 3) RGB in [0, 255] -> probabilities, averaged over the flips of `tta`, and their deviation.

        Raises:
            FloatingPointError: the probabilities are not finite.
        """


class _Cores:
    """Predicts a batch on a CPU in small parts, each by a thread of its own with one core.

    Threads wait for one another once a batch instead of in every layer, and a part stays in the caches (own choice).
    """

    def __init__(self, predict: Callable[[NDArray[np.uint8], str], BatchProbs], count: int) -> None:
        self._predict, self._pool, self._is_first = predict, ThreadPoolExecutor(count, "network"), True

    def __call__(self, images: NDArray[np.uint8], tta: str) -> BatchProbs:
        at_once = max(1, PART_PIXELS // images[0, ..., 0].size)
        parts = [images[first : first + at_once] for first in range(0, len(images), at_once)]
        done = [self._predict(parts.pop(0), tta)] if self._is_first else []  # networks may adapt to the size of images
        self._is_first = False
        done += self._pool.map(lambda part: self._predict(part, tta), parts)
        probs, deviations = zip(*done, strict=True)
        return BatchProbs(np.concatenate(probs), None if deviations[0] is None else np.concatenate(deviations))


class TorchNetwork:
    """The network of a run, on a device (auto, cpu, cuda or cuda:N); loaded at the first prediction."""

    def __init__(self, load: Callable[[], LocalModel], device: str) -> None:
        self._load, self._device = load, device

    def predict(self, images: NDArray[np.uint8], tta: str) -> BatchProbs:
        """See `Network`."""
        import torch

        cores, count = self._cores, torch.get_num_threads()
        try:
            return cores(images, tta) if cores and min(count, len(images)) > 1 else self._predict(images, tta)
        finally:
            torch.set_num_threads(count)  # of this thread, and of others to come

    def _predict(self, images: NDArray[np.uint8], tta: str) -> BatchProbs:
        from kmine.training.inference import predict_resized

        model, device = self._loaded
        probs, std = predict_resized(model, images, tta, device)
        return BatchProbs(probs, None if tta == "none" else std)

    @cached_property
    def _cores(self) -> _Cores | None:
        """None on a GPU."""
        import torch

        def predict(images: NDArray[np.uint8], tta: str) -> BatchProbs:
            torch.set_num_threads(1)  # of this thread
            return self._predict(images, tta)

        return _Cores(predict, torch.get_num_threads()) if self._loaded[1].type == "cpu" else None

    @cached_property
    def _loaded(self) -> tuple[LocalModel, Any]:
        import torch

        from kmine.models.fuse import fuse_conv_bn
        from kmine.setup.device import resolve_device

        device, model = resolve_device(self._device), self._load()
        fuse_conv_bn(model)
        return model.to(device, memory_format=torch.channels_last), device


class OnnxNetwork:
    """The network of an ONNX file."""

    path = Path("the model")

    def __init__(self, path: Path, device: str, data: bytes | None = None) -> None:
        from kmine.models.onnx_session import open_session

        self.path, self.session = path, open_session(path, device, data)
        self._open_single = partial(open_session, path, device, data, threads=1)

    def predict(self, images: NDArray[np.uint8], tta: str) -> BatchProbs:
        """See `Network`."""
        cores = self._cores
        return cores(images, tta) if cores and len(images) > 1 else self._predict(self.session, images, tta)

    @cached_property
    def _cores(self) -> _Cores | None:
        """None on a GPU, and with a single core."""
        from kmine.models.onnx_session import num_cores

        if (count := num_cores()) == 1 or self.session.get_providers() != ["CPUExecutionProvider"]:
            return None
        return _Cores(partial(self._predict, self._open_single()), count)

    def _predict(self, session: Any, images: NDArray[np.uint8], tta: str) -> BatchProbs:
        views = [self._view(session, images, axes) for axes in FLIPS[tta]]
        mean = np.mean(views, axis=0)
        if not np.isfinite(mean).all():
            raise FloatingPointError("the network gave NaN or infinite probabilities; export the run again")
        return BatchProbs(mean, np.std([1 - view[:, :1] for view in views], axis=0) if len(views) > 1 else None)

    def _view(self, session: Any, images: NDArray[np.uint8], axes: tuple[int, ...]) -> NDArray[np.float32]:
        try:
            flipped = session.run(None, {"images": np.ascontiguousarray(np.flip(images, axes))})[0]
        except (FloatingPointError, UserError):
            raise
        except Exception as error:  # onnxruntime's error classes have no common base
            reason = "".join(c for c in str(error)[:200] if c.isprintable())
            raise UserError(f"{self.path}: the model cannot be run ({reason}); export it again") from error
        return np.flip(flipped, tuple(axis + 1 for axis in axes))  # the class axis is before rows and columns


def open_onnx(path: Path, device: str) -> tuple[ModelMetadata, OnnxNetwork]:
    """Open an exported model. Raises `UserError` for a file that is missing, damaged or not written by kmine."""
    if not path.is_file():
        raise UserError(f"{path}: expected an exported model, found no such file; export one with --export FILE.onnx")
    from kmine.models.onnx_file import read_model

    data, notes = read_model(path)
    metadata = ModelMetadata.from_json(notes, str(path))
    network = OnnxNetwork(path, device, data)
    ends = [(end.name, end.type, list(end.shape)[1:]) for end in _ends(network.session)]
    side, classes = metadata.size, len(metadata.class_names)
    expected = [("images", "tensor(uint8)", [side, side, 3])]
    expected += [("probabilities", "tensor(float)", [classes, side, side])]
    if ends != expected:
        actual = "".join(c for c in str(ends)[:200] if c.isprintable())
        raise UserError(f"{path}: expected the input and output {expected}, got {actual}; export the run again")
    return metadata, network


def _ends(session: Any) -> list[Any]:
    """Inputs and outputs of a session."""
    return [*session.get_inputs(), *session.get_outputs()]

"""Stream inputs through a network: reading, prediction and writing overlap.

Memory holds a few batches of images, or two volumes, whatever the number of inputs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from concurrent.futures import ThreadPoolExecutor as Pool
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from kmine.data.io.nifti_write import ProbabilityFile
from kmine.data.quality.intensity import out_of_range_text
from kmine.data.resize import to_frame
from kmine.errors import SampleError
from kmine.mining.calibration.local_quality import LocalQualityEstimator
from kmine.predict.estimates import ObjectEstimate, estimate_objects
from kmine.predict.inputs import Input
from kmine.predict.log import Row
from kmine.predict.metadata import ModelMetadata
from kmine.predict.network import BatchProbs, Network
from kmine.predict.outputs import Prediction, class_mask, mean_max_probability, prediction_row, write_outputs, write_seg
from kmine.predict.reader import Loaded, ValueWindow, load

THREADS = 2
"""Threads that read, and threads that write; their libraries release the GIL."""

ItemT, ResultT = TypeVar("ItemT"), TypeVar("ResultT")


@dataclass(frozen=True)
class PredictJob:
    """Settings of a prediction."""

    network: Network
    metadata: ModelMetadata
    out: Path
    window: ValueWindow | None
    tta: str
    batch_size: int
    probs: bool
    overlay: bool
    estimator: LocalQualityEstimator | None = None
    """Estimates Dice; None: no estimates."""
    dicom_seg: bool = False

    def names(self, item: Input) -> dict[str, str]:
        """Kind of output (mask, probs, overlay, seg) -> its path below the folder of outputs."""
        names = {"mask": f"masks/{item.name}{'.nii.gz' if item.is_volume else '.png'}"}
        if self.probs:
            names["probs"] = f"probs/{item.name}{'.nii' if item.is_volume else '.npz'}"
        if self.overlay:
            names["overlay"] = f"overlays/{item.name}.jpg"
        if self.dicom_seg and item.is_dicom:
            names["seg"] = f"segs/{item.name}.dcm"
        return names

    def write_result(
        self, item: Input, loaded: Loaded, prediction: Prediction, file: ProbabilityFile | None = None
    ) -> PredictResult:
        """Write all outputs; `file` holds the probabilities of a volume."""
        if file is not None:
            file.finish()
        class_names, names = self.metadata.class_names, self.names(item)
        try:
            if "seg" in names:
                write_seg(item, loaded, prediction.mask, self.out / names["seg"], class_names)
        except SampleError as error:
            del names["seg"]
            warning = "; ".join(filter(None, (prediction.warning, f"no DICOM segmentation: {error.problem}")))
            prediction = replace(prediction, warning=warning)
        write_outputs(loaded, prediction, self.out, names)
        return PredictResult(item, prediction_row(item, loaded, prediction, class_names, names), names=names)


@dataclass(frozen=True)
class PredictResult:
    """Outcome for one input."""

    item: Input
    row: Row
    error: str = ""
    """Reason for a missing mask."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Written outputs, as in `PredictJob.names`."""


def predict_stream(job: PredictJob, inputs: Iterable[Input]) -> Iterator[PredictResult]:
    """Predict and write; yields each finished input, images in order, then volumes.

    Raises:
        FloatingPointError: the network's probabilities are not finite.
        UserError: the outputs cannot be written.
    """
    inputs = list(inputs)
    readers, writers = Pool(THREADS, "read"), Pool(THREADS, "write")
    try:
        yield from _singles(job, [item for item in inputs if not item.is_volume], readers, writers)
        yield from _volumes(job, [item for item in inputs if item.is_volume], readers, writers)
    finally:
        readers.shutdown(wait=True, cancel_futures=True)
        writers.shutdown(wait=True, cancel_futures=True)


def _singles(job: PredictJob, inputs: list[Input], readers: Pool, writers: Pool) -> Iterator[PredictResult]:
    writing: deque[Future[PredictResult]] = deque()
    batch: list[tuple[Input, Loaded]] = []

    def flush() -> None:
        predicted = job.network.predict(np.concatenate([loaded.small for _, loaded in batch]), job.tta)
        for (item, loaded), (probs, std) in zip(batch, predicted.per_image(), strict=True):
            of_image = BatchProbs(probs, std).content(job.metadata.resizer, loaded.shape)
            writing.append(writers.submit(_write_single, job, item, loaded, *of_image))
        batch.clear()

    for item, future in _ahead(readers, lambda item: _load(job, item), inputs, 2 * job.batch_size):
        try:
            batch.append((item, future.result()))
        except SampleError as error:
            yield _failed(item, error)
        if len(batch) == job.batch_size:
            flush()
        while len(writing) > job.batch_size:
            yield writing.popleft().result()
    if batch:
        flush()
    while writing:
        yield writing.popleft().result()


def _volumes(job: PredictJob, inputs: list[Input], readers: Pool, writers: Pool) -> Iterator[PredictResult]:
    writing: Future[PredictResult] | None = None
    for item, future in _ahead(readers, lambda item: _load(job, item), inputs, 2):
        try:
            loaded = future.result()
        except SampleError as error:
            yield _failed(item, error)
            continue
        del future
        prediction, file = _predict_slices(job, item, loaded, writers)
        if writing is not None:
            yield writing.result()
        writing = writers.submit(job.write_result, item, loaded, prediction, file)
        del loaded, prediction
    if writing is not None:
        yield writing.result()


def _predict_slices(
    job: PredictJob, item: Input, loaded: Loaded, writers: Pool
) -> tuple[Prediction, ProbabilityFile | None]:
    """Prediction of a volume, and the file of its probabilities if requested."""
    depth, max_probs = len(loaded.small), []
    objects: list[list[ObjectEstimate] | None] = [None] * depth
    mask = np.empty((depth, *loaded.shape), np.uint8)
    file = None
    if job.probs:
        assert loaded.frame is not None, "of a volume"
        shape = (depth, len(job.metadata.class_names), *loaded.shape)
        file = ProbabilityFile(job.out / job.names(item)["probs"], loaded.frame, shape)

    def fill(first: int, predicted: BatchProbs) -> None:
        for number, (probs, std) in enumerate(predicted.per_image(), first):
            mask[number] = class_mask(probs, *loaded.shape)
            objects[number] = estimate_objects(job.estimator, job.tta, probs, std, mask[number])
        if file is not None:
            file.write(first, np.stack([to_frame(image_probs, *loaded.shape) for image_probs in predicted.probs]))

    filling: deque[Future[None]] = deque()
    try:
        for first in range(0, depth, job.batch_size):
            predicted = job.network.predict(loaded.small[first : first + job.batch_size], job.tta)
            predicted = predicted.content(job.metadata.resizer, loaded.shape)
            max_probs += map(mean_max_probability, predicted.probs)
            filling.append(writers.submit(fill, first, predicted))
            while len(filling) > THREADS:
                filling.popleft().result()
        while filling:
            filling.popleft().result()
    except BaseException:
        if file is not None:
            file.drop()
        raise
    estimates = [(n, obj) for n, slice_objects in enumerate(objects) for obj in slice_objects or ()]
    has_estimates = job.estimator is not None
    return Prediction(mask, float(np.mean(max_probs)), loaded.warning, estimates if has_estimates else None), file


def _write_single(
    job: PredictJob, item: Input, loaded: Loaded, probs: NDArray[np.float32], std: NDArray[np.float32] | None
) -> PredictResult:
    mask = class_mask(probs, *loaded.shape)
    estimates = estimate_objects(job.estimator, job.tta, probs, std, mask)
    objects = None if estimates is None else [(0, obj) for obj in estimates]
    native_probs = to_frame(probs, *loaded.shape) if job.probs else None
    prediction = Prediction(mask, mean_max_probability(probs), loaded.warning, objects, native_probs)
    return job.write_result(item, loaded, prediction)


def _load(job: PredictJob, item: Input) -> Loaded:
    loaded = load(item, job.metadata.resizer, job.window, keep=job.overlay)
    out_of_range = [text for image in loaded.small if (text := out_of_range_text(job.metadata.intensity, image))]
    # The end slices of a volume often differ from the training images, so half of all slices must.
    if not out_of_range or 2 * len(out_of_range) < len(loaded.small):
        return loaded
    which = f"{len(out_of_range)} of {len(loaded.small)} slices, the first: " if item.is_volume else ""
    warning = "; ".join(filter(None, (loaded.warning, f"unlike the training images: {which}{out_of_range[0]}")))
    return replace(loaded, warning=warning)


def _failed(item: Input, error: SampleError) -> PredictResult:
    row = {"file": str(item.path), "kind": item.kind, "error": " ".join(error.problem.split())}
    return PredictResult(item, row, f"{error.path}: {error.problem}")


def _ahead(
    pool: Pool, work: Callable[[ItemT], ResultT], items: Iterable[ItemT], depth: int
) -> Iterator[tuple[ItemT, Future[ResultT]]]:
    """Items in order with the future of their work, at most `depth` of them submitted ahead."""
    waiting: deque[tuple[ItemT, Future[ResultT]]] = deque()
    for item in items:
        waiting.append((item, pool.submit(work, item)))
        if len(waiting) >= depth:
            yield waiting.popleft()
    while waiting:
        yield waiting.popleft()

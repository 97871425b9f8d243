"""Images through a network: the next ones are read and the last ones written while it works.

Memory holds a batch and as many images read ahead, or a volume and the next one, however many there are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from kmine.data.io.nifti_write import ProbabilityFile
from kmine.data.quality.intensity import how_far
from kmine.data.resize import to_frame
from kmine.errors import SampleError
from kmine.mining.calibration.local_quality import Alone
from kmine.predict.estimates import Judged, judge
from kmine.predict.inputs import Input
from kmine.predict.metadata import About
from kmine.predict.network import Network, Predicted
from kmine.predict.outputs import (
    Row,
    Told,
    class_mask,
    output_names,
    sureness,
    write_single,
    write_volume,
)
from kmine.predict.reader import Loaded, Window, load

THREADS = 2
"""That read, and that write; both spend their time in libraries that let others work meanwhile."""

One, Found = TypeVar("One"), TypeVar("Found")


@dataclass(frozen=True)
class Job:
    """How images are predicted."""

    network: Network
    about: About
    out: Path
    window: Window | None
    tta: str
    batch_size: int
    probs: bool
    overlay: bool
    alone: Alone | None = None
    """What estimates Dice; None: nothing does."""

    def judge(
        self, probs: NDArray[np.float32], std: NDArray[np.float32] | None, mask: NDArray[np.uint8]
    ) -> list[Judged] | None:
        """The objects of an image or slice with their estimates; None where nothing estimates them."""
        return None if self.alone is None else judge(self.alone, self.tta, probs, std, mask)

    def names(self, one: Input) -> dict[str, str]:
        """The outputs of an image."""
        return output_names(one, self.probs, self.overlay)


@dataclass(frozen=True)
class Done:
    """What became of one input."""

    one: Input
    row: Row
    error: str = ""
    """Why there is no mask."""


def predict_stream(job: Job, inputs: Iterable[Input]) -> Iterator[Done]:
    """Predict and write; each input as it is done, images in order, then volumes.

    Raises:
        FloatingPointError: the network gave numbers that are none.
        UserError: nothing can be written.
    """
    inputs = list(inputs)
    readers, writers = ThreadPoolExecutor(THREADS, "read"), ThreadPoolExecutor(THREADS, "write")
    try:
        yield from _singles(job, [one for one in inputs if not one.is_volume], readers, writers)
        yield from _volumes(job, [one for one in inputs if one.is_volume], readers, writers)
    finally:
        readers.shutdown(wait=True, cancel_futures=True)
        writers.shutdown(wait=True, cancel_futures=True)


def _singles(job: Job, inputs: list[Input], readers: ThreadPoolExecutor, writers: ThreadPoolExecutor) -> Iterator[Done]:
    writing: deque[Future[Done]] = deque()
    batch: list[tuple[Input, Loaded]] = []

    def flush() -> None:
        predicted = job.network.predict(np.concatenate([loaded.small for _, loaded in batch]), job.tta)
        for (one, loaded), of_one in zip(batch, predicted.each(), strict=True):
            writing.append(writers.submit(_write_single, job, one, loaded, *of_one))
        batch.clear()

    for one, future in _ahead(readers, lambda one: _load(job, one), inputs, 2 * job.batch_size):
        try:
            batch.append((one, future.result()))
        except SampleError as error:
            yield _failed(one, error)
        if len(batch) == job.batch_size:
            flush()
        while len(writing) > job.batch_size:
            yield writing.popleft().result()
    if batch:
        flush()
    while writing:
        yield writing.popleft().result()


def _volumes(job: Job, inputs: list[Input], readers: ThreadPoolExecutor, writers: ThreadPoolExecutor) -> Iterator[Done]:
    writing: Future[Done] | None = None
    for one, future in _ahead(readers, lambda one: _load(job, one), inputs, 2):
        try:
            loaded = future.result()
        except SampleError as error:
            yield _failed(one, error)
            continue
        del future
        told, file = _slices(job, one, loaded, writers)
        if writing is not None:
            yield writing.result()
        writing = writers.submit(_write_volume, job, one, loaded, told, file)
        del loaded, told
    if writing is not None:
        yield writing.result()


def _slices(job: Job, one: Input, loaded: Loaded, writers: ThreadPoolExecutor) -> tuple[Told, ProbabilityFile | None]:
    """What came of a volume, and the file of probabilities, where it is wanted."""
    depth, sure = len(loaded.small), []
    objects: list[list[Judged] | None] = [None] * depth
    mask = np.empty((depth, *loaded.shape), np.uint8)
    file = None
    if job.probs:
        assert loaded.frame is not None, "of a volume"
        shape = (depth, len(job.about.class_names), *loaded.shape)
        file = ProbabilityFile(job.out / job.names(one)["probs"], loaded.frame, shape)

    def fill(first: int, predicted: Predicted) -> None:
        for number, (probs, std) in enumerate(predicted.each(), first):
            mask[number] = class_mask(probs, *loaded.shape)
            objects[number] = job.judge(probs, std, mask[number])
        if file is not None:
            file.write(first, np.stack([to_frame(of_one, *loaded.shape) for of_one in predicted.probs]))

    filling: deque[Future[None]] = deque()
    try:
        for first in range(0, depth, job.batch_size):
            predicted = job.network.predict(loaded.small[first : first + job.batch_size], job.tta)
            sure += map(sureness, predicted.probs)
            filling.append(writers.submit(fill, first, predicted))
            while len(filling) > THREADS:
                filling.popleft().result()
        while filling:
            filling.popleft().result()
    except BaseException:
        if file is not None:
            file.drop()
        raise
    judged = None if job.alone is None else [(n, each) for n, some in enumerate(objects) for each in some or ()]
    return Told(mask, float(np.mean(sure)), loaded.warning, judged), file


def _write_single(
    job: Job, one: Input, loaded: Loaded, probs: NDArray[np.float32], std: NDArray[np.float32] | None
) -> Done:
    mask = class_mask(probs, *loaded.shape)
    judged = job.judge(probs, std, mask)
    objects = None if judged is None else [(0, each) for each in judged]
    told = Told(mask, sureness(probs), loaded.warning, objects)
    return Done(one, write_single(one, loaded, told, probs, job.about, job.out, job.names(one)))


def _write_volume(job: Job, one: Input, loaded: Loaded, told: Told, file: ProbabilityFile | None) -> Done:
    if file is not None:
        file.finish()
    return Done(one, write_volume(one, loaded, told, job.about, job.out, job.names(one)))


def _load(job: Job, one: Input) -> Loaded:
    loaded = load(one, job.about.size, job.window, keep=job.overlay)
    far = [text for image in loaded.small if (text := how_far(job.about.intensity, image))]
    # Slices at the ends of a volume differ from those in the middle, and from training: half of them are a reason.
    if not far or 2 * len(far) < len(loaded.small):
        return loaded
    which = f"{len(far)} of {len(loaded.small)} slices, the first: " if one.is_volume else ""
    warning = "; ".join(filter(None, (loaded.warning, f"unlike the training images: {which}{far[0]}")))
    return replace(loaded, warning=warning)


def _failed(one: Input, error: SampleError) -> Done:
    row = {"file": str(one.path), "kind": one.kind, "error": " ".join(error.problem.split())}
    return Done(one, row, f"{error.path}: {error.problem}")


def _ahead(
    pool: ThreadPoolExecutor, work: Callable[[One], Found], items: Iterable[One], depth: int
) -> Iterator[tuple[One, Future[Found]]]:
    """Items in order, each with its work under way, that of at most `depth` of them."""
    waiting: deque[tuple[One, Future[Found]]] = deque()
    for item in items:
        waiting.append((item, pool.submit(work, item)))
        if len(waiting) >= depth:
            yield waiting.popleft()
    while waiting:
        yield waiting.popleft()

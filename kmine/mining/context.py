"""What the stages of a mining round share, and the images that pass through them together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kmine.data.pool import Pool, UnreadSample
from kmine.mining.rank import Ranking
from kmine.mining.segment import Embedded
from kmine.models.base import LocalModel
from kmine.ops.calibrator import Calibration
from kmine.segmenters.base import Proposals, Segmenter
from kmine.store.tables import DecisionRow
from kmine.training.task import StageTimer, Task
from kmine.types import Sample


class ProposalSource(Protocol):
    """Where proposals come from, if not from the segmenter's own generator (`kmine.mining.memory`)."""

    def proposals(self, ctx: RoundContext, ids: Sequence[str]) -> Iterator[Proposals]:
        """One `Proposals` for each of the images `ids`, in order."""


@dataclass(frozen=True)
class RoundContext:
    """Models, images and settings of a round; the calibration of the gate uses one of round 0."""

    task: Task
    model: LocalModel
    """The local model with the weights that predict."""
    auxiliary_model: LocalModel | None
    """Its agreement with a candidate is evidence; None: no such evidence."""
    segmenter: Segmenter
    pool: Pool
    """Images to segment; their masks are not read."""
    area_prior: dict[int, float]
    """Per class, the median share of the image that one labeled object covers."""
    round_idx: int = 0
    signature: str = ""
    """Of the round's pseudo masks: model, segmenter, settings."""
    calibration: Calibration | Ranking | None = None
    """What the gate goes by; None: it keeps what no check drops."""
    previous: Mapping[str, Sequence[DecisionRow]] = field(default_factory=dict)
    """Decisions of the round before, with `prompts.source cascade`."""
    pending: tuple[tuple[int, list[str]], ...] = ()
    """Number and sample ids of the batches that no interrupted session has mined."""
    timer: StageTimer = field(default_factory=StageTimer)
    memory: ProposalSource | None = None
    """With `prompts.source memory`, where proposals come from."""
    parts: tuple[tuple[frozenset[str], LocalModel], ...] = ()
    """Ids of each part of the images, and the model that predicts it: trained without pseudo masks of the part. Empty:
    `model` predicts all."""

    def predicting(self, ids: Sequence[str]) -> Iterator[tuple[LocalModel, list[str]]]:
        """The models that predict the images `ids`, each with its own of them."""
        for part_ids, model in self.parts or ((frozenset(ids), self.model),):
            if own := [i for i in ids if i in part_ids]:
                yield model, own


@dataclass(frozen=True)
class ImageBatch:
    """Images that pass the stages together; prompts, candidates and decisions have one entry per image."""

    images: Sequence[Sample | UnreadSample]
    reviewed: Sequence[str] = ()
    """Ids of further images of the batch, which have a reviewer's verdict and are not segmented."""
    batch_idx: int = 0
    embedded: Embedded = field(default_factory=dict)
    """Embeddings by index of the image: filled when an image is encoded first, so that none is encoded twice."""
    vetoed: set[str] = field(default_factory=set)
    """Ids of images in which the classifier of sks sees no lesion: filled when the local model predicts."""
    slices: dict[str, NDArray[np.uint8]] = field(default_factory=dict)
    """(H, W) class ids that the local model predicts, by id, of the images' neighbours in volumes; filled likewise."""

    @property
    def ids(self) -> list[str]:
        """Sample ids of the images to segment."""
        return [image.sample_id for image in self.images]

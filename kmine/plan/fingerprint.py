"""Fingerprint of a data set: index, splits and a bounded sample of files; nnU-Net's idea (arXiv 1904.08128).

The sample cache is not built. Masks are read of images that the run may open, labeled and validation ones: exactly so
where all images are hashed for near-duplicates (`EXACT`), or where the data set's groups stand; of larger sets the draw
without that search is used, and nothing but the sizes of objects is kept.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kmine.config import DataConfig
from kmine.data.perceptual_hash import perceptual_hash
from kmine.data.source import Source, stop_or_skip
from kmine.data.split_file import read_split, resolve_splits
from kmine.data.splits import Splits
from kmine.errors import SampleError, UserError
from kmine.io.threads import thread_pool
from kmine.ops.masks import components
from kmine.types import IGNORE_INDEX

EXACT, SECONDS = 400, 10.0  # all images are decoded and hashed if they are no more and take no longer
SAMPLE, VOLUMES, MIN_OBJECT = 48, 2, 4
"""Images and masks sampled; of few NIfTI files, which are read as a whole; pixels of objects that are no specks."""


@dataclass(frozen=True)
class Fingerprint:
    """What the plan knows of the data.

    Numbers of pixels are native; height and width are medians, aspects (width / height) the 10th and 90th percentile.
    Objects: mean number in an image that has any, median and 10th percentile of the square root of their area; NaN
    without any. `read_seconds` of one thread decode and hash an image. Groups are patients, volumes or single images.
    """

    num_images: int
    num_masks: int
    num_image_labels: int
    num_labeled: int
    num_unlabeled: int
    num_val: int
    num_groups: int
    num_classes: int
    height: int
    width: int
    aspect_low: float
    aspect_high: float
    is_grey: bool
    num_objects: float
    object_px: float
    small_object_px: float
    read_seconds: float

    @property
    def side(self) -> int:
        """Long side of the median image."""
        return max(self.height, self.width)


class SampledData(NamedTuple):
    """A fingerprint, and the labeled images whose masks were read."""

    fingerprint: Fingerprint
    labeled: tuple[str, ...]


def take_fingerprint(cfg: DataConfig, seed: int, source: Source) -> SampledData:
    """Fingerprint of an open data set; seconds.

    Raises:
        UserError: splits or files with which the loop would stop, too.
    """
    refs, given_split = source.refs(), read_split(cfg.split_file, source)
    ids = [ref.sample_id for ref in refs]
    has_volumes = bool(ids) and source.slice_location(ids[0]) is not None
    images = _read_images(cfg, source, [] if has_volumes else _spread(ids, SAMPLE))
    seconds = len(refs) * np.mean([facts.seconds for facts in images.values()]) if images else np.inf
    if cfg.duplicate_distance >= 0 and len(refs) <= EXACT and seconds <= SECONDS:
        images |= _read_images(cfg, source, [i for i in ids if i not in images])
        refs = tuple(ref for ref in refs if ref.sample_id in images)
    else:
        cfg = replace(cfg, duplicate_distance=-1)
    hashes = {i: facts.image_hash for i, facts in images.items()}
    splits = resolve_splits(cfg, seed, refs, hashes, given_split)
    objects = _object_sizes(cfg, source, _spread(_of_few_volumes(source, splits.labeled), SAMPLE))
    labeled = tuple(objects)
    if len(labeled) < SAMPLE // 4:
        objects |= _object_sizes(cfg, source, _spread(_of_few_volumes(source, splits.val), SAMPLE // 4))
    images = images or _read_images(cfg, source, labeled)
    if not labeled or not images:
        raise UserError("no readable labeled image remains; mend the damaged files, or label more")
    return SampledData(
        _fingerprint(source, splits, images, [areas for areas in objects.values() if len(areas)]), labeled
    )


def _fingerprint(
    source: Source, splits: Splits, images: Mapping[str, _Facts], objects: Sequence[NDArray[np.float64]]
) -> Fingerprint:
    refs = source.refs()
    diameters = np.sqrt(np.concatenate([*objects, np.zeros(0)]))
    heights, widths, seconds, _, grey = map(np.array, zip(*images.values(), strict=True))
    low, high = np.percentile(widths / heights, (10, 90))
    return Fingerprint(
        num_images=len(refs),
        num_masks=sum(ref.has_mask for ref in refs),
        num_image_labels=sum(ref.image_label is not None for ref in refs),
        num_labeled=len(splits.labeled),
        num_unlabeled=len(splits.unlabeled),
        num_val=len(splits.val),
        num_groups=len(set(splits.groups.values())),
        num_classes=len(source.class_names),
        height=int(np.median(heights)),
        width=int(np.median(widths)),
        aspect_low=round(float(low), 3),
        aspect_high=round(float(high), 3),
        is_grey=bool(grey.all()),
        num_objects=float(np.mean([len(areas) for areas in objects])) if objects else float("nan"),
        object_px=round(float(np.median(diameters)), 1) if len(diameters) else float("nan"),
        small_object_px=round(float(np.percentile(diameters, 10)), 1) if len(diameters) else float("nan"),
        read_seconds=float(np.mean(seconds)),
    )


def _spread(ids: Sequence[str], count: int) -> list[str]:
    """At most `count` ids, evenly from first to last."""
    if len(ids) <= count:
        return list(ids)
    return [ids[n * len(ids) // count] for n in range(count)]


def _of_few_volumes(source: Source, ids: Sequence[str]) -> Sequence[str]:
    """The ids of pictures, or of `VOLUMES` volumes: those with the most slices among `ids`."""
    locations = {i: source.slice_location(i) for i in ids}
    sizes = Counter(location.volume for location in locations.values() if location)
    kept = {volume for volume, _ in sizes.most_common(VOLUMES)}
    return [i for i, location in locations.items() if location is None or location.volume in kept]


class _Facts(NamedTuple):
    """Of a decoded image."""

    height: int
    width: int
    seconds: float
    image_hash: int
    is_grey: bool


def _read_images(cfg: DataConfig, source: Source, ids: Sequence[str]) -> dict[str, _Facts]:
    """Facts of the readable images, by id."""

    def read(sample_id: str) -> _Facts | None:
        began = time.thread_time()
        try:
            image = source.image(sample_id)
        except SampleError as error:
            stop_or_skip(sample_id, error, cfg.on_error)
            return None
        image_hash, part = perceptual_hash(image), image[::8, ::8]
        is_grey = bool((part == part[..., :1]).all())
        return _Facts(*image.shape[:2], time.thread_time() - began, image_hash, is_grey)

    with thread_pool() as threads:
        found = zip(ids, threads.map(read, ids), strict=True)
        return {sample_id: facts for sample_id, facts in found if facts}


def _object_sizes(cfg: DataConfig, source: Source, ids: Iterable[str]) -> dict[str, NDArray[np.float64]]:
    """Areas in pixels of the objects of each readable mask."""
    out = {}
    for sample_id in ids:
        try:
            mask = source.mask(sample_id)
        except SampleError as error:
            stop_or_skip(sample_id, error, cfg.on_error)
            continue
        classes = [class_id for class_id in np.unique(mask) if class_id not in (0, IGNORE_INDEX)]
        areas = [found.sum() for class_id in classes for found in components(mask == class_id, MIN_OBJECT)]
        out[sample_id] = np.array(areas, float)
    return out

"""Statistics of phantom images, for tests of the data checks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kmine.data.datasets.phantom.dataset import PhantomSource
from kmine.data.quality.image_stats import ImageStats, compute_stats
from kmine.types import Finding


def phantom_image(index: int, kind: str = "polyp") -> np.ndarray:
    """(96, 96, 3) RGB; index below 64."""
    return PhantomSource(kind, 64, 96).image(f"{kind}_{index:06d}")


def stats_of(sample_id: str, index: int = 0, mask: np.ndarray | None = None) -> ImageStats:
    return compute_stats(sample_id, phantom_image(index), mask)


def own_groups(stats: Sequence[ImageStats]) -> dict[str, str]:
    """Every sample is its own group."""
    return {item.sample_id: item.sample_id for item in stats}


def square_mask(low: int, high: int, value: int = 1) -> np.ndarray:
    """(96, 96) with `value` in rows and columns [low, high)."""
    mask = np.zeros((96, 96), np.uint8)
    mask[low:high, low:high] = value
    return mask


def severities(findings: Sequence[Finding]) -> dict[str, str]:
    """Severity by code."""
    return {finding.code: finding.severity for finding in findings}

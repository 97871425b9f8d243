"""A few items that stand for many: greedy facility location.

Letters: N items, C features of each, M items of the short list.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

SHORTLIST = 4
"""Groups of the highest weights that are looked at, as a multiple of the number to choose; own choice."""


def choose_covering(
    weights: NDArray[np.floating], features: NDArray[np.floating], groups: Sequence[str], count: int
) -> list[tuple[int, int]]:
    """At most `count` items, one of a group: (index, items that it stands for), in the order of choice.

    Two steps, as in Suggestive Annotation (Yang et al. 2017, arXiv 1706.04737): a short list of the highest weights,
    and of it those that represent all items best. Each choice adds most to the sum over all items of their weight times
    their similarity to the nearest chosen item; that the weight counts there, too, is our choice. An item stands for
    those that are nearest to it. Similarity is the cosine of features less their mean, at least 0.

    `weights` are (N,), at least 0, `features` (N, C). Items of one of the (N,) `groups`, such as near-duplicates, count
    as one: that of the highest weight.
    """
    firsts: dict[str, int] = {}
    for n in np.argsort(-weights, kind="stable"):
        firsts.setdefault(groups[n], n)
    shortlist = np.array([*firsts.values()][: SHORTLIST * count])
    centred = features - features.mean(axis=0)
    unit = centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)
    similarity = np.clip(unit[shortlist] @ unit.T, 0, 1)  # (M, N)
    similarity[np.arange(len(shortlist)), shortlist] = 1
    covered, chosen = np.zeros(len(weights)), []
    while len(chosen) < min(count, len(shortlist)):
        added = np.maximum(similarity - covered, 0) @ weights
        added[chosen] = -1
        chosen.append(int(added.argmax()))
        covered = np.maximum(covered, similarity[chosen[-1]])
    stands_for = np.bincount(similarity[chosen].argmax(axis=0), minlength=len(chosen))
    return [(int(shortlist[n]), int(number)) for n, number in zip(chosen, stands_for, strict=True)]

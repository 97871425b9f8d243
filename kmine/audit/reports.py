"""The report on a mask, and reports on many masks in columns."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kmine.audit import ranking
from kmine.audit.label_issues import ConfidentDisagreement
from kmine.audit.ranking import GIVEN_WEIGHTS, SHAPE_FEATURES, WEIGHTS
from kmine.report.audit.page import Kind


@dataclass(frozen=True, slots=True)
class MaskReport:
    """Scores of one mask."""

    sample_id: str
    kind: Kind
    signature: str
    height: int
    width: int
    shape: tuple[float, ...]
    """`SHAPE_FEATURES`."""
    classes: tuple[int, ...]
    """Foreground class ids of the mask."""
    area: float
    """Foreground, share of the image."""
    ignored: float
    """Ignored pixels, share of the image."""
    signals: Mapping[str, float]
    """By names of `WEIGHTS`; NaN or missing where unknown."""
    conflict: ConfidentDisagreement | None
    """None without a held-out model."""
    model_names: tuple[str, ...]
    """The models compared with; none was trained on this mask."""
    contradicted: bool
    """Whether the mask contradicts the image-level label."""
    predicted_rle: Mapping[int, str]
    """Predicted mask at training size: run lengths by class."""
    rank: int = 0
    suspicion: float = math.nan
    explanations: tuple[str, ...] = ()


_UNKNOWN = ConfidentDisagreement(*[math.nan] * 4)


class _Common(NamedTuple):
    """What many masks have in common and is held once; fields of `MaskReport`."""

    kind: Kind
    height: int
    width: int
    classes: tuple[int, ...]
    model_names: tuple[str, ...]
    contradicted: bool
    predicted_classes: tuple[int, ...]
    """Keys of `predicted_rle`."""


class _Ranks(NamedTuple):
    """Of N masks."""

    order: NDArray[np.int64]
    """(N,) indices, most suspicious first."""
    suspicion: NDArray[np.float64]
    """(N,)"""
    by_signal: Mapping[str, NDArray[np.float64]]
    """(N,) each."""


class MaskReports(Sequence[MaskReport]):
    """Reports on masks of one kind; one is made when it is asked for.

    A report takes some 3,000 bytes. Here a mask takes 500 and its run lengths.
    """

    def __init__(self, reports: Iterable[MaskReport]) -> None:
        shared, shapes, signals, shares = dict[Any, Any](), array("d"), array("d"), array("d")
        self._rows = list[tuple[str, str, _Common, str]]()
        for r in reports:
            common = _Common(*(getattr(r, name) for name in _Common._fields[:-1]), tuple(r.predicted_rle))
            rle = " ".join(r.predicted_rle.values())
            self._rows.append((r.sample_id, r.signature, shared.setdefault(common, common), rle))
            shapes.extend(r.shape)
            signals.extend(r.signals.get(name, math.nan) for name in WEIGHTS)
            shares.extend((r.area, r.ignored, *(r.conflict or _UNKNOWN)[:2]))
        self._shares = np.asarray(shares).reshape(-1, 4)
        self.shapes = np.asarray(shapes).reshape(-1, len(SHAPE_FEATURES))
        """(N, F) `SHAPE_FEATURES`."""
        self._signals = dict(zip(WEIGHTS, np.asarray(signals).reshape(-1, len(WEIGHTS)).T, strict=True))
        self._ranks: _Ranks | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: Any) -> Any:
        numbers = range(len(self))[place]
        return self._report(numbers) if isinstance(numbers, int) else [self._report(n) for n in numbers]

    def _report(self, place: int) -> MaskReport:
        n = place if self._ranks is None else int(self._ranks.order[place])
        sample_id, signature, common, rle = self._rows[n]
        area, ignored, *pixels = self._shares[n].tolist()
        signals = {name: float(values[n]) for name, values in self._signals.items()}
        conflict = ConfidentDisagreement(*pixels, signals["conflict"], signals["unlike"])
        *fields, classes = common
        report = MaskReport(
            sample_id=sample_id,
            signature=signature,
            shape=tuple(self.shapes[n].tolist()),
            area=area,
            ignored=ignored,
            signals=signals,
            conflict=None if math.isnan(conflict.conflict) else conflict,
            predicted_rle=dict(zip(classes, rle.split(), strict=True)),
            **dict(zip(_Common._fields, fields, strict=False)),
        )
        if self._ranks is None:
            return report
        own_ranks = {name: float(values[n]) for name, values in self._ranks.by_signal.items()}
        texts = ranking.explanations(signals, own_ranks, common.contradicted, report.conflict, _weights(common.kind))
        suspicion = float(self._ranks.suspicion[n])
        return replace(report, rank=place + 1, suspicion=suspicion, explanations=texts)

    def ranked(self, *others: NDArray[np.float64]) -> MaskReports:
        """The same, most suspicious first; `others`: (M, F) shapes of other masks to compare with."""
        if not self._rows:
            return self
        out = copy(self)
        out._signals = self._signals | ranking.outliers(self.shapes, self.shapes, *others)
        common = [row[2] for row in self._rows]
        contradicted = np.array([own.contradicted for own in common])
        values, by_signal = ranking.label_issue_scores(out._signals, contradicted, _weights(common[0].kind))
        order = ranking.rank_order(values, [row[0] for row in self._rows])
        out._ranks = _Ranks(np.array(order), values, by_signal)
        return out


def _weights(kind: Kind) -> Mapping[str, float]:
    return WEIGHTS if kind == "pseudo" else GIVEN_WEIGHTS

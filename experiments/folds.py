"""Five folds that cover all images of a data set: their parts, and paired differences over them (README, protocol)."""

from __future__ import annotations

import fcntl
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from kmine.ops.statistics import paired_difference

try:
    from kmine.ops.seeding import derive_seed
except ImportError:  # older code, of which experiments/recipe trains an arm
    from kmine.seeding import derive_seed

NUM_FOLDS, NUM_CHECKED = 5, 30


def folds_of(groups: dict[str, str]) -> list[list[str]]:
    """The ids in `NUM_FOLDS` folds of nearly equal size; a group is in one fold."""
    folds: list[list[str]] = [[] for _ in range(NUM_FOLDS)]
    for members in _by_group(groups, "folds", 0):
        min(folds, key=len).extend(members)
    return folds


def parts_of(groups: dict[str, str], fold: int, num_labels: int) -> dict[str, list[str]]:
    """Ids of a fold's parts: test (the fold), labeled, checked (`NUM_CHECKED`, to watch the training), others.

    Groups are in one part each; labels beyond `num_labels` in the last group are unused. With more labels than there
    are all images outside the fold are labeled, and `checked` are some of them.
    """
    test = set(folds_of(groups)[fold])
    rest = _by_group({i: g for i, g in groups.items() if i not in test}, "labels", fold)
    parts: dict[str, list[str]] = {"test": sorted(test), "labeled": [], "checked": [], "others": []}
    for members in rest:
        labeled, checked = len(parts["labeled"]) < num_labels, len(parts["checked"]) < NUM_CHECKED
        parts["labeled" if labeled else "checked" if checked else "others"] += members
    if not parts["others"]:
        parts["labeled"] = [i for members in rest for i in members]
        parts["checked"] = parts["labeled"][:NUM_CHECKED]
    else:
        parts["labeled"] = parts["labeled"][:num_labels]
    return parts


def is_locked(file: IO[str]) -> bool:
    """Take a lock that ends with the process, unless another process holds it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def write_cells(
    out: Path, numbers: Iterable[int], arms: Sequence[str], cell: Callable[[int, str], pd.DataFrame]
) -> None:
    """Write OUT/cells/NUMBER-ARM.csv for those that lack; another process may write those of another number."""
    for folder in ("cells", "locks"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    for number in numbers:
        with (out / "locks" / str(number)).open("w") as lock:
            for arm in arms if is_locked(lock) else ():
                path = out / "cells" / f"{number}-{arm}.csv"
                if not path.exists():
                    cell(number, arm).to_csv(path.with_suffix(".tmp"), index=False)
                    path.with_suffix(".tmp").rename(path)


def _by_group(groups: dict[str, str], *keys: Any) -> list[list[str]]:
    """Ids by group, groups in seeded order."""
    members = defaultdict(list)
    for sample_id, group in sorted(groups.items()):
        members[group].append(sample_id)
    return [members[group] for group in sorted(members, key=lambda group: (derive_seed(*keys, group), group))]


def t_interval(values: pd.Series | np.ndarray) -> tuple[float, float]:
    """95 % t-interval of the mean of (N,) values; NaN with fewer than two."""
    if len(values) < 2:
        return np.nan, np.nan
    half = stdtrit(len(values) - 1, 0.975) * np.std(values, ddof=1) / np.sqrt(len(values))
    return np.mean(values) - half, np.mean(values) + half


class Difference(NamedTuple):
    """Mean paired difference with 95 % intervals; those over folds are NaN with a single one."""

    mean: float
    num_images: int
    images: tuple[float, float]
    """With the trainings as given; near-duplicates are one unit."""
    folds: tuple[float, float]
    """Over the means of folds, each a training of its own."""

    def __str__(self) -> str:
        text = f"{self.mean:+.4f} [{self.images[0]:+.4f}, {self.images[1]:+.4f}] over {self.num_images} images"
        return text if np.isnan(self.folds[0]) else f"{text}; [{self.folds[0]:+.4f}, {self.folds[1]:+.4f}] over folds"


def difference(rows: pd.DataFrame, arm: str, against: str) -> Difference:
    """Of two arms in rows of arm, fold, group, sample_id and dice, over the images that both have."""
    wide = rows[rows.arm.isin((arm, against))].pivot_table(
        index=["fold", "group", "sample_id"], columns="arm", values="dice"
    )
    wide = wide.dropna().reset_index()
    units = [f"{fold} {group}" for fold, group in zip(wide.fold, wide.group, strict=True)]
    by_image = paired_difference(wide[[against]].to_numpy().T, wide[[arm]].to_numpy().T, seed=0, groups=units)
    by_fold = (wide[arm] - wide[against]).groupby(wide.fold).mean()
    return Difference(by_image.difference, by_image.num_pairs, (by_image.low, by_image.high), t_interval(by_fold))


def read_cells(source: Path) -> pd.DataFrame:
    """Rows of a CSV, or of all cells of a folder, which are then written to its results.csv."""
    if not source.is_dir():
        return pd.read_csv(source)
    cells = pd.concat([pd.read_csv(path) for path in sorted((source / "cells").glob("*.csv"))])
    cells.to_csv(source / "results.csv", index=False, float_format="%.4f")
    return read_cells(source / "results.csv")


def table(several: Iterable[pd.DataFrame], against: str) -> str:
    """Markdown: mean Dice by arm, and differences to the arm `against` of the same frame.

    Columns of the frames: arm, fold, labels, group, sample_id, dice.
    """
    columns = ("arm", "labels", "Dice", "images", "folds", f"minus {against}, over images", "over folds")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for rows in several:
        for (labels, arm), own in rows.groupby(["labels", "arm"]):
            gaps = ["", ""]
            if arm != against and against in {*rows.arm}:
                mean, _, *intervals = difference(rows, arm, against)
                gaps = ["" if np.isnan(low) else f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]" for low, high in intervals]
            cells = (arm, labels, f"{own.dice.mean():.3f}", len(own), own.fold.nunique(), *gaps)
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)

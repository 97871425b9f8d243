"""Does the data doctor find what is planted, and nothing in clean data? Many draws of several data sets.

    python experiments/data_doctor/run.py --data FOLDER [--seeds 20] [--out experiments/data_doctor/results.csv]

FOLDER holds kvasir_seg/ and covid_qu_ex/. Writes one row a draw: which fault codes were expected, which were found.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kmine import cli
from kmine.check.findings import examine_source
from kmine.config import DataConfig
from kmine.data import open_source
from kmine.types import SampleRef, Skipped

NUM, LONGEST, PHANTOM, PART = 48, 256, 128, 15
"""Images of a draw; their longest side; side of the phantoms; masks shifted where a part is."""
LEAK = "Test/COVID-19/covid_46"
"""A true copy in the X-rays; left out."""


class Drawn:
    """A data set in memory, three sides drawn at random, to plant faults into."""

    name = "drawn"
    skipped: tuple[Skipped, ...] = ()

    def __init__(self, pool: list[tuple[NDArray[np.uint8], NDArray[np.uint8]]], rng: np.random.Generator) -> None:
        chosen = [pool[i] for i in rng.permutation(len(pool))[:NUM]]
        self.images = {f"s{n:03}": image for n, (image, _) in enumerate(chosen)}
        self.masks = {f"s{n:03}": mask for n, (_, mask) in enumerate(chosen)}
        self.samples = {
            i: SampleRef(i, i, image_label=int(mask.any()), split=("train", "train", "train", "val", "test")[n % 5])
            for n, (i, mask) in enumerate(self.masks.items())
        }
        self.class_names: tuple[str, ...] = ("background", "object")

    def refs(self) -> tuple[SampleRef, ...]:
        return tuple(ref for _, ref in sorted(self.samples.items()))

    def image(self, sample_id: str) -> NDArray[np.uint8]:
        return self.images[sample_id]

    def mask(self, sample_id: str) -> NDArray[np.uint8]:
        return self.masks[sample_id]

    def fingerprint(self) -> str:
        return ""

    @property
    def filled(self) -> list[str]:
        return [i for i, mask in self.masks.items() if mask.any()]

    def copy_across(self, rng: np.random.Generator, change: Callable[[NDArray[np.uint8]], NDArray[np.uint8]]) -> None:
        """One image of train again in test, changed, with its mask."""
        origin = str(rng.choice([i for i, ref in self.samples.items() if ref.split == "train"]))
        name = f"s{rng.integers(NUM):03}b"
        self.images[name] = change(self.images[origin])
        size = self.images[name].shape[1::-1]
        self.masks[name] = cv2.resize(self.masks[origin], size, interpolation=cv2.INTER_NEAREST)
        self.samples[name] = replace(self.samples[origin], sample_id=name, group_id=name, split="test")


def cropped(image: NDArray[np.uint8], share: float) -> NDArray[np.uint8]:
    height, width = image.shape[:2]
    y, x = round(share * height), round(share * width)
    buffer = io.BytesIO()
    Image.fromarray(image[y : height - y, x : width - x]).save(buffer, "JPEG", quality=60)
    return np.array(Image.open(buffer))


def exact(s: Drawn, rng: np.random.Generator) -> None:
    s.copy_across(rng, np.copy)


def crop_2(s: Drawn, rng: np.random.Generator) -> None:
    s.copy_across(rng, lambda image: cropped(image, 0.02))


def crop_4(s: Drawn, rng: np.random.Generator) -> None:
    s.copy_across(rng, lambda image: cropped(image, 0.04))


def group(s: Drawn, rng: np.random.Generator) -> None:
    for split in ("train", "test"):
        i = str(rng.choice([i for i, ref in s.samples.items() if ref.split == split]))
        s.samples[i] = replace(s.samples[i], group_id="one patient")


def other_size(s: Drawn, rng: np.random.Generator) -> None:
    i = str(rng.choice(list(s.masks)))
    s.masks[i] = s.masks[i][:-1]


def inverted_one(s: Drawn, rng: np.random.Generator) -> None:
    i = str(rng.choice(s.filled))
    s.masks[i] = 1 - s.masks[i]


def inverted_all(s: Drawn, rng: np.random.Generator) -> None:
    s.masks = {i: 1 - mask for i, mask in s.masks.items()}


def take_from(s: Drawn, start: int, stop: int, shift: int) -> None:
    """Within the part each image gets the next one's mask; at its end the mask that is left over."""
    ids = sorted(s.masks)[start:stop]
    old = dict(s.masks)
    for n, i in enumerate(ids):
        other = old[ids[(n + shift) % len(ids)]]
        s.masks[i] = cv2.resize(other, s.images[i].shape[1::-1], interpolation=cv2.INTER_NEAREST)
        s.samples[i] = replace(s.samples[i], image_label=int(other.any()))


def shifted_all(s: Drawn, rng: np.random.Generator) -> None:
    take_from(s, 0, NUM, int(rng.choice([-1, 1])))


def shifted_part(s: Drawn, rng: np.random.Generator) -> None:
    start = int(rng.integers(1, NUM - PART))
    take_from(s, start, start + PART, int(rng.choice([-1, 1])))


def foreign_class(s: Drawn, rng: np.random.Generator) -> None:
    i = str(rng.choice(s.filled))
    s.masks[i] = s.masks[i] * 7


def absent_class(s: Drawn, rng: np.random.Generator) -> None:
    s.class_names = ("background", "object", "other")


def label_0(s: Drawn, rng: np.random.Generator) -> None:
    i = str(rng.choice(s.filled))
    s.samples[i] = replace(s.samples[i], image_label=0)


def label_1(s: Drawn, rng: np.random.Generator) -> None:
    i = str(rng.choice(list(s.masks)))
    s.masks[i] = np.zeros_like(s.masks[i])
    s.samples[i] = replace(s.samples[i], image_label=1)


def no_contrast(s: Drawn, rng: np.random.Generator) -> None:
    i = str(rng.choice(s.filled))
    s.images[i] = np.full_like(s.images[i], rng.integers(256))


def same_mask(s: Drawn, rng: np.random.Generator) -> None:
    one, other = rng.choice(s.filled, 2, replace=False).tolist()
    s.images[other] = cv2.resize(s.images[other], s.images[one].shape[1::-1])
    s.masks[other] = s.masks[one].copy()


def image_as_mask(s: Drawn, rng: np.random.Generator) -> None:
    i = str(rng.choice(s.filled))
    s.masks[i] = (cv2.cvtColor(s.images[i], cv2.COLOR_RGB2GRAY) > 127).astype(np.uint8)


FAULTS: dict[str, tuple[Callable[[Drawn, np.random.Generator], None], str]] = {
    "exact copy in another split": (exact, "exact_duplicates_across"),
    "copy cropped 2 % a side, JPEG q60": (crop_2, "near_duplicates_across"),
    "copy cropped 4 % a side, JPEG q60": (crop_4, "near_duplicates_across"),
    "group on two sides": (group, "group_on_two_sides"),
    "mask of another size": (other_size, "mask_size"),
    "one mask inverted": (inverted_one, "mask_inverted mask_at_rim"),
    "all masks inverted": (inverted_all, "masks_inverted"),
    "all masks off by one": (shifted_all, "pairing"),
    f"{PART} masks off by one": (shifted_part, "pairing_part"),
    "class id outside the names": (foreign_class, "mask_values"),
    "class that never occurs": (absent_class, "class_absent"),
    "label 0, mask not empty": (label_0, "label_0_with_mask"),
    "label 1, mask empty": (label_1, "label_1_empty_mask"),
    "image without contrast": (no_contrast, "mask_on_nothing"),
    "one mask on two images": (same_mask, "same_mask"),
    "mask equal to its image": (image_as_mask, "mask_is_image"),
}
"""What is planted, how, and the codes of which one must be found."""
COPIES = {"exact", "crop_2", "crop_4"}
ORDINARY = {"pairing", "pairing_unknown", "near_unsearched", "no_contrast"}
"""Notes that are no alarm."""


class Quiet(cli.Terminal):
    def start(self, title: str, total: int) -> None:
        pass

    advance = log = lambda self, *args, **kwargs: None


def findings(source: Drawn, distance: int) -> dict[str, str]:
    """Severity by code."""
    checked = examine_source(DataConfig(duplicate_distance=distance), 0, source, (), Quiet())
    return {finding.code: finding.severity for finding in checked.findings}


def pool(name: str, data: Path) -> list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    if name in ("polyp", "ct", "xray"):
        source = open_source(DataConfig(kind=name, num_samples=150, size=PHANTOM))  # type: ignore[arg-type]
    elif name == "kvasir_seg":
        source = open_source(DataConfig(name=name, root=str(data / name)))
    else:
        source = open_source(DataConfig(name="covid_qu_ex", root=str(data / "covid_qu_ex"), task="lung"))
    return [shrunk(source.image(r.sample_id), source.mask(r.sample_id)) for r in source.refs() if r.sample_id != LEAK]


def shrunk(image: NDArray[np.uint8], mask: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    scale = min(1.0, LONGEST / max(mask.shape))
    size = tuple(round(side * scale) for side in mask.shape[::-1])
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA), cv2.resize(
        mask, size, interpolation=cv2.INTER_NEAREST
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--sets", nargs="+", default=["polyp", "ct", "xray", "kvasir_seg", "covid_qu_ex"])
    parser.add_argument("--planted", nargs="+", help="these alone")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results.csv"))
    args = parser.parse_args()
    began, rows = time.process_time(), []
    table: dict[str, dict[str, str]] = defaultdict(dict)
    for name in args.sets:
        images = pool(name, args.data)
        for planted, (plant, codes) in {"nothing": (None, ""), **FAULTS}.items():
            if args.planted and planted not in args.planted:
                continue
            hits, alarms = 0, 0
            for seed in range(args.seeds):
                rng = np.random.default_rng([seed, *name.encode()])
                source = Drawn(images, rng)
                if plant is not None:
                    plant(source, rng)
                # Search for near copies only where there are some, or nothing: it is the slow part.
                near = plant is None or plant.__name__ in COPIES
                found = findings(source, 6 if near else -1)
                extra = [c for c, s in found.items() if c not in codes.split() and (s == "fault" or c not in ORDINARY)]
                hit = any(code in found for code in codes.split())
                if codes == "pairing":
                    hit = found.get("pairing") == "fault"
                hits, alarms = hits + hit, alarms + bool(extra)
                rows.append([name, planted, seed, codes, int(hit), " ".join(sorted(extra))])
            table[planted][name] = f"{alarms} alarms" if plant is None else f"{hits}"
            print(f"{name}, {planted}: found {hits}, others {alarms} of {args.seeds}", flush=True)
    with args.out.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["set", "planted", "seed", "expected", "found", "others"])
        writer.writerows(rows)
    print(f"| planted | {' | '.join(args.sets)} |\n|---|{'---|' * len(args.sets)}")
    for planted, cells in table.items():
        print(f"| {planted} | {' | '.join(cells[name] for name in args.sets)} |")
    print(f"{time.process_time() - began:.0f} s of processor time")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()

"""Every fault planted in a synthetic Kvasir-SEG is found and named; a clean set has none."""

from __future__ import annotations

import doctest
import io
import json
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from kmine import cli
from kmine.check import __main__ as check
from kmine.check import findings
from kmine.check import report as check_report
from kmine.config import LoopConfig
from kmine.data.datasets.covid_qu_ex import CovidQuEx
from kmine.data.datasets.kvasir_seg import KvasirSeg
from kmine.data.datasets.phantom.dataset import PhantomSource
from kmine.data.source import Source
from kmine.types import SampleRef

DATA = os.environ.get("KMINE_TEST_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="KMINE_TEST_DATA is not set to the folder that holds kvasir_seg/")
NUM = 40


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("clean")
    source = PhantomSource("polyp", NUM, 96)
    for ref in source.refs():
        save(root / "images" / f"{ref.sample_id}.png", source.image(ref.sample_id))
        save(root / "masks" / f"{ref.sample_id}.png", source.mask(ref.sample_id) * 255)
    return root


@pytest.fixture(autouse=True)
def no_contact_sheet(monkeypatch):
    """Half the time of a check; tests/check/test_report.py has it."""
    monkeypatch.setattr(check_report, "contact_sheet_png", lambda source, checked: b"")


@pytest.fixture
def root(clean, tmp_path) -> Path:
    return Path(shutil.copytree(clean, tmp_path / "data"))


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def pictures(root: Path, kind: str) -> list[Path]:
    return sorted((root / kind).iterdir())


def words(root: Path, *more: str) -> list[str]:
    out = root.parent / "out"
    given = {"data.name": "kvasir_seg", "data.root": root, "data.label_fraction": 0.3, "out": out}
    return [f"--{k}={v}" for k, v in given.items()] + list(more)


def config(root: Path, *more: str) -> LoopConfig:
    return cli.parse(LoopConfig, words(root, *more), prog="kmine check", description="")


def report(root: Path) -> dict:
    return json.loads((root.parent / "out/check.json").read_text())


def faults(root: Path) -> dict[str, dict]:
    return {f["code"]: f for f in report(root)["findings"] if f["severity"] == "fault"}


def notes(root: Path) -> dict[str, dict]:
    return {f["code"]: f for f in report(root)["findings"] if f["severity"] == "note"}


def cropped(image: np.ndarray, share: float = 0.04) -> np.ndarray:
    """Without that share of each side, as a JPEG of low quality shows it."""
    y, x = (round(side * share) for side in image.shape[:2])
    buffer = io.BytesIO()
    Image.fromarray(image[y : image.shape[0] - y, x : image.shape[1] - x]).save(buffer, "JPEG", quality=60)
    return np.array(Image.open(buffer))


class WithCopies:
    """A source with a cropped copy of some of its images, in another official split."""

    class_names = ("background", "object")
    skipped = ()

    def __init__(self, source: Source, ids: list[str], copied: list[str], share: float) -> None:
        self._source, self._ids, self._copied, self._share = source, ids, copied, share
        self.name = source.name

    def refs(self):
        own = [SampleRef(i, i, split="train") for i in self._ids]
        copies = [SampleRef(f"copy of {i}", f"copy of {i}", has_mask=False, split="test") for i in self._copied]
        return tuple(sorted((*own, *copies), key=lambda ref: ref.sample_id))

    def image(self, sample_id):
        image = self._source.image(sample_id.removeprefix("copy of "))
        return cropped(image, self._share) if sample_id.startswith("copy of ") else image

    def mask(self, sample_id):
        return self._source.mask(sample_id)

    def fingerprint(self):
        return ""


class Official:
    """A source with the official splits that `split_of` gives."""

    def __init__(self, source: Source, split_of, **groups: str) -> None:
        self._source, self._split_of, self._groups = source, split_of, groups

    def __getattr__(self, name):
        return getattr(self._source, name)

    def refs(self):
        return tuple(
            replace(ref, split=self._split_of(ref.sample_id), group_id=self._groups.get(ref.sample_id, ref.group_id))
            for ref in self._source.refs()
        )


class Part:
    """The samples of a source for which `is_part` holds."""

    def __init__(self, source: Source, is_part) -> None:
        self._source, self._is_part = source, is_part

    def __getattr__(self, name):
        return getattr(self._source, name)

    def refs(self):
        return tuple(ref for ref in self._source.refs() if self._is_part(ref.sample_id))


class Shifted:
    """A source whose masks are those of the next sample."""

    def __init__(self, source: Source) -> None:
        self._source = source
        ids = [ref.sample_id for ref in source.refs()]
        self._next = dict(zip(ids, ids[1:] + ids[:1], strict=True))

    def __getattr__(self, name):
        return getattr(self._source, name)

    def mask(self, sample_id: str) -> np.ndarray:
        height, width = self._source.image(sample_id).shape[:2]
        mask = self._source.mask(self._next[sample_id])
        return cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST)


def by_thirds(sample_id: str) -> str:
    return ("train", "val", "test")[sum(sample_id.encode()) % 3]


def test_few_masks_leave_the_alignment_unknown(root):
    for kind in ("images", "masks"):
        for path in pictures(root, kind)[12:]:
            path.unlink()
    assert check.main(words(root)) == 0
    assert notes(root)["pairing_unknown"]["text"].startswith("12 masks are too few")


def test_the_example_in_the_docstring():
    result = doctest.testmod(findings)
    assert result.attempted and not result.failed


# -- copies


def test_an_exact_copy_kept_on_one_side_is_a_note(root):
    image = pictures(root, "images")[0]
    shutil.copy(image, image.with_name("another.png"))
    shutil.copy(pictures(root, "masks")[0], root / "masks/another.png")
    assert check.main(words(root)) == 0
    assert notes(root)["exact_duplicates_within"]["samples"] == [f"another = {image.stem}"]


def test_an_exact_copy_on_two_official_sides_is_a_fault_unless_allowed(root, capsys):
    image = pictures(root, "images")[0]
    Image.open(image).save(root / "images/another.png", compress_level=1)  # other bytes on disk, the same pixels
    shutil.copy(pictures(root, "masks")[0], root / "masks/another.png")
    source = Official(KvasirSeg(root), lambda i: "test" if i == "another" else "train")
    assert check.run_check(config(root), source) == 1
    assert faults(root)["exact_duplicates_across"]["samples"] == [f"another = {image.stem}"]
    assert "FAULT exact_duplicates_across: 1 pair of images" in capsys.readouterr().out
    assert check.run_check(config(root, "--data.allow_leaks", "true"), source) == 0
    assert "exact_duplicates_across" in notes(root)


@pytest.mark.parametrize(("kind", "share"), [("polyp", 0.02), ("polyp", 0.04), ("ct", 0.04), ("xray", 0.04)])
def test_cropped_recompressed_copies_on_another_side_are_a_fault(tmp_path, kind, share):
    phantom = PhantomSource(kind, NUM, 96)
    ids = [ref.sample_id for ref in phantom.refs()]
    cfg = config(tmp_path / "data", "--data.duplicate_distance=0")
    assert check.run_check(cfg, WithCopies(phantom, ids, ids[::4], share)) == 1
    assert set(faults(tmp_path / "data")) == {"near_duplicates_across"}
    assert {(t["first"], t["second"]) for t in report(tmp_path / "data")["duplicates"]["near"]} == {
        (f"copy of {i}", i) for i in ids[::4]
    }


def test_copies_beyond_the_hash_distance_leak_even_from_drawn_splits(root):
    pairs = list(zip(pictures(root, "images"), pictures(root, "masks"), strict=True))
    for n, (image, mask) in enumerate(pairs):
        save(root / f"images/copy_{n}.png", cropped(np.array(Image.open(image))))
        save(root / f"masks/copy_{n}.png", np.array(Image.open(mask))[4:-4, 4:-4])
    assert check.main(words(root, "--data.duplicate_distance=0")) == 1
    assert set(faults(root)) == {"near_duplicates_across"}


def test_a_group_on_two_official_sides_is_a_fault_unless_allowed(root):
    ids = [path.stem for path in pictures(root, "images")[:2]]
    sides = {ids[0]: "test", ids[1]: "train"}
    source = Official(KvasirSeg(root), lambda i: sides.get(i, by_thirds(i)), **dict.fromkeys(ids, "one_patient"))
    assert check.run_check(config(root), source) == 1
    assert faults(root)["group_on_two_sides"]["samples"] == ["one_patient"]
    assert check.run_check(config(root, "--data.allow_leaks"), source) == 0


# -- masks


def test_a_mask_of_another_size_is_a_fault_that_names_the_file(root):
    path = pictures(root, "masks")[3]
    save(path, np.array(Image.open(path))[:-1])
    assert check.main(words(root)) == 1
    assert path.name in faults(root)["damaged"]["text"] and "image's size" in faults(root)["damaged"]["text"]
    assert check.main(words(root, "--data.on_error=skip")) == 0


def test_masks_of_another_size_are_found_if_the_source_does_not_check(root):
    class Careless(Official):
        def mask(self, sample_id):
            return self._source.mask(sample_id)[:-1]

    assert check.run_check(config(root), Careless(KvasirSeg(root), by_thirds)) == 1
    assert len(faults(root)["mask_size"]["samples"]) == 20  # of 40: as many as are named


def test_a_damaged_image_and_a_mask_without_image_do_not_stop_the_scan(root):
    image, orphan = pictures(root, "images")[:2]
    image.write_bytes(image.read_bytes()[:200])
    orphan.unlink()
    assert check.main(words(root)) == 1
    assert set(faults(root)) == {"damaged", "refused"}
    assert "expected an image for each mask" in faults(root)["refused"]["text"]
    assert report(root)["num_pairs"] == NUM - 2
    assert [s["sample_id"] for s in report(root)["left_out"]] == [orphan.stem]


def test_inverted_masks_are_a_fault(root):
    for path in pictures(root, "masks"):
        save(path, 255 - np.array(Image.open(path)))
    assert check.main(words(root)) == 1
    assert set(faults(root)) == {"masks_inverted"}


def at_rim(path: Path) -> bool:
    mask = np.array(Image.open(path))
    return bool(mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any())


@pytest.mark.parametrize("number", [0, -1])
def test_one_inverted_mask_among_many_is_named(root, number):
    path = [path for path in pictures(root, "masks") if not at_rim(path)][number]
    save(path, 255 - np.array(Image.open(path)))
    assert check.main(words(root)) == 1
    assert set(faults(root)) == {"mask_inverted"} and faults(root)["mask_inverted"]["samples"] == [path.stem]


def test_an_inverted_mask_of_an_object_at_the_rim_is_a_note_that_names_it(root):
    path = pictures(root, "masks")[NUM - 1]
    assert at_rim(path)
    save(path, 255 - np.array(Image.open(path)))
    assert check.main(words(root)) == 0
    assert notes(root)["mask_at_rim"]["samples"] == [path.stem]


def test_an_image_stored_as_its_mask_is_a_fault(root):
    image, mask = pictures(root, "images")[5], pictures(root, "masks")[5]
    shutil.copy(image, mask)
    assert check.main(words(root)) == 1
    assert faults(root)["mask_is_image"]["samples"] == [image.stem]


def test_one_mask_copied_to_many_images_is_a_fault(root):
    masks = pictures(root, "masks")
    for path in masks[10:14]:
        shutil.copy(masks[3], path)
    assert check.main(words(root)) == 1
    assert set(faults(root)) == {"same_mask"}
    assert faults(root)["same_mask"]["samples"] == [f"{masks[3].stem} = {path.stem}" for path in masks[10:14]]


def test_images_without_contrast_are_notes_and_with_masks_faults(root):
    first, second = pictures(root, "images")[:2]
    for n, path in enumerate((first, second)):
        grey = np.full((96, 96, 3), 90, np.uint8)
        grey[n::2] += 1  # two images, both of nothing
        save(path, grey)
    (root / "masks" / second.name).unlink()
    assert check.main(words(root)) == 1
    assert notes(root)["no_contrast"]["samples"] == [first.stem, second.stem]
    assert faults(root).keys() == {"mask_on_nothing"} and faults(root)["mask_on_nothing"]["samples"] == [first.stem]
    (root / "masks" / first.name).unlink()
    assert check.main(words(root)) == 0 and "no_contrast" in notes(root)


class Labeled:
    """A source whose samples have the image-level labels given."""

    def __init__(self, source: Source, **labels: int) -> None:
        self._source, self._labels = source, labels

    def __getattr__(self, name):
        return getattr(self._source, name)

    def refs(self):
        return tuple(replace(ref, image_label=self._labels.get(ref.sample_id, 1)) for ref in self._source.refs())

    def mask(self, sample_id):
        return self._source.mask(sample_id) * (sample_id != "polyp_000002")


def test_labels_that_contradict_their_masks_are_named(root):
    source = Labeled(KvasirSeg(root), polyp_000001=0)
    assert check.run_check(config(root), source) == 1
    assert faults(root).keys() == {"label_0_with_mask"}
    assert faults(root)["label_0_with_mask"]["samples"] == ["polyp_000001"]
    assert notes(root)["label_1_empty_mask"]["samples"] == ["polyp_000002"]
    assert check.run_check(config(root), Labeled(KvasirSeg(root), polyp_000002=0)) == 0
    assert "label_1_empty_mask" not in notes(root)


@pytest.mark.parametrize("value", [1, 2, 3])
def test_class_ids_outside_the_names_and_classes_that_never_occur(root, value):
    for path in pictures(root, "masks"):
        save(path, np.array(Image.open(path)) // 255)  # class 1 only
    path = pictures(root, "masks")[4]
    save(path, np.array(Image.open(path)) * value)
    names = "--data.class_names=[background,polyp,tool]"
    flags = ["--data.name=folder", f"--data.images={root / 'images'}", f"--data.masks={root / 'masks'}", names]
    code = check.main([w for w in words(root, *flags) if "data.root" not in w])
    found = {1: {"class_absent"}, 2: set(), 3: {"class_absent", "damaged"}}[value]
    assert set(faults(root)) == found and code == int(bool(found))
    if value == 1:
        assert faults(root)["class_absent"]["samples"] == ["2 tool"]
    if value == 3:
        assert path.name in faults(root)["damaged"]["text"] and "also the values 3" in faults(root)["damaged"]["text"]


def test_masks_that_are_all_empty_are_a_fault(tmp_path):
    root = tmp_path / "data"
    for side in ("Train", "Val", "Test"):
        for n in range(4):
            rng = np.random.default_rng([n, *side.encode()])
            folder = root / f"Infection Segmentation Data/{side}/COVID-19"
            save(folder / f"images/{n}.png", rng.integers(0, 256, (40, 40), dtype=np.uint8))
            save(folder / f"infection masks/{n}.png", np.zeros((40, 40), np.uint8))
            save(folder / f"lung masks/{n}.png", np.zeros((40, 40), np.uint8))
    argv = ["--data.name=covid_qu_ex", "--data.classes=[COVID-19]"]
    cfg = config(root, *argv)
    assert check.run_check(cfg, CovidQuEx(root, cfg.data)) == 1
    assert set(faults(root)) == {"masks_empty"}
    assert report(root)["splits"] == "the data set's own"
    assert "label_1_empty_mask" in notes(root)


@pytest.mark.parametrize(("shift", "way"), [(1, "after"), (-1, "before")])
@pytest.mark.parametrize(("start", "stop"), [(0, NUM), (8, 26)])
def test_masks_shifted_by_one_file_are_a_fault_with_the_direction(root, shift, way, start, stop):
    masks = pictures(root, "masks")[start:stop]
    contents = [path.read_bytes() for path in masks]
    for path, content in zip(masks, contents[shift:] + contents[:shift], strict=True):
        path.write_bytes(content)
    assert check.main(words(root)) == 1
    code = "pairing" if stop - start == NUM else "pairing_part"
    assert set(faults(root)) == {code} and f"one place {way}" in faults(root)[code]["text"]
    if code == "pairing_part":
        first, last = (int(name[-6:]) for name in faults(root)[code]["samples"])
        assert abs(first - start) <= 3 and abs(last - (stop - 1)) <= 3


def test_a_slow_file_does_not_queue_more_results_than_the_limit():
    begun, go = [], threading.Event()

    def work(number):
        begun.append(number)
        if number == 0:
            go.wait(10)
        return number

    results = findings._in_order(work, range(10 * findings.AHEAD))
    threading.Timer(0.3, go.set).start()
    assert next(results) == 0 and len(begun) <= findings.AHEAD + 1
    assert list(results) == list(range(1, 10 * findings.AHEAD))


# -- real data


@pytest.mark.slow
@needs_data
def test_kvasir_masks_belong_to_their_images_and_shifted_ones_do_not(tmp_path):
    cfg = config(tmp_path / "data", f"--data.root={DATA}/kvasir_seg")
    source = KvasirSeg(Path(DATA) / "kvasir_seg")
    ids = [ref.sample_id for ref in source.refs()][:100]
    source = Part(source, lambda sample_id: sample_id in ids)
    assert check.run_check(cfg, source) == 0
    assert check.run_check(cfg, Shifted(source)) == 1
    assert set(faults(tmp_path / "data")) == {"pairing"}


@pytest.mark.slow
@needs_data
@pytest.mark.parametrize("share", [0.02, 0.04])
def test_cropped_recompressed_kvasir_images_are_recognized(tmp_path, share):
    source = KvasirSeg(Path(DATA) / "kvasir_seg")
    ids = [ref.sample_id for ref in source.refs()][::8]
    assert check.run_check(config(tmp_path / "data"), WithCopies(source, ids, ids[::2], share)) == 1
    assert set(faults(tmp_path / "data")) == {"near_duplicates_across"}
    found = {frozenset((t["first"], t["second"])) for t in report(tmp_path / "data")["duplicates"]["near"]}
    assert found == {frozenset((i, f"copy of {i}")) for i in ids[::2]}


@pytest.mark.slow
@needs_data
def test_the_known_leak_of_the_x_rays_is_the_only_finding(tmp_path):
    argv = ["--data.name=covid_qu_ex", "--data.task=lung", f"--data.root={DATA}/covid_qu_ex"]
    cfg = config(tmp_path / "data", *argv)
    source = Part(CovidQuEx(Path(cfg.data.root), cfg.data), lambda sample_id: "COVID-19" in sample_id)
    assert check.run_check(cfg, source) == 1
    assert set(faults(tmp_path / "data")) == {"near_duplicates_across"}
    leak = faults(tmp_path / "data")["near_duplicates_across"]["samples"]
    assert leak == ["Test/COVID-19/covid_46 = Train/COVID-19/covid_23"]

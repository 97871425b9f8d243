"""The check before training: planted faults are found, no further mask is read, a passed check is not repeated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.small import Silent as Listener

from kmine.config import DataConfig, LoopConfig, ModelConfig
from kmine.data.datasets.phantom.dataset import PhantomSource
from kmine.errors import UserError
from kmine.setup import open as runs
from kmine.setup.open import open_task
from kmine.store.run_folder import RunFolder


class Planted(PhantomSource):
    """Phantoms of 32 pixels with a fault in them."""

    def __init__(self, num: int = 40, *, kind="polyp", mask=None, image=None, groups=None) -> None:
        super().__init__(kind, num, 32)
        self._mask, self._image, self._groups = mask, image, groups or {}
        self.opened: set[str] = set()

    def refs(self):
        return tuple(replace(r, group_id=self._groups.get(r.sample_id, r.group_id)) for r in super().refs())

    def mask(self, sample_id: str) -> np.ndarray:
        self.opened.add(sample_id)
        return self._mask(self, sample_id) if self._mask else super().mask(sample_id)

    def image(self, sample_id: str) -> np.ndarray:
        return super().image(self._image(sample_id) if self._image else sample_id)


def genuine(source: Planted, sample_id: str) -> np.ndarray:
    return PhantomSource.mask(source, sample_id)


def following(source: Planted, sample_id: str) -> np.ndarray:
    return genuine(source, f"polyp_{(int(sample_id[-6:]) + 1) % source.num_samples:06}")


@pytest.fixture
def opened(tmp_path):
    def open_with(source: PhantomSource, out: str = "run", cache: str = "cache", **data):
        settings = {"size": 32, "label_fraction": 0.3, "cache_dir": str(tmp_path / cache), "split_file": None}
        model = ModelConfig(encoder_weights=None)
        cfg = LoopConfig(rounds=0, device="cpu", data=DataConfig(**(settings | data)), model=model)
        store, listener = RunFolder(tmp_path / out), Listener()
        try:
            task = open_task(cfg, source, store, listener)
        finally:
            store.close()
        return task, store.run()["check"], listener.said

    return open_with


def codes(check: dict) -> dict[str, str]:
    return {finding["code"]: finding["severity"] for finding in check["findings"]}


def table(folder: Path, rows: dict[str, str], groups: dict[str, str] | None = None) -> str:
    lines = [f"{i},{(groups or {}).get(i, i)},{split}" for i, split in rows.items()]
    (folder / "given.csv").write_text("\n".join(["sample_id,group_id,split", *lines]))
    return str(folder / "given.csv")


def cycle(num: int = 40) -> dict[str, str]:
    return {f"polyp_{n:06}": ("labeled", "unlabeled", "val", "test")[n % 4] for n in range(num)}


def test_a_sound_data_set_has_notes_only_each_on_one_line(opened):
    _, check, said = opened(Planted(100))
    assert check["passed"] and codes(check) == {"pairing": "note"}
    assert [line for line in said if line.startswith("check: ")] == [f"check: note: {check['findings'][0]['text']}"]
    _, check, said = opened(Planted(20), "other")  # too few masks to tell whose they are
    assert check["passed"] and codes(check) == {"few_cases": "note"} and len(said) == 1


def test_only_labeled_and_validation_masks_are_read_and_nothing_is_decoded_twice(opened):
    source = Planted(60)
    task, check, _ = opened(source)
    assert source.opened == {*task.labeled.ids, *task.val.ids} < {ref.sample_id for ref in source.refs()}

    def trap(*args):
        raise AssertionError("a file was opened")

    trapped = Planted(60, mask=trap, image=trap)
    assert opened(trapped, "again")[1] == check


def test_a_passed_check_is_not_repeated_and_a_failed_one_is(opened, monkeypatch):
    blank = Planted(mask=lambda source, sample_id: np.zeros((32, 32), np.uint8))
    calls = []
    real = runs.find_issues
    monkeypatch.setattr(runs, "find_issues", lambda *args: calls.append(1) or real(*args))
    for _ in range(2):
        with pytest.raises(UserError, match="masks are empty"):
            opened(blank)
    assert len(calls) == 2
    _, check, _ = opened(blank, on_fault="say")
    assert check["passed"] and len(calls) == 3
    _, again, said = opened(blank)
    assert again == check and len(calls) == 3 and not said


FAULTS = {
    "masks_empty": (lambda source, sample_id: np.zeros((32, 32), np.uint8), r"all \d+ masks are empty"),
    "masks_inverted": (lambda source, sample_id: 1 - genuine(source, sample_id), "foreground and background look swap"),
    "mask_values": (lambda source, sample_id: 7 * genuine(source, sample_id), r"values that are no class: \[7\]"),
}


@pytest.mark.parametrize("code", FAULTS)
def test_faults_of_masks_stop_with_their_cures_or_are_logged(opened, code):
    mask, text = FAULTS[code]
    with pytest.raises(UserError, match=text) as caught:
        opened(Planted(mask=mask))
    line = str(caught.value)
    assert "kmine.check" in line and line.endswith("pass --data.on_fault say") and "allow_leaks" not in line
    _, check, said = opened(Planted(mask=mask), on_fault="say")
    assert codes(check)[code] == "fault" and any(line.startswith("check: fault: ") for line in said)


def test_labeled_masks_that_are_all_empty_stop_even_if_validation_has_objects(opened, tmp_path):
    given = table(tmp_path, cycle())

    def mask(source: Planted, sample_id: str) -> np.ndarray:
        return genuine(source, sample_id) * (cycle()[sample_id] != "labeled")

    with pytest.raises(UserError, match="of the labeled images all 10 masks are empty"):
        opened(Planted(mask=mask), split_file=given)


def test_a_class_that_no_labeled_image_shows_is_a_note_before_training(opened):
    source = Planted()
    source.class_names = ("background", "polyp", "ulcer")
    _, check, said = opened(source)
    assert check["passed"] and codes(check)["class_unlabeled"] == "note"
    assert any("no labeled image shows class 2: nothing teaches it" in line for line in said)


def test_masks_of_other_images_stop_if_there_are_enough_of_them(opened):
    data = {"label_fraction": 1, "test_fraction": 0}
    with pytest.raises(UserError, match=r"masks fit their own images no better.*by name"):
        opened(Planted(130, mask=following), **data)
    assert codes(opened(Planted(130), "sound", "sound", **data)[1]) == {"pairing": "note"}
    few = opened(Planted(60, mask=following), "few", "few", **data)[1]
    assert codes(few) == {"few_cases": "note", "pairing_unsure": "note"}
    assert "kmine.check" in few["findings"][1]["text"]


def test_a_group_on_two_sides_stops_unless_leaks_are_allowed(opened, tmp_path):
    source = Planted(groups={"polyp_000000": "patient", "polyp_000002": "patient", "polyp_000001": "patient"})
    given = table(tmp_path, cycle())
    with pytest.raises(UserError, match=r"1 group \(patient.*on two sides of the split \[patient\]") as caught:
        opened(source, split_file=given)
    assert "kmine.check" in str(caught.value) and "--data.allow_leaks true" in str(caught.value)
    assert codes(opened(source, split_file=given, allow_leaks=True)[1])["group_on_two_sides"] == "note"


@pytest.mark.parametrize("other", [2, 3])
def test_copies_on_two_sides_stop_unless_leaks_are_allowed(opened, tmp_path, other):
    source = Planted(image=lambda i: "polyp_000000" if i == f"polyp_{other:06}" else i)
    given = table(tmp_path, cycle())
    with pytest.raises(UserError, match="1 pair of images with the same pixels on two sides") as caught:
        opened(source, split_file=given)
    assert f"[polyp_000000 = polyp_{other:06}]" in str(caught.value) and "allow_leaks" in str(caught.value)
    _, check, _ = opened(source, split_file=given, allow_leaks=True)
    assert codes(check)["exact_duplicates_across"] == "note"


class EndSlices(Planted):
    """Volumes of five slices, of which the first is black."""

    def __init__(self) -> None:
        super().__init__(groups={f"polyp_{n:06}": f"volume {n // 5}" for n in range(40)})

    def image(self, sample_id: str) -> np.ndarray:
        return super().image(sample_id) * bool(int(sample_id[-6:]) % 5)


def test_black_end_slices_join_no_volumes(opened, tmp_path):
    task, check, _ = opened(EndSlices())
    assert check["passed"] and len({row["group_id"] for row in task.run.read_csv("splits.csv")}) == 8


def test_black_end_slices_on_two_sides_are_no_leak(opened):
    _, check, _ = opened(EndSlices(), duplicate_distance=-1)
    assert check["passed"] and not any("duplicates" in code for code in codes(check))


def test_copies_on_one_side_or_outside_the_splits_are_no_leak(opened, tmp_path):
    rows = cycle() | {"polyp_000005": "unlabeled"}
    del rows["polyp_000007"]
    source = Planted(image=lambda i: "polyp_000000" if i in ("polyp_000005", "polyp_000007") else i)
    _, check, said = opened(source, split_file=table(tmp_path, rows))
    assert set(codes(check).values()) == {"note"}
    assert any("1 image that data.split_file does not name" in line and "[polyp_000007]" in line for line in said)


def test_groups_that_straddle_a_given_split_are_counted_and_named(opened, tmp_path):
    ids = [f"polyp_{n:06}" for n in range(40)]
    (tmp_path / "test.txt").write_text("\n".join(ids[:8]))
    source = Planted(groups={ids[0]: "patient", ids[20]: "patient", ids[21]: "patient"})
    task, check, said = opened(source, split_file=str(tmp_path / "test.txt"))
    assert codes(check) == {"few_cases": "note", "left_out_straddling": "note"}
    assert sum("2 images whose group" in line and ids[20] in line for line in said) == 1
    assert not {*ids[:8], ids[20], ids[21]} & {*task.labeled.ids, *task.unlabeled.ids, *task.val.ids}


def test_what_few_images_cannot_show_is_said_before_training_but_not_in_a_fold(opened):
    _, check, said = opened(PhantomSource("polyp", 20, 32))
    assert codes(check)["few_cases"] == "note"
    line = "check: note: 2 validation and 5 test images: no gain can be told from noise; --data.folds 5 of kmine loop"
    assert any(text.startswith(line) for text in said)
    task, check, said = opened(PhantomSource("polyp", 20, 32), "fold", folds=5, fold=2)
    assert "few_cases" not in codes(check) and (len(task.labeled) + len(task.unlabeled), len(task.val)) == (14, 2)


def test_a_single_run_names_its_fold(opened):
    with pytest.raises(UserError, match=r"data\.fold: expected one of the folds for a single run, got null"):
        opened(PhantomSource("polyp", 20, 32), folds=5)

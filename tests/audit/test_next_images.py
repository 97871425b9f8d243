"""Images to label next: which, in what order, and that the answers reach the next run."""

from __future__ import annotations

import csv
import json
import math
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers.loop_command import run_loop
from helpers.small import Silent
from pycocotools import mask as coco_masks

from kmine import next as command
from kmine.audit import __main__ as audit
from kmine.audit import next_images
from kmine.audit.next_images import choose_next, dropped_or_doubtful
from kmine.audit.rounds import open_audit
from kmine.data.datasets.phantom.dataset import PhantomSource
from kmine.feedback import label_studio_rle
from kmine.feedback.verdicts import read_verdicts
from kmine.io.files import encode_png
from kmine.store.run_folder import RunFolder
from kmine.store.table_files import encode_table
from kmine.store.tables import DecisionRow

from .conftest import TINY


@contextmanager
def opened(run: Path):
    with open_audit(run, Silent(), device="cpu") as audited:
        yield audited


def change_decisions(run: Path, changes: dict[str, dict[str, object]]) -> list[str]:
    """Write other values into the rows of samples in the audited round; `changes` by number of the unlabeled image."""
    with opened(run) as audited:
        number, ids = audited.audited_round.round_idx, list(audited.task.unlabeled.ids)
        store = audited.store
        rows = [replace(row, **changes.get(ids.index(row.sample_id), {})) for row in store.decisions(number)]
        path = store.round_dir(number) / "decisions.parquet"
        path.write_bytes(encode_table(rows, DecisionRow, store.round_signature(number)))
    return ids


DROPPED = {"kept": False, "reason": "low_rank", "in_training": False}


def drop(run: Path, count: int) -> list[str]:
    """Drop the masks of the first of 13 images of the audited round; returns all unlabeled ids."""
    return change_decisions(run, dict.fromkeys(range(count), DROPPED))


def test_dropped_and_doubtful_images_are_candidates_and_settled_ones_are_not(run):
    with opened(run) as audited:
        before = set(dropped_or_doubtful(audited))
        silent = {i for i in audited.task.unlabeled.ids if not audited.audited_round.has_pseudo_mask(i)}
    assert before == silent, "an open gate drops nothing else"
    low, high = ({"estimated_dice": value} for value in (0.2, 0.95))
    settled = {"kept": True, "reason": "accepted", "in_training": True}
    ids = change_decisions(run, {0: DROPPED, 1: low, 2: high, 3: settled, 4: {**DROPPED, "reason": "lesion_free"}})
    with opened(run) as audited:
        found = set(dropped_or_doubtful(audited))
        assert found - before == {ids[0], ids[1]} - before and {ids[0], ids[1]} <= found
        assert not found & {ids[3], ids[4]}, "settled, whether anything was found or not"


def test_images_with_a_verdict_are_left_out_but_for_rejected_ones(run, tmp_path):
    ids = drop(run, 3)
    mask = np.zeros((32, 32), np.uint8)
    mask[4:9, 4:9] = 1
    (tmp_path / "drawn").mkdir()
    (tmp_path / "drawn" / f"{ids[0]}.png").write_bytes(encode_png(mask, "", 0))
    kept = next(row.sample_id for row in RunFolder(run, follows=True).decisions(2) if row.kept)
    (tmp_path / "v.json").write_text(
        json.dumps(
            {"format": "kmine-verdicts-1", "verdicts": [{"sample_id": kept, "kind": "pseudo", "verdict": "reject"}]}
        )
    )
    words = ["--corrected", str(tmp_path / "drawn"), "--verdicts", str(tmp_path / "v.json"), "--device", "cpu"]
    assert audit.main([str(run), *words]) == 0
    with opened(run) as audited:
        found = dropped_or_doubtful(audited)
    assert ids[0] not in found and {ids[1], ids[2], kept} <= set(found)


def test_the_gain_is_the_mean_of_the_three_doubts(run, monkeypatch):
    """A model that sees the segmenter's mask with half of its pixels, and 0.1 deviation over flips."""
    ids = change_decisions(run, {0: {**DROPPED, "estimated_dice": 0.7}})
    with opened(run) as audited:
        truth = next_images.mask_of_round(audited, ids[0], "segmenter") == 1
        half = truth & (np.cumsum(truth).reshape(truth.shape) <= truth.sum() // 2)

        def predict(model, images, tta, device):
            probs = np.where(half, np.float32(0.9), np.float32(0.1))
            probs = np.broadcast_to(np.stack([1 - probs, probs]), (len(images), 2, *half.shape))
            return probs, np.full((len(images), 1, *half.shape), 0.1, np.float32)

        monkeypatch.setattr(next_images, "predict_resized", predict)
        ((gain, estimate, disagreement, flips), features), *_ = next_images._doubts(audited, [ids[0]])
    dice = 2 * half.sum() / (half.sum() + truth.sum())
    assert (estimate, flips, disagreement) == pytest.approx((0.7, 0.2, 1 - dice))
    assert gain == pytest.approx((0.3 + 0.2 + 1 - dice) / 3) and features.ndim == 1 and np.isfinite(features).all()


def test_an_image_where_nothing_is_found_has_the_share_of_such_validation_images_with_an_object(run, monkeypatch):
    silent = {"object_idx": -1, "local_rle": None, "segmenter_rle": None, **DROPPED}
    ids = change_decisions(run, {0: silent})
    finds: set[bytes] = set()

    def predict(model, images, tta, device):
        """Foreground everywhere in the images of `finds`, nothing in others."""
        probs = np.zeros((len(images), 2, 32, 32), np.float32)
        for n, image in enumerate(images):
            probs[n, int(image.tobytes() in finds)] = 1
        return probs, np.zeros((len(images), 1, 32, 32), np.float32)

    monkeypatch.setattr(next_images, "predict_resized", predict)
    with opened(run) as audited:
        val, labeled = audited.task.val, audited.task.labeled
        prior = np.mean([labeled.mask_resized(i).any() for i in labeled.ids])
        masks = {i: np.full((32, 32), n % 2, np.uint8) for n, i in enumerate(val.ids)}
        monkeypatch.setattr(val, "mask_resized", masks.get)
        monkeypatch.setattr(audited.task.unlabeled, "image_label", lambda sample_id: None)
        finds |= {val.image_resized(val.ids[0]).tobytes()}
        with_object = [n % 2 for n in range(1, len(val.ids))]
        ((gain, *rest), _), *_ = next_images._doubts(audited, [ids[0]])
        finds |= {val.image_resized(i).tobytes() for i in val.ids}
        ((alone, *_), _), *_ = next_images._doubts(audited, [ids[0]])
        monkeypatch.setattr(audited.task.unlabeled, "image_label", lambda sample_id: 1)
        ((diseased, *_), _), *_ = next_images._doubts(audited, [ids[0]])
    assert gain == pytest.approx(np.mean([prior, *with_object])) and all(map(math.isnan, rest))
    assert (alone, diseased) == (pytest.approx(prior), 1)


def test_near_duplicates_and_neighbouring_slices_count_as_one(run, monkeypatch):
    drop(run, 12)
    with opened(run) as audited:
        ids = dropped_or_doubtful(audited)
        groups = {i: "twins" if n < len(ids) - 1 else i for n, i in enumerate(ids)}
        monkeypatch.setattr(audited.task.unlabeled, "group_of", groups.get)
        assert len({image.group_id for image in choose_next(audited, 2)}) == 2
        with pytest.raises(Exception, match=rf"dropped or doubts {len(ids)} images, 2 without near-duplicates"):
            choose_next(audited, 3)
        place = {i: ("v", Path("v.nii"), n) for n, i in enumerate(ids)}
        monkeypatch.setattr(audited.source, "slice_location", place.get)
        numbers = [place[image.sample_id][2] // next_images.NEAR_SLICES for image in choose_next(audited, 2)]
        assert len({*numbers}) == 2


def test_table_sheet_and_tasks_show_the_mask_of_the_round_dropped_objects_included(run, capsys):
    drop(run, 12)
    assert command.main([str(run), "-n", "4", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    folder = run / "next"
    with (folder / "next.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["rank"] for row in table] == ["1", "2", "3", "4"] and all(row["sample_id"] in shown for row in table)
    assert all(0 <= float(row["gain"]) <= 1 and row["estimated_dice"] == "" for row in table), "the gate is ranked"
    assert cv2.imread(str(folder / "next.png")).shape[1] > 4 * 256
    tasks = {task["data"]["sample_id"]: task for task in json.loads((folder / "labelstudio.json").read_text())}
    coco = json.loads((folder / "coco.json").read_text())
    ids = {image["id"]: image["sample_id"] for image in coco["images"]}
    assert set(tasks) == {*ids.values()} == {row["sample_id"] for row in table}
    with opened(run) as audited:
        for annotation in coco["annotations"]:
            expected = next_images.mask_of_round(audited, ids[annotation["image_id"]]) == 1
            assert (coco_masks.decode(annotation["segmentation"]) == expected).all()
            (stroke,) = tasks[ids[annotation["image_id"]]]["predictions"][0]["result"]
            assert (label_studio_rle.decode(stroke["value"]["rle"], *expected.shape) == expected).all()
    assert all((folder / task["data"]["image"]).is_file() for task in tasks.values())
    assert {annotation["category_id"] for annotation in coco["annotations"]} == {1}


@pytest.mark.parametrize("tool", ["labelstudio", "cvat"])
def test_tasks_go_out_masks_come_in_and_the_next_run_trains_on_them(run, tmp_path, tool):
    drop(run, 12)
    assert command.main([str(run), "-n", "3", "--device", "cpu", "--format", tool]) == 0
    path = run / "next" / next_images.FORMATS[tool]
    tasks = json.loads(path.read_text())
    source = PhantomSource("polyp", 40, 32)

    def drawn(sample_id: str) -> np.ndarray:
        return source.mask(sample_id) == 1

    if tool == "labelstudio":
        for task in tasks:
            truth = drawn(task["data"]["sample_id"])
            value = {"format": "rle", "rle": label_studio_rle.encode(truth), "brushlabels": ["polyp"]}
            size = {"original_width": truth.shape[1], "original_height": truth.shape[0]}
            region = {"type": "brushlabels", "from_name": "tag", "to_name": "image", "value": value, **size}
            task["annotations"] = [{"result": [region]}]
        names = [task["data"]["sample_id"] for task in tasks]
    else:
        tasks["annotations"] = []
        for image in tasks["images"]:
            runs = coco_masks.encode(np.asfortranarray(drawn(image["sample_id"]).astype(np.uint8)))
            runs["counts"] = runs["counts"].decode()
            tasks["annotations"].append(
                {"id": image["id"], "image_id": image["id"], "category_id": 1, "segmentation": runs}
            )
        names = [image["sample_id"] for image in tasks["images"]]
    (tmp_path / "answers.json").write_text(json.dumps(tasks))
    assert audit.main([str(run), "--corrected", str(tmp_path / "answers.json"), "--device", "cpu"]) == 0
    corrected = read_verdicts(run / "verdicts.json").corrected
    assert set(corrected) == set(names)
    for name in names:
        assert ((cv2.imread(str(corrected[name]), -1) == 1) == drawn(name)).all()
    if tool == "cvat":
        return
    settings = {**TINY, "rounds": 1, "data.split_file": run / "splits.csv", "verdicts": run / "verdicts.json"}
    second = tmp_path / "second"
    assert run_loop(settings, second) == 0
    info = json.loads((second / "run.json").read_text())
    assert info["verdicts"]["corrected"] == 3
    with (run / "splits.csv").open(newline="") as file:
        labeled = sum(row["split"] == "labeled" for row in csv.DictReader(file))
    metrics = json.loads((second / "round_00" / "metrics.json").read_text())
    assert metrics["num_labeled"] == labeled + 3
    assert audit.main([str(second), "--export", "coco", "--device", "cpu"]) == 0
    coco = json.loads((second / "audit" / "coco.json").read_text())
    ids = {image["id"]: image["sample_id"] for image in coco["images"]}
    strokes = {ids[one["image_id"]]: coco_masks.decode(one["segmentation"]) for one in coco["annotations"]}
    assert all((strokes[name] == drawn(name)).all() for name in names), "from brush to run lengths of COCO"
    assert command.main([str(run), "-n", "3", "--device", "cpu"]) == 0
    with (run / "next" / "next.csv").open(newline="") as file:
        assert not {row["sample_id"] for row in csv.DictReader(file)} & set(names), "these have a mask now"


def refused(words: list[str], capsys: pytest.CaptureFixture[str], text: str) -> None:
    capsys.readouterr()
    assert command.main([*words, "--device", "cpu"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("kmine next: error: ") and text in last


def test_bad_input_is_one_line_with_the_cure(run, tmp_path, capsys):
    with opened(run) as audited:
        count = len(dropped_or_doubtful(audited))
    number = RunFolder(run, follows=True).run()["adopted_round"]
    text = f"-n 41: expected at most {count}" if count else f"expected images that round {number}"
    refused([str(run), "-n", "41"], capsys, text)
    drop(run, 12)
    with opened(run) as audited:
        count = len(dropped_or_doubtful(audited))
    refused([str(run), "-n", "41"], capsys, f"-n 41: expected at most {count}, as round")
    assert not (run / "next").exists()
    assert run_loop({**TINY, "rounds": 0}, tmp_path / "labels") == 0
    refused([str(tmp_path / "labels")], capsys, "run kmine.loop with --rounds 1 or more")
    info = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(info | {"stopped_by": "interrupted"}))
    refused([str(run)], capsys, "the run is not finished")

"""Verdicts and corrected masks imported into the run folder."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.dicom_files import SHAPE, multiframe, scan
from helpers.masks import replace_masks
from PIL import Image

from kmine.audit import __main__ as audit
from kmine.audit import import_verdicts
from kmine.audit.export_dicom_seg import write_dicom_segs
from kmine.config import DataConfig
from kmine.data import open_source
from kmine.errors import UserError
from kmine.feedback.expected import ExpectedMasks
from kmine.feedback.verdict_effects import resolve_verdicts
from kmine.feedback.verdicts import FORMAT, mask_signature, read_verdicts
from kmine.ops.masks import to_rle
from kmine.store.run_folder import RunFolder


@pytest.fixture
def verdicts_json(run, rows):
    """Writes verdicts of the page: reject, accept and unsure on the first three masks."""

    def write(**changes: object) -> Path:
        rated = [
            {name: row[name] for name in ("sample_id", "kind", "mask_signature")} | {"verdict": word, "note": ""}
            for row, word in zip(rows(run / "audit"), ("reject", "accept", "unsure"), strict=False)
        ]
        value = {"format": FORMAT, "run": "run", "run_signature": "", "verdicts": rated} | changes
        (run.parent / "verdicts.json").write_text(json.dumps(value))
        return run.parent / "verdicts.json"

    return write


def test_verdicts_and_corrected_masks_are_imported(run, rows, verdicts_json, capsys):
    assert audit.main([str(run), "--device", "cpu", "--export", "masks"]) == 0
    found = rows(run / "audit")
    masks = run / "audit" / "masks"
    assert len(list(masks.glob("*.png"))) == len(found)
    name = found[0]["sample_id"]
    drawn = np.asarray(Image.open(masks / f"{name}.png")).copy()
    drawn[:3, :3] = 1
    Image.fromarray((drawn == 1).astype(np.uint8) * 255).save(masks / f"{name}.png")
    words = [str(run), "--device", "cpu", "--verdicts", str(verdicts_json()), "--corrected", str(masks)]
    assert audit.main(words) == 0
    assert "1 accept, 1 reject, 1 unsure, 1 corrected" in capsys.readouterr().err
    kept = read_verdicts(run / "verdicts.json")
    assert kept.rejected == {name} and kept.run_signature and set(kept.corrected) == {name}
    assert (np.asarray(Image.open(kept.corrected[name])) == (drawn == 1)).all()
    entry = json.loads((run / "verdicts.json").read_text())["corrected"][name]
    assert entry["mask_signature"] == mask_signature((drawn == 1).astype(np.uint8))


def test_a_verdict_on_a_changed_mask_is_left_out(run, rows, verdicts_json, capsys):
    store = RunFolder(run)
    row = rows(run / "audit")[0]
    number, name = int(row["round"]), row["sample_id"]
    replace_masks(store, number, {name: 1 - np.minimum(store.pseudo_mask(number, name), 1)})
    store.close()
    assert audit.main([str(run), "--device", "cpu", "--verdicts", str(verdicts_json())]) == 0
    text = f"1 verdicts on masks that have changed or are no longer used were left out: {row['sample_id']}"
    assert text in capsys.readouterr().err
    assert read_verdicts(run / "verdicts.json").rejected == frozenset()


def test_unknown_images_and_masks_of_another_size_leave_nothing_behind(run, rows, verdicts_json, tmp_path, capsys):
    unknown = verdicts_json(verdicts=[{"sample_id": "elsewhere", "kind": "pseudo", "verdict": "accept"}])
    assert audit.main([str(run), "--verdicts", str(unknown), "--device", "cpu"]) == 2
    assert "elsewhere (pseudo)" in capsys.readouterr().err.splitlines()[-1]
    (tmp_path / "small").mkdir()
    Image.fromarray(np.zeros((5, 4), np.uint8)).save(tmp_path / "small" / f"{rows(run / 'audit')[0]['sample_id']}.png")
    assert audit.main([str(run), "--corrected", str(tmp_path / "small"), "--device", "cpu"]) == 2
    assert "got 4 x 5" in capsys.readouterr().err.splitlines()[-1]
    assert not (run / "corrected").exists() and not (run / "verdicts.json").exists()


def opened(folder: Path):
    where = {"images": str(folder / "images"), "class_names": ("background", "liver", "tumour"), "window": (0.0, 9.0)}
    return open_source(DataConfig(name="folder", **where))


def test_dicom_segmentations_are_corrected_masks_bit_for_bit(tmp_path):
    pytest.importorskip("highdicom")
    scan(tmp_path / "images" / "ct", 4)
    multiframe(tmp_path / "images" / "enhanced.dcm", 3)
    source = opened(tmp_path)
    drawn_ids = ["ct/s0", "ct/s2", "enhanced/slice-0000", "enhanced/slice-0002"]
    rng = np.random.default_rng(0)
    drawn = {i: rng.choice(np.array([0, 1, 2, 255], np.uint8), SHAPE) for i in drawn_ids}
    segs = write_dicom_segs(tmp_path / "segs", drawn.items(), source)
    run = SimpleNamespace(source=source)
    shapes = {ref.sample_id: SHAPE for ref in source.refs() if ref.sample_id != "ct/s2"}  # that one is of validation
    expected = ExpectedMasks(shapes, source.class_names)

    def read(path: Path) -> dict[str, np.ndarray]:
        return dict(import_verdicts._read_segs(run, expected, import_verdicts._dicom_files(path), path))

    assert len(import_verdicts._dicom_files(segs)) == 2 and not import_verdicts._dicom_files(tmp_path / "nothing")
    back = read(segs)
    assert set(back) == {*drawn_ids} - {"ct/s2"}, "without the frame that is ignored as a whole"
    assert all((back[i] == drawn[i]).all() for i in back)
    assert set(read(next(segs.glob("ct*.dcm")))) == {"ct/s0"}
    (segs / "other.png").touch()
    assert not import_verdicts._dicom_files(segs), "left to the reader of pictures"


def test_dicom_that_is_no_mask_of_the_run_is_one_line(run, tmp_path, capsys):
    pytest.importorskip("highdicom")
    scan(tmp_path / "images" / "ct", 2)
    source = opened(tmp_path)
    expected = ExpectedMasks({ref.sample_id: SHAPE for ref in source.refs()}, source.class_names)

    def read(path: Path) -> None:
        files = import_verdicts._dicom_files(path)
        [*import_verdicts._read_segs(SimpleNamespace(source=source), expected, files, path)]

    with pytest.raises(UserError, match="expected DICOM segmentations, got other DICOM files; give the masks"):
        read(tmp_path / "images")
    scan(tmp_path / "other" / "images" / "ct", 2, study="1.2.7")
    other = opened(tmp_path / "other")
    segs = write_dicom_segs(tmp_path / "segs", [("ct/s0", np.ones(SHAPE, np.uint8))], other)
    with pytest.raises(UserError, match="expected a segmentation of these images, got one of 1 others"):
        read(segs)
    assert audit.main([str(run), "--corrected", str(segs), "--device", "cpu"]) == 2
    assert "expected masks of images that are not DICOM, got DICOM files" in capsys.readouterr().err.splitlines()[-1]
    assert not (run / "verdicts.json").exists()


def mended_on(row: dict[str, str], mask: np.ndarray, *more: tuple[int, str]) -> dict[str, object]:
    """A verdict of the page on a mask that the reviewer changed."""
    runs = [[class_id, to_rle(mask == class_id)] for class_id in (1, 255)]
    verdict = {name: row[name] for name in ("sample_id", "kind", "mask_signature")} | {"verdict": "reject", "note": ""}
    return {**verdict, "mended": [*runs, *more]}


def test_masks_mended_on_the_page_are_corrections_until_they_are_withdrawn(run, rows, verdicts_json, capsys):
    by_kind = {row["kind"]: row for row in rows(run / "audit")}
    pseudo, given = (by_kind[kind] for kind in ("pseudo", "labeled"))
    mask = np.zeros((int(pseudo["height"]), int(pseudo["width"])), np.uint8)
    mask[4:9, 5:20], mask[0, :3] = 1, 255
    page = verdicts_json(verdicts=[mended_on(pseudo, mask), mended_on(given, mask)])
    assert audit.main([str(run), "--device", "cpu", "--verdicts", str(page)]) == 0
    kept = read_verdicts(run / "verdicts.json")
    assert set(kept.corrected) == {pseudo["sample_id"], given["sample_id"]} == kept.rejected
    assert all((np.asarray(Image.open(path)) == mask).all() for path in kept.corrected.values())
    ids = [[given["sample_id"]], [pseudo["sample_id"]]]
    effects = resolve_verdicts(run / "verdicts.json", *ids, ())
    assert set(effects.corrected) == kept.rejected and not effects.rejected and not effects.dropped_labels
    with pytest.raises(UserError, match=r"expected the mended masks beside it.*first import the file"):
        resolve_verdicts(page, *ids, ())
    plain = {**mended_on(pseudo, mask), "mended": None}
    assert audit.main([str(run), "--device", "cpu", "--verdicts", str(verdicts_json(verdicts=[plain]))]) == 0
    assert set(read_verdicts(run / "verdicts.json").corrected) == {given["sample_id"]}


def test_damaged_mended_masks_leave_nothing_behind(run, rows, verdicts_json, capsys):
    row = rows(run / "audit")[0]
    mask = np.zeros((int(row["height"]), int(row["width"])), np.uint8)
    for wrong, words in (
        (mended_on(row, mask, (7, to_rle(mask == 0))), "of the classes 1 to 1 and 255, got 7; save it again"),
        (mended_on(row, mask[:-1]), "expected run lengths of 32 x 32"),
        ({**mended_on(row, mask), "mended": [[1]]}, "expected mended masks as [class id, run lengths]"),
    ):
        page = verdicts_json(verdicts=[wrong])
        assert audit.main([str(run), "--verdicts", str(page), "--device", "cpu"]) == 2
        assert words in capsys.readouterr().err.splitlines()[-1]
    assert not (run / "corrected").exists() and not (run / "verdicts.json").exists()

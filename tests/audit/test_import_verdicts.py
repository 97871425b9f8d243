"""Verdicts and corrected masks imported into the run folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kmine.audit import __main__ as audit
from kmine.feedback.verdicts import FORMAT, mask_signature, read_verdicts
from kmine.io.files import encode_png
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
    path = store.pseudo_path(int(row["round"]), row["sample_id"])
    path.write_bytes(encode_png(1 - np.minimum(store.pseudo_mask(int(row["round"]), row["sample_id"]), 1), "x", 1))
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

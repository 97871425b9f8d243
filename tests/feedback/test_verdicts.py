"""verdicts.json is read strictly; a mask's signature depends on shape and pixels only."""

from __future__ import annotations

import json

import numpy as np
import pytest

from kmine.errors import UserError
from kmine.feedback.verdicts import (
    FORMAT,
    Verdict,
    Verdicts,
    mask_signature,
    read_verdicts,
    to_json,
)

GOOD = {"sample_id": "a", "kind": "pseudo", "verdict": "reject", "mask_signature": "00", "note": "liver"}


def write(folder, rows, **more):
    path = folder / "verdicts.json"
    path.write_text(json.dumps({"format": FORMAT, "run": "r", "run_signature": "s", "verdicts": rows, **more}))
    return path


def test_verdicts_are_read_by_their_kind(tmp_path):
    rows = [GOOD, GOOD | {"sample_id": "b", "verdict": "accept"}, GOOD | {"sample_id": "c", "verdict": "unsure"}]
    found = read_verdicts(write(tmp_path, rows))
    assert (found.run, found.run_signature) == ("r", "s") and found.all[0] == Verdict(**GOOD)
    assert (found.accepted, found.rejected, found.unsure) == ({"b"}, {"a"}, {"c"})
    assert found.corrected == {}


def test_verdicts_of_a_run_come_back_with_their_masks(tmp_path):
    (tmp_path / "corrected").mkdir()
    (tmp_path / "corrected" / "a.png").write_bytes(b"")
    verdicts = Verdicts("r", "s", (Verdict(**GOOD),))
    entry = {"a": {"file": "corrected/a.png", "mask_signature": "00"}}
    (tmp_path / "verdicts.json").write_text(json.dumps(to_json(verdicts, entry, {})))
    found = read_verdicts(tmp_path / "verdicts.json")
    assert found.all == verdicts.all and found.corrected == {"a": tmp_path / "corrected" / "a.png"}
    (tmp_path / "corrected" / "a.png").unlink()
    with pytest.raises(UserError, match="missing"):
        read_verdicts(tmp_path / "verdicts.json")


@pytest.mark.parametrize(
    ("row", "match"),
    [
        (GOOD | {"kind": "mined"}, "kind"),
        (GOOD | {"verdict": "yes"}, "'yes'"),
        (GOOD | {"sample_id": ""}, "sample_id"),
        ({"kind": "pseudo"}, "verdict 2"),
        (7, "verdict 2"),
        (GOOD, "two on a"),
    ],
)
def test_a_bad_row_is_named(row, match, tmp_path):
    with pytest.raises(UserError, match=match):
        read_verdicts(write(tmp_path, [GOOD, row]))


@pytest.mark.parametrize("text", ["", "[]", '{"format": "kmine-verdicts-9"}', f'{{"format": "{FORMAT}"}}', "\xff"])
def test_another_format_is_refused(text, tmp_path):
    (tmp_path / "v.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="expected"):
        read_verdicts(tmp_path / "v.json")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_verdicts(tmp_path / "v.json")


def test_a_signature_depends_on_shape_and_pixels():
    mask = np.zeros((2, 3), np.uint8)
    other = mask.copy()
    other[0, 0] = 1
    found = {mask_signature(m) for m in (mask, other, mask.T, mask.reshape(6, 1))}
    assert len(found) == 4 and mask_signature(np.asfortranarray(other)) == mask_signature(other)

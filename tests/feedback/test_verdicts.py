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
from kmine.io.files import encode_png

GOOD = {"sample_id": "a", "kind": "pseudo", "verdict": "reject", "mask_signature": "00", "note": "liver"}


def write(folder, rows, **more):
    path = folder / "verdicts.json"
    value = {"format": FORMAT, "run": "r", "run_signature": "s", "verdicts": rows} | more
    path.write_text(json.dumps(value))
    return path


def test_verdicts_are_read_by_their_kind(tmp_path):
    rows = [GOOD, GOOD | {"sample_id": "b", "verdict": "accept"}, GOOD | {"sample_id": "c", "verdict": "unsure"}]
    found = read_verdicts(write(tmp_path, rows))
    assert (found.run, found.run_signature) == ("r", "s") and found.all[0] == Verdict(**GOOD)
    assert (found.accepted, found.rejected, found.unsure) == ({"b"}, {"a"}, {"c"})
    assert found.corrected == {}


def test_verdicts_of_a_run_come_back_with_their_masks(tmp_path):
    (tmp_path / "corrected").mkdir()
    mask = np.eye(3, dtype=np.uint8)
    (tmp_path / "corrected" / "a.png").write_bytes(encode_png(mask, "", 1))
    verdicts = Verdicts("r", "s", (Verdict(**GOOD),))
    entry = {"a": {"file": "corrected/a.png", "mask_signature": mask_signature(mask)}}
    (tmp_path / "verdicts.json").write_text(json.dumps(to_json(verdicts, entry, {})))
    found = read_verdicts(tmp_path / "verdicts.json")
    assert found.all == verdicts.all and found.corrected == {"a": tmp_path / "corrected" / "a.png"}
    (tmp_path / "corrected" / "a.png").write_bytes(encode_png(1 - mask, "", 1))
    with pytest.raises(UserError, match=r"a\.png: expected the mask as it was imported"):
        read_verdicts(tmp_path / "verdicts.json")
    for damage in (b"", b"\x89PNG\r\n\x1a\n", encode_png(mask, "", 1)[:-30]):
        (tmp_path / "corrected" / "a.png").write_bytes(damage)
        with pytest.raises(UserError, match=r"a\.png: expected a mask of kmine"):
            read_verdicts(tmp_path / "verdicts.json")
    (tmp_path / "corrected" / "a.png").unlink()
    with pytest.raises(UserError, match="missing"):
        read_verdicts(tmp_path / "verdicts.json")


@pytest.mark.parametrize(
    ("row", "match"),
    [
        (GOOD | {"kind": "mined"}, "kind"),
        (GOOD | {"verdict": "yes"}, 'got "yes"'),
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


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"run": ["r"]}, "`run` to be text or null or NaN, got a list"),
        ({"verdicts": {}}, "`verdicts` to be a list"),
        ({"verdicts": [GOOD | {"note": {"a": 1}}]}, "verdict 1: expected `note` to be text"),
        ({"verdicts": [GOOD | {"mask_signature": 7}]}, "`mask_signature` to be text"),
        ({"verdicts": [GOOD | {"verdict": ["accept"]}]}, "got a list"),
        ({"corrected": []}, "`corrected` to be an object"),
        ({"corrected": {"a": "b.png"}}, "expected an object with `file`"),
        ({"accepted": {"a": {"file": 1}}}, "`file` to be text"),
        ({"corrected": {"a": {"file": "../a.png"}}}, "in its own folder, got '../a.png'"),
        ({"corrected": {"a": {"file": "/etc/passwd"}}}, "in its own folder"),
        ({"corrected": {"a": {"file": "a\0.png"}}}, "in its own folder"),
    ],
)
def test_fields_of_another_type_are_named(changes, match, tmp_path):
    with pytest.raises(UserError, match=match) as error:
        read_verdicts(write(tmp_path, **{"rows": [GOOD], **changes}))
    assert str(error.value).startswith(f"{tmp_path / 'verdicts.json'}: ")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_verdicts(tmp_path / "v.json")


def test_a_signature_depends_on_shape_and_pixels():
    mask = np.zeros((2, 3), np.uint8)
    other = mask.copy()
    other[0, 0] = 1
    found = {mask_signature(m) for m in (mask, other, mask.T, mask.reshape(6, 1))}
    assert len(found) == 4 and mask_signature(np.asfortranarray(other)) == mask_signature(other)

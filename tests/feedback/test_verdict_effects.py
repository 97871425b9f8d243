"""Effects of verdicts on the next run, by the side of the split that an image is on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from kmine.errors import UserError
from kmine.feedback.verdict_effects import NO_VERDICTS, resolve_verdicts
from kmine.feedback.verdicts import FORMAT
from kmine.io.files import encode_png, read_png


def verdicts_json(
    folder: Path, verdicts: dict[str, str], corrected: str = "", accepted: str = "", given: str = ""
) -> Path:
    """Verdicts by sample id; `corrected`, `accepted`: ids of samples with such a mask, a letter each; `given`: those
    whose given mask was reviewed, in place of a pseudo mask."""
    files = {}
    for kind, names in (("corrected", corrected), ("accepted", accepted)):
        (folder / kind).mkdir(exist_ok=True)
        for name in names:
            (folder / kind / f"{name}.png").write_bytes(encode_png(np.ones((2, 2), np.uint8), "", 0))
        files[kind] = {name: {"file": f"{kind}/{name}.png"} for name in names}
    kinds = {name: "labeled" if name in given else "pseudo" for name in verdicts}
    rows = [{"sample_id": name, "kind": kinds[name], "verdict": verdict} for name, verdict in verdicts.items()]
    value = {"format": FORMAT, "run": "r", "run_signature": "", "verdicts": rows, **files}
    (folder / "verdicts.json").write_text(json.dumps(value))
    return folder / "verdicts.json"


def test_each_verdict_has_its_effect(tmp_path):
    words = {"l": "reject", "k": "accept", "u": "accept", "w": "reject", "x": "unsure", "c": "reject"}
    effects = resolve_verdicts(verdicts_json(tmp_path, words, "c", "u", "lk"), ["l", "k"], ["u", "w", "x", "c"], [])
    assert effects.rejected == {"w"} and set(effects.accepted) == {"u"} and set(effects.corrected) == {"c"}
    assert effects.dropped_labels == {"l"} and effects.unmatched == ()
    assert {name for name in "lkuwxc" if name in effects} == {"u", "w"}
    assert effects.summary() == {"accepted": 1, "rejected": 1, "corrected": 1, "dropped": 1, "elsewhere": 0}
    assert read_png(effects.corrected["c"]).sum() == 4


def test_a_verdict_on_the_other_kind_of_mask_has_no_effect_but_a_correction_has(tmp_path):
    """g and h had given masks and are mined now, p and q had pseudo masks and are labeled now."""
    words = {"g": "reject", "h": "accept", "p": "reject", "q": "accept", "c": "reject", "d": "reject"}
    effects = resolve_verdicts(verdicts_json(tmp_path, words, "cd", "", "ghc"), ["p", "q", "d"], ["g", "h", "c"], [])
    assert not effects.rejected and not effects.accepted and not effects.dropped_labels
    assert set(effects.corrected) == {"c", "d"} and effects.unmatched == ("g", "h", "p", "q")


def test_verdicts_on_validation_and_test_images_have_no_effect(tmp_path):
    path = verdicts_json(tmp_path, {}, corrected="uv")
    effects = resolve_verdicts(path, ["l"], ["u"], ["v"])
    assert set(effects.corrected) == {"u"} and effects.unmatched == ("v",) and effects.summary()["elsewhere"] == 1
    with pytest.raises(UserError, match="got v; is it the file of another data set"):
        resolve_verdicts(path, ["l"], ["u"], [])


def test_the_signature_changes_with_verdicts_and_with_pixels(tmp_path):
    def signature(verdicts: dict[str, str]) -> str:
        return resolve_verdicts(verdicts_json(tmp_path, verdicts, "c"), ["l"], ["u", "w", "c"], []).signature

    first = signature({"u": "reject"})
    assert first == signature({"u": "reject", "w": "unsure"}) != signature({"w": "reject"})
    path = verdicts_json(tmp_path, {"u": "reject"}, "c")
    (tmp_path / "corrected" / "c.png").write_bytes(encode_png(np.zeros((2, 2), np.uint8), "", 0))
    assert resolve_verdicts(path, ["l"], ["u", "w", "c"], []).signature != first
    assert NO_VERDICTS.signature == ""


def test_verdicts_that_fit_no_image_or_lack_a_mask_are_refused(tmp_path):
    with pytest.raises(UserError, match="none of its 1 verdicts is on an image that this run labels or mines"):
        resolve_verdicts(verdicts_json(tmp_path, {"v": "reject"}), ["l"], ["u"], ["v"])
    with pytest.raises(UserError, match=r"that of u is missing \(1 in all\)"):
        resolve_verdicts(verdicts_json(tmp_path, {"u": "accept"}), ["l"], ["u"], [])
    many = dict.fromkeys("abcdefg", "reject")
    with pytest.raises(UserError, match="got a, b, c, d, e and 2 more; is it"):
        resolve_verdicts(verdicts_json(tmp_path, many), ["l"], ["u"], [])

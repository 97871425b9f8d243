"""Round trip: run, audit, keys in a real browser, saved file, import, effect on the next run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.browser import CHROMIUM, Browser
from helpers.loop_command import (
    FEW_STEPS,
    OPEN_GATE,
    SMALL,
    run_loop,
)

from kmine.audit import __main__ as audit
from kmine.feedback.verdicts import read_verdicts
from kmine.io.files import read_png
from kmine.store.run_folder import RunFolder

SETTINGS = {**SMALL, **FEW_STEPS, **OPEN_GATE, "gate.mode": "ranked", "data.label_fraction": 0.4}


def saved_in_browser(page_file: Path, downloads: Path, keys: str) -> Path:
    """Open the page, press the keys, mend the next mask and save; returns the file."""
    downloads.mkdir()
    with Browser() as browser:
        browser.downloads_to(downloads)
        browser.open(page_file.as_uri())
        browser.wait("document.body.dataset.ready === 'yes' && document.getElementById('stage').dataset.shown !== ''")
        for key in keys:
            browser.key(key)
        browser.key("m")
        browser.wait("kmineAudit.mend.active")
        browser.evaluate("kmineAudit.mend.dab(), kmineAudit.mend.erasing = true")  # one of the two changes the mask
        if browser.evaluate("kmineAudit.verdicts.state(kmineAudit.list.shown[kmineAudit.list.at])") != "mended":
            browser.key(" ")
        browser.evaluate("document.getElementById('save').click()")
        file = downloads / "verdicts.json"
        for _ in range(100):
            if file.exists():
                break
            browser.evaluate("new Promise((done) => setTimeout(done, 100))")
    return file


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_verdicts_of_the_page_take_effect_in_the_next_run(tmp_path):
    first, cache = tmp_path / "first", tmp_path / "cache"
    assert run_loop(SETTINGS, first, cache) == 0
    assert audit.main([str(first), "--no-labeled", "--device", "cpu"]) == 0
    file = saved_in_browser(first / "audit" / "audit.html", tmp_path / "downloads", "aru")
    saved = json.loads(file.read_text("utf-8"))["verdicts"]
    rated = {one["verdict"]: one["sample_id"] for one in saved if "mended" not in one}
    (mended,) = (one["sample_id"] for one in saved if "mended" in one)
    assert set(rated) == {"accept", "reject", "unsure"}
    assert audit.main([str(first), "--verdicts", str(file), "--device", "cpu"]) == 0
    assert run_loop(SETTINGS, tmp_path / "second", cache, verdicts=first / "verdicts.json") == 0
    drawn = read_verdicts(first / "verdicts.json").corrected[mended]
    one, two = RunFolder(first), RunFolder(tmp_path / "second")
    reasons = {row.sample_id: row.reason for row in two.decisions(1)}
    assert (reasons[rated["accept"]], reasons[rated["reject"]]) == ("accepted", "rejected")
    assert reasons[rated["unsure"]] not in ("accepted", "rejected")
    assert np.array_equal(one.pseudo_mask(1, rated["accept"]), two.pseudo_mask(1, rated["accept"]))
    assert two.masks(1).missing([rated["reject"], rated["accept"]]) == [rated["reject"]]
    assert not np.array_equal(one.pseudo_mask(1, mended), read_png(drawn)) and mended not in reasons, "a label now"
    assert [two.run()["verdicts"][name] for name in ("accepted", "rejected", "corrected")] == [1, 1, 1]
    one.close(), two.close()

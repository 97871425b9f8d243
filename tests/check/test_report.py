"""check.json, check.png and the text of a small data set without faults."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kmine.check.findings import examine_source
from kmine.check.report import contact_sheet_png, render_text, report_values, stratum_of
from kmine.cli import Terminal
from kmine.config import DataConfig
from kmine.data.datasets.phantom.dataset import PhantomSource
from kmine.types import Finding, SampleRef

NUM = 40


@pytest.fixture(scope="module")
def source() -> PhantomSource:
    return PhantomSource("polyp", NUM, 96)


@pytest.fixture(scope="module")
def checked(source):
    return examine_source(DataConfig(num_samples=NUM, size=96), 0, source, (), Terminal(quiet=True))


def test_every_sample_is_counted(source, checked):
    values = report_values(DataConfig(num_samples=NUM, size=96), source, checked)
    assert [finding["code"] for finding in values["findings"]] == ["few_cases", "pairing"] and not checked.has_fault
    assert sum(row["with a mask"] for row in values["counts"].values()) == NUM
    assert set(values["counts"]) == {"train", "val", "test"}
    assert values["images"]["sizes"] == {"96 x 96": NUM} and set(values["masks"]["values"]) == {"0", "1"}
    assert values["groups"] == {"count": NUM, "largest": 1}
    assert values["pairing"]["num_pairs"] == NUM and values["pairing"]["z"] > 5


def test_the_text_has_the_counts_and_names_three_samples_a_finding(source, checked):
    values = report_values(DataConfig(), source, checked)
    text = render_text(values, Path("out"))
    assert f"{NUM} samples, {NUM} pairs" in text and "no fault; written: out/check.json" in text
    values["findings"] = [vars(Finding("same_mask", "fault", "equal masks", ("a", "b", "c", "d")))]
    assert "FAULT same_mask: equal masks [a; b; c; ...]\n1 fault; written" in render_text(values, Path("out"))


def test_the_contact_sheet_shows_24_samples_with_their_outlines(source, checked):
    sheet = np.array(Image.open(io.BytesIO(contact_sheet_png(source, checked))))
    assert sheet.shape == (4 * (256 + 34 + 6) + 6, 6 * (256 + 6) + 6, 3)
    cyan = np.all(np.abs(sheet.astype(int) - (0, 229, 255)) < 12, axis=2)  # the outlines' colour
    cells = [cyan[6 + y * 296 :, 6 + x * 262 :][:256, :256] for y in range(4) for x in range(6)]
    assert all(cell.sum() > 50 for cell in cells)


def test_a_stratum_is_the_split_with_classes_and_image_label(checked):
    item = checked.scan.stats[0]
    ref = SampleRef(item.sample_id, "group", image_label=1)
    assert stratum_of(item, ref, {item.sample_id: "val"}) == ("val", "class 1, label 1")
    assert stratum_of(item, ref, {}) == ("left out", "class 1, label 1")

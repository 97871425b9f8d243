"""The report of a run: self-contained, escaped, complete for every kind of run."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import ClassVar

import numpy as np
import pytest

from kmine.ops.statistics import Paired
from kmine.report.html import headline, render_html, write_report
from kmine.report.inputs import GalleryItem, Report, RoundRow
from kmine.types import Prompts, Skipped

EVIL = "<script>alert(1)</script>"
NAN = float("nan")


def row(round_idx: int, dice: float = 0.7, **more) -> RoundRow:
    mined = {"reasons": {"kept": 8, "low_agreement": 2}, "coverage": 0.4, "changed_pixels": 0.03} if round_idx else {}
    base = RoundRow(round_idx, 6, 8 * round_idx, dice, dice - 0.1, 12.5, 1, dice - 0.01, True, seconds={"fit": 65.0})
    return replace(base, **(mined | more))


def item(category: str = "best", sample_id: str = "a", pseudo: bool = True) -> GalleryItem:
    image = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    mask = np.zeros((40, 60), np.uint8)
    mask[10:30, 15:45] = 1
    ignored = mask.copy()
    ignored[10:14] = 255
    points = np.array([[30, 20], [16, 11]], np.float32)
    prompts = [Prompts(1, np.array([14, 9, 45, 30], np.float32), points, np.array([1, 0]))]
    scores = {"predicted_iou": NAN, "agreement_iou": 0.5}
    found = (mask, mask, ignored if pseudo else None)
    return GalleryItem(category, sample_id, 1, "kept" if pseudo else "low_agreement", scores, image, prompts, *found)


def report(rounds: list[RoundRow], **more) -> Report:
    base = Report("a run", "phantom", "unetpp", "ellipse", "python -m kmine.loop", rounds, validation_cases=12)
    return replace(base, **more)


class _Page(HTMLParser):
    """Collects tags, what they would load, and the text; checks that tags close in order."""

    VOID: ClassVar = {"meta", "link", "img", "br", "hr"}

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags, self.loads, self.text, self.open, self.ids = [], [], [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.loads += [value for name, value in attrs if name in {"src", "href", "xlink:href", "srcset", "data"}]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def full() -> str:
    rounds = [
        row(0, 0.60, supervised_dice=0.60, supervised_dice_final=0.59),
        row(1, 0.70, supervised_dice=0.62, supervised_dice_final=0.61),
        row(2, 0.65, supervised_dice=0.63, supervised_dice_final=NAN, adopted=False),
    ]
    gallery = [item("dropped", "third", pseudo=False), item("best", "first"), item("worst", "second")]
    return render_html(report(rounds, gallery=gallery, config_yaml="rounds: 2", provenance={"git_commit": "abc"}))


def test_the_page_loads_nothing_from_outside(full):
    page = _Page(full)
    assert all(target.startswith(("data:", "#")) for target in page.loads)
    assert not re.search(r"(https?:)?//[a-z]", re.sub(r"data:[^\"]*", "", full))
    assert not re.search(r"url\((?!#)", full) and "@import" not in full


def test_ids_are_unique_and_references_resolve(full):
    page = _Page(full)
    assert len(page.ids) == len(set(page.ids))
    used = set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', full))
    assert {a or b for a, b in used} <= set(page.ids)


def test_every_picture_has_an_alternative_text(full):
    pictures = [attrs for tag, attrs in _Page(full).tags if tag == "img"]
    assert len(pictures) == 14  # five per item, less the pseudo mask of the dropped one
    assert all(attrs["alt"] for attrs in pictures)


def test_gallery_order_is_best_worst_dropped(full):
    where = [full.index(f"<h4>{name} ") for name in ("first", "second", "third")]
    assert where == sorted(where)
    assert "no pseudo mask" in full


def test_the_segmenter_is_named_in_tables_and_figures(full):
    assert full.count("<td>ellipse</td>") == 2
    assert full.count("(segmenter: ellipse)") == 3
    assert "ellipse mask" in full


def test_everything_is_escaped():
    fields = dict.fromkeys(("title", "dataset", "model", "segmenter", "command", "config_yaml"), EVIL)
    hostile = report(
        [row(0), row(1, reasons={"kept": 1}, seconds={EVIL: 1.0, "$x_{": 2.0})],
        **fields,
        gallery=[replace(item(), sample_id=EVIL, reason=EVIL, scores={EVIL: 1.0})],
        provenance={EVIL: EVIL},
        notes=[EVIL],
        skipped=[Skipped(EVIL, EVIL, EVIL)],
    )
    page = _Page(render_html(hostile))
    assert all(tag != "script" for tag, _ in page.tags)
    assert sum(EVIL in text for text in page.text) >= 14


def test_unknown_numbers_are_dashes_and_never_nan(full):
    empty = row(1, NAN, iou=NAN, hd95=NAN, dice_final=NAN, coverage=NAN, changed_pixels=NAN, supervised_dice=NAN)
    for html in (full, render_html(report([row(0, NAN), empty]))):
        text = " ".join(_Page(html).text)
        assert not re.search(r"\bnan\b", text, re.IGNORECASE)
        assert "–" in text


@pytest.mark.parametrize("rounds", [[], [row(0)], [row(0), row(1)], [row(0), row(1, reasons={}, seconds={})]])
def test_every_kind_of_run_gives_a_page(rounds):
    page = _Page(render_html(report(rounds)))
    assert ("table", {"class": "rounds"}) in page.tags or not rounds


def test_a_failed_write_leaves_the_page_before(tmp_path, monkeypatch):
    path = tmp_path / "new" / "report.html"
    write_report(path, report([row(0)]))
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_report(path, report([row(0), row(1)]))
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_equal_reports_give_equal_bytes(tmp_path):
    for name in ("a.html", "b.html"):
        write_report(tmp_path / name, report([row(0), row(1)], gallery=[item()]))
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_undecodable_file_name_is_written(tmp_path):
    write_report(tmp_path / "r.html", report([row(0)], skipped=[Skipped("a\udcff", "a\udcff.png", "unreadable")]))
    assert "a?" in (tmp_path / "r.html").read_text("utf-8")


def test_a_page_with_24_large_items_is_below_5_mb():
    big = np.random.default_rng(1).integers(0, 255, (24, 32, 3), dtype=np.uint8).repeat(30, 0).repeat(30, 1)
    mask = np.zeros(big.shape[:2], np.uint8)
    mask[100:500, 200:700] = 1
    large = replace(item(), image=big, local_mask=mask, segmenter_mask=mask, pseudo_mask=mask)
    assert len(render_html(report([row(0)], gallery=[large] * 24))) < 5e6


ONE = {"supervised": 0.637}


def test_the_headline_compares_the_kept_round_with_the_better_baseline():
    rounds = [row(0, 0.6), row(1, 0.70, kept=True), row(2, 0.69)]
    gain, both = Paired(0.063, 0.021, 0.105, 40), {"supervised_once": 0.66, "supervised": 0.65}
    text = headline(report(rounds, gain=gain, baselines=both))
    assert "0.700 on 12 validation cases (round 1)" in text
    assert text.endswith(
        "reached 0.660 (in one schedule; 0.650 in rounds): mining is ahead by 6.3 points [+2.1, +10.5] (95 % interval, "
        "image by image)."
    )
    assert "reached 0.637 (in rounds): mining" in headline(report(rounds, gain=gain, baselines=ONE))


@pytest.mark.parametrize(
    ("gain", "ending"),
    [
        (
            Paired(-0.01, -0.015, -0.005, 40),
            ": mining is behind by 1.0 points [-1.5, -0.5] (95 % interval, image by image).",
        ),
        (
            Paired(0.063, -0.01, 0.136, 20),
            ": no difference shown, +6.3 points [-1.0, +13.6] (95 % interval, image by image).",
        ),
        (Paired(0.0, 0.0, 0.0, 20), ": no difference shown, +0.0 points [+0.0, +0.0] (95 % interval, image by image)."),
        (None, ": too few validation images to say which is ahead."),
    ],
)
def test_the_headline_states_the_difference_with_its_interval_or_none(gain, ending):
    assert headline(report([row(0), row(1, 0.7, kept=True)], gain=gain, baselines=ONE)).endswith(ending)


def test_the_headline_without_a_baseline_claims_no_gain():
    assert headline(report([row(0), row(1)])).endswith("more optimizer steps may explain any gain over round 0.")


def test_the_headline_says_how_clean_images_count():
    rounds = [row(0), row(1, num_clean=3, kept=True)]
    assert headline(report(rounds, gain=Paired(0.1, 0.05, 0.15, 40), baselines=ONE)).endswith(
        "; silence on a clean image counts 1, a false alarm 0."
    )


def test_the_headline_of_a_run_that_kept_or_adopted_nothing():
    empty = row(1, 0.6, num_pseudo=0, adopted=False, supervised_dice=0.5)
    assert headline(report([row(0, 0.6), empty], gain=Paired(0.1, 0.05, 0.15, 40))) == (
        "Supervised training on 6 labels reached Dice 0.600 on 12 validation cases; nothing was mined: no round with "
        "ellipse kept a pseudo mask."
    )
    rounds = [row(0, 0.6, kept=True), row(1, 0.5, adopted=False)]
    text = headline(report(rounds, gain=Paired(-0.05, -0.08, -0.02, 40), baselines=ONE))
    assert text.startswith(
        "No round of mining with ellipse is kept: round 0, trained on the labels alone, reached Dice 0.600"
    )
    assert "mining is behind by 5.0 points [-8.0, -2.0]" in text


def test_the_headline_where_only_image_labels_gave_masks():
    rounds = [row(0), row(1, 0.7, supervised_dice=0.6, reasons={"lesion_free": 8, "low_agreement": 3})]
    text = headline(report(rounds, gain=Paired(0.1, 0.05, 0.15, 40)))
    assert text.startswith("No mask of ellipse was kept, so nothing was mined;") and "ahead" not in text


def test_figures_of_clean_images_are_shown_where_there_are_any():
    clean = [
        row(
            0,
            num_clean=4,
            num_empty=3,
            dice_lesion=0.65,
            false_alarm_rate=0.25,
            supervised_dice_lesion=0.61,
            supervised_dice=0.6,
        )
    ]
    page = render_html(report(clean))
    assert all(text in page for text in ("Dice lesion", ">0.650<", ">25 %<", ">0.610<", "silence on a clean image"))
    assert "false alarms" not in render_html(report([row(0)]))


def test_the_headline_before_and_without_mining():
    assert headline(report([])).startswith("No round has finished")
    assert headline(report([row(0, 0.5)])) == (
        "Supervised training on 6 labels reached Dice 0.500 on 12 validation cases; nothing was mined."
    )

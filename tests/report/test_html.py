"""The report of a run: self-contained, escaped, complete for every kind of run."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from kmine.ops.statistics import Paired
from kmine.report.html import headline, render_html, verdict_on, write_report
from kmine.report.inputs import GalleryItem, Report, RoundRow
from kmine.types import REASONS, Prompts, Skipped

EVIL = "<script>alert(1)</script>"
NAN = float("nan")
DOCS = Path(__file__).resolve().parents[2] / "docs"


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

    VOID: ClassVar = {"meta", "link", "img", "br", "hr", "input"}

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
    assert full.count('<td class="more">ellipse</td>') == 2
    assert full.count("(segmenter: ellipse)") == 3
    assert "ellipse mask" in full


def test_bars_of_reasons_and_of_stages_are_to_scale_and_every_reason_has_its_own_colour():
    counts = dict.fromkeys(REASONS, 1)
    page = render_html(report([row(0), row(1, reasons=counts, seconds={"fit": 30.0, "infer": 10.0})]))
    bars = re.findall(r'<i style="flex-basis: ([\d.]+)%; background: (#\w+)" title="([^"]*)">', page)
    assert bars[: len(REASONS)][0][0] == f"{100 / len(REASONS):.2f}"
    assert len({colour for _, colour, _ in bars[: len(REASONS)]}) == len(REASONS)
    assert [(width, title) for width, _, title in bars[len(REASONS) :]] == [
        ("100.00", "fit 65.0"), ("46.15", "fit 30.0"), ("15.38", "infer 10.0"),
    ]  # fmt: skip
    bare = render_html(report([row(0, seconds={})]))
    assert "Seconds per stage" not in bare and "by the gate's reason" not in bare


def test_everything_is_escaped():
    fields = dict.fromkeys(
        ("title", "dataset", "model", "segmenter", "command", "config_yaml", "objects", "advice"), EVIL
    )
    hostile = report(
        [row(0), row(1, reasons={"kept": 1}, seconds={EVIL: 1.0, "$x_{": 2.0})],
        **fields,
        gallery=[replace(item(), sample_id=EVIL, reason=EVIL, scores={EVIL: 1.0})],
        provenance={EVIL: EVIL},
        notes=[EVIL],
        warnings=[(EVIL, EVIL)],
        commands=[(EVIL, EVIL)],
        skipped=[Skipped(EVIL, EVIL, EVIL)],
    )
    page = _Page(render_html(hostile))
    assert all(tag != "script" for tag, _ in page.tags)
    assert sum(EVIL in text for text in page.text) >= 19


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


def test_the_verdict_compares_the_kept_round_with_the_better_baseline():
    rounds = [row(0, 0.6), row(1, 0.70, kept=True), row(2, 0.69)]
    gain, both = Paired(0.063, 0.021, 0.105, 40), {"supervised_once": 0.66, "supervised": 0.65}
    verdict = headline(report(rounds, gain=gain, baselines=both))
    assert verdict.call == "Better"
    assert verdict.by == (
        "mining gains 6.3 points of Dice over the baseline (95 % interval +2.1 to +10.5, image by image, on 12 "
        "validation images)"
    )
    assert "0.700 on 12 validation images (round 1)" in verdict.lead
    assert verdict.lead.endswith("reached 0.660 (in one schedule; 0.650 in rounds)")
    assert headline(report(rounds, gain=gain, baselines=ONE)).lead.endswith("reached 0.637 (in rounds)")


@pytest.mark.parametrize(
    ("gain", "call", "by"),
    [
        (
            Paired(-0.01, -0.015, -0.005, 40),
            "Worse",
            "mining loses 1.0 points of Dice over the baseline (95 % interval",
        ),
        (
            Paired(0.063, -0.01, 0.136, 20),
            "Not shown",
            "+6.3 points of Dice by mining may be chance (95 % interval -1.0",
        ),
        (Paired(0.0, 0.0, 0.0, 20), "Not shown", "mining and the baseline score the same in each of 12"),
        (Paired(0.1, NAN, NAN, 20), "Not shown", "+10.0 points of Dice by mining, without an interval, on 12"),
        (None, "Not shown", "12 validation images are too few to say whether mining is better"),
    ],
)
def test_the_verdict_is_a_word_and_the_difference_with_its_interval(gain, call, by):
    rendered = report([row(0), row(1, 0.7, kept=True)], gain=gain, baselines=ONE)
    verdict = headline(rendered)
    assert verdict.call == call and verdict.by.startswith(by)
    page = render_html(rendered)
    assert page.index(f">{call}<") < page.index("<h2>")
    assert ('class="span"' in page) == (gain is not None and gain.low == gain.low)
    assert not re.search(r"\bnan\b", page)


def test_a_correction_for_many_comparisons_takes_a_verdict_back():
    gain = Paired(0.05, 0.01, 0.09, 40)
    assert verdict_on("x", gain, "9 images").call == "Better"
    text = "+5.0 points of Dice by x, among so many comparisons, may be chance"
    assert verdict_on("x", gain, "9 images", shown=False).by.startswith(text)


def test_without_a_baseline_no_gain_is_claimed():
    verdict = headline(report([row(0), row(1)]))
    assert verdict.call == "No comparison"
    assert verdict.by.endswith("more optimizer steps may explain any gain over round 0")


def test_the_lead_says_how_clean_images_count():
    rounds = [row(0), row(1, num_clean=3, kept=True)]
    verdict = headline(report(rounds, gain=Paired(0.1, 0.05, 0.15, 40), baselines=ONE))
    assert verdict.lead.endswith("; silence on a clean image counts 1, a false alarm 0")


def test_the_verdict_of_a_run_that_kept_or_adopted_nothing():
    empty = row(1, 0.6, num_pseudo=0, adopted=False, supervised_dice=0.5)
    assert headline(report([row(0, 0.6), empty], gain=Paired(0.1, 0.05, 0.15, 40))) == (
        "No comparison",
        "supervised training on 6 labels reached Dice 0.600 on 12 validation images; nothing was mined: no round with "
        "ellipse kept a pseudo mask",
        "",
    )
    rounds = [row(0, 0.6, kept=True), row(1, 0.5, adopted=False)]
    verdict = headline(report(rounds, gain=Paired(-0.05, -0.08, -0.02, 40), baselines=ONE))
    assert verdict.lead.startswith(
        "No round of mining with ellipse is kept: round 0, trained on the labels alone, reached Dice 0.600"
    )
    assert verdict.call == "Worse" and "loses 5.0 points" in verdict.by


def test_the_verdict_where_only_image_labels_gave_masks():
    rounds = [row(0), row(1, 0.7, supervised_dice=0.6, reasons={"lesion_free": 8, "low_agreement": 3})]
    verdict = headline(report(rounds, gain=Paired(0.1, 0.05, 0.15, 40)))
    assert verdict.call == "No comparison"
    assert verdict.by.startswith("no mask of ellipse was kept, so nothing was mined;")


def test_warnings_come_in_order_with_their_cures_and_apart_from_news():
    warned = [("Few images", "label more"), ("A stand-in", "")]
    page = render_html(report([row(0)], warnings=warned, notes=["It stopped."], commands=[("audit r", "look")]))
    places = [page.index(text) for text in ("Few images.", "label more.", "A stand-in.", "audit r", "It stopped.")]
    assert places == sorted(places)
    assert "<h2>Warnings</h2>" not in render_html(report([row(0)]))


def test_the_words_of_the_page_are_those_of_the_glossary(full):
    written = re.sub(r"[`\n]", "", (DOCS / "glossary.md").read_text("utf-8"))
    pairs = re.findall(r'<dt id="word-[^"]*">(.*?)</dt><dd>(.*?)</dd>', full)
    assert len(pairs) > 10 and {"Dice", "gate"} <= {word for word, _ in pairs}
    for word, meaning in pairs:
        assert f"| {word} | {meaning} |" in written
    links = set(re.findall(r'href="#(word-[^"]*)"', full))
    assert links and links <= set(_Page(full).ids)


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


def test_the_verdict_before_and_without_mining():
    assert headline(report([])) == ("No comparison", "no round has finished yet", "")
    assert headline(report([row(0, 0.5)])).by == (
        "supervised training on 6 labels reached Dice 0.500 on 12 validation images; nothing was mined"
    )

"""The page of an audit in a real browser: display, storage, files, escaping."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from helpers.audit_items import (
    EVIL,
    HOSTILE,
    PICTURES,
    disc,
    item,
    items,
    write,
)
from helpers.browser import CHROMIUM, Browser

from kmine.feedback.verdicts import read_verdicts
from kmine.ops.masks import from_rle, to_rle
from kmine.report.audit import page as audit_page

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")

READY = "document.body.dataset.ready === 'yes' && document.getElementById('stage').dataset.shown !== ''"


@pytest.fixture(scope="module")
def browser():
    with Browser() as found:
        yield found


@pytest.fixture
def page(browser, tmp_path, request):
    """The open page; a run signature per test gives each test its own storage."""
    address = write(tmp_path, signature=request.node.name).as_uri()
    browser.events.clear()
    browser.open(address)
    browser.wait(READY)
    return browser


def text(page: Browser, element: str) -> str:
    return page.evaluate(f"document.getElementById('{element}').textContent.replace(/\\s+/g, ' ').trim()")


def names(page: Browser) -> list[str]:
    return page.evaluate("kmineAudit.list.shown.map((one) => one.id)")


def put(page: Browser, element: str, value: str, event: str = "change") -> None:
    page.evaluate(
        f"(() => {{ const one = document.getElementById('{element}'); one.value = {json.dumps(value)};"
        f" one.dispatchEvent(new Event('{event}')); }})()"
    )


def test_everything_loads_from_the_folder_and_hostile_text_is_text(page, tmp_path):
    for _ in 2 * HOSTILE:
        page.key("n")
        page.wait("document.getElementById('stage').dataset.shown !== ''")
    assert page.evaluate("window.bad") is None
    assert not page.seen("Page.javascriptDialogOpening")
    assert [entry for entry in page.seen("Log.entryAdded") if entry["entry"]["level"] == "error"] == []
    urls = [event["request"]["url"] for event in page.seen("Network.requestWillBeSent")]
    assert urls and all(url.startswith(("file://", "data:")) for url in urls)
    assert page.evaluate("document.querySelectorAll('#list script, .panel script, #summary script, i').length") == 0
    assert page.evaluate("document.title") == f"Audit of {EVIL} · kmine"
    assert text(page, "summary").count(EVIL) == 2
    put(page, "text", "漢字", "input")
    page.wait("kmineAudit.list.shown.length === 1")
    page.wait(f"document.getElementById('history').textContent === {json.dumps(HOSTILE[-1])}")
    assert page.evaluate("document.getElementById('name').textContent") == HOSTILE[-1]
    assert page.evaluate("document.querySelector('#facts tr:last-child th').textContent") == HOSTILE[-1]
    assert page.evaluate("document.querySelector('#causes li').textContent") == HOSTILE[-1]


def test_foreign_and_inline_scripts_are_refused(page):
    page.evaluate(
        "(() => { const one = document.createElement('script'); one.textContent = 'window.bad = 4';"
        " document.body.append(one); const other = document.createElement('img');"
        " other.src = 'http://127.0.0.1:9/x.png'; document.body.append(other); })()"
    )
    assert page.evaluate("window.bad") is None
    page.wait("new Promise((done) => setTimeout(() => done(true), 300))")
    shown = " ".join(entry["entry"]["text"] for entry in page.seen("Log.entryAdded"))
    assert "script-src" in shown and "img-src" in shown


def test_pictures_of_any_name_are_shown(page):
    for _ in PICTURES:
        assert page.wait("document.getElementById('picture').naturalWidth === 40 || null")
        page.key("n")


def test_a_missing_picture_is_named_and_no_other_is_shown(browser, tmp_path):
    found = [item(0), item(1, picture="pictures/gone.png")]
    browser.open(write(tmp_path, found, signature="gone").as_uri())
    browser.wait(READY)
    visible = "getComputedStyle(document.getElementById('picture')).visibility"
    assert browser.evaluate(visible) == "visible"
    browser.key("n")
    assert browser.evaluate(visible) == "hidden"
    browser.wait("!document.getElementById('failed').hidden")
    assert "pictures/gone.png" in text(browser, "failed")


def test_run_lengths_are_decoded_as_by_pycocotools(page):
    rng = np.random.default_rng(0)
    shapes = [(1, 1), (7, 5), (300, 200), (3, 2000)]
    found = [rng.random(shape) > level for shape in shapes for level in (0.02, 0.5, 0.98)]
    found += [np.zeros((9, 4), bool), np.ones((9, 4), bool), disc(200, 300, 5)]
    for mask in found:
        rle = to_rle(mask)
        height, width = mask.shape
        drawn = page.evaluate(
            f"(() => {{ const mask = kmineAudit.masks.decode({json.dumps(rle)}, {height}, {width});"
            " const canvas = kmineAudit.masks.paint(mask, [230, 159, 0]);"
            " const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;"
            " let out = ''; for (let at = 3; at < data.length; at += 4) out += { 0: 0, 255: 1 }[data[at]] ?? 'x';"
            " return [out, mask.area, mask.box]; })()"
        )  # fmt: skip
        truth = from_rle(rle, height, width)
        assert drawn[0] == "".join(map(str, truth.astype(int).ravel()))
        assert drawn[1] == truth.sum()
        rows, cols = np.nonzero(truth)
        assert drawn[2] == ([cols.min(), rows.min(), cols.max(), rows.max()] if rows.size else None)
        same = page.evaluate(
            f"[...kmineAudit.masks.sample({json.dumps(rle)}, {height}, {width}, {height}, {width}).pixels].join('')"
        )
        assert same == drawn[0]


def test_run_lengths_are_encoded_as_by_pycocotools(page):
    rng = np.random.default_rng(1)
    found = [rng.random(shape) > level for shape in ((1, 1), (7, 5), (90, 70)) for level in (0.02, 0.5, 0.98)]
    found += [np.zeros((9, 4), bool), np.ones((9, 4), bool), disc(200, 300, 5), np.eye(40, 3000, dtype=bool)]
    for mask in found:
        rle, (height, width) = to_rle(mask), mask.shape
        again = page.evaluate(
            f"kmineAudit.masks.encode(kmineAudit.masks.decode({json.dumps(rle)}, {height}, {width}).pixels, 1,"
            f" {height}, {width})"
        )
        assert again == rle


def test_outline_of_a_square_and_of_two_that_touch_at_a_corner(page):
    def loops(mask):
        height, width = np.shape(mask)
        rle = json.dumps(to_rle(np.array(mask, bool)))
        return page.evaluate(
            f"kmineAudit.masks.outline(kmineAudit.masks.decode({rle}, {height}, {width}))"
            ".map((loop) => loop.map(String).sort())"
        )

    assert loops([[0, 0, 0], [0, 1, 1], [0, 1, 1]]) == [["1,1", "1,3", "3,1", "3,3"]]
    corners = [corner for loop in loops([[1, 0], [0, 1]]) for corner in loop]
    assert sorted(corners) == ["0,0", "0,1", "1,0", "1,1", "1,1", "1,2", "2,1", "2,2"]
    ring = loops([[1, 1, 1], [1, 0, 1], [1, 1, 1]])
    assert sorted(map(len, ring)) == [4, 4]


def overlay(page: Browser) -> list[int]:
    """Number of drawn pixels of the overlay."""
    return page.evaluate(
        "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => {"
        " const canvas = document.getElementById('overlay');"
        " const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;"
        " let count = 0; for (let at = 3; at < data.length; at += 4) count += data[at] > 0; done(count); })))"
    )


def test_keys_switch_layers_prompts_and_fill(page):
    for key in "589":  # pseudo, model, ignored
        page.key(key)
    assert overlay(page) == 0
    page.key("2")
    assert overlay(page) > 0
    page.key("2")
    page.key("5")
    filled = overlay(page)
    page.key("o")
    assert 0 < overlay(page) < filled
    page.key("1")
    page.wait("document.getElementById('picture').hidden")
    pressed = (
        "[...document.querySelectorAll('#layers button')].map((one) => one.ariaPressed === 'true' ? 1 : 0).join('')"
    )
    assert page.evaluate(pressed) == "000010100"


def test_keys_give_verdicts_move_and_undo(page):
    page.key("a")
    page.key("r")
    page.key("n")
    page.key("u")
    page.key("ArrowLeft")
    assert text(page, "progress") == "3 of 64 reviewed"
    shown = page.evaluate("JSON.parse(kmineAudit.verdicts.text(kmineAudit.list.items)).verdicts.map((v) => v.verdict)")
    assert shown == ["accept", "reject", "unsure"]
    page.key("z")
    page.key("z")
    assert text(page, "progress") == "1 of 64 reviewed"
    assert page.evaluate("kmineAudit.list.at") == 1
    page.key("?")
    assert page.evaluate("document.getElementById('help').open") is True
    page.key("a")
    assert text(page, "progress") == "1 of 64 reviewed"
    page.key("Escape")
    page.wait("!document.getElementById('help').open")


def mended(page: Browser) -> np.ndarray | None:
    """The mask under review as the reviewer has changed it, as the page saves it."""
    page.evaluate("new Promise((done) => setTimeout(done, 50))")
    text = page.evaluate("kmineAudit.verdicts.text(kmineAudit.list.items)")
    path = Path(tempfile.mkdtemp()) / "verdicts.json"
    path.write_text(text, "utf-8")
    found = [verdict for verdict in read_verdicts(path).all if verdict.mended]
    if not found:
        return None
    assert [(verdict.sample_id, verdict.verdict) for verdict in found] == [(names(page)[0], "reject")]
    mask = np.zeros((30, 40), np.uint8)
    for class_id, runs in found[0].mended:
        mask[from_rle(runs, 30, 40)] = class_id
    return mask


def stroke(page: Browser, *places: tuple[float, float]) -> None:
    """Drag from pixel to pixel (x, y) of the image, once the stage has its size."""
    page.evaluate("new Promise((done) => setTimeout(() => requestAnimationFrame(done), 100))")
    left, top, scale, x, y = page.evaluate(
        "(({ left, top }, { scale, x, y }) => [left, top, scale, x, y])"
        "(document.getElementById('stage').getBoundingClientRect(), kmineAudit.view)"
    )
    at = [(round(left + x + scale * (u + 0.5)), round(top + y + scale * (v + 0.5))) for u, v in places]
    page.mouse("mousePressed", *at[0], button="left", clickCount=1)
    for place in at:
        page.mouse("mouseMoved", *place, button="left", buttons=1)
    page.mouse("mouseReleased", *at[-1], button="left", clickCount=1)


def test_a_brush_mends_the_mask_in_place(page):
    first = np.where(disc(30, 40, 0), 1, 255).astype(np.uint8)
    page.key("m")
    page.wait("kmineAudit.mend.active")
    page.evaluate("kmineAudit.mend.resize(-9)")  # one pixel
    stroke(page, (2, 3), (12, 3))
    page.wait("kmineAudit.verdicts.state(kmineAudit.list.shown[0]) === 'mended'")
    expected = first.copy()
    expected[3, 2:13] = 1
    assert (expected != first).any() and np.array_equal(mended(page), expected)
    assert "✎ mended" in text(page, "rows")
    page.key("x")
    stroke(page, (5, 3), (5, 3))
    expected[3, 5] = 0
    assert np.array_equal(mended(page), expected)
    put(page, "mend-class", "2")
    page.key("ArrowDown")
    page.key(" ")
    expected[4, 5] = 2
    assert np.array_equal(mended(page), expected)
    page.key("z")
    expected[4, 5] = first[4, 5]
    assert np.array_equal(mended(page), expected)
    page.key("Escape")
    page.wait("!kmineAudit.mend.active")
    page.key("r")
    assert mended(page) is None, "a verdict on the mask as the run made it"
    page.key("z")
    assert np.array_equal(mended(page), expected)
    page.evaluate("document.getElementById('discard').click()")
    assert mended(page) is None and text(page, "progress") == "0 of 64 reviewed"


def test_a_mended_mask_survives_a_reload_and_pans_are_no_strokes(page):
    page.key("m")
    page.wait("kmineAudit.mend.active")
    stroke(page, (20, 10), (22, 10))
    drawn = mended(page)
    assert drawn is not None
    page.evaluate("new Promise((done) => setTimeout(done, 400))")
    page.open(page.evaluate("location.href"))
    page.wait(READY)
    assert np.array_equal(mended(page), drawn)
    stroke(page, (3, 3), (9, 9))
    assert np.array_equal(mended(page), drawn)


def test_the_wheel_zooms_about_the_pointer_and_dragging_pans(page):
    place = "(({ scale, x, y }) => [scale, x, y])(kmineAudit.view)"
    box = page.evaluate("(({ left, top }) => [left, top])(document.getElementById('stage').getBoundingClientRect())")
    scale, x, y = page.evaluate(place)
    left, top = (
        round(box[0]) + 100,
        round(box[1]) + 50,
    )  # a pointer is on whole pixels of the window, the stage may not be
    u, v = left - box[0], top - box[1]
    page.mouse("mouseWheel", left, top, deltaX=0, deltaY=-120)
    larger, nx, ny = page.wait(f"kmineAudit.view.scale > {scale} && {place}")
    assert (u - nx) / larger == pytest.approx((u - x) / scale)
    assert (v - ny) / larger == pytest.approx((v - y) / scale)
    page.mouse("mousePressed", left, top, button="left", clickCount=1)
    page.mouse("mouseMoved", left + 30, top - 5, button="left", buttons=1)
    page.mouse("mouseReleased", left + 30, top - 5, button="left", clickCount=1)
    assert page.evaluate(place) == pytest.approx([larger, nx + 30, ny - 5])
    page.key("0")
    assert page.evaluate(place) == [scale, x, y]


def test_letters_in_a_field_are_not_keys(page):
    page.evaluate("document.getElementById('note').focus()")
    page.type("rather bad")
    page.key("a")
    assert text(page, "progress") == "0 of 64 reviewed"
    assert page.evaluate("document.getElementById('note-unsaved').hidden") is False
    page.key("Escape")
    page.key("r")
    saved = json.loads(page.evaluate("kmineAudit.verdicts.text(kmineAudit.list.items)"))["verdicts"]
    assert [(one["verdict"], one["note"]) for one in saved] == [("reject", "rather bada")]


def test_filter_and_order_by_text_kind_reason_verdict_and_facts(page):
    page.key("r")
    put(page, "verdict-filter", "reject")
    assert names(page) == [HOSTILE[0]]
    put(page, "verdict-filter", "")
    put(page, "kind", "labeled")
    assert sorted(names(page)) == [f"case_{n:03d}" for n in range(4)]
    put(page, "reason", "low_agreement")
    assert sorted(names(page)) == ["case_000", "case_003"]
    page.evaluate("document.getElementById('clear').click()")
    assert len(names(page)) == 64
    page.evaluate("document.getElementById('condition').click()")
    page.evaluate(
        "(() => { const [fact, how, what] = document.querySelectorAll('.condition select, .condition input');"
        " fact.value = 'area'; how.value = 'at least'; what.value = '5700';"
        " what.dispatchEvent(new Event('input')); })()"
    )
    page.wait("kmineAudit.list.shown.length === 3")
    put(page, "sort", "fact:area")
    assert names(page) == ["case_059", "case_058", "case_057"]
    page.evaluate("document.getElementById('direction').click()")
    assert names(page) == ["case_057", "case_058", "case_059"]
    put(page, "text", "case_058 small", "input")
    page.wait("kmineAudit.list.shown.length === 0")
    assert page.evaluate("document.getElementById('empty').hidden") is False
    assert page.evaluate("document.getElementById('panel').hidden") is True
    page.key("a")  # on nothing
    assert text(page, "progress") == "1 of 64 reviewed"


def test_the_saved_file_holds_the_verdicts_and_is_read_back(page, tmp_path, request):
    page.key("a")
    page.key("r")
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    page.downloads_to(downloads)
    page.evaluate("document.getElementById('save').click()")
    file = downloads / "verdicts.json"
    page.wait("new Promise((done) => setTimeout(() => done(true), 200))")
    for _ in range(100):
        if file.exists():
            break
        page.evaluate("new Promise((done) => setTimeout(done, 100))")
    saved = json.loads(file.read_text("utf-8"))
    assert {name: saved[name] for name in ("format", "run", "run_signature")} == {
        "format": "kmine-verdicts-1", "run": EVIL, "run_signature": request.node.name,
    }  # fmt: skip
    ranked = names(page)
    first = {"sample_id": ranked[0], "kind": "pseudo", "verdict": "accept", "mask_signature": "sig0", "note": ""}
    assert saved["verdicts"][0] == first
    assert len(saved["verdicts"]) == 2

    saved["verdicts"][1]["mask_signature"] = "another"
    saved["verdicts"].append(first | {"sample_id": "unknown"})
    saved["verdicts"].append(first | {"sample_id": "case_009", "mask_signature": "sig9", "note": "n"})
    shown = page.evaluate(
        f"kmineAudit.verdicts.read({json.dumps(json.dumps(saved))},"
        " (key) => kmineAudit.list.items.find((one) => `${one.kind}/${one.id}` === key))"
    )
    assert shown == "2 verdicts read; 1 left out: the mask has changed since; 1 left out: no such mask here"
    page.key("z")
    assert text(page, "progress") == "2 of 64 reviewed"


def test_an_invalid_file_is_refused_with_a_message(page, tmp_path):
    node = page.call("DOM.getDocument")["root"]["nodeId"]
    found = page.call("DOM.querySelector", nodeId=node, selector="#file")["nodeId"]
    for content, shown in (("{", "no JSON"), ('{"format": "x"}', 'got format "x"')):
        (tmp_path / "other.json").write_text(content)
        page.evaluate("document.getElementById('status').textContent = ''")
        page.call("DOM.setFileInputFiles", files=[str(tmp_path / "other.json")], nodeId=found)
        page.wait("document.getElementById('status').textContent !== ''")
        assert shown in text(page, "status") and "kmine-verdicts-1" in text(page, "status")


def test_verdicts_survive_a_reload_except_on_changed_masks(page, tmp_path, request):
    page.key("a")
    page.key("r")
    page.key("u")
    page.open("about:blank")
    changed = [item(n, mask_signature="new") if n == 30 else one for n, one in enumerate(items())]
    changed[1] = item(1, sample_id=HOSTILE[1], mask_signature="new")
    page.open(write(tmp_path, changed, signature=request.node.name).as_uri())
    page.wait(READY)
    assert text(page, "progress") == "2 of 64 reviewed"


def test_a_page_detects_files_of_a_later_audit(browser, tmp_path, monkeypatch):
    monkeypatch.setattr(audit_page, "DETAIL_ROWS", 1)
    browser.open(write(tmp_path, signature="anew").as_uri())
    browser.wait(READY)
    write(tmp_path, [item(n, mask_signature="x") for n in range(64)], signature="anew")
    browser.evaluate("kmineAudit.list.pick(50)")
    browser.wait("document.getElementById('status').textContent !== ''")
    assert text(browser, "status").endswith("the audit was run again since this page was opened: reload it")


def test_without_storage_the_page_works_and_warns(browser, tmp_path):
    refused = (
        "Object.defineProperty(window, 'localStorage', { get() { throw new DOMException('no', 'SecurityError'); } })"
    )
    script = browser.call("Page.addScriptToEvaluateOnNewDocument", source=refused)["identifier"]
    try:
        browser.open(write(tmp_path, signature="refused").as_uri())
        browser.wait(READY)
        assert browser.evaluate("document.getElementById('no-storage').hidden") is False
        browser.key("a")
        assert text(browser, "progress") == "1 of 64 reviewed"
    finally:
        browser.call("Page.removeScriptToEvaluateOnNewDocument", identifier=script)
        browser.open("about:blank")


def test_the_list_draws_visible_rows_only_and_all_controls_are_labelled(browser, tmp_path):
    browser.open(write(tmp_path, [item(n) for n in range(500)], signature="long").as_uri())
    browser.wait(READY)
    browser.evaluate("document.getElementById('list').scrollTop = 20000")
    browser.wait("document.querySelectorAll('.row .thumb canvas').length > 3")
    assert browser.evaluate("document.querySelectorAll('.row').length") < 40
    nameless = "[...document.querySelectorAll('button, select, input, textarea')].filter((one) => !one.hidden &&"
    assert browser.evaluate(
        f"{nameless} !one.textContent.trim() && !one.ariaLabel && !one.labels?.length).map((one) => one.outerHTML)"
    ) == []  # fmt: skip


@pytest.mark.parametrize("size", [(1280, 800), (768, 1024)])
def test_nothing_is_cut_off(browser, tmp_path, size):
    browser.resize(*size)
    browser.open(write(tmp_path, signature=f"size{size[0]}").as_uri())
    browser.wait(READY)
    try:
        assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth") is True
        assert browser.evaluate("document.documentElement.scrollHeight <= innerHeight") is True
        assert browser.evaluate("document.getElementById('stage').clientHeight > 250") is True
    finally:
        browser.resize(1280, 800)


def test_a_run_without_masks_has_a_page(browser, tmp_path):
    browser.open(write(tmp_path, [], signature="none").as_uri())
    browser.wait("document.body.dataset.ready === 'yes'")
    assert text(browser, "status") == "The run has no masks to review."

"""The audit's page: `audit.html` and the scripts beside it, written while the masks go by once.

A browser opens it from the folder, without a server and without a network. There `fetch` is refused but script tags are
not, so the data are scripts: `index_N.js` holds what the list filters and sorts by and is read at once, `masks_N.js`
holds run lengths, prompts and stories and is read when a mask of it is looked at.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args
from urllib.parse import quote

from kmine.report.audit_inputs import (
    LAYERS,
    AuditItem,
    Kind,
    Layer,
)
from kmine.report.html import environment
from kmine.types import Prompts

DATA = "audit_data"
"""The folder beside the page."""
INDEX_ROWS = 1000
"""Masks of one index file: the first one is what a first view waits for."""
DETAIL_ROWS = 40
"""Masks of one file of run lengths: what showing one mask has to read."""
_SCRIPTS = ("audit_masks.js", "audit_view.js", "audit_list.js", "audit_filter.js", "audit_verdicts.js", "audit.js")
"""In the order in which they are run."""
_OURS = re.compile(r"(index|masks)_\d+\.js")
_KINDS = get_args(Kind)
_CODES = {ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&"}


def write_page(
    folder: Path,
    items: Iterator[AuditItem],
    *,
    title: str,
    run_name: str,
    run_signature: str,
    summary: Mapping[str, str | int | float],
    figures: Mapping[str, str],
) -> Path:
    """Write `folder/audit.html` and `folder/audit_data/`; return the page's path.

    `items` is read once, a few at a time; the list opens with the highest suspicion, equals in the given order.
    `figures` are SVG by caption, as `report.figures` draws them; all else is text and escaped. Files of the folder that
    are not the page's stay. Until all items were read the page that stood there stands. ValueError: two items of one
    sample and kind, a kind or layer that is none, or a picture that is not named relative to the page.
    """
    data = folder / DATA
    data.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{DATA}.", dir=folder) as name:
        temp = Path(name)
        count = _write_data(temp, items)
        for asset in ("audit.css", *_SCRIPTS):
            shutil.copyfile(Path(__file__).parent / asset, temp / asset)
        page = {
            "run": run_name,
            "run_signature": run_signature,
            "count": count,
            "index_files": math.ceil(count / INDEX_ROWS),
            "detail_rows": DETAIL_ROWS,
        }
        (temp / "audit.html").write_bytes(_render(page, title, summary, figures).encode("utf-8", "replace"))
        _put(temp, folder)
    return folder / "audit.html"


def script_json(value: Any) -> str:
    """JSON in ASCII that may stand in a script or an HTML file: <, > and & are escaped, as is all that is not ASCII."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).translate(_CODES)


def _render(
    page: Mapping[str, Any], title: str, summary: Mapping[str, str | int | float], figures: Mapping[str, str]
) -> str:
    from markupsafe import Markup

    shown = {name: _round(value) for name, value in summary.items()}
    return (
        environment()
        .get_template("audit.jinja")
        .render(
            page=Markup(script_json(page)),
            title=title,
            run_name=page["run"],
            data=DATA,
            count=page["count"],
            scripts=_SCRIPTS,
            summary=shown,
            # The SVG is matplotlib's own output, which escapes the text in it.
            figures={caption: Markup(svg) for caption, svg in figures.items()},
        )
    )


def _round(value: str | int | float) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else "–"
    return str(value)


def _write_data(folder: Path, items: Iterator[AuditItem]) -> int:
    """Write the scripts of all items into `folder`; return how many items there were."""
    index: list[AuditItem] = []
    details: list[list[Any]] = []
    seen_keys: set[tuple[str, str]] = set()
    for item in items:
        _check(item, seen_keys)
        index.append(replace(item, layers=(), prompts=(), history=()))  # what is heavy is not held
        details.append(_detail(item))
        if len(details) == DETAIL_ROWS:
            _write_script(folder, "masks", (len(seen_keys) - 1) // DETAIL_ROWS, details)
            details = []
        if len(index) == INDEX_ROWS:
            _write_script(folder, "index", (len(seen_keys) - 1) // INDEX_ROWS, _index(index))
            index = []
    if details:
        _write_script(folder, "masks", len(seen_keys) // DETAIL_ROWS, details)
    if index:
        _write_script(folder, "index", len(seen_keys) // INDEX_ROWS, _index(index))
    return len(seen_keys)


def _check(item: AuditItem, seen_keys: set[tuple[str, str]]) -> None:
    key = (item.kind, item.sample_id)
    if item.kind not in _KINDS:
        raise ValueError(f"write_page: expected a kind of {', '.join(_KINDS)}, got {item.kind!r}")
    if key in seen_keys:
        raise ValueError(f"write_page: expected one item a mask, got {item.kind} {item.sample_id!r} twice")
    if item.picture.startswith("/"):
        raise ValueError(f"write_page: expected a picture's path relative to the page, got {item.picture!r}")
    wrong = sorted({layer.name for layer in item.layers} - set(LAYERS))
    if wrong:
        raise ValueError(f"write_page: expected layers of {', '.join(LAYERS)}, got {wrong[0]!r}")
    seen_keys.add(key)


def _write_script(folder: Path, what: str, number: int, value: Any) -> None:
    (folder / f"{what}_{number}.js").write_text(f'kmineAudit.take("{what}",{number},{script_json(value)});\n', "ascii")


def _index(items: Sequence[AuditItem]) -> dict[str, Any]:
    """Facts as columns of this file: names stand once, and none of them becomes a key of an object."""
    names = list(dict.fromkeys(name for item in items for name in item.facts))
    return {"facts": names, "rows": [_row(item, names) for item in items]}


def _row(item: AuditItem, names: Sequence[str]) -> list[Any]:
    return [
        item.sample_id,
        item.kind,
        int(item.rank),
        _plain(item.suspicion),
        list(item.explanations),
        # By its bytes, so that a name that is no UTF-8 is found as well.
        quote(os.fsencode(item.picture)),
        int(item.height),
        int(item.width),
        item.mask_signature,
        *(_plain(item.facts.get(name)) for name in names),
    ]


def _detail(item: AuditItem) -> list[Any]:
    """The mask again by name and signature, so that the page notices files of another writing."""
    return [
        item.sample_id,
        item.kind,
        item.mask_signature,
        [_layer(layer) for layer in item.layers],
        [_prompt(prompt) for prompt in item.prompts],
        list(item.history),
    ]


def _layer(layer: Layer) -> list[Any]:
    return [layer.name, int(layer.class_id), layer.rle]


def _prompt(prompt: Prompts) -> list[Any]:
    """[class, box or None, [[x, y, label] ...], [box ...]]."""
    points: list[list[float]] = []
    if prompt.point_coords is not None and prompt.point_labels is not None:
        labeled_points = zip(prompt.point_coords.tolist(), prompt.point_labels.tolist(), strict=True)
        points = [[round(x, 2), round(y, 2), int(label)] for (x, y), label in labeled_points]
    box = None if prompt.box is None else [round(v, 2) for v in prompt.box.tolist()]
    return [int(prompt.class_id), box, points, [[round(v, 1) for v in row] for row in prompt.jittered_boxes.tolist()]]


def _plain(value: Any) -> str | int | float | None:
    """A value as JSON knows it; what is not a number becomes None, NumPy's numbers become Python's."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)


def _put(temp: Path, folder: Path) -> None:
    """Move the finished files to their places, the page last; take away those of a longer page that stood here."""
    fresh = {path.name for path in temp.iterdir()}
    for name in sorted(fresh - {"audit.html"}):
        (temp / name).replace(folder / DATA / name)
    (temp / "audit.html").replace(folder / "audit.html")
    for path in (folder / DATA).iterdir():
        if _OURS.fullmatch(path.name) and path.name not in fresh:
            path.unlink()

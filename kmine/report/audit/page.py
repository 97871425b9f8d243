"""The page of an audit: plain values in, `audit.html` and its data files out, written in one pass over the masks.

A browser opens it from the folder, without server or network. File pages may not use `fetch` but may load scripts, so
the data are scripts. `index_N.js` holds the columns for filters and sorting and is loaded first. `masks_N.js` holds run
lengths, prompts and histories and is loaded when one of its masks is shown.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import quote

from markupsafe import Markup

from kmine.report.html import environment
from kmine.types import Prompts

DATA = "audit_data"
"""Folder of the data files, beside the page."""
INDEX_ROWS = 1000
"""Masks per index file; the first view waits for the first file."""
DETAIL_ROWS = 40
"""Masks per file of run lengths; showing a mask loads one such file."""
_SCRIPTS = tuple(f"audit{part}.js" for part in ("_masks", "_view", "_mend", "_list", "_filter", "_verdicts", ""))
"""In the order of execution."""
_OURS = re.compile(r"(index|masks)_\d+\.js")
Kind = Literal["pseudo", "labeled"]
"""A mined mask or a given one."""
LAYERS = ("pseudo", "local", "segmenter", "given", "model", "withheld")
"""Overlays of an image: the pseudo mask; the local model's and the segmenter's mask it was made from; the given mask of
a labeled image; the prediction of models not trained on the mask; the withheld mask, if opened."""
_KINDS = get_args(Kind)
_CODES = {ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&"}


@dataclass(frozen=True)
class Layer:
    """One mask over an image, in the image's own frame."""

    name: str
    """One of `LAYERS`."""
    class_id: int
    """255: pixels ignored in training."""
    rle: str
    """Compressed COCO run lengths, of (height, width)."""


@dataclass(frozen=True)
class AuditItem:
    """One mask to review, with its history."""

    sample_id: str
    kind: Kind
    rank: int
    """1 is the most suspicious mask of its kind."""
    suspicion: float
    """In [0, 1]; defines `rank`."""
    explanations: tuple[str, ...]
    """Reasons for suspicion, `tag: detail`, the most important first; the list shows the tags."""
    picture: str
    """Path of an image file that browsers show, relative to the page."""
    height: int
    width: int
    layers: tuple[Layer, ...]
    prompts: tuple[Prompts, ...] = ()
    """Prompts of the audited round, in the image's own frame, without `mask_input`."""
    facts: Mapping[str, str | int | float | None] = field(default_factory=dict)
    """Columns to show, filter and sort by, such as group, class, round, reason, estimated Dice, area."""
    history: tuple[str, ...] = ()
    """One line per round: model and weights, prompts, decisions, use in training, change of the mask."""
    mask_signature: str = ""
    """Signature of the mask; a verdict holds that of the mask it was given on."""


def write_page(
    folder: Path,
    items: Iterator[AuditItem],
    *,
    title: str,
    run_name: str,
    run_signature: str,
    class_names: Sequence[str],
    summary: Mapping[str, str | int | float],
    figures: Mapping[str, str],
) -> Path:
    """Write `folder/audit.html` and `folder/audit_data/`; return the path of the page.

    An earlier page is replaced once all items were read; other files in the folder are kept. Items are read once, a few
    at a time; the list opens with the highest suspicion, ties keep their order. Browsers keep verdicts under
    `run_signature`. `figures`: SVG by caption. All other text is escaped.

    Raises:
        ValueError: two items of one sample and kind, an unknown kind or layer, or an absolute picture path.
    """
    data = folder / DATA
    data.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{DATA}.", dir=folder) as name:
        temp = Path(name)
        count = _write_data(temp, items)
        for asset in ("audit.css", *_SCRIPTS):
            shutil.copyfile(Path(__file__).parent / asset, temp / asset)
        page = {"run": run_name, "run_signature": run_signature, "count": count, "classes": [*class_names]}
        page |= {"index_files": math.ceil(count / INDEX_ROWS), "detail_rows": DETAIL_ROWS}
        (temp / "audit.html").write_bytes(_render(page, title, summary, figures).encode("utf-8", "replace"))
        _put(temp, folder)
    return folder / "audit.html"


def script_json(value: Any) -> str:
    """JSON that is safe inside a script or an HTML file: ASCII, with <, > and & escaped."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).translate(_CODES)


def _render(
    page: Mapping[str, Any], title: str, summary: Mapping[str, str | int | float], figures: Mapping[str, str]
) -> str:
    template = environment().get_template("audit/audit.jinja")
    return template.render(
        page=Markup(script_json(page)),
        title=title,
        run_name=page["run"],
        data=DATA,
        count=page["count"],
        classes=page["classes"],
        scripts=_SCRIPTS,
        summary=summary,
        figures={caption: Markup(svg) for caption, svg in figures.items()},  # matplotlib escapes the text in its SVG
    )


def _write_data(folder: Path, items: Iterator[AuditItem]) -> int:
    """Write the data files of all items into `folder`; return the number of items."""
    index: list[AuditItem] = []
    details: list[list[Any]] = []
    seen_keys: set[tuple[str, str]] = set()
    for item in items:
        _check(item, seen_keys)
        index.append(replace(item, layers=(), prompts=(), history=()))  # heavy fields are not kept
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
    """Facts as columns: names are written once, and none becomes the key of a JavaScript object."""
    names = list(dict.fromkeys(name for item in items for name in item.facts))
    return {"facts": names, "rows": [_row(item, names) for item in items]}


def _row(item: AuditItem, names: Sequence[str]) -> list[Any]:
    return [
        item.sample_id,
        item.kind,
        int(item.rank),
        _plain(item.suspicion),
        list(item.explanations),
        quote(os.fsencode(item.picture)),  # by its bytes: names may be invalid UTF-8
        int(item.height),
        int(item.width),
        item.mask_signature,
        *(_plain(item.facts.get(name)) for name in names),
    ]


def _detail(item: AuditItem) -> list[Any]:
    """Repeats id and signature, so that the page detects files of a later audit."""
    return [
        item.sample_id,
        item.kind,
        item.mask_signature,
        [[layer.name, int(layer.class_id), layer.rle] for layer in item.layers],
        [_prompt(prompt) for prompt in item.prompts],
        list(item.history),
    ]


def _prompt(prompt: Prompts) -> list[Any]:
    """[class, box or None, [[x, y, label] ...], [box ...]]."""
    points: list[list[float]] = []
    if prompt.point_coords is not None and prompt.point_labels is not None:
        labeled_points = zip(prompt.point_coords.tolist(), prompt.point_labels.tolist(), strict=True)
        points = [[round(x, 2), round(y, 2), int(label)] for (x, y), label in labeled_points]
    box = None if prompt.box is None else [round(v, 2) for v in prompt.box.tolist()]
    return [int(prompt.class_id), box, points, [[round(v, 1) for v in row] for row in prompt.jittered_boxes.tolist()]]


def _plain(value: Any) -> str | int | float | None:
    """A JSON value: NaN and infinity become None, NumPy scalars Python numbers."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)


def _put(temp: Path, folder: Path) -> None:
    """Move the finished files to `folder`, the page last; remove surplus data files of an earlier page."""
    fresh = {path.name for path in temp.iterdir()}
    for name in sorted(fresh - {"audit.html"}):
        (temp / name).replace(folder / DATA / name)
    (temp / "audit.html").replace(folder / "audit.html")
    for path in (folder / DATA).iterdir():
        if _OURS.fullmatch(path.name) and path.name not in fresh:
            path.unlink()

"""Synthetic masks for the page of an audit, some with hostile names, and a page of them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image

from kmine.ops.masks import to_rle
from kmine.report.audit.page import AuditItem, Layer, write_page
from kmine.types import Prompts

EVIL = "<script>window.bad=1;alert(1)</script>"
HOSTILE = (
    EVIL,
    "</script><script>window.bad=2</script>",
    "<img src=x onerror=window.bad=3>",
    "\"quotes\" 'both' & `back` ${1}",
    "__proto__",
    "ü\u2028line\u2029end\u202eright-to-left 漢字",
)
PICTURES = ("plain.png", "a b#c?d%20&\"'<i>.png", "ü漢.png", os.fsdecode(b"latin\xe9.png"))


def disc(height: int, width: int, seed: int) -> np.ndarray:
    """A ragged ring, cut by the image border for some seeds."""
    rng = np.random.default_rng(seed)
    rows, cols = np.mgrid[:height, :width]
    far = np.hypot(rows - rng.uniform(0, height), cols - rng.uniform(0, width))
    return (far < 0.4 * height) & (far > 0.1 * height) & (rng.random((height, width)) > 0.05)


def item(number: int, kind: str = "pseudo", **more) -> AuditItem:
    """Suspicion falls with `number`; odd ones are small."""
    mask = disc(30, 40, number)
    name = "pseudo" if kind == "pseudo" else "given"
    prompts = Prompts(1, np.array([3, 4, 20, 21], np.float32), np.array([[7, 8]], np.float32), np.array([1]))
    values = {
        "sample_id": f"case_{number:03d}",
        "kind": kind,
        "rank": number + 1,
        "suspicion": 1 - number / 1000,
        "explanations": ("models: they disagree",),
        "picture": f"pictures/{PICTURES[number % len(PICTURES)]}",
        "height": 30,
        "width": 40,
        "layers": (Layer(name, 1, to_rle(mask)), Layer("model", 1, to_rle(~mask)), Layer(name, 255, to_rle(~mask))),
        "prompts": (prompts,),
        "facts": {
            "reason": "kept" if number % 3 else "low_agreement",
            "area": 100 * number,
            "size": ("big", "small")[number % 2],
        },
        "history": (f"round 1: 1 prompt, kept {number}",),
        "mask_signature": f"sig{number}",
    }  # fmt: skip
    return AuditItem(**(values | more))


def items() -> list[AuditItem]:
    evil = [
        item(n, sample_id=text, explanations=(text,), facts={text: text, "reason": "kept"}, history=(text,))
        for n, text in enumerate(HOSTILE)
    ]
    given = [item(n, "labeled") for n in range(4)]
    return [*evil, *(item(n) for n in range(len(HOSTILE), 60)), *given]


def write(folder: Path, found: list[AuditItem] | None = None, signature: str = "run-1", **more) -> Path:
    pictures = folder / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    for name in PICTURES:
        Image.fromarray(np.full((30, 40, 3), 90, np.uint8)).save(pictures / name, "png")
    words = {
        "title": f"Audit of {EVIL}",
        "run_name": EVIL,
        "summary": {EVIL: EVIL, "masks": 64},
        "figures": {},
        "class_names": ("background", "polyp", EVIL),
    } | more
    return write_page(folder, iter(items() if found is None else found), run_signature=signature, **words)

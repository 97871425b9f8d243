"""Draw docs/loop.svg: the mining loop as `kmine.methods.mining` runs it. `python docs/draw_loop.py`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

INK, SOFT = "#1c2430", "#5a6675"
DATA, LOCAL, LARGE, CARE = "#e8eef5", "#d5e7f7", "#fbe3c8", "#d9f0e4"
EDGE = {DATA: "#93a4b7", LOCAL: "#2f80c9", LARGE: "#d97b1f", CARE: "#2f9e6e"}
WIDTH, HEIGHT = 116.0, 62.0
"""The canvas in its own units; one unit is a tenth of an inch."""

ALT = "The mining loop: labels train the local model, whose predictions prompt the segmenter"

# name: (x, y of the centre, width, height, fill, heading, what it does)
BOXES = {
    "labels": (12.5, 51, 20, 10, DATA, "few labels", "given masks,\nnever changed"),
    "pool": (12.5, 31, 20, 10, DATA, "unlabeled images", "opened without\ntheir masks"),
    "fit": (39, 51, 22, 10, LOCAL, "train local model", "U-Net++ or U-Net; round 0\non the labels alone"),
    "adopt": (69, 51, 24, 10, CARE, "adopt the round?", "only if validation Dice\ndoes not fall"),
    "infer": (39, 31, 22, 10, LOCAL, "predict", "probabilities,\ntest-time flips"),
    "prompts": (69, 31, 24, 10, LOCAL, "prompts", "per object: box, shaken\nboxes, point, mask hint"),
    "segment": (102, 31, 24, 10, LARGE, "segmenter", "SAM, or the built-in ellipse:\nmasks and its own scores"),
    "gate": (102, 11, 24, 10, CARE, "gate", "every score against its\nthreshold; a reason for each"),
    "refine": (69, 11, 24, 10, CARE, "refine", "keep where the answers\nagree, ignore the rest"),
    "pseudo": (39, 11, 22, 10, DATA, "pseudo masks", "class ids,\n255 = ignore"),
}


def main(folder: Path) -> None:
    """Write loop.svg into `folder`."""
    style = {"svg.fonttype": "path", "svg.hashsalt": "loop", "font.family": "DejaVu Sans"}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(WIDTH / 10, HEIGHT / 10))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
        axes.axis("off")
        _card(axes, WIDTH / 2, HEIGHT / 2, WIDTH - 1, HEIGHT - 1, "#ffffff", "#d9dee5")
        _draw(axes)
        figure.savefig(
            folder / "loop.svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    svg = (folder / "loop.svg").read_text("utf-8")
    named = f'<svg role="img" aria-label="{ALT}"'
    (folder / "loop.svg").write_text(re.sub(r"[ \t]+\n", "\n", svg.replace("<svg", named, 1)), "utf-8")


def _draw(axes: Axes) -> None:
    for x, y, width, height, fill, heading, text in BOXES.values():
        _card(axes, x, y, width, height, fill, EDGE[fill])
        axes.text(x, y + 2.5, heading, ha="center", va="center", fontsize=12.5, weight="bold", color=INK)
        axes.text(x, y - 1.5, text, ha="center", va="center", fontsize=9.5, color=INK, linespacing=1.3)
    for start, end in (("labels", "fit"), ("pool", "infer"), ("infer", "prompts"), ("prompts", "segment")):
        _arrow(axes, _side(start, "right"), _side(end, "left"))
    for start, end in (("gate", "refine"), ("refine", "pseudo")):
        _arrow(axes, _side(start, "left"), _side(end, "right"))
    _arrow(axes, _side("fit", "right"), _side("adopt", "left"))
    _arrow(axes, _side("segment", "bottom"), _side("gate", "top"), "candidates", (1.2, 0))
    _return(axes)


def _return(axes: Axes) -> None:
    """The three ways back: pseudo masks into training, the adopted model into prediction, the images into training."""
    left, bottom = 25.5, 11.0
    axes.plot([left, left], [29.5, 32.5], color="#ffffff", linewidth=7, solid_capstyle="butt")  # a bridge, no crossing
    _line(axes, [_side("pseudo", "left"), (left, bottom), (left, 48.5)])
    _arrow(axes, (left, 48.5), (28, 48.5))
    axes.text(left - 0.8, 21, "retrain,\nround r", ha="right", va="center", fontsize=9.5, color=SOFT, style="italic")
    turn = 41.0
    _line(axes, [_side("adopt", "bottom"), (69, turn), (39, turn)])
    _arrow(axes, (39, turn), _side("infer", "top"))
    axes.text(
        54, turn + 1.3, "the adopted model mines the next round", ha="center", fontsize=9.5, color=SOFT, style="italic"
    )
    _card(axes, 102, 51, 24, 10, "#ffffff", SOFT, dashed=True)
    axes.text(102, 53.5, "baseline", ha="center", va="center", fontsize=12.5, weight="bold", color=SOFT)
    beside = "the labels alone, trained\nfor as many steps"
    axes.text(102, 49.5, beside, ha="center", va="center", fontsize=9.5, color=SOFT, linespacing=1.3)
    axes.plot([81.4, 89.6], [51, 51], linestyle=(0, (2, 2)), color=SOFT, linewidth=1.3)


def _card(
    axes: Axes, x: float, y: float, width: float, height: float, fill: str, edge: str, *, dashed: bool = False
) -> None:
    corner = (x - width / 2 + 0.8, y - height / 2 + 0.8)
    style = "round,pad=0.8,rounding_size=1.2"
    line = (0, (4, 3)) if dashed else "solid"
    size = (width - 1.6, height - 1.6)
    axes.add_patch(FancyBboxPatch(corner, *size, style, fc=fill, ec=edge, linewidth=1.4, linestyle=line))


def _side(name: str, side: str) -> tuple[float, float]:
    x, y, width, height = BOXES[name][:4]
    step = {"left": (-1, 0), "right": (1, 0), "top": (0, 1), "bottom": (0, -1)}[side]
    return x + step[0] * width / 2, y + step[1] * height / 2


def _line(axes: Axes, points: list[tuple[float, float]]) -> None:
    axes.plot(*zip(*points, strict=True), color=INK, linewidth=1.5, solid_joinstyle="round", solid_capstyle="butt")


def _arrow(
    axes: Axes,
    start: tuple[float, float],
    end: tuple[float, float],
    label: str = "",
    shift: tuple[float, float] = (0, 0),
) -> None:
    head = "-|>,head_length=5,head_width=2.6"
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle=head, color=INK, linewidth=1.5, shrinkA=0, shrinkB=0))
    middle = ((start[0] + end[0]) / 2 + shift[0], (start[1] + end[1]) / 2 + shift[1])
    axes.text(*middle, label, ha="left", va="center", fontsize=9.5, color=SOFT, style="italic")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)

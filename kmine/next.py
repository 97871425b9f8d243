"""`python -m kmine.next RUN -n 10`: which unlabeled images to label next, as a table, a sheet and labeling tasks."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from kmine import cli
from kmine.config.checks import LocalPath, expand_paths, require
from kmine.errors import UserError
from kmine.io.console import say

if TYPE_CHECKING:
    from kmine.audit.next_images import NextImage

DESCRIPTION = """Choose the unlabeled images to label next: among those that a finished run dropped or doubts, the ones
with the highest expected gain that stand for most others. Writes next.csv, next.png and tasks with the run's mask as a
prediction to be corrected. kmine audit RUN --corrected FILE takes the answers."""


@dataclass(frozen=True)
class NextConfig:
    """Settings of `python -m kmine.next`."""

    run: list[LocalPath] = field(default_factory=list)
    """The run folder of a finished kmine.loop."""
    count: int = 10
    """Images to choose; -n 10 is the same."""
    out: LocalPath | None = None
    """Folder for next.csv, next.png, pictures and tasks; default: next in the run folder."""
    format: list[Literal["labelstudio", "cvat"]] = field(default_factory=lambda: ["labelstudio", "cvat"])
    """Tasks to write: labelstudio.json, coco.json for CVAT, or both."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    data_root: LocalPath | None = None
    """Where the data lie now, if they were moved since the run; for your own files the folder that holds them all."""

    def __post_init__(self) -> None:
        expand_paths(self)
        require(self.count >= 1, "count", "at least 1", self.count)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    prog = "kmine next"
    words = ["--count" if word == "-n" else word for word in (sys.argv[1:] if argv is None else argv)]
    cfg = cli.parse(NextConfig, words, prog=prog, description=DESCRIPTION, positional="run")
    return cli.guarded(prog, lambda: run_next(cfg))


def run_next(cfg: NextConfig) -> int:
    """Choose images, write the files and print the table; returns the exit code."""
    if len(cfg.run) != 1:
        raise UserError(f"expected one run folder, got {len(cfg.run)}; choose images of one run at a time")
    from kmine.audit.next_images import choose_next, write_next
    from kmine.audit.rounds import open_audit
    from kmine.setup.finished import final_run

    root, terminal = final_run(Path(cfg.run[0])), cli.Terminal()
    out = Path(cfg.out) if cfg.out else root / "next"
    try:
        with open_audit(root, terminal, device=cfg.device, data_root=cfg.data_root) as audited:
            chosen = choose_next(audited, cfg.count)
            paths = write_next(audited, chosen, out, cfg.format)
    finally:
        terminal.stop()
    say(next_table(chosen))
    say(f"written: {'   '.join(map(str, paths))}\nback into the run: kmine audit {root} --corrected FILE\n")
    return 0


def next_table(chosen: Sequence[NextImage]) -> str:
    """The images as lines of a table; `-` for an unknown number."""
    numbers = "{0.rank:4} {0.gain:6.2f} {0.estimated_dice:6.2f} {0.disagreement:13.2f} {0.flips:6.2f} {0.stands_for:11}"
    rows = (f"{numbers.format(i).replace('nan', '  -')}  {i.sample_id}: {i.reason}\n" for i in chosen)
    return "rank   gain   Dice  disagreement  flips  stands for  image: reason\n" + "".join(rows)


if __name__ == "__main__":
    sys.exit(main())

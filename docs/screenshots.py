"""Screenshots of the pages of a run, from today's pages: `python docs/screenshots.py [RUN] [--out FOLDER]`.

Without RUN a small one is made (phantom images, a few minutes on a CPU). Each page is taken 1280 and 500 pixels wide,
light and dark: OUT/report-500-dark.png. Needs Chromium on the PATH.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent / "tests"))

from helpers.browser import CHROMIUM, Browser  # noqa: E402

PAGES = {"report": "report.html", "comparison": "test_table.html", "audit": "audit/audit.html"}
WIDTHS, SCHEMES = {1280: 900, 500: 1100}, ("light", "dark")
"""Height of the picture by width."""
SETTINGS = (
    *("--data.num_samples", "120", "--data.label_fraction", "0.3", "--data.val_fraction", "0.25", "--rounds", "1"),
    *("--data.test_fraction", "0.2", "--model.name", "unet", "--model.encoder", "tu-mobilenetv3_small_050"),
    *("--model.encoder_weights", "none", "--model.encoder_depth", "3", "--model.decoder_channels", "8"),
    *("--fit.steps", "160", "--fit.round_steps", "60", "--fit.batch_size", "4", "--infer.tta", "none"),
    *("--adapt.folds", "2", "--gate.mode", "ranked", "--plan", "false", "--device", "cpu"),
)
READY = "document.readyState === 'complete' && (!document.body.dataset.folder || document.body.dataset.ready === 'yes')"
SETTLED = "new Promise((done) => setTimeout(() => done(true), 400))"
"""The thumbnails of the audit's list follow a moment later."""


def make_run(root: Path) -> Path:
    """A small run with its audit and comparison."""
    run = str(root / "phantom")
    for words in (["loop", "--out", run, *SETTINGS], ["audit", run], ["compare", run]):
        subprocess.run([sys.executable, "-m", "kmine", *words], check=True, stdout=subprocess.DEVNULL)
    return Path(run)


def take(run: Path, out: Path) -> list[Path]:
    """Pictures of the pages that the run has."""
    out.mkdir(parents=True, exist_ok=True)
    taken = []
    with Browser() as browser:
        for name, page in PAGES.items():
            if not (run / page).is_file():
                continue
            for width, height in WIDTHS.items():
                browser.resize(width, height)
                for scheme in SCHEMES:
                    browser.colours(scheme)
                    browser.open((run / page).resolve().as_uri())
                    browser.wait(READY)
                    browser.evaluate(SETTLED)
                    taken.append(out / f"{name}-{width}-{scheme}.png")
                    browser.screenshot(taken[-1])
    return taken


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, help="a finished run folder; default: a small one is made")
    parser.add_argument("--out", type=Path, default=DOCS / "_generated" / "screens")
    args = parser.parse_args()
    if CHROMIUM is None:
        print("screenshots.py: expected Chromium on the PATH, found none; install it (apt-get install chromium)")
        return 2
    if args.run and not (args.run / "report.html").is_file():
        print(f"screenshots.py: {args.run}: expected a finished run, found no report.html; name its folder")
        return 2
    with tempfile.TemporaryDirectory() as folder:
        for path in take(args.run or make_run(Path(folder)), args.out):
            print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())

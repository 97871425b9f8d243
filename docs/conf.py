"""Configuration of the documentation: `python -m sphinx -W docs docs/_build` (extra `docs`)."""

from __future__ import annotations

from pathlib import Path

import kmine
from kmine.audit.__main__ import AuditConfig
from kmine.config import LoopConfig
from kmine.config.sweep import SweepConfig
from kmine.io.settings_help import sections_of, settings_of
from kmine.next import NextConfig
from kmine.predict.files import PredictConfig

DOCS = Path(__file__).parent

project = "kmine"
author = "The kmine maintainers"
version = release = kmine.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"kmine {release}"
myst_heading_anchors = 3
myst_enable_extensions = ["deflist"]
autodoc_typehints = "none"
napoleon_use_ivar = True
autodoc_member_order = "bysource"
suppress_warnings = ["myst.xref_missing"]  # links of pages to files of the source tree, outside the site
COMMANDS = (("audit", AuditConfig, "run"), ("next", NextConfig, "run"), ("predict", PredictConfig, "run_inputs"))


def settings_page() -> str:
    """Reference of all settings, in Markdown, from the dataclasses that declare them."""
    lines = [
        "# All settings",
        "",
        "Each is a flag (`--data.size 128`), a key of a settings file (`data:` with `size: 128` below it) and an",
        "argument of `KnowledgeMiner` (`data__size=128`). `kmine loop --help all` prints the same.",
    ]
    sections = {"": "Of the loop as a whole.", **sections_of(LoopConfig)}
    by_section = {name: [] for name in sections}
    for setting in settings_of(LoopConfig):
        by_section[setting.name.rpartition(".")[0]].append(setting)
    for name, text in sections.items():
        lines += ["", f"## {name or 'loop'}", "", " ".join(text.split())]
        for setting in by_section[name]:
            default = f" Default: `{setting.default}`." if setting.default else ""
            lines += ["", f"`{setting.flag}`", f": {_escaped(setting.text)}{default}"]
    own = {setting.name for setting in settings_of(LoopConfig)}
    lines += ["", "## sweep", "", "`kmine sweep` has all of these and, in place of `seed` and `data.label_fraction`:"]
    for setting in settings_of(SweepConfig):
        if setting.name not in own:
            lines += ["", f"`{setting.flag}`", f": {_escaped(setting.text)}"]
    for name, config, positional in COMMANDS:
        lines += ["", f"## {name}", "", f"`kmine {name}` has settings of its own:"]
        for setting in settings_of(config, positional):
            default = f" Default: `{setting.default}`." if setting.default else ""
            lines += ["", f"`{setting.flag}`", f": {_escaped(setting.text)}{default}"]
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    """Text as Markdown shows it: no emphasis, no links."""
    return "".join(f"\\{letter}" if letter in "*_[]<>{}$" else letter for letter in text)


def pictures_page() -> str:
    """The pages of a run as docs/screenshots.py took them, in the colours of the reader; without them, how to."""
    lines = [
        "# What a run shows",
        "",
        "`report.html`, `test_table.html` and `audit/audit.html` open without network.",
        "",
    ]
    for picture in sorted(GENERATED.glob("screens/*.png")):
        name, width, scheme = picture.stem.rsplit("-", 2)
        lines += [f"```{{image}} screens/{picture.name}", f":alt: {name}, {width} pixels wide, {scheme}"]
        lines += [f":class: only-{scheme}", f":width: {int(width) // 2}px", "```", ""]
    return "\n".join(lines if len(lines) > 4 else [*lines, "`make screenshots` takes pictures of them for this page."])


GENERATED = DOCS / "_generated"
GENERATED.mkdir(exist_ok=True)
(GENERATED / "pages.md").write_text(pictures_page(), "utf-8")
(GENERATED / "settings.md").write_text(settings_page(), "utf-8")

"""Settings files that come with kmine: `configs/` of the source tree, `kmine/presets` of a wheel (pyproject.toml)."""

from __future__ import annotations

import re
from pathlib import Path

from kmine.errors import UserError, unknown_name
from kmine.io.errors import expanded

PACKAGE = Path(__file__).parents[1]
SUFFIXES = (".yaml", ".yml")


def preset_files() -> dict[str, Path]:
    """Presets by name. An editable install and a source tree have them in `configs/` beside the package."""
    folder = PACKAGE / "presets" if (PACKAGE / "presets").is_dir() else PACKAGE.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def settings_file(word: str) -> Path:
    """The file that `--config WORD` means: a file of that name, else the preset; anything with / or .yaml is a path.

    Raises:
        UserError: a bare word that is neither.
    """
    path = expanded(word)
    if not re.fullmatch(r"\w[\w.-]*", word) or path.suffix in SUFFIXES or path.is_file():
        return path
    presets = preset_files()
    if word not in presets:
        error = unknown_name("--config", word, presets)
        raise UserError(f"{error}; or give the path of a YAML file of settings, as in ./{word}.yaml")
    return presets[word]

"""Help of a command, from the dataclasses that declare its settings: the main ones in a line each, or all of them."""

from __future__ import annotations

import ast
import inspect
import itertools
import re
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from kmine.errors import unknown_name
from kmine.io.presets import preset_files

INDENT = 24
"""Column at which the short help's texts begin."""
SHORT = 40
"""Lines of the short help at most, if a line a setting allows it."""


@dataclass(frozen=True)
class Setting:
    """One setting of a command."""

    name: str
    """Dotted, as in data.size."""
    value: str
    """What the flag takes: N, X, TEXT, {a,b}, [X,X]; empty for a switch."""
    default: str
    """As a settings file has it; empty if the default is null or no elements."""
    text: str
    """Its explanation."""

    @property
    def flag(self) -> str:
        """The flag with what it takes."""
        return f"--{self.name} {self.value}".rstrip()


def settings_of(config_class: type[Any], skip: str = "", prefix: str = "") -> list[Setting]:
    """All settings of a class and of its sections, in the order of declaration."""
    texts, hints = _texts(config_class), get_type_hints(config_class)
    found = []
    for field in fields(config_class):
        kind = hints[field.name]
        if is_dataclass(kind):
            found += settings_of(kind, prefix=f"{field.name}.")
        elif field.name != skip:
            default = field.default if field.default_factory is MISSING else field.default_factory()
            name = prefix + field.name
            found.append(Setting(name, _value(kind), _written(default), " ".join(texts[field.name].split())))
    return found


def sections_of(config_class: type[Any]) -> dict[str, str]:
    """First sentences on the sections of a class, by name."""
    kinds = {name: kind for name, kind in get_type_hints(config_class).items() if is_dataclass(kind)}
    return {name: (inspect.getdoc(kind) or "").split("\n\n")[0] for name, kind in kinds.items()}


def help_text(
    config_class: type[Any], topic: str, *, usage: str, description: str, main: Sequence[str] = (), skip: str = ""
) -> str:
    """The help that `--help TOPIC` prints.

    Args:
        config_class: of the settings.
        topic: empty: the settings `main` (all if there are none), a line each; all; or a section, such as data.
        usage: first line.
        description: what the command does.
        main: names of the main settings.
        skip: setting that has no flag.

    Raises:
        UserError: an unknown topic.
    """
    width = max(60, min(shutil.get_terminal_size().columns, 100))
    settings, sections = settings_of(config_class, skip), sections_of(config_class)
    if topic not in ("", "all", *sections):
        raise unknown_name("--help", topic, ["all", *sections])
    head = [f"usage: {usage}", "", *textwrap.wrap(" ".join(description.split()), width), ""]
    config = Setting("config", "FILE", "", f"YAML file of settings, or a preset: {', '.join(preset_files())}.")
    if topic:
        return "\n".join([*head, *_full([config, *settings], sections, topic, width)]) + "\n"
    chosen = [s for s in settings if s.name in main] if main else settings
    prog = usage.split(" [")[0]
    more = f"--help {next(iter(sections))}: those of a section ({', '.join(sections)}). " if sections else ""
    foot = f"--help all: all {len(settings) + 1} settings in full. {more}{prog} ... --print_config shows their values."
    foot_lines = ["", *textwrap.wrap(foot, width)]
    shown = [config, *chosen]
    entries = [_lines(setting, width, 3 if setting is config else 1) for setting in shown]
    for most, (i, setting) in itertools.product((2, 3), enumerate(shown)):
        longer = [*entries[:i], _lines(setting, width, most), *entries[i + 1 :]]
        if len(head) + sum(map(len, longer)) + len(foot_lines) <= SHORT:
            entries = longer
    lines = itertools.chain.from_iterable(entries)
    return "\n".join([*head, *lines, *foot_lines]) + "\n"


def help_topic(argv: Sequence[str]) -> str | None:
    """The word after `--help`, empty without one; None if no help is wanted."""
    for word, following in itertools.pairwise([*argv, ""]):
        if word == "--":
            return None
        if word in ("-h", "--help"):
            return "" if following.startswith("-") else following
    return None


def _full(settings: Sequence[Setting], sections: dict[str, str], topic: str, width: int) -> list[str]:
    """Every setting of a topic with its whole text, under the headings of the sections."""
    lines, last = [], ""
    for setting in settings:
        section = setting.name.partition(".")[0] if "." in setting.name else ""
        if topic not in ("all", section):
            continue
        if section != last:
            lines += ["", *textwrap.wrap(f"{section}: {sections[section]}", width)]
            last = section
        says_default = not setting.default or "default:" in setting.text.lower()
        text = setting.text + ("" if says_default else f" Default: {setting.default}.")
        body = textwrap.wrap(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6, break_on_hyphens=False)
        lines += [f"  {setting.flag}", *body]
    return lines


def _lines(setting: Setting, width: int, most: int) -> list[str]:
    """A setting in at most so many lines: its first clause, as far as there is room, and its default."""
    flag = f"  --{setting.name}"
    end = f" [{setting.default}]" if setting.default and len(setting.default) <= 16 else ""
    sentence = re.sub(r"^(.{20,}?)(\. |; ).*", r"\1", setting.text).rstrip(".") + end
    wrapped = textwrap.TextWrapper(width - INDENT, max_lines=most, placeholder=f" ...{end}").wrap(sentence)
    if len(flag) + 2 > INDENT:
        return [flag, *(" " * INDENT + line for line in wrapped)]
    return [f"{flag if i == 0 else '':{INDENT}}{line}" for i, line in enumerate(wrapped)]


def _texts(config_class: type[Any]) -> dict[str, str]:
    """The string below each field of a class and of its bases."""
    texts = {}
    for base in reversed([base for base in config_class.__mro__ if is_dataclass(base)]):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        for field, text in itertools.pairwise(tree.body):  # type: ignore[attr-defined]
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                texts[field.target.id] = text.value.value  # type: ignore[union-attr]
    return texts


def _value(kind: Any) -> str:
    """What a flag of a type takes."""
    if type(None) in get_args(kind):
        kind = next(arg for arg in get_args(kind) if arg is not type(None))
    if get_origin(kind) is Literal:
        return f"{{{','.join(map(str, get_args(kind)))}}}"
    if get_origin(kind) in (tuple, list):
        parts = [_value(arg) for arg in get_args(kind) if arg is not ...]
        return f"[{','.join(parts)}{',...' if len(parts) == 1 else ''}]"
    return {bool: "", int: "N", float: "X"}.get(kind, "TEXT")


def _written(default: Any) -> str:
    if default is None or default in ((), []) or default is MISSING:
        return ""
    if isinstance(default, (tuple, list)):
        return f"[{', '.join(map(str, default))}]"
    return str(default).lower() if isinstance(default, bool) else str(default)

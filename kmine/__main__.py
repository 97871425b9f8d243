"""`kmine COMMAND`: dispatch to the commands."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from types import ModuleType

from kmine import __version__
from kmine.cli import fail, guarded
from kmine.errors import unknown_name
from kmine.io.console import open_outputs

COMMANDS = {
    "fetch": "download a data set, or print where to get it",
    "plan": "settings from the data, the machine and a time budget, with an estimate; kmine loop does so by itself",
    "loop": "train on the few masks, mine pseudo masks, retrain, repeat",
    "sweep": "methods, models, label fractions and seeds, a run each; resumes",
    "compare": "mining against its supervised baseline on the test split, with paired intervals",
    "audit": "pseudo masks, the most suspicious first; verdicts and corrected masks back into the run",
    "next": "which unlabeled images to label next, with tasks for Label Studio and CVAT",
    "predict": "masks of new images by the model of a run; export it, with a model card",
    "weights": "checkpoints of the segmenters: list, download, verify, carry to a machine without network",
    "check": "faults of a data set: leaks, damage, masks that do not fit their images",
}

COMPLETION = r"""
_kmine() {
  local word=${COMP_WORDS[COMP_CWORD]} command=${COMP_WORDS[1]}
  if [ "$COMP_CWORD" = 1 ]; then COMPREPLY=($(compgen -W "COMMANDS" -- "$word")); return; fi
  if [[ $word != -* || ! " COMMANDS " == *" $command "* ]]; then COMPREPLY=($(compgen -f -- "$word")); return; fi
  local flags=_kmine_$command
  [ -n "${!flags}" ] || printf -v "$flags" %s "$("$1" "$command" --help all 2>/dev/null | grep -o '^  --[^ ]*')"
  COMPREPLY=($(compgen -W "${!flags} --help" -- "$word"))
}
complete -o filenames -F _kmine kmine
""".replace("COMMANDS", " ".join(COMMANDS)).lstrip()
"""For bash, and zsh after `bashcompinit`. The flags of a command are asked of it once."""


def main(argv: Sequence[str] | None = None) -> int:
    """Dispatch to `kmine.<command>`; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    outputs = {"--version": f"kmine {__version__}\n", "--completion": COMPLETION, "--help": _help(), "-h": _help()}
    if not words or words[0] in outputs:
        with open_outputs():
            sys.stdout.write(outputs[words[0] if words else "--help"])
        return 0
    if words[0] not in COMMANDS:
        return fail("kmine", str(unknown_name("command", words[0], COMMANDS)))
    return guarded(f"kmine {words[0]}", lambda: int(_module(words[0]).main(words[1:])))


def _module(command: str) -> ModuleType:
    """`kmine.loop.__main__` where the command is a package, `kmine.fetch` where it is a module."""
    module = importlib.import_module(f"kmine.{command}")
    return importlib.import_module(f"kmine.{command}.__main__") if hasattr(module, "__path__") else module


def _help() -> str:
    lines = "".join(f"  {name:<10}{text}\n" for name, text in COMMANDS.items())
    return (
        "usage: kmine COMMAND [--config FILE.yaml] [--SETTING VALUE ...]\n\n"
        "Semi-supervised medical image segmentation by knowledge mining.\n\n"
        f"commands:\n{lines}\n`kmine COMMAND --help` lists the main settings, `--help all` explains every one.\n"
        '`python -m kmine.COMMAND` is the same. Words by the tab key: eval "$(kmine --completion)" in ~/.bashrc.\n'
    )


if __name__ == "__main__":
    sys.exit(main())

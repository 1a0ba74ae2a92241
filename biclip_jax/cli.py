"""The `biclip` console command: `biclip COMMAND ...` runs the module of that name.

`python -m biclip_jax COMMAND ...` and `python -m biclip_jax.COMMAND ...` do the same.
"""

from __future__ import annotations

import importlib
import sys

from biclip_jax import __version__
from biclip_jax.core.errors import did_you_mean, missing_extra

COMMANDS = {
    "train": "train a model and evaluate it on the test split",
    "evaluate": "evaluate a trained model on a split",
    "predict": "segment images given a text prompt",
    "convert": "convert pretrained weights to a model folder",
    "prepare": "prepare a dataset as one file",
    "ablate": "train and compare several methods",
    "report": "write an HTML report of a run",
    "generalization": "summarize scores on other datasets",
}
USAGE = """usage: biclip COMMAND [options]
       biclip COMMAND --help
       biclip --version
"""


def main(argv: list[str] | None = None) -> None:
    """Runs a command; exit status 2 for an unknown command or a missing dependency."""
    argv = sys.argv[1:] if argv is None else argv
    name = argv[0] if argv else ""
    if name in ("", "-h", "--help"):
        print(f"{USAGE}\ncommands:")
        for known, summary in COMMANDS.items():
            print(f"  {known:15} {summary}")
        sys.exit(0 if name else 2)
    if name == "--version":
        print(f"biclip_jax {__version__}")
        return
    if name not in COMMANDS:
        names = ", ".join(COMMANDS)
        near = did_you_mean(name, list(COMMANDS))
        print(f"error: {name}: unknown command; expected one of {names}{near}", file=sys.stderr)
        sys.exit(2)
    try:
        command = importlib.import_module(f"biclip_jax.{name}")
    except ModuleNotFoundError as error:
        print(f"error: {missing_extra(error)}", file=sys.stderr)
        sys.exit(2)
    command.main(argv[1:])

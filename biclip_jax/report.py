"""Writes a run down as one page: scores, curves, pictures, and what is published beside them.

    python -m biclip_jax.report --workdir runs/qata

Writes WORKDIR/report.html, a single file that asks for nothing from elsewhere, out of what training
and evaluation left in the work directory; what is missing is named with the command that makes it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from biclip_jax import __version__
from biclip_jax.core import runtime
from biclip_jax.evaluation.report import html


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    runtime.run_command(_main, argv)


def _main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True, help="of a training run")
    parser.add_argument("--output", help="the file (default: WORKDIR/report.html)")
    args = parser.parse_args(argv)
    workdir = Path(args.workdir)
    path = html.write_report(workdir, Path(args.output or workdir / "report.html"), __version__)
    print(f"report  {path}")


if __name__ == "__main__":
    main(sys.argv[1:])

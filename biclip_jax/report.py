"""Writes an HTML report of a run: scores, curves, images and published results.

    biclip report --workdir runs/qata

Writes WORKDIR/report.html, a single file without external resources, from the files that training
and evaluation wrote. Missing parts are listed with the command that creates them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from biclip_jax import __version__
from biclip_jax.core import runtime
from biclip_jax.evaluation.report import html


def main(argv: list[str] | None = None) -> None:
    """Runs `biclip report`."""
    runtime.run_command(_main, argv)


def _main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="biclip report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workdir", required=True, help="work directory of a training run")
    parser.add_argument("--output", help="HTML file (default: WORKDIR/report.html)")
    args = parser.parse_args(argv)
    workdir = Path(args.workdir)
    path = html.write_report(workdir, Path(args.output or workdir / "report.html"), __version__)
    print(f"report  {path}")


if __name__ == "__main__":
    main(sys.argv[1:])

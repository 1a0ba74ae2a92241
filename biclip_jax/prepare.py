"""Prepares a dataset as one file, to train with on another machine.

    biclip prepare --config qata --config.data.source=DIR --output qata_224.npz
    biclip train --config qata --config.data.source=qata_224.npz

The file holds images and masks at the model's image size, every mask at its own size, and the
prompts. NumPy alone reads it: the other machine needs no TFDS. Without grain, batches are not read
ahead.
"""

from __future__ import annotations

import sys
from pathlib import Path

from biclip_jax.core import config as config_lib
from biclip_jax.core import runtime
from biclip_jax.core.errors import UserError
from biclip_jax.data import pipeline


def main(argv: list[str] | None = None) -> None:
    """Runs `biclip prepare`."""
    runtime.run_command(_main, argv)


def _main(argv: list[str]) -> None:
    parser = config_lib.config_parser("prepare", __doc__)
    parser.add_argument("--output", required=True, help="output file, ending in .npz")
    args, overrides = parser.parse_known_args(argv)
    config = config_lib.load_config(args.config, overrides)
    output = Path(args.output)
    if output.suffix != ".npz":
        raise UserError(f"--output: {output}; expected a file name that ends in .npz")
    counts = pipeline.write_file(config.data.to_dict(), config.model.image_size, output)
    splits = ", ".join(f"{count} {split}" for split, count in counts.items())
    print(f"{output}  {splits}; {output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main(sys.argv[1:])

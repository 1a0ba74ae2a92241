"""Reads a data set once and writes it as one file, to train with on another machine.

    python -m biclip_jax.prepare --config qata --config.data.source=DIR --output qata_224.npz
    python -m biclip_jax.train --config qata --config.data.source=qata_224.npz

The file holds pictures and masks at the model's size, each mask at its own, and the sentences.
It is read with NumPy alone: TFDS need not be there, nor grain where config.data.on_device is true.
"""

from __future__ import annotations

import sys
from pathlib import Path

from biclip_jax.core import config as config_lib
from biclip_jax.core import runtime
from biclip_jax.core.errors import UserError
from biclip_jax.data import pipeline


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    runtime.run_command(_main, argv)


def _main(argv: list[str]) -> None:
    parser = config_lib.config_parser(__doc__)
    parser.add_argument("--output", required=True, help="the file, ending in .npz")
    args, overrides = parser.parse_known_args(argv)
    config = config_lib.load_config(args.config, overrides)
    output = Path(args.output)
    if output.suffix != ".npz":
        raise UserError(f"--output: {output}; expected a name that ends in .npz")
    counts = pipeline.write_file(config.data.to_dict(), config.model.image_size, output)
    said = ", ".join(f"{count} {split}" for split, count in counts.items())
    print(f"{output}  {said}; {output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main(sys.argv[1:])

"""Runs `python -m biclip_jax COMMAND ...`, the same as `biclip COMMAND ...`."""

from biclip_jax.cli import main

if __name__ == "__main__":
    main()

"""What an evaluation can be asked for: the arguments of `biclip_jax.evaluate`."""

from __future__ import annotations

import argparse

from biclip_jax.core.errors import UserError, did_you_mean
from biclip_jax.data.schema import SPLITS
from biclip_jax.evaluation.robustness import corruptions, text_conditions


def parse(argv: list[str], description: str = "") -> argparse.Namespace:
    """The arguments of a command line, its lists taken apart.

    Args:
      argv: without the program's name; kept as `argv`.
      description: for --help.

    Raises:
      UserError: a value that no code stands for.
      SystemExit: 2 for an option that there is not, 0 for --help.
    """
    args = _parser(description).parse_args(argv)
    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size}: expected at least 1 picture at a time")
    if args.num_samples is not None and args.num_samples < 1:
        raise UserError(f"--num-samples {args.num_samples}: expected at least 1 pass")
    if args.subset is not None and args.subset < 1:
        raise UserError(f"--subset {args.subset}: expected at least 1 picture")
    args.ensemble_with = _ensemble_folders(args)
    args.text_conditions, args.argv = _text_conditions(args.text_conditions), argv
    args.corruptions = _names("--corruptions", args.corruptions, corruptions.NAMES)
    args.severities = _severities(args.severities)
    return args


def _parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--workdir", required=True, help="of a training run")
    parser.add_argument(
        "--ensemble-with",
        default="",
        metavar="RUN,RUN",
        help="the mean of this model and these; with --output, as it is no one run's",
    )
    parser.add_argument("--split", default="test", choices=SPLITS)
    parser.add_argument("--source", default="", help="another data set on disk, in any layout")
    parser.add_argument("--layout", default="", help="of --source (default: look and see)")
    parser.add_argument("--subset", type=int, metavar="N", help="fixed N pictures of it")
    parser.add_argument(
        "--text-conditions",
        default="all",
        metavar="A,B",
        help=f"all, or right and some of {', '.join(text_conditions.CONDITIONS[1:])} (default: all)",
    )
    parser.add_argument(
        "--tta", action="store_true", help="also the mean over flips, rotations, contrast"
    )
    parser.add_argument(
        "--flip-consistency",
        action="store_true",
        help="Dice of the mirrored pass and the mirrored mask",
    )
    parser.add_argument(
        "--surface-metrics",
        action="store_true",
        help="DSC and NSD as MedCLIPSeg takes them, NSD in 2-D",
    )
    parser.add_argument(
        "--uncertainty", action="store_true", help="of MedCLIPSeg's samples: entropy, its parts"
    )
    parser.add_argument(
        "--num-samples", type=int, metavar="S", help="of MedCLIPSeg (default: its own)"
    )
    parser.add_argument("--calibration", action="store_true", help="of the pixels' probabilities")
    parser.add_argument(
        "--corruptions",
        default="",
        metavar="A,B",
        help=f"all, or some of {', '.join(corruptions.NAMES)}",
    )
    parser.add_argument("--severities", default="1,2,3,4,5", metavar="1,2", help="of --corruptions")
    parser.add_argument("--no-baselines", dest="baselines", action="store_false")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--output", help="folder (default: WORKDIR/evaluation/SPLIT[-N])")
    return parser


def _text_conditions(text: str) -> tuple[str, ...]:
    known = text_conditions.CONDITIONS
    names = _names("--text-conditions", text, known)
    if "original" not in names:
        raise UserError(
            f"--text-conditions {text}: expected all, or a list with original, out of "
            f"{', '.join(known)}"
        )
    return names


def _names(flag: str, text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    names = known if text == "all" else tuple(name for name in text.split(",") if name)
    if unknown := [name for name in names if name not in known]:
        near = did_you_mean(unknown[0], known)
        raise UserError(
            f"{flag}: {unknown[0]!r}; expected all, or some of {', '.join(known)}{near}"
        )
    return names


def _ensemble_folders(args: argparse.Namespace) -> list[str]:
    """The folders of other models."""
    folders = (
        [folder.strip() for folder in args.ensemble_with.split(",")] if args.ensemble_with else []
    )
    if not all(folders) or len({args.workdir, *folders}) <= len(folders):
        raise UserError(
            f"--ensemble-with {args.ensemble_with}: expected work directories with commas between them, each "
            "once, and --workdir not among them"
        )
    if folders and not args.output:
        raise UserError(
            f"--ensemble-with {args.ensemble_with}: expected --output, a folder of its own"
        )
    if folders and args.uncertainty:
        raise UserError(
            "--ensemble-with: found --uncertainty beside it, of one model's samples; ask for one of them"
        )
    return folders


def _severities(text: str) -> tuple[int, ...]:
    try:
        levels = tuple(int(part) for part in text.split(","))
    except ValueError:
        levels = (0,)
    if not set(levels) <= set(corruptions.SEVERITIES):
        raise UserError(f"--severities {text}: expected some of 1,2,3,4,5")
    return levels

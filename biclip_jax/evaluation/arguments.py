"""What an evaluation can be asked for: the arguments of `biclip_jax.evaluate`."""

from __future__ import annotations

import argparse

from biclip_jax.data.annotations import VARIANTS
from biclip_jax.data.schema import SPLITS
from biclip_jax.errors import UserError, did_you_mean
from biclip_jax.evaluation import conditions, degrade


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
    args.together = _together(args)
    args.text_conditions, args.argv = _asked(args), argv
    args.degradations = _names("--degradations", args.degradations, degrade.NAMES)
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
        "--together",
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
        metavar="A,B",
        help=f"all, or right and some of {', '.join(conditions.CONDITIONS[1:])} (default: all)",
    )
    parser.add_argument(
        "--prompts",
        metavar="A,B",
        help=f"short for --text-conditions right,A,B: published sentences, {', '.join(VARIANTS)}",
    )
    parser.add_argument(
        "--tta", action="store_true", help="also the mean over flips, rotations, contrast"
    )
    parser.add_argument(
        "--mirroring", action="store_true", help="Dice of the mirrored pass and the mirrored mask"
    )
    parser.add_argument(
        "--surface", action="store_true", help="DSC and NSD as MedCLIPSeg takes them, NSD in 2-D"
    )
    parser.add_argument(
        "--uncertainty", action="store_true", help="of MedCLIPSeg's samples: entropy, its parts"
    )
    parser.add_argument(
        "--num-samples", type=int, metavar="S", help="of MedCLIPSeg (default: its own)"
    )
    parser.add_argument("--calibration", action="store_true", help="of the pixels' probabilities")
    parser.add_argument(
        "--degradations",
        default="",
        metavar="A,B",
        help=f"all, or some of {', '.join(degrade.NAMES)}",
    )
    parser.add_argument(
        "--severities", default="1,2,3,4,5", metavar="1,2", help="of --degradations"
    )
    parser.add_argument("--no-baselines", dest="baselines", action="store_false")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--output", help="folder (default: WORKDIR/evaluation/SPLIT[-N])")
    return parser


def _text_conditions(text: str) -> tuple[str, ...]:
    known = conditions.CONDITIONS
    names = _names("--text-conditions", text, known)
    if "right" not in names:
        raise UserError(
            f"--text-conditions {text}: expected all, or a list with right, out of "
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


def _prompts(text: str) -> tuple[str, ...]:
    names = tuple(name for name in text.split(",") if name)
    if not names or not set(names) <= set(VARIANTS):
        raise UserError(
            f"--prompts {text}: expected some of {', '.join(VARIANTS)}, joined by commas; other "
            "conditions go by --text-conditions"
        )
    return ("right", *names)


def _asked(args: argparse.Namespace) -> tuple[str, ...]:
    """The text conditions of both flags that name them."""
    if args.prompts is None:
        return _text_conditions("all" if args.text_conditions is None else args.text_conditions)
    if args.text_conditions is not None:
        raise UserError(
            f"--prompts {args.prompts}: found --text-conditions {args.text_conditions} beside it; "
            "expected one of them; name all conditions in --text-conditions"
        )
    return _prompts(args.prompts)


def _together(args: argparse.Namespace) -> list[str]:
    """The folders of other models."""
    folders = [folder.strip() for folder in args.together.split(",")] if args.together else []
    if not all(folders) or len({args.workdir, *folders}) <= len(folders):
        raise UserError(
            f"--together {args.together}: expected work directories with commas between them, each "
            "once, and --workdir not among them"
        )
    if folders and not args.output:
        raise UserError(f"--together {args.together}: expected --output, a folder of its own")
    if folders and args.uncertainty:
        raise UserError(
            "--together: found --uncertainty beside it, of one model's samples; ask for one of them"
        )
    return folders


def _severities(text: str) -> tuple[int, ...]:
    try:
        levels = tuple(int(part) for part in text.split(","))
    except ValueError:
        levels = (0,)
    if not set(levels) <= set(degrade.SEVERITIES):
        raise UserError(f"--severities {text}: expected some of 1,2,3,4,5")
    return levels

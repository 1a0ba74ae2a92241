"""Arguments of `biclip evaluate`; also checked by `biclip ablate --evaluate`."""

from __future__ import annotations

import argparse

from biclip_jax.core.errors import UserError, did_you_mean
from biclip_jax.data.schema import SPLITS
from biclip_jax.evaluation.robustness import corruptions, text_conditions


def parse(argv: list[str], description: str = "") -> argparse.Namespace:
    """Parses and validates the arguments of an evaluation.

    Args:
      argv: Arguments without the program's name; kept as `argv`.
      description: Description for --help.

    Returns:
      The arguments, with lists as tuples. `workdir` is the work directory or the model folder, and
      `is_model` tells which.

    Raises:
      UserError: An invalid value.
      SystemExit: 2 for an unknown option, 0 for --help.
    """
    args = _parser(description).parse_args(argv)
    for name in ("batch_size", "num_samples", "subset"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: expected at least 1")
    args.is_model = args.model is not None
    if args.is_model:
        _check_model(args)
        args.workdir = args.model
    args.ensemble_with = _ensemble_folders(args)
    args.text_conditions, args.argv = _text_conditions(args.text_conditions), argv
    args.corruptions = _names("--corruptions", args.corruptions, corruptions.NAMES)
    args.severities = _severities(args.severities)
    return args


def _parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="biclip evaluate",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    trained = parser.add_mutually_exclusive_group(required=True)
    trained.add_argument("--workdir", help="work directory of a training run")
    trained.add_argument("--model", help="model folder; needs --source and --output")
    parser.add_argument(
        "--ensemble-with",
        default="",
        metavar="RUN,RUN",
        help="evaluate the mean of this model and these; needs --output",
    )
    parser.add_argument("--split", default="test", choices=SPLITS)
    parser.add_argument("--source", default="", help="another dataset on disk, in any layout")
    parser.add_argument("--layout", default="", help="layout of --source (default: detected)")
    parser.add_argument("--subset", type=int, metavar="N", help="evaluate N fixed images")
    parser.add_argument(
        "--text-conditions",
        default="all",
        metavar="A,B",
        help="all, or original and some of "
        f"{', '.join(text_conditions.CONDITIONS[1:])} (default: all)",
    )
    parser.add_argument(
        "--tta", action="store_true", help="also the mean over a flip, rotations and contrast"
    )
    parser.add_argument(
        "--flip-consistency",
        action="store_true",
        help="Dice between the prediction of the flipped image and the flipped prediction",
    )
    parser.add_argument(
        "--surface-metrics",
        action="store_true",
        help="DSC and NSD as in MedCLIPSeg, and NSD of the 2-D boundary",
    )
    parser.add_argument(
        "--uncertainty", action="store_true", help="entropy of MedCLIPSeg's samples and its parts"
    )
    parser.add_argument(
        "--num-samples", type=int, metavar="S", help="samples of MedCLIPSeg (default: as trained)"
    )
    parser.add_argument(
        "--calibration", action="store_true", help="pixel-wise calibration and temperature scaling"
    )
    parser.add_argument(
        "--corruptions",
        default="",
        metavar="A,B",
        help=f"all, or some of {', '.join(corruptions.NAMES)}",
    )
    parser.add_argument(
        "--severities", default="1,2,3,4,5", metavar="1,2", help="severities of --corruptions"
    )
    parser.add_argument(
        "--no-baselines",
        dest="baselines",
        action="store_false",
        help="skip the image-free baselines",
    )
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--output", help="output folder (default: WORKDIR/evaluation/SPLIT[-N])")
    return parser


def _check_model(args: argparse.Namespace) -> None:
    """Raises UserError if a model folder comes without data or output folder."""
    missing = [name for name in ("source", "output") if not getattr(args, name)]
    if missing:
        options = " and ".join(f"--{name}" for name in missing)
        raise UserError(
            f"--model {args.model}: a model folder has no dataset and no work directory; add "
            f"{options}, or give the --workdir of a run"
        )


def _text_conditions(text: str) -> tuple[str, ...]:
    names = _names("--text-conditions", text, text_conditions.CONDITIONS)
    if "original" not in names:
        raise UserError(
            f"--text-conditions {text}: expected all, or a list with original, out of "
            f"{', '.join(text_conditions.CONDITIONS)}"
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
    """Returns the work directories or model folders of --ensemble-with."""
    text = args.ensemble_with
    folders = [folder.strip() for folder in text.split(",")] if text else []
    if not all(folders) or len({args.workdir, *folders}) <= len(folders):
        raise UserError(
            f"--ensemble-with {text}: expected comma-separated work directories, without "
            "repetitions and without --workdir"
        )
    if folders and not args.output:
        raise UserError(f"--ensemble-with {text}: expected --output, as it is not one run's result")
    if folders and args.uncertainty:
        raise UserError(
            "--ensemble-with: --uncertainty evaluates the samples of one model; remove one of them"
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

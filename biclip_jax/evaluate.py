"""Evaluates a trained model on a split, with every text condition and the image-free baselines.

    python -m biclip_jax.evaluate --workdir runs/qata --split test

Writes results.json, per_image.csv and overlays.png to WORKDIR/evaluation/SPLIT.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from biclip_jax import __version__, cli, inference, sentences
from biclip_jax.data import pipeline
from biclip_jax.data.schema import SPLITS
from biclip_jax.errors import UserError
from biclip_jax.evaluation import degrade, reporting, runner
from biclip_jax.weights import folder as model_folder


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the evaluation that the command line describes; returns what results.json holds."""
    workdir = Path(args.workdir)
    config = _run_config(workdir)
    data = dict(config["data"])
    if args.source:
        empty = dict.fromkeys(data["num_examples"], 0)
        data |= {"name": "folder", "source": args.source, "layout": args.layout}
        data |= {"prompt": "", "num_examples": empty}
    model, variables, processor = inference.load_model(workdir)
    needed = SPLITS if args.baselines else (args.split,)
    prepared = pipeline.prepare(data, processor.image_size)
    splits = pipeline.open_splits(prepared, data, needed)
    records = splits[args.split]
    extra = {
        "split": args.split,
        "data": Path(args.source).name if args.source else data["name"],
        "command": f"python -m biclip_jax.evaluate {' '.join(args.argv)}",
        "seed": config["seed"],
        "best_step": _best_step(workdir),
        "config": config,
        "versions": {"biclip_jax": __version__, "jax": metadata.version("jax")},
        "device": jax.devices()[0].device_kind,
    }
    if args.baselines:
        train, val = splits["train"], splits["val"]
        extra["baselines"] = runner.image_free_results(train, val, records)
    outcome = runner.evaluate(
        runner.make_predict(model, sentences.without_tower(model, variables)),
        sentences.encoder(model, variables, processor),
        records,
        folder=_output(args),
        conditions=args.conditions,
        batch_size=args.batch_size,
        extra=extra,
    )
    if args.degradations:
        outcome["degradations"] = degraded(args, model, variables, processor, records, outcome)
    print(f"{args.split}, {len(records)} pictures, percent, at {outcome['size']}:")
    print(runner.table_of({**outcome["conditions"], **outcome.get("baselines", {})}))
    print(f"results  {_output(args) / 'results.json'}")
    print(f"images   {_output(args) / 'per_image.csv'}")
    print(f"page     {_output(args) / 'overlays.png'}")
    if args.degradations:
        _print_degradations(outcome["degradations"])
        print(f"plot     {_output(args) / 'degradations.png'}")
    return outcome


def degraded(
    args: argparse.Namespace,
    model: Any,
    variables: dict[str, Any],
    processor: inference.Processor,
    records: Sequence[Any],
    outcome: dict[str, Any],
) -> dict[str, Any]:
    """Evaluates on damaged pictures; adds to results.json and draws degradations.png."""
    found = runner.evaluate_degradations(
        partial(runner.make_predict, model, sentences.without_tower(model, variables)),
        sentences.encoder(model, variables, processor),
        records,
        names=args.degradations,
        severities=args.severities,
        batch_size=args.batch_size,
    )
    scores = runner.degradation_results(found)
    folder = _output(args)
    runner.write_json(folder / "results.json", {**outcome, "degradations": scores})
    cells = {name: rows for name, rows in scores.items() if name != "mean"}
    right = outcome["conditions"]["right"]
    reporting.plot_degradations(cells, right, folder / "degradations.png")
    return scores


def _print_degradations(scores: dict[str, Any]) -> None:
    kinds = ("dice_global", "dice_mean")
    rows = [
        {"degradation": name, "severity": severity, **{k: f"{100 * cell[k]:.2f}" for k in kinds}}
        for name, cells in scores.items()
        if name != "mean"
        for severity, cell in cells.items()
    ]
    mean = {k: f"{100 * scores['mean'][k]:.2f}" for k in kinds}
    rows.append({"degradation": "mean", "severity": "", **mean})
    print(reporting.format_table(rows, ("degradation", "severity", *kinds)))


def _output(args: argparse.Namespace) -> Path:
    name = f"{Path(args.source).name}-{args.split}" if args.source else args.split
    return Path(args.output or Path(args.workdir) / "evaluation" / name)


def _run_config(workdir: Path) -> dict[str, Any]:
    path = workdir / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); give the --workdir of a training run"
        ) from error
    if not isinstance(config, dict) or not {"data", "seed"} <= config.keys():
        raise UserError(f"{path}: no configuration of a run; give the --workdir of a training run")
    return config


def _best_step(workdir: Path) -> int:
    # The config alone: loading the model has read and checked the weights already.
    return json.loads((inference.model_path(workdir) / model_folder.CONFIG).read_text())["step"]


def _conditions(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    unknown = [name for name in names if name not in runner.CONDITIONS]
    if unknown or "right" not in names:
        known = ", ".join(runner.CONDITIONS)
        raise UserError(f"--conditions {text}: expected a list with right, out of {known}")
    return names


def _degradations(text: str) -> tuple[str, ...]:
    names = degrade.NAMES if text == "all" else tuple(name for name in text.split(",") if name)
    unknown = [name for name in names if name not in degrade.NAMES]
    if unknown:
        known = ", ".join(degrade.NAMES)
        raise UserError(f"--degradations {text}: {unknown[0]!r}; expected all, or some of {known}")
    return names


def _severities(text: str) -> tuple[int, ...]:
    severities = tuple(int(part) if part.isdigit() else 0 for part in text.split(","))
    if not set(severities) <= set(degrade.SEVERITIES):
        raise UserError(f"--severities {text}: expected some of 1,2,3,4,5")
    return severities


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    cli.run(_main, argv)


def _main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True, help="of a training run")
    parser.add_argument("--split", default="test", choices=SPLITS)
    parser.add_argument("--source", default="", help="another data set on disk, in any layout")
    parser.add_argument("--layout", default="", help="of --source (default: look and see)")
    parser.add_argument("--conditions", default=",".join(runner.CONDITIONS), metavar="A,B")
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
    parser.add_argument("--output", help="folder (default: WORKDIR/evaluation/SPLIT)")
    args = parser.parse_args(argv)
    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size}: expected at least 1 picture at a time")
    args.conditions, args.argv = _conditions(args.conditions), argv
    args.degradations = _degradations(args.degradations)
    args.severities = _severities(args.severities)
    evaluate(args)


if __name__ == "__main__":
    main(sys.argv[1:])

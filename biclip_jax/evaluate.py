"""Evaluates a trained model on a split, with every text condition and the image-free baselines.

    python -m biclip_jax.evaluate --workdir runs/qata --split test
    python -m biclip_jax.evaluate --workdir runs/qata --calibration --tta --degradations all

Writes results.json, per_image.csv, overlays.png and uncertainty.png to WORKDIR/evaluation/SPLIT
(SPLIT-N with --subset N), and plots for --calibration and --degradations; docs/evaluation.md says
what each number is. Sections of results.json that a call does not make stay, as long as model and
pictures are the same.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from biclip_jax import __version__, cli, inference, sentences
from biclip_jax.configs import common
from biclip_jax.data import pipeline
from biclip_jax.data.schema import SPLITS, Record
from biclip_jax.errors import UserError
from biclip_jax.evaluation import (
    arguments,
    calibration,
    conditions,
    earlier,
    metrics,
    mirroring,
    plots,
    reporting,
    runner,
    surface,
    together,
)
from biclip_jax.models.medclipseg import MedCLIPSeg
from biclip_jax.weights import folder as model_folder


class Job(NamedTuple):
    """What every part of an evaluation takes.

    Attributes:
      make: damage -> predict, see `runner.make_predict`.
      predict: without damage.
      members: the same, of each member of an ensemble or of --together; empty for a single model.
      samples: batch -> the samples' mean, its entropy and its epistemic part; None where these
        are not asked for.
      num_samples: passes of a prediction; None for models that draw none.
      encode: sentences -> the sentence fields of a batch.
      splits: {name: records}, whole.
      records: that are evaluated.
      folder: where the files go.
    """

    make: Callable[..., runner.Predict]
    predict: runner.Predict
    members: list[runner.Predict]
    samples: runner.Predict | None
    num_samples: int | None
    encode: runner.Encode
    splits: dict[str, Sequence[Record]]
    records: Sequence[Record]
    folder: Path


class Opened(NamedTuple):
    """A trained model, its variables without a frozen text tower, and what makes its input."""

    folder: str
    model: nn.Module
    bare: Mapping[str, Any]
    encode: runner.Encode
    processor: inference.Processor


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the evaluation that the command line describes; returns what results.json holds."""
    workdir = Path(args.workdir)
    config = _run_config(workdir, bool(args.source))
    job = _open(args, config)
    extra = _facts(args, config, job)
    if args.source and not args.output:
        earlier.check_pictures(job.folder, extra)
    trained = None
    if args.baselines:
        train, val = job.splits["train"], job.splits["val"]
        extra["baselines"] = runner.image_free_results(train, val, job.records)
        # Another data set's training pictures are not what the model was trained on.
        trained = None if args.source else {one["text"] for one in conditions.spoken(train)}
    columns: dict[str, list[float]] = {}
    if args.surface:
        columns = surface.per_image(job.predict, job.encode, job.records, args.batch_size)
        extra["surface"] = surface.section(columns) | {"by_condition": surfaces(job, args)}
    outcome = runner.evaluate(
        job.predict,
        job.encode,
        job.records,
        folder=job.folder,
        conditions=args.text_conditions,
        batch_size=args.batch_size,
        extra=extra,
        before=earlier.read(job.folder, extra),
        split=job.splits[args.split],
        columns=columns,
        trained=trained,
    )
    if job.members:
        outcome |= runner.evaluate_members(
            job.members, job.encode, job.records, batch_size=args.batch_size
        )
    if job.samples is not None:
        outcome["sampling"] = runner.evaluate_samples(
            job.samples, job.encode, job.records, batch_size=args.batch_size
        )
    if args.mirroring:
        counts = mirroring.agreement(job.predict, job.encode, job.records, args.batch_size)
        outcome["mirroring"] = metrics.summarize(counts)
    if args.tta:
        outcome["tta"] = runner.evaluate_tta(
            job.predict, job.encode, job.records, batch_size=args.batch_size
        )
    if args.calibration:
        outcome["calibration"] = calibrated(job, args.split, args.batch_size)
    if args.degradations:
        outcome["degradations"] = degraded(args, job, outcome)
    runner.write_json(job.folder / "results.json", outcome)
    _print(args, job, outcome)
    return outcome


def _facts(args: argparse.Namespace, config: dict[str, Any], job: Job) -> dict[str, Any]:
    """What results.json says of an evaluation beside its figures."""
    workdir = Path(args.workdir)
    return {
        "split": args.split,
        "subset": args.subset or None,
        "num_images": len(job.records),
        "num_samples": job.num_samples,
        "pictures_sha256": earlier.digest(conditions.spoken(job.records)),
        "data": Path(args.source).name if args.source else config["data"]["name"],
        "command": shlex.join(["python", "-m", "biclip_jax.evaluate", *args.argv]),
        "seed": config["seed"],
        **_model_facts(inference.model_path(workdir)),
        "together": [_described(folder) for folder in args.together] or None,
        "config": config,
        "versions": {"biclip_jax": __version__, "jax": metadata.version("jax")},
        "device": jax.devices()[0].device_kind,
    }


def _open(args: argparse.Namespace, config: dict[str, Any]) -> Job:
    # A run may be older than a field: the default is what it did.
    data = {**common.base().data.to_dict(), **config["data"]}
    if args.source:
        empty = dict.fromkeys(data["num_examples"], 0)
        data |= {"name": "folder", "source": args.source, "layout": args.layout}
        data |= {"prompt": "", "percent": 100, "num_examples": empty}
    models = [_open_model(folder, args) for folder in (args.workdir, *args.together)]
    first = _alike(models)
    data["resize"] = first.processor.resizing
    wanted = {args.split, *(("train", "val") if args.baselines else ())}
    wanted |= {"val"} if args.calibration else set()
    prepared = pipeline.prepare(data, first.processor.image_size)
    splits = pipeline.open_splits(prepared, data, [name for name in SPLITS if name in wanted])
    sampled = isinstance(first.model, MedCLIPSeg)
    return Job(
        **(_together(models) if args.together else _alone(first)),
        samples=runner.make_samples(first.model, first.bare) if args.uncertainty else None,
        num_samples=first.model.num_samples if sampled else None,
        splits=dict(splits),
        records=conditions.subset(splits[args.split], args.subset),
        folder=_output(args),
    )


def _open_model(folder: str, args: argparse.Namespace) -> Opened:
    model, variables, processor = inference.load_segmenter(folder)
    if (args.num_samples or args.uncertainty) and not isinstance(model, MedCLIPSeg):
        raise UserError(
            f"--num-samples, --uncertainty: the model of {folder} draws no samples; leave them "
            "out (--tta averages over views)"
        )
    if args.num_samples:
        model = model.clone(num_samples=args.num_samples)
    encode = sentences.encoder(model, variables, processor)
    return Opened(folder, model, sentences.without_tower(model, variables), encode, processor)


def _alike(models: Sequence[Opened]) -> Opened:
    """The first of models that take pictures alike."""
    first, *others = models
    wanted = (first.processor.image_size, first.processor.resizing)
    for other in others:
        found = (other.processor.image_size, other.processor.resizing)
        if found != wanted:
            raise UserError(
                f"--together: {other.folder} takes pictures of {found[0]} px, resized {found[1]}, "
                f"and {first.folder} of {wanted[0]} px, {wanted[1]}; give models of the same size"
            )
    return first


def _alone(one: Opened) -> dict[str, Any]:
    make = partial(runner.make_predict, one.model, one.bare)
    members = runner.make_member_predicts(one.model, one.bare)
    return {"make": make, "predict": make(), "members": members, "encode": one.encode}


def _together(models: Sequence[Opened]) -> dict[str, Any]:
    makes = [partial(runner.make_predict, one.model, one.bare) for one in models]
    members = together.predicts([make() for make in makes])
    return {
        "make": together.maker(makes),
        "predict": together.mean(members),
        "members": members,
        "encode": together.encoder([one.encode for one in models]),
    }


def surfaces(job: Job, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The surface section's scores with the other sentences, {condition: scores}."""
    spoken, whole = (conditions.spoken(r) for r in (job.records, job.splits[args.split]))
    found = {}
    for name in args.text_conditions:
        asked = None if name == "right" else conditions.ask(name, spoken, split=whole)
        if asked is not None:
            rows = [job.records[int(i)] for i in asked.rows]
            pairs = zip(rows, asked.sentences, strict=True)
            chosen = [Record({**record, "text": sentence}) for record, sentence in pairs]
            columns = surface.per_image(job.predict, job.encode, chosen, args.batch_size)
            found[name] = surface.section(columns)
    return found


def calibrated(job: Job, split: str, batch_size: int) -> dict[str, Any]:
    """The calibration section, its temperature fitted on the whole validation split."""
    gather = partial(runner.pixel_histogram, job.predict, job.encode, batch_size=batch_size)
    counts = gather(job.records)
    # The evaluated pictures may be the validation split's own; it says so in the results.
    whole = split == "val" and len(job.records) == len(job.splits["val"])
    fitted_on = counts if whole else gather(job.splits["val"])
    section = calibration.report(fitted_on, counts)
    plots.plot_reliability(section, job.folder / "reliability.png")
    return section


def degraded(args: argparse.Namespace, job: Job, outcome: dict[str, Any]) -> dict[str, Any]:
    """The degradations section, joined with that of `outcome`; draws degradations.png of it."""
    found = runner.evaluate_degradations(
        job.make,
        job.encode,
        job.records,
        names=args.degradations,
        severities=args.severities,
        batch_size=args.batch_size,
    )
    scores = runner.degradation_results(found, outcome.get("degradations"))
    cells = {name: rows for name, rows in scores.items() if name != "mean"}
    right = outcome["conditions"]["right"]
    reporting.plot_degradations(cells, right, job.folder / "degradations.png")
    return scores


def _print(args: argparse.Namespace, job: Job, outcome: dict[str, Any]) -> None:
    print(f"{args.split}, {len(job.records)} pictures, percent, at {outcome['size']}:")
    more = {"right_tta": outcome["tta"]["right_tta"]} if args.tta else {}
    more |= outcome.get("members", {})
    print(runner.table_of({**outcome["conditions"], **more, **outcome.get("baselines", {})}))
    if job.members:
        _print_disagreement("members", outcome["ensemble_uncertainty"])
    if args.surface:
        _print_surface(outcome["surface"])
    if args.uncertainty:
        _print_disagreement("samples", outcome["sampling"])
    if args.mirroring:
        scores = {"mirrored against itself": outcome["mirroring"]}
        print(runner.table_of(scores))
    if outcome["left_out"]:
        print(f"left out, as the {args.split} split has none: {', '.join(outcome['left_out'])}")
    if args.calibration:
        _print_calibration(outcome["calibration"])
    if args.degradations:
        _print_degradations(outcome["degradations"])
    files = {"results": "results.json", "images": "per_image.csv", "page": "overlays.png"}
    files["unsure"] = "uncertainty.png"
    files |= {"curve": "reliability.png"} if args.calibration else {}
    files |= {"plot": "degradations.png"} if args.degradations else {}
    for what, name in files.items():
        print(f"{what:8} {job.folder / name}")


def _print_disagreement(whose: str, section: dict[str, Any]) -> None:
    auroc = section["error_auroc"]
    print(
        f"{whose} together: entropy {section['mean_entropy']:.4f} nats, of it disagreement "
        f"{section['mean_mutual_information']:.4f}, error AUROC "
        f"{'-' if auroc is None else format(auroc, '.4f')}"
    )


def _print_surface(section: dict[str, Any]) -> None:
    print(
        f"masks resized by nearest neighbour: DSC {100 * section['dsc']:.2f}, NSD within "
        f"{section['tolerance']:g} pixels {100 * section['nsd_plate']:.2f} as a plate with its "
        f"faces, {100 * section['nsd_2d']:.2f} of the boundary in 2-D"
    )
    for name, scores in section["by_condition"].items():
        print(f"  {name}: DSC {100 * scores['dsc']:.2f}, plate {100 * scores['nsd_plate']:.2f}")


def _print_calibration(section: dict[str, Any]) -> None:
    print(
        f"calibration, temperature {section['temperature']:.4f} fitted on {section['fitted_on']}:"
    )
    if section["at_limit"]:
        print("the temperature is at the end of its range: these pixels ask for more")
    rows = [{"": name, **section[name]} for name in ("before", "after")]
    print(reporting.format_table(rows, ("", *section["before"])))


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
    name += f"-{args.subset}" if args.subset else ""
    return Path(args.output or Path(args.workdir) / "evaluation" / name)


def _run_config(workdir: Path, elsewhere: bool) -> dict[str, Any]:
    """The run's configuration; or, to score a model folder `elsewhere`, what stands for one."""
    path = workdir / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); give the --workdir of a training run"
        ) from error
    if elsewhere and isinstance(config, dict) and "kind" in config:
        data = common.base().data.to_dict()
        return {
            "name": config.get("name"),
            "seed": None,
            "data": data,
            "model": config.get("model"),
        }
    described = isinstance(config, dict) and {"data", "seed"} <= config.keys()
    if not described or not isinstance(config["data"], dict) or "name" not in config["data"]:
        raise UserError(f"{path}: no configuration of a run; give the --workdir of a training run")
    return config


def _described(folder: str) -> dict[str, Any]:
    return {"folder": folder, **_model_facts(inference.model_path(folder))}


def _model_facts(folder: Path) -> dict[str, Any]:
    # The config alone: loading the model has read and checked the weights already.
    described = model_folder.read_config(folder)
    if not isinstance(described.get("step"), int):
        raise UserError(
            f"{folder / model_folder.CONFIG}: no step of a training run; give the --workdir of one"
        )
    return {"best_step": described["step"], "model_sha256": described["sha256"]}


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    cli.run(_main, argv)


def _main(argv: list[str]) -> None:
    evaluate(arguments.parse(argv, __doc__ or ""))


if __name__ == "__main__":
    main(sys.argv[1:])

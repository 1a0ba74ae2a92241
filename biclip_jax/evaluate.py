"""Evaluates a trained model on a split, with every text condition and the image-free baselines.

    python -m biclip_jax.evaluate --workdir runs/qata --split test
    python -m biclip_jax.evaluate --workdir runs/qata --calibration --tta --corruptions all

Writes results.json, per_image.csv, overlays.png and uncertainty.png to WORKDIR/evaluation/SPLIT
(SPLIT-N with --subset N), and plots for --calibration and --corruptions; docs/evaluation.md says
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

from biclip_jax import __version__, inference
from biclip_jax.configs import common
from biclip_jax.core import files, runtime
from biclip_jax.core.errors import UserError
from biclip_jax.data import pipeline
from biclip_jax.data.schema import SPLITS, Record
from biclip_jax.encoders import text as text_encoders
from biclip_jax.evaluation import arguments, ensemble, results_file, runner
from biclip_jax.evaluation.metrics import calibration, overlap, surface
from biclip_jax.evaluation.report import plots, tables
from biclip_jax.evaluation.robustness import flip_consistency, text_conditions
from biclip_jax.models.medclipseg import MedCLIPSeg
from biclip_jax.weights import model_folder


class Evaluation(NamedTuple):
    """What every part of an evaluation takes.

    Attributes:
      make: damage -> predict, see `runner.make_predict`.
      predict: without damage.
      members: the same, of each member of an ensemble or of --ensemble-with; empty for a single model.
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


class OpenedModel(NamedTuple):
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
        results_file.check_same_images(job.folder, extra)
    trained = None
    if args.baselines:
        train, val = job.splits["train"], job.splits["val"]
        extra["baselines"] = runner.image_free_results(train, val, job.records)
        # Another data set's training pictures are not what the model was trained on.
        trained = (
            None if args.source else {one["text"] for one in text_conditions.prompt_fields(train)}
        )
    columns: dict[str, list[float]] = {}
    if args.surface_metrics:
        columns = surface.per_image(job.predict, job.encode, job.records, args.batch_size)
        extra["surface_metrics"] = surface.summarize(columns) | {
            "by_condition": surface_by_condition(job, args)
        }
    outcome = runner.evaluate(
        job.predict,
        job.encode,
        job.records,
        folder=job.folder,
        conditions=args.text_conditions,
        batch_size=args.batch_size,
        extra=extra,
        before=results_file.read(job.folder, extra),
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
    if args.flip_consistency:
        counts = flip_consistency.count_agreement(
            job.predict, job.encode, job.records, args.batch_size
        )
        outcome["flip_consistency"] = overlap.summarize(counts)
    if args.tta:
        outcome["tta"] = runner.evaluate_tta(
            job.predict, job.encode, job.records, batch_size=args.batch_size
        )
    if args.calibration:
        outcome["calibration"] = calibration_section(job, args.split, args.batch_size)
    if args.corruptions:
        outcome["corruptions"] = corruption_section(args, job, outcome)
    files.write_json(job.folder / "results.json", outcome)
    _print(args, job, outcome)
    return outcome


def _facts(args: argparse.Namespace, config: dict[str, Any], job: Evaluation) -> dict[str, Any]:
    """What results.json says of an evaluation beside its figures."""
    workdir = Path(args.workdir)
    return {
        "split": args.split,
        "subset": args.subset or None,
        "num_images": len(job.records),
        "num_samples": job.num_samples,
        "images_sha256": results_file.digest(text_conditions.prompt_fields(job.records)),
        "data": Path(args.source).name if args.source else config["data"]["name"],
        "command": shlex.join(["python", "-m", "biclip_jax.evaluate", *args.argv]),
        "seed": config["seed"],
        **_model_facts(inference.model_path(workdir)),
        "ensemble_with": [_described_model(folder) for folder in args.ensemble_with] or None,
        "config": config,
        "versions": {"biclip_jax": __version__, "jax": metadata.version("jax")},
        "device": jax.devices()[0].device_kind,
    }


def _open(args: argparse.Namespace, config: dict[str, Any]) -> Evaluation:
    # A run may be older than a field: the default is what it did.
    data = {**common.base().data.to_dict(), **config["data"]}
    if args.source:
        empty = dict.fromkeys(data["num_examples"], 0)
        data |= {"name": "folder", "source": args.source, "layout": args.layout}
        data |= {"prompt": "", "percent": 100, "num_examples": empty}
    models = [_open_model(folder, args) for folder in (args.workdir, *args.ensemble_with)]
    first = _require_same_input(models)
    data["resize"] = first.processor.resize_method
    wanted = {args.split, *(("train", "val") if args.baselines else ())}
    wanted |= {"val"} if args.calibration else set()
    prepared = pipeline.prepare(data, first.processor.image_size)
    splits = pipeline.open_splits(prepared, data, [name for name in SPLITS if name in wanted])
    sampled = isinstance(first.model, MedCLIPSeg)
    return Evaluation(
        **(_ensemble(models) if args.ensemble_with else _single(first)),
        samples=runner.make_sample_predict(first.model, first.bare) if args.uncertainty else None,
        num_samples=first.model.num_samples if sampled else None,
        splits=dict(splits),
        records=text_conditions.subset(splits[args.split], args.subset),
        folder=_output(args),
    )


def _open_model(folder: str, args: argparse.Namespace) -> OpenedModel:
    model, variables, processor = inference.load_segmentation_model(folder)
    if (args.num_samples or args.uncertainty) and not isinstance(model, MedCLIPSeg):
        raise UserError(
            f"--num-samples, --uncertainty: the model of {folder} draws no samples; leave them "
            "out (--tta averages over views)"
        )
    if args.num_samples:
        model = model.clone(num_samples=args.num_samples)
    encode = text_encoders.make_encode(model, variables, processor)
    return OpenedModel(
        folder, model, text_encoders.without_text_encoder(model, variables), encode, processor
    )


def _require_same_input(models: Sequence[OpenedModel]) -> OpenedModel:
    """The first of models that take pictures alike."""
    first, *others = models
    wanted = (first.processor.image_size, first.processor.resize_method)
    for other in others:
        found = (other.processor.image_size, other.processor.resize_method)
        if found != wanted:
            raise UserError(
                f"--ensemble-with: {other.folder} takes pictures of {found[0]} px, resized {found[1]}, "
                f"and {first.folder} of {wanted[0]} px, {wanted[1]}; give models of the same size"
            )
    return first


def _single(one: OpenedModel) -> dict[str, Any]:
    make = partial(runner.make_predict, one.model, one.bare)
    members = runner.make_member_predicts(one.model, one.bare)
    return {"make": make, "predict": make(), "members": members, "encode": one.encode}


def _ensemble(models: Sequence[OpenedModel]) -> dict[str, Any]:
    makes = [partial(runner.make_predict, one.model, one.bare) for one in models]
    members = ensemble.member_predicts([make() for make in makes])
    return {
        "make": ensemble.mean_predict_maker(makes),
        "predict": ensemble.mean_predict(members),
        "members": members,
        "encode": ensemble.joint_encode([one.encode for one in models]),
    }


def surface_by_condition(job: Evaluation, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The surface section's scores with the other sentences, {condition: scores}."""
    prompt_records, whole = (
        text_conditions.prompt_fields(r) for r in (job.records, job.splits[args.split])
    )
    found = {}
    for name in args.text_conditions:
        asked = (
            None
            if name == "original"
            else text_conditions.apply_condition(name, prompt_records, split=whole)
        )
        if asked is not None:
            rows = [job.records[int(i)] for i in asked.rows]
            pairs = zip(rows, asked.prompts, strict=True)
            chosen = [Record({**record, "text": prompt}) for record, prompt in pairs]
            columns = surface.per_image(job.predict, job.encode, chosen, args.batch_size)
            found[name] = surface.summarize(columns)
    return found


def calibration_section(job: Evaluation, split: str, batch_size: int) -> dict[str, Any]:
    """The calibration section, its temperature fitted on the whole validation split."""
    gather = partial(runner.pixel_histogram, job.predict, job.encode, batch_size=batch_size)
    counts = gather(job.records)
    # The evaluated pictures may be the validation split's own; it says so in the results.
    whole = split == "val" and len(job.records) == len(job.splits["val"])
    fitted_on = counts if whole else gather(job.splits["val"])
    section = calibration.report(fitted_on, counts)
    plots.plot_reliability(section, job.folder / "reliability.png")
    return section


def corruption_section(
    args: argparse.Namespace, job: Evaluation, outcome: dict[str, Any]
) -> dict[str, Any]:
    """The degradations section, joined with that of `outcome`; draws degradations.png of it."""
    found = runner.evaluate_corruptions(
        job.make,
        job.encode,
        job.records,
        names=args.corruptions,
        severities=args.severities,
        batch_size=args.batch_size,
    )
    scores = runner.corruption_results(found, outcome.get("corruptions"))
    cells = {name: rows for name, rows in scores.items() if name != "mean"}
    right = outcome["conditions"]["original"]
    plots.plot_corruptions(cells, right, job.folder / "corruptions.png")
    return scores


def _print(args: argparse.Namespace, job: Evaluation, outcome: dict[str, Any]) -> None:
    print(f"{args.split}, {len(job.records)} pictures, percent, at {outcome['size']}:")
    more = {"original_tta": outcome["tta"]["original_tta"]} if args.tta else {}
    more |= outcome.get("members", {})
    print(runner.score_table({**outcome["conditions"], **more, **outcome.get("baselines", {})}))
    if job.members:
        _print_disagreement("members", outcome["ensemble_uncertainty"])
    if args.surface_metrics:
        _print_surface(outcome["surface_metrics"])
    if args.uncertainty:
        _print_disagreement("samples", outcome["sampling"])
    if args.flip_consistency:
        scores = {"mirrored against itself": outcome["flip_consistency"]}
        print(runner.score_table(scores))
    if outcome["unavailable"]:
        print(f"left out, as the {args.split} split has none: {', '.join(outcome['unavailable'])}")
    if args.calibration:
        _print_calibration(outcome["calibration"])
    if args.corruptions:
        _print_degradations(outcome["corruptions"])
    files = {"results": "results.json", "images": "per_image.csv", "page": "overlays.png"}
    files["uncertainty"] = "uncertainty.png"
    files |= {"curve": "reliability.png"} if args.calibration else {}
    files |= {"plot": "corruptions.png"} if args.corruptions else {}
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
    print(tables.format_table(rows, ("", *section["before"])))


def _print_degradations(scores: dict[str, Any]) -> None:
    kinds = ("dice_global", "dice_mean")
    rows = [
        {"corruption": name, "severity": severity, **{k: f"{100 * cell[k]:.2f}" for k in kinds}}
        for name, cells in scores.items()
        if name != "mean"
        for severity, cell in cells.items()
    ]
    mean = {k: f"{100 * scores['mean'][k]:.2f}" for k in kinds}
    rows.append({"corruption": "mean", "severity": "", **mean})
    print(tables.format_table(rows, ("corruption", "severity", *kinds)))


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


def _described_model(folder: str) -> dict[str, Any]:
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
    runtime.run_command(_main, argv)


def _main(argv: list[str]) -> None:
    evaluate(arguments.parse(argv, __doc__ or ""))


if __name__ == "__main__":
    main(sys.argv[1:])

"""Evaluates a trained model on a split, with several text conditions and image-free baselines.

    biclip evaluate --workdir runs/qata --split test
    biclip evaluate --workdir runs/qata --calibration --tta --corruptions all
    biclip evaluate --model weights/medclipseg --source DIR --output out

Writes results.json, per_image.csv, overlays.png and uncertainty.png to WORKDIR/evaluation/SPLIT
(SPLIT-N with --subset N), and plots for --calibration and --corruptions. docs/evaluation.md defines
every number. A second call adds its sections to results.json if model and images are the same.
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
    """Models, data and output folder of an evaluation.

    Attributes:
      make: corruption -> predict, see `runner.make_predict`.
      predict: Prediction without corruption.
      members: Predictions of the members of an ensemble or of --ensemble-with; empty for one model.
      samples: batch -> mean of the samples, its entropy and the epistemic part; None without
        --uncertainty.
      num_samples: Forward passes per prediction; None for models that do not sample.
      encode: prompts -> text fields of a batch.
      splits: {name: all records}.
      records: Records to evaluate.
      folder: Output folder.
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
    """A trained model, its variables without a pretrained text encoder, and its processor."""

    folder: str
    model: nn.Module
    variables: Mapping[str, Any]
    encode: runner.Encode
    processor: inference.Processor


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the evaluation that the arguments describe; returns the contents of results.json."""
    workdir = Path(args.workdir)
    config = _run_config(workdir, args.is_model)
    job = _open(args, config)
    extra = _facts(args, config, job)
    if args.source and not args.output:
        results_file.check_same_images(job.folder, extra)
    trained = None
    if args.baselines:
        train, val = job.splits["train"], job.splits["val"]
        extra["baselines"] = runner.image_free_results(train, val, job.records)
        # The model was not trained on the training images of another dataset.
        if not args.source:
            trained = {record["text"] for record in text_conditions.prompt_fields(train)}
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
    """Returns the entries of results.json that identify the evaluation."""
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
        "ensemble_with": [_model_summary(folder) for folder in args.ensemble_with] or None,
        "config": config,
        "versions": {"biclip_jax": __version__, "jax": metadata.version("jax")},
        "device": jax.devices()[0].device_kind,
    }


def _open(args: argparse.Namespace, config: dict[str, Any]) -> Evaluation:
    data = dict(config["data"])
    if args.source:
        empty = dict.fromkeys(data["num_examples"], 0)
        data |= {"name": "folder", "source": args.source, "layout": args.layout}
        data |= {"prompt": "", "percent": 100, "num_examples": empty}
    models = [_open_model(folder, args) for folder in (args.workdir, *args.ensemble_with)]
    first = _require_same_input(models)
    data["resize"] = first.processor.resize_method
    needed = {args.split, *(("train", "val") if args.baselines else ())}
    needed |= {"val"} if args.calibration else set()
    prepared = pipeline.prepare(data, first.processor.image_size)
    splits = pipeline.open_splits(prepared, data, [name for name in SPLITS if name in needed])
    sampled = isinstance(first.model, MedCLIPSeg)
    return Evaluation(
        **(_ensemble(models) if args.ensemble_with else _single(first)),
        samples=runner.make_sample_predict(first.model, first.variables)
        if args.uncertainty
        else None,
        num_samples=first.model.num_samples if sampled else None,
        splits=dict(splits),
        records=text_conditions.subset(splits[args.split], args.subset),
        folder=_output(args),
    )


def _open_model(folder: str, args: argparse.Namespace) -> OpenedModel:
    model, variables, processor = inference.load_segmentation_model(folder)
    if (args.num_samples or args.uncertainty) and not isinstance(model, MedCLIPSeg):
        raise UserError(
            f"--num-samples, --uncertainty: the model in {folder} does not sample; remove them "
            "(--tta averages over views)"
        )
    if args.num_samples:
        model = model.clone(num_samples=args.num_samples)
    encode = text_encoders.make_encode(model, variables, processor)
    return OpenedModel(
        folder, model, text_encoders.without_text_encoder(model, variables), encode, processor
    )


def _require_same_input(models: Sequence[OpenedModel]) -> OpenedModel:
    """Returns the first model; raises UserError if another one needs different images."""
    first, *others = models
    expected = (first.processor.image_size, first.processor.resize_method)
    for other in others:
        found = (other.processor.image_size, other.processor.resize_method)
        if found != expected:
            raise UserError(
                f"--ensemble-with: {other.folder} takes images of {found[0]} px, resize "
                f"{found[1]!r}; expected {expected[0]} px, resize {expected[1]!r}, as in "
                f"{first.folder}"
            )
    return first


def _single(opened: OpenedModel) -> dict[str, Any]:
    make = partial(runner.make_predict, opened.model, opened.variables)
    members = runner.make_member_predicts(opened.model, opened.variables)
    return {"make": make, "predict": make(), "members": members, "encode": opened.encode}


def _ensemble(models: Sequence[OpenedModel]) -> dict[str, Any]:
    makes = [partial(runner.make_predict, opened.model, opened.variables) for opened in models]
    members = ensemble.member_predicts([make() for make in makes])
    return {
        "make": ensemble.mean_predict_maker(makes),
        "predict": ensemble.mean_predict(members),
        "members": members,
        "encode": ensemble.joint_encode([opened.encode for opened in models]),
    }


def surface_by_condition(job: Evaluation, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Computes the surface metrics with the other text conditions, {condition: scores}."""
    prompt_records = text_conditions.prompt_fields(job.records)
    split = text_conditions.prompt_fields(job.splits[args.split])
    scores = {}
    for name in args.text_conditions:
        if name == "original":
            continue
        conditioned = text_conditions.apply_condition(name, prompt_records, split=split)
        if conditioned is not None:
            pairs = zip(conditioned.rows, conditioned.prompts, strict=True)
            records = [Record({**job.records[int(row)], "text": text}) for row, text in pairs]
            columns = surface.per_image(job.predict, job.encode, records, args.batch_size)
            scores[name] = surface.summarize(columns)
    return scores


def calibration_section(job: Evaluation, split: str, batch_size: int) -> dict[str, Any]:
    """Computes calibration; the temperature is fitted on the full validation split."""
    gather = partial(runner.pixel_histogram, job.predict, job.encode, batch_size=batch_size)
    counts = gather(job.records)
    # The evaluated split may be the validation split itself; the results record it.
    is_val = split == "val" and len(job.records) == len(job.splits["val"])
    fitted_on = counts if is_val else gather(job.splits["val"])
    section = calibration.report(fitted_on, counts)
    plots.plot_reliability(section, job.folder / "reliability.png")
    return section


def corruption_section(
    args: argparse.Namespace, job: Evaluation, outcome: dict[str, Any]
) -> dict[str, Any]:
    """Evaluates corruptions, merges them with those in `outcome` and plots corruptions.png."""
    counts = runner.evaluate_corruptions(
        job.make,
        job.encode,
        job.records,
        names=args.corruptions,
        severities=args.severities,
        batch_size=args.batch_size,
    )
    scores = runner.corruption_results(counts, outcome.get("corruptions"))
    cells = {name: rows for name, rows in scores.items() if name != "mean"}
    original = outcome["conditions"]["original"]
    plots.plot_corruptions(cells, original, job.folder / "corruptions.png")
    return scores


def _print(args: argparse.Namespace, job: Evaluation, outcome: dict[str, Any]) -> None:
    print(f"{args.split}, {len(job.records)} images, percent, at {outcome['size']}:")
    rows = {"original_tta": outcome["tta"]["original_tta"]} if args.tta else {}
    rows |= outcome.get("members", {})
    print(runner.score_table({**outcome["conditions"], **rows, **outcome.get("baselines", {})}))
    if job.members:
        _print_disagreement("members", outcome["ensemble_uncertainty"])
    if args.surface_metrics:
        _print_surface(outcome["surface_metrics"])
    if args.uncertainty:
        _print_disagreement("samples", outcome["sampling"])
    if args.flip_consistency:
        scores = {"flip consistency": outcome["flip_consistency"]}
        print(runner.score_table(scores))
    if outcome["unavailable"]:
        print(f"not in the {args.split} split: {', '.join(outcome['unavailable'])}")
    if args.calibration:
        _print_calibration(outcome["calibration"])
    if args.corruptions:
        _print_corruptions(outcome["corruptions"])
    outputs = {"results": "results.json", "images": "per_image.csv", "overlays": "overlays.png"}
    outputs["uncertainty"] = "uncertainty.png"
    outputs |= {"reliability": "reliability.png"} if args.calibration else {}
    outputs |= {"corruptions": "corruptions.png"} if args.corruptions else {}
    for what, name in outputs.items():
        print(f"{what:12} {job.folder / name}")


def _print_disagreement(whose: str, section: dict[str, Any]) -> None:
    auroc = section["error_auroc"]
    print(
        f"mean over {whose}: entropy {section['mean_entropy']:.4f} nats, mutual information "
        f"{section['mean_mutual_information']:.4f} nats, error AUROC "
        f"{'-' if auroc is None else format(auroc, '.4f')}"
    )


def _print_surface(section: dict[str, Any]) -> None:
    print(
        f"masks resized by nearest neighbour: DSC {100 * section['dsc']:.2f}, NSD within "
        f"{section['tolerance']:g} pixels {100 * section['nsd_plate']:.2f} (plate, as MedCLIPSeg), "
        f"{100 * section['nsd_2d']:.2f} (2-D boundary)"
    )
    for name, scores in section["by_condition"].items():
        print(f"  {name}: DSC {100 * scores['dsc']:.2f}, plate {100 * scores['nsd_plate']:.2f}")


def _print_calibration(section: dict[str, Any]) -> None:
    print(
        f"calibration, temperature {section['temperature']:.4f} fitted on {section['fitted_on']}:"
    )
    if section["at_limit"]:
        print("the temperature is at the limit of its range")
    rows = [{"": name, **section[name]} for name in ("before", "after")]
    print(tables.format_table(rows, ("", *section["before"])))


def _print_corruptions(scores: dict[str, Any]) -> None:
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


def _run_config(workdir: Path, is_model: bool) -> dict[str, Any]:
    """Reads the config of a run.

    For a model folder, returns the fields that an evaluation needs.
    """
    path = workdir / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); give the --workdir of a training run"
        ) from error
    if is_model and isinstance(config, dict) and "kind" in config:
        data = common.base().data.to_dict()
        return {
            "name": config.get("name"),
            "seed": None,
            "data": data,
            "model": config.get("model"),
        }
    is_run = isinstance(config, dict) and {"data", "seed"} <= config.keys()
    if not is_run or not isinstance(config["data"], dict) or "name" not in config["data"]:
        raise UserError(f"{path}: not the config of a run; give the --workdir of a training run")
    return config


def _model_summary(folder: str) -> dict[str, Any]:
    return {"folder": folder, **_model_facts(inference.model_path(folder))}


def _model_facts(folder: Path) -> dict[str, Any]:
    # Only the config: loading the model has already read and verified the weights.
    model_config = model_folder.read_config(folder)
    if not isinstance(model_config.get("step"), int):
        raise UserError(
            f"{folder / model_folder.CONFIG}: no training step; give the work directory of a run"
        )
    return {"best_step": model_config["step"], "model_sha256": model_config["sha256"]}


def main(argv: list[str] | None = None) -> None:
    """Runs `biclip evaluate`."""
    runtime.run_command(_main, argv)


def _main(argv: list[str]) -> None:
    evaluate(arguments.parse(argv, __doc__ or ""))


if __name__ == "__main__":
    main(sys.argv[1:])

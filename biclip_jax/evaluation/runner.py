"""Evaluates a model on a split: text conditions, views, corruptions, calibration, and files."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np

from biclip_jax.core import distributed, files
from biclip_jax.data import pipeline
from biclip_jax.data import text as text_lib
from biclip_jax.data.image_io import resize_probability
from biclip_jax.data.schema import Batch, Record
from biclip_jax.evaluation import baselines, results_file
from biclip_jax.evaluation.metrics import calibration, overlap
from biclip_jax.evaluation.report import figures, tables
from biclip_jax.evaluation.robustness import corruptions, text_conditions, tta
from biclip_jax.evaluation.steps import predict_step, sample_step
from biclip_jax.models.ensemble import Ensemble, member_of

# batch -> probabilities (B, S, S, 1), on the host.
Predict = Callable[[Batch], np.ndarray]
# Prompts -> text fields of a `Batch`, for all records of a split.
Encode = Callable[[Sequence[str]], dict[str, np.ndarray]]


def make_predict(
    model: nn.Module, variables: Mapping[str, Any], corruption: Callable[..., Any] | None = None
) -> Predict:
    """Returns a prediction function on all local devices; `corruption` as in `predict_step`."""
    step = distributed.pmap_predict_step(partial(predict_step, model=model, corruption=corruption))
    return partial(step, distributed.replicate_locally(variables))


def make_sample_predict(model: nn.Module, variables: Mapping[str, Any]) -> Predict:
    """Returns batch -> maps (B, S, S, 3) of a model that samples, see `steps.sample_step`."""
    step = distributed.pmap_predict_step(partial(sample_step, model=model))
    return partial(step, distributed.replicate_locally(variables))


def make_member_predicts(model: nn.Module, variables: Mapping[str, Any]) -> list[Predict]:
    """Returns one prediction function per ensemble member; none for a single model."""
    if not isinstance(model, Ensemble):
        return []
    step = distributed.pmap_predict_step(partial(predict_step, model=model.member))
    members = (member_of(variables, k) for k in range(model.num_members))
    return [partial(step, distributed.replicate_locally(member)) for member in members]


def evaluate_members(
    members: Sequence[Predict], encode: Encode, records: Sequence[Record], *, batch_size: int
) -> dict[str, Any]:
    """Evaluates every ensemble member and the disagreement between them, with original prompts.

    Returns:
      members: {"member_0": scores and intervals, ...}; ensemble_uncertainty: mean_entropy,
      mean_mutual_information and error_auroc as in `evaluate_tta`, over members instead of views.
    """
    texts = encode([record["text"] for record in records])
    predict = partial(tta.predict_members, members)
    counts, uncertainty = _with_uncertainty(predict, records, texts, batch_size)
    return {
        "members": {f"member_{k}": _with_intervals(member) for k, member in enumerate(counts[1:])},
        "ensemble_uncertainty": uncertainty,
    }


def evaluate(
    predict: Predict,
    encode: Encode,
    records: Sequence[Record],
    *,
    folder: Path,
    conditions: Sequence[str],
    batch_size: int,
    extra: Mapping[str, Any] | None = None,
    before: Mapping[str, Any] | None = None,
    split: Sequence[Record] | None = None,
    columns: Mapping[str, Sequence[float]] | None = None,
    trained: Collection[str] | None = None,
) -> dict[str, Any]:
    """Evaluates a split; writes results.json, per_image.csv, overlays.png and uncertainty.png.

    Args:
      predict: batch -> probabilities; see `make_predict`.
      encode: prompts -> text fields of a batch.
      records: Records of the split.
      folder: Output folder, created if missing.
      conditions: Text conditions, including "original"; see `text_conditions.apply_condition`.
      batch_size: Number of images per batch.
      extra: Additional entries of results.json: split, checkpoint, baselines.
      before: Existing results (`results_file.read`) to merge with.
      split: All records of the split, if `records` is a subset.
      columns: Additional columns of per_image.csv, one value per image.
      trained: Prompts of the training images, see `results`; None if unknown.

    Returns:
      The contents of results.json; "unavailable" lists conditions that the split does not have.
    """
    folder.mkdir(parents=True, exist_ok=True)
    counts = evaluate_conditions(
        predict, encode, records, batch_size=batch_size, conditions=conditions, split=split
    )
    unavailable = [name for name in conditions if name not in counts]
    outcome = {**(extra or {}), **results(counts, records, trained), "unavailable": unavailable}
    lines = per_image_rows(counts, records)
    for name, values in (columns or {}).items():
        lines = [{**line, name: value} for line, value in zip(lines, values, strict=True)]
    if before:
        outcome = results_file.merge_results(before, outcome)
        lines = results_file.merge_columns(folder / "per_image.csv", lines)
    files.write_json(folder / "results.json", outcome)
    tables.write_csv(folder / "per_image.csv", lines)
    rows = figure_rows(predict, encode, records, counts["original"], batch_size)
    title = f"{len(records)} images, by Dice"
    figures.overlay_figure(rows, folder / "overlays.png", title)
    figures.uncertainty_figure(rows, folder / "uncertainty.png", title)
    return outcome


def validate(
    eval_fn: Callable[[Batch], Mapping[str, Any]],
    records: Sequence[Record],
    texts: dict[str, np.ndarray],
    batch_size: int,
) -> dict[str, float | int]:
    """Computes global and mean Dice and IoU at the model's image size; each record counts once.

    Args:
      eval_fn: batch -> `overlap.overlap_sums` over the batch.
      records, texts: Records and text fields of the split.
      batch_size: A multiple of the number of devices.
    """
    total: dict[str, Any] = {}
    shard = distributed.process_shard()
    for batch in pipeline.eval_batches(records, texts, batch_size=batch_size, **shard):
        sums = eval_fn(batch)
        # Added on the host: int32 counts of a large split would overflow.
        total = {name: total.get(name, 0) + np.asarray(x).item() for name, x in sums.items()}
    scores = overlap.from_sums(total)
    if scores["num_images"] != len(records):
        raise AssertionError(f"{scores['num_images']} of {len(records)} records were counted")
    return scores


def at_mask_size(
    predict: Predict, records: Sequence[Record], texts: dict[str, np.ndarray], batch_size: int
) -> Iterator[tuple[Record, np.ndarray]]:
    """Yields each record with its maps (C, H, W), resized bilinearly to the size of the mask."""
    for batch in pipeline.eval_batches(records, texts, batch_size=batch_size):
        maps = predict(batch)
        for i in np.flatnonzero(batch["valid"]):
            record = records[int(batch["index"][i])]
            yield record, _resized(maps[i], record["full_mask"].shape[:2])


def _resized(maps: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    return np.stack([resize_probability(m, size[0], size[1]) for m in np.moveaxis(maps, -1, 0)])


def _overlap(probs: np.ndarray, record: Record) -> overlap.Overlap:
    pred = probs >= overlap.THRESHOLD
    return overlap.count_pixels(pred[..., None], record["full_mask"], axis=(0, 1, 2))


def overlap_at_mask_size(
    predict: Predict, records: Sequence[Record], texts: dict[str, np.ndarray], batch_size: int
) -> overlap.Overlap:
    """Counts pixels (N,): probabilities resized bilinearly to the mask's own size, then >= 0.5."""
    pairs = at_mask_size(predict, records, texts, batch_size)
    return overlap.stack([_overlap(maps[0], record) for record, maps in pairs])


def evaluate_conditions(
    predict: Predict,
    encode: Encode,
    records: Sequence[Record],
    *,
    batch_size: int,
    conditions: Sequence[str] = text_conditions.CONDITIONS,
    seed: int = 0,
    split: Sequence[Record] | None = None,
) -> dict[str, overlap.Overlap]:
    """Counts pixels for every available text condition, on the images that have it.

    Args:
      predict, encode, records, batch_size, conditions, split: See `evaluate`.
      seed: Seed of the shuffled prompts.
    """
    prompt_records = text_conditions.prompt_fields(records)
    split_prompts = None if split is None else text_conditions.prompt_fields(split)
    counts = {}
    for condition in conditions:
        conditioned = text_conditions.apply_condition(
            condition, prompt_records, seed, split_prompts
        )
        if conditioned is None:
            continue
        has_all = len(conditioned.rows) == len(records)
        chosen = records if has_all else [records[i] for i in conditioned.rows]
        texts = encode(conditioned.prompts)
        counts[condition] = overlap_at_mask_size(predict, chosen, texts, batch_size)
    return counts


def pixel_histogram(
    predict: Predict, encode: Encode, records: Sequence[Record], batch_size: int
) -> calibration.Histogram:
    """Returns the pixel histogram of a split for `calibration`, with original prompts."""
    texts = encode([record["text"] for record in records])
    pairs = at_mask_size(predict, records, texts, batch_size)
    return calibration.gather_histogram((maps[0], r["full_mask"][..., 0]) for r, maps in pairs)


def evaluate_tta(
    predict: Predict,
    encode: Encode,
    records: Sequence[Record],
    *,
    batch_size: int,
    views: Mapping[str, tta.View] = tta.VIEWS,
) -> dict[str, Any]:
    """Evaluates the mean over views and its uncertainty, with original prompts.

    Returns:
      views: names; original_tta: scores and intervals; mean_entropy and mean_mutual_information: in
      nats, over all pixels; error_auroc: of the entropy of the mean, see `calibration.error_auroc`.
    """
    texts = pipeline.text_fields(encode, [record["text"] for record in records])
    predict_mean = partial(tta.predict_views, predict, views=list(views.values()))
    counts, uncertainty = _with_uncertainty(predict_mean, records, texts, batch_size)
    return {"views": list(views), "original_tta": _with_intervals(counts[0]), **uncertainty}


def _with_uncertainty(
    predict_mean: Predict, records: Sequence[Record], texts: dict[str, np.ndarray], batch_size: int
) -> tuple[list[overlap.Overlap], dict[str, float | None]]:
    """Counts pixels of the mean and of every further map, and averages the uncertainties.

    Args:
      predict_mean: batch -> maps (B, S, S, 3 + K): mean, entropy, mutual information, then K
        probability maps.
      records, texts, batch_size: See `at_mask_size`.

    Returns:
      Counts of the mean and the K maps; mean_entropy, mean_mutual_information and error_auroc.
    """
    counts, sums, num_pixels = [], np.zeros(2), 0
    histogram = calibration.gather_histogram([])
    for record, maps in at_mask_size(predict_mean, records, texts, batch_size):
        counts.append([_overlap(probs, record) for probs in (maps[0], *maps[3:])])
        histogram += calibration.histogram(maps[0], record["full_mask"][..., 0])
        sums += maps[1:3].sum((1, 2), dtype=np.float64)
        num_pixels += maps[0].size
    return [overlap.stack(list(column)) for column in zip(*counts, strict=True)], {
        "mean_entropy": float(sums[0] / num_pixels),
        "mean_mutual_information": float(sums[1] / num_pixels),
        "error_auroc": calibration.error_auroc(histogram),
    }


def evaluate_samples(
    samples: Predict, encode: Encode, records: Sequence[Record], *, batch_size: int
) -> dict[str, float | None]:
    """Evaluates the disagreement of a model's samples, with original prompts.

    See `evaluate_tta`.
    """
    texts = encode([record["text"] for record in records])
    return _with_uncertainty(samples, records, texts, batch_size)[1]


def evaluate_corruptions(
    make: Callable[[Callable[..., Any] | None], Predict],
    encode: Encode,
    records: Sequence[Record],
    *,
    names: Sequence[str],
    severities: Sequence[int],
    batch_size: int,
    seed: int = 0,
) -> dict[str, dict[int, overlap.Overlap]]:
    """Counts pixels for every corruption and severity, with original prompts.

    Args:
      make: corruption -> predict, see `make_predict`.
      encode, batch_size: See `evaluate`.
      records: Records of the split.
      names: Names out of `corruptions.NAMES`.
      severities: Severities out of 1 to 5.
      seed: Seed of random corruptions.
    """
    texts = encode([record["text"] for record in records])
    # One program for all JPEG qualities: images are compressed on the host.
    clean_predict = make(None)
    counts: dict[str, dict[int, overlap.Overlap]] = {name: {} for name in names}
    for name in names:
        for severity in severities:
            corrupted, predict = records, clean_predict
            if name == "jpeg":
                corrupted = [_through_jpeg(record, severity) for record in records]
            else:
                predict = make(corruptions.on_device(name, severity, seed))
            counts[name][severity] = overlap_at_mask_size(predict, corrupted, texts, batch_size)
    return counts


def _through_jpeg(record: Record, severity: int) -> Record:
    return Record({**record, "image": corruptions.jpeg(record["image"], severity)})


def corruption_results(
    counts: Mapping[str, Mapping[int, overlap.Overlap]], before: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Computes scores and intervals of every corruption, and their mean.

    Args:
      counts: See `evaluate_corruptions`.
      before: The corruptions of an existing results.json; its other names and severities stay.

    Returns:
      {name: {severity: scores}} and {"mean": scores} over all names and severities.
    """
    scores = results_file.corruption_cells(before or {})
    for name, by_severity in counts.items():
        cells = {str(severity): _with_intervals(c) for severity, c in by_severity.items()}
        scores[name] = dict(sorted({**scores.get(name, {}), **cells}.items()))
    flat = [cell for cells in scores.values() for cell in cells.values()]
    keys = ("dice_global", "dice_mean", "iou_global", "iou_mean")
    return {**scores, "mean": {key: float(np.mean([cell[key] for cell in flat])) for key in keys}}


def results(
    counts: Mapping[str, overlap.Overlap],
    records: Sequence[Record],
    trained: Collection[str] | None = None,
) -> dict[str, Any]:
    """Computes scores and intervals of each condition, in the format of results.json.

    `swapped_changed` and `original_where_swap_changes` are restricted to images whose prompt
    changes when left and right are swapped; symmetric prompts carry no information. If only some
    images have a condition, `original_where_NAME` is restricted to these.
    `original_where_prompt_is_new` is restricted to images whose prompt is not in `trained`.
    """
    counts = dict(counts)
    prompt_records = text_conditions.prompt_fields(records)
    changed = np.array([text_lib.swap_sides(r["text"]) != r["text"] for r in prompt_records])
    for name in list(counts):
        rows = text_conditions.rows_of(name, prompt_records)
        if len(rows) < len(prompt_records):
            counts[f"original_where_{name}"] = overlap.take(counts["original"], rows)
    if "swapped" in counts and changed.any():
        counts["swapped_changed"] = overlap.take(counts["swapped"], changed)
        counts["original_where_swap_changes"] = overlap.take(counts["original"], changed)
    if trained is not None:
        new = np.array([r["text"] not in trained for r in prompt_records])
        if new.any():
            counts["original_where_prompt_is_new"] = overlap.take(counts["original"], new)
    scores = {name: _with_intervals(c) for name, c in counts.items()}
    return {
        "size": "each mask's own size, probabilities resized bilinearly",
        "model_image_size": records[0]["image"].shape[0],
        "threshold": overlap.THRESHOLD,
        "conditions": scores,
    }


def image_free_results(
    train: Sequence[Record], val: Sequence[Record], test: Sequence[Record]
) -> dict[str, Any]:
    """Computes scores and intervals of both image-free baselines."""
    counts_by_name = baselines.image_free(train, val, test)
    return {name: _with_intervals(counts) for name, counts in counts_by_name.items()}


def _with_intervals(counts: overlap.Overlap) -> dict[str, Any]:
    intervals = overlap.bootstrap_intervals(counts)
    return {**overlap.summarize(counts), "interval_95": {k: list(v) for k, v in intervals.items()}}


def per_image_rows(
    counts: Mapping[str, overlap.Overlap], records: Sequence[Record]
) -> list[dict[str, Any]]:
    """Returns one row per image: id, prompt, Dice and IoU of every condition, areas in pixels.

    Values are None for images without a prompt of the condition.
    """
    prompt_records = text_conditions.prompt_fields(records)
    rows: list[dict[str, Any]] = [{"id": r["id"], "text": r["text"]} for r in prompt_records]
    for condition, c in counts.items():
        by_metric = {"dice": overlap.dice(c), "iou": overlap.iou(c)}
        position = {
            int(row): i for i, row in enumerate(text_conditions.rows_of(condition, prompt_records))
        }
        for metric, values in by_metric.items():
            for i, row in enumerate(rows):
                row[f"{metric}_{condition}"] = values[position[i]].item() if i in position else None
    for i, row in enumerate(rows):
        row["pred_area_original"] = int(counts["original"].pred_area[i])
        row["mask_area"] = int(counts["original"].mask_area[i])
    return rows


def figure_rows(
    predict: Predict,
    encode: Encode,
    records: Sequence[Record],
    counts: overlap.Overlap,
    batch_size: int,
) -> list[dict[str, Any]]:
    """Returns the best, median and worst cases by Dice, for the figures of `report.figures`."""
    scores = np.asarray(overlap.dice(counts))
    return [
        _figure_row(band, predict, encode, records[i], float(scores[i]), batch_size)
        for band, rows in figures.bands(scores.tolist()).items()
        for i in rows
    ]


def _figure_row(band, predict, encode, record, score, batch_size) -> dict[str, Any]:
    # A full batch with one valid row: another size would compile anew.
    texts = encode([record["text"]])
    batch = next(pipeline.eval_batches([record], texts, batch_size=batch_size))
    height, width = record["full_mask"].shape[:2]
    probs = resize_probability(predict(batch)[0, ..., 0], height, width)
    channels = [
        resize_probability(channel, height, width)
        for channel in np.moveaxis(record["image"].astype(np.float32), -1, 0)
    ]
    return {
        "band": band,
        "id": record["id"],
        "image": np.clip(np.rint(np.stack(channels, -1)), 0, 255).astype(np.uint8),
        "mask": record["full_mask"],
        "pred": probs >= overlap.THRESHOLD,
        "uncertainty": tta.entropy(probs),
        "dice": score,
        "text": record["text"],
    }


def score_table(scores: Mapping[str, Mapping[str, Any]]) -> str:
    """Formats one line per condition, with global and mean Dice and IoU in percent."""
    names = ("dice_global", "dice_mean", "iou_global", "iou_mean")
    rows = [
        {"condition": name, **{n: f"{100 * s[n]:.2f}" for n in names}, "images": s["num_images"]}
        for name, s in scores.items()
    ]
    return tables.format_table(rows, ("condition", *names, "images"))

"""A model over a split: text conditions, views, damage, calibration, and the files they go to."""

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

# (batch) -> probabilities (B, S, S, 1), on the host
Predict = Callable[[Batch], np.ndarray]
# sentences -> the sentence fields of a batch, for a whole split
Encode = Callable[[Sequence[str]], dict[str, np.ndarray]]


def make_predict(
    model: nn.Module, variables: Mapping[str, Any], corruption: Callable[..., Any] | None = None
) -> Predict:
    """The model on all local devices, as a function of a batch; `damage` as `predict_step`'s."""
    step = distributed.pmap_predict_step(partial(predict_step, model=model, corruption=corruption))
    return partial(step, distributed.replicate_locally(variables))


def make_sample_predict(model: nn.Module, variables: Mapping[str, Any]) -> Predict:
    """Batch -> maps (B, S, S, 3) of a model that samples, see `steps.sample_step`."""
    step = distributed.pmap_predict_step(partial(sample_step, model=model))
    return partial(step, distributed.replicate_locally(variables))


def make_member_predicts(model: nn.Module, variables: Mapping[str, Any]) -> list[Predict]:
    """Each member of an ensemble by itself, by one program; none for a single model."""
    if not isinstance(model, Ensemble):
        return []
    step = distributed.pmap_predict_step(partial(predict_step, model=model.member))
    members = (member_of(variables, k) for k in range(model.num_members))
    return [partial(step, distributed.replicate_locally(member)) for member in members]


def evaluate_members(
    members: Sequence[Predict], encode: Encode, records: Sequence[Record], *, batch_size: int
) -> dict[str, Any]:
    """Each member of an ensemble by itself, and how much they disagree, with the right sentences.

    Returns:
      members: scores and intervals, {"member_0": ...}; ensemble_uncertainty: mean_entropy,
      mean_mutual_information and error_auroc as of `evaluate_tta`, members in place of views.
    """
    texts = encode([record["text"] for record in records])
    ensemble_with = partial(tta.predict_members, members)
    counts, uncertainty = _with_uncertainty(ensemble_with, records, texts, batch_size)
    return {
        "members": {f"member_{k}": _with_intervals(own) for k, own in enumerate(counts[1:])},
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
      encode: sentences -> the sentence fields of a batch.
      records: of the split.
      folder: made if missing.
      conditions: of the sentences, "original" among them; see `conditions.ask`.
      batch_size: pictures at a time.
      extra: more for results.json: split, checkpoint, baselines.
      before: what `earlier.read` found; what it has and this call does not make stays.
      split: the whole one, where `records` are a subset of it.
      columns: more for per_image.csv, a value a picture.
      trained: the sentences of the training, see `results`; None: not known.

    Returns:
      What results.json holds; "unavailable" names conditions that the split has not.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = evaluate_conditions(
        predict, encode, records, batch_size=batch_size, conditions=conditions, split=split
    )
    left_out = [name for name in conditions if name not in found]
    outcome = {**(extra or {}), **results(found, records, trained), "unavailable": left_out}
    lines = per_image_rows(found, records)
    for name, values in (columns or {}).items():
        lines = [{**line, name: value} for line, value in zip(lines, values, strict=True)]
    if before:
        outcome = results_file.merge_results(before, outcome)
        lines = results_file.merge_columns(folder / "per_image.csv", lines)
    files.write_json(folder / "results.json", outcome)
    tables.write_csv(folder / "per_image.csv", lines)
    rows = figure_rows(predict, encode, records, found["original"], batch_size)
    title = f"{len(records)} pictures, by Dice"
    figures.overlay_figure(rows, folder / "overlays.png", title)
    figures.uncertainty_figure(rows, folder / "uncertainty.png", title)
    return outcome


def validate(
    eval_fn: Callable[[Batch], Mapping[str, Any]],
    records: Sequence[Record],
    texts: dict[str, np.ndarray],
    batch_size: int,
) -> dict[str, float | int]:
    """Dice and IoU of both kinds at the model's own size; each record counts once.

    Args:
      eval_fn: batch -> `metrics.overlap_sums` over the whole batch.
      records, texts: of the split.
      batch_size: a multiple of the number of devices.
    """
    total: dict[str, Any] = {}
    share = distributed.process_shard()
    for batch in pipeline.eval_batches(records, texts, batch_size=batch_size, **share):
        sums = eval_fn(batch)
        # On the host: int32 counts of a large split would run over.
        total = {name: total.get(name, 0) + np.asarray(x).item() for name, x in sums.items()}
    scores = overlap.from_sums(total)
    if scores["num_images"] != len(records):
        raise AssertionError(f"{scores['num_images']} of {len(records)} records were counted")
    return scores


def at_mask_size(
    predict: Predict, records: Sequence[Record], texts: dict[str, np.ndarray], batch_size: int
) -> Iterator[tuple[Record, np.ndarray]]:
    """Each record once, with its maps (C, H, W), brought bilinearly to its mask's own size."""
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
    """Counts (N,), the probabilities brought bilinearly to each mask's own size, then >= 0.5."""
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
    """Counts of every text condition that the records have, on the pictures that have it.

    Args:
      predict, encode, records, batch_size, conditions, split: as in `evaluate`.
      seed: of the shuffled sentences.
    """
    prompt_records = text_conditions.prompt_fields(records)
    whole = None if split is None else text_conditions.prompt_fields(split)
    found = {}
    for condition in conditions:
        asked = text_conditions.apply_condition(condition, prompt_records, seed, whole)
        if asked is None:
            continue
        everywhere = len(asked.rows) == len(records)
        chosen = records if everywhere else [records[i] for i in asked.rows]
        texts = encode(asked.prompts)
        found[condition] = overlap_at_mask_size(predict, chosen, texts, batch_size)
    return found


def pixel_histogram(
    predict: Predict, encode: Encode, records: Sequence[Record], batch_size: int
) -> calibration.Histogram:
    """The split's probabilities and masks, with the right sentences, for `calibration`."""
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
    """Scores of the mean over views, with the right sentences, and how unsure it is.

    Returns:
      views (names); right_tta (scores and intervals); mean_entropy and mean_mutual_information,
      in nats, over all pixels; error_auroc of the mean's entropy, see `calibration.error_auroc`.
    """
    texts = pipeline.text_fields(encode, [record["text"] for record in records])
    looked = partial(tta.predict_views, predict, views=list(views.values()))
    counts, uncertainty = _with_uncertainty(looked, records, texts, batch_size)
    return {"views": list(views), "original_tta": _with_intervals(counts[0]), **uncertainty}


def _with_uncertainty(
    pooled: Predict, records: Sequence[Record], texts: dict[str, np.ndarray], batch_size: int
) -> tuple[list[overlap.Overlap], dict[str, float | None]]:
    """Counts of the mean and of each map after its uncertainties; means of these over all pixels.

    Args:
      pooled: batch -> maps (B, S, S, 3 + K): mean, entropy, mutual information, then others.
      records, texts, batch_size: as in `at_mask_size`.
    """
    counts, sums, num_pixels = [], np.zeros(2), 0
    histogram = calibration.gather_histogram([])
    for record, maps in at_mask_size(pooled, records, texts, batch_size):
        counts.append([_overlap(probs, record) for probs in (maps[0], *maps[3:])])
        histogram += calibration.histogram(maps[0], record["full_mask"][..., 0])
        sums += maps[1:3].sum((1, 2), dtype=np.float64)
        num_pixels += maps[0].size
    return [overlap.stack(list(own)) for own in zip(*counts, strict=True)], {
        "mean_entropy": float(sums[0] / num_pixels),
        "mean_mutual_information": float(sums[1] / num_pixels),
        "error_auroc": calibration.error_auroc(histogram),
    }


def evaluate_samples(
    samples: Predict, encode: Encode, records: Sequence[Record], *, batch_size: int
) -> dict[str, float | None]:
    """How much a model's samples disagree, with the right sentences; as of `evaluate_tta`."""
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
    """Counts of every degradation and severity, with the right sentences.

    Args:
      make: damage -> predict, see `make_predict`.
      encode, batch_size: as in `evaluate`.
      records: of the split.
      names: of `degrade.NAMES`.
      severities: out of 1 to 5.
      seed: of the random ones.
    """
    texts = encode([record["text"] for record in records])
    # One program for all qualities: jpeg damages the pictures before they reach it.
    undamaged = make(None)
    found: dict[str, dict[int, overlap.Overlap]] = {name: {} for name in names}
    for name in names:
        for severity in severities:
            corrupted, predict = records, undamaged
            if name == "jpeg":
                corrupted = [_through_jpeg(record, severity) for record in records]
            else:
                predict = make(corruptions.on_device(name, severity, seed))
            found[name][severity] = overlap_at_mask_size(predict, corrupted, texts, batch_size)
    return found


def _through_jpeg(record: Record, severity: int) -> Record:
    return Record({**record, "image": corruptions.jpeg(record["image"], severity)})


def corruption_results(
    found: Mapping[str, Mapping[int, overlap.Overlap]], before: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Scores and intervals of every degradation, {name: {severity: ...}}, and their mean.

    The mean is taken over all names and severities that the section holds.

    Args:
      found: counts, see `evaluate_corruptions`.
      before: such a section of an earlier evaluation; its other names and severities stay.
    """
    scores = results_file.corruption_cells(before or {})
    for name, rows in found.items():
        cells = {str(severity): _with_intervals(counts) for severity, counts in rows.items()}
        scores[name] = dict(sorted({**scores.get(name, {}), **cells}.items()))
    flat = [cell for rows in scores.values() for cell in rows.values()]
    keys = ("dice_global", "dice_mean", "iou_global", "iou_mean")
    return {**scores, "mean": {key: float(np.mean([cell[key] for cell in flat])) for key in keys}}


def results(
    found: Mapping[str, overlap.Overlap],
    records: Sequence[Record],
    trained: Collection[str] | None = None,
) -> dict[str, Any]:
    """Scores and intervals of each condition, as results.json holds them.

    `mirrored_changed` and `original_where_mirrored_changes` are the images whose
    sentence mirroring changes: the symmetric ones cannot tell anything. Where
    only some images have a condition, `original_where_NAME` is of these, and
    `original_where_sentence_is_new` of those whose sentence is not among the `trained` ones.
    """
    found = dict(found)
    prompt_records = text_conditions.prompt_fields(records)
    changed = np.array([text_lib.swap_sides(r["text"]) != r["text"] for r in prompt_records])
    for name in list(found):
        rows = text_conditions.rows_of(name, prompt_records)
        if len(rows) < len(prompt_records):
            found[f"original_where_{name}"] = overlap.take(found["original"], rows)
    if "swapped" in found and changed.any():
        found["swapped_changed"] = overlap.take(found["swapped"], changed)
        found["original_where_swap_changes"] = overlap.take(found["original"], changed)
    if trained is not None:
        new = np.array([one["text"] not in trained for one in prompt_records])
        if new.any():
            found["original_where_prompt_is_new"] = overlap.take(found["original"], new)
    scores = {name: _with_intervals(counts) for name, counts in found.items()}
    return {
        "size": "each mask's own size, probabilities resized bilinearly",
        "model_image_size": records[0]["image"].shape[0],
        "threshold": overlap.THRESHOLD,
        "conditions": scores,
    }


def image_free_results(
    train: Sequence[Record], val: Sequence[Record], test: Sequence[Record]
) -> dict[str, Any]:
    """Scores and intervals of both image-free baselines."""
    found = baselines.image_free(train, val, test)
    return {name: _with_intervals(counts) for name, counts in found.items()}


def _with_intervals(counts: overlap.Overlap) -> dict[str, Any]:
    intervals = overlap.bootstrap_intervals(counts)
    return {**overlap.summarize(counts), "interval_95": {k: list(v) for k, v in intervals.items()}}


def per_image_rows(
    found: Mapping[str, overlap.Overlap], records: Sequence[Record]
) -> list[dict[str, Any]]:
    """One row an image: id, sentence, Dice and IoU of every condition, areas in pixels.

    None where an image has no sentence of a condition.
    """
    prompt_records = text_conditions.prompt_fields(records)
    rows: list[dict[str, Any]] = [{"id": r["id"], "text": r["text"]} for r in prompt_records]
    for condition, counts in found.items():
        of_kind = {"dice": overlap.dice(counts), "iou": overlap.iou(counts)}
        places = {
            int(row): i for i, row in enumerate(text_conditions.rows_of(condition, prompt_records))
        }
        for kind, values in of_kind.items():
            for i, row in enumerate(rows):
                row[f"{kind}_{condition}"] = values[places[i]].item() if i in places else None
    for i, row in enumerate(rows):
        row["pred_area_original"] = int(found["original"].pred_area[i])
        row["mask_area"] = int(found["original"].mask_area[i])
    return rows


def figure_rows(
    predict: Predict,
    encode: Encode,
    records: Sequence[Record],
    counts: overlap.Overlap,
    batch_size: int,
) -> list[dict[str, Any]]:
    """The best, median and worst cases by Dice, as the pages of `reporting` take them."""
    scores = np.asarray(overlap.dice(counts))
    return [
        _figure_row(band, predict, encode, records[i], float(scores[i]), batch_size)
        for band, rows in figures.bands(scores.tolist()).items()
        for i in rows
    ]


def _figure_row(band, predict, encode, record, score, batch_size) -> dict[str, Any]:
    # A whole batch, of which one row counts: another size would compile again.
    texts = encode([record["text"]])
    batch = next(pipeline.eval_batches([record], texts, batch_size=batch_size))
    height, width = record["full_mask"].shape[:2]
    probs = resize_probability(predict(batch)[0, ..., 0], height, width)
    grey = [
        resize_probability(channel, height, width)
        for channel in np.moveaxis(record["image"].astype(np.float32), -1, 0)
    ]
    return {
        "band": band,
        "id": record["id"],
        "image": np.clip(np.rint(np.stack(grey, -1)), 0, 255).astype(np.uint8),
        "mask": record["full_mask"],
        "pred": probs >= overlap.THRESHOLD,
        "uncertainty": tta.entropy(probs),
        "dice": score,
        "text": record["text"],
    }


def score_table(scores: Mapping[str, Mapping[str, Any]]) -> str:
    """The console's table: one line a condition, both kinds of Dice and IoU, in percent."""
    names = ("dice_global", "dice_mean", "iou_global", "iou_mean")
    rows = [
        {"condition": name, **{n: f"{100 * s[n]:.2f}" for n in names}, "images": s["num_images"]}
        for name, s in scores.items()
    ]
    return tables.format_table(rows, ("condition", *names, "images"))

"""Masks for pictures that have none: what trained models answer together, before a run begins.

The pictures are then those of a noisy student (arXiv 1911.04252): it learns the teachers' masks of
the pictures as they are, on views that the teachers never saw.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from biclip_jax import inference, parallel, places, sentences
from biclip_jax.data import pipeline
from biclip_jax.data.schema import Record
from biclip_jax.errors import UserError
from biclip_jax.evaluation import metrics, runner
from biclip_jax.training import checkpoint

FILE = "teacher_masks.npz"


def with_masks(records: Sequence[Record], config: ConfigDict, workdir: Path) -> Sequence[Record]:
    """The unlabelled records with the masks of `data.teachers`; as they are where none is named.

    A pixel is foreground where the mean of the teachers' probabilities is at least one half. The
    masks are kept in the work directory: a run that goes on asks no teacher again.

    Args:
      records: unlabelled, at the model's size.
      config: resolved.
      workdir: of the run.

    Raises:
      UserError: nothing would look at the masks, a teacher does not fit, or the kept masks are
        damaged or of other pictures.
    """
    folders = [folder for folder in config.data.teachers.split(",") if folder]
    if not folders:
        return records
    if not records or not config.loss.get("pseudo_labels"):
        raise UserError(
            "--config.data.teachers: they give masks to unlabelled pictures, for "
            "loss.pseudo_labels; set data.unlabelled and loss.pseudo_labels, or leave it empty"
        )
    size = config.model.image_size
    masks = np.zeros((len(records), size, size, 1), np.uint8)
    if parallel.leads():
        masks = _kept_or_asked(records, folders, config, workdir / FILE)
    masks, _ = parallel.of_first(masks, {})
    return [Record({**r, "mask": mask}) for r, mask in zip(records, masks, strict=True)]


def _kept_or_asked(records, folders, config, path) -> np.ndarray:
    if checkpoint.steps(path.parent / "checkpoints/last"):
        return _read(path, records, config.model.image_size)
    total = np.zeros((), np.float32)
    for folder in folders:
        print(f"{folder}: answers {len(records)} unlabelled pictures", flush=True)
        total = total + probabilities(Path(folder), records, config)
    masks = np.asarray(total / len(folders) >= metrics.THRESHOLD, np.uint8)
    _write(path, records, masks)
    return masks


def probabilities(folder: Path, records: Sequence[Record], config: ConfigDict) -> np.ndarray:
    """(N, S, S, 1) float32: what one trained model answers to every record and its sentence.

    Args:
      folder: a run's work directory or a model folder.
      records: at S pixels.
      config: of the run that learns from it.

    Raises:
      UserError: no model that segments pictures, or one of another size or resizing.
    """
    model, variables, processor = inference.load_segmenter(folder)
    teacher = (processor.image_size, processor.resizing)
    student = (config.model.image_size, config.data.resize)
    if teacher != student:
        raise UserError(
            f"--config.data.teachers: {folder} takes pictures of {teacher[0]} px, resized "
            f"{teacher[1]}, and this run has {student[0]} px, {student[1]}; give teachers of the "
            "same size"
        )
    predict = runner.make_predict(model, sentences.without_tower(model, variables))
    encode = sentences.encoder(model, variables, processor)
    texts = encode([record["text"] for record in records])
    batches = pipeline.eval_batches(records, texts, batch_size=config.batch_size)
    return np.concatenate([predict(batch)[batch["valid"]] for batch in batches])


def _write(path: Path, records: Sequence[Record], masks: np.ndarray) -> None:
    ids = np.array([record["id"] for record in records])
    with places.written_whole(path) as part, part.open("wb") as file:
        np.savez_compressed(file, ids=ids, masks=masks)


def _read(path: Path, records: Sequence[Record], size: int) -> np.ndarray:
    try:
        with np.load(path) as kept:
            ids, masks = kept["ids"].tolist(), kept["masks"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: damaged ({error}); give another --workdir") from error
    if ids != [record["id"] for record in records] or masks.shape[1] != size:
        raise UserError(
            f"{path}: masks of {len(ids)} other pictures than the {len(records)} unlabelled ones "
            "of this run; give another --workdir, or the same data"
        )
    return masks

"""Masks for pictures that have none: what trained models answer together, before a run begins.

The pictures are then those of a noisy student (arXiv 1911.04252): it learns the teachers' masks of
the pictures as they are, on views that the teachers never saw.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from biclip_jax import inference
from biclip_jax.core import distributed, files
from biclip_jax.core.errors import UserError
from biclip_jax.data import label_subset, pipeline
from biclip_jax.data.schema import Record
from biclip_jax.encoders import text as text_encoders
from biclip_jax.evaluation import runner
from biclip_jax.evaluation.metrics import overlap
from biclip_jax.evaluation.robustness import tta
from biclip_jax.training import checkpoint

MASKS_FILE = "teacher_masks.npz"
Teacher = Callable[[Sequence[Record]], np.ndarray]


def add_pseudo_labels(
    records: Sequence[Record], config: ConfigDict, workdir: Path
) -> Sequence[Record]:
    """The unlabelled records with the masks of `data.teachers`; as they are where none is named.

    A pixel is foreground where the mean of the teachers' probabilities is at least one half. The
    masks are kept in the work directory: a run that goes on asks no teacher again.

    Args:
      records: unlabelled, at the model's size.
      config: resolved.
      workdir: of the run.

    Raises:
      UserError: nothing would look at the masks, nobody would answer, a teacher does not fit, or
        the kept masks are damaged or of other pictures.
    """
    if not config.data.teachers:
        if config.data.teacher_flip_tta:
            raise UserError(
                "--config.data.teacher_flip_tta: there are no teachers to answer mirror images; "
                "name them in data.teachers, or leave it false"
            )
        return records
    if not records or not config.loss.get("pseudo_labels"):
        raise UserError(
            "--config.data.teachers: they give masks to unlabelled pictures, for "
            "loss.pseudo_labels; set data.unlabelled and loss.pseudo_labels, or leave it empty"
        )
    size = config.model.image_size
    masks = np.zeros((len(records), size, size, 1), np.uint8)
    distributed.barrier()  # others wait long for the first, but not for its first message
    if distributed.is_main_process():
        masks = _load_or_predict(records, config, workdir / MASKS_FILE)
    masks, _ = distributed.broadcast_from_main(masks, {})
    return [Record({**r, "mask": mask}) for r, mask in zip(records, masks, strict=True)]


def _load_or_predict(records: Sequence[Record], config: ConfigDict, path: Path) -> np.ndarray:
    if checkpoint.complete_steps(path.parent / "checkpoints/last"):
        return _read(path, records, config.model.image_size)
    teachers = {folder: open_teacher(folder, records, config) for folder in teacher_folders(config)}
    total = np.zeros((), np.float32)
    for folder, teacher in teachers.items():
        print(f"{folder}: answers {len(records)} unlabelled pictures", flush=True)
        total = total + teacher(records)
    masks = np.asarray(total / len(teachers) >= overlap.THRESHOLD, np.uint8)
    _write(path, records, masks)
    return masks


def teacher_folders(config: ConfigDict) -> list[str]:
    """The teachers' folders.

    Raises:
      UserError: an empty name, or one twice.
    """
    folders = [folder.strip() for folder in config.data.teachers.split(",")]
    if not all(folders) or len(set(folders)) < len(folders):
        raise UserError(
            f"--config.data.teachers={config.data.teachers}: expected work directories with commas "
            "between them, each once"
        )
    return folders


def open_teacher(folder: str, records: Sequence[Record], config: ConfigDict) -> Teacher:
    """One trained model as a function: records -> probabilities (N, S, S, 1) float32.

    With `data.teacher_flip_tta` they are the mean over the picture and its mirror image, which is read
    with the mirrored sentence.

    Args:
      folder: a run's work directory or a model folder.
      records: unlabelled, at S pixels.
      config: of the run that learns from it.

    Raises:
      UserError: no model that segments pictures, one of another size or resizing, or one that has
        learned the masks of these pictures.
    """
    if not Path(folder).is_dir():
        raise UserError(f"--config.data.teachers: {folder}: no such folder; give work directories")
    model, variables, processor = inference.load_segmentation_model(folder)
    teacher = (processor.image_size, processor.resize_method)
    student = (config.model.image_size, config.data.resize)
    if teacher != student:
        raise UserError(
            f"--config.data.teachers: {folder} takes pictures of {teacher[0]} px, resized "
            f"{teacher[1]}, and this run has {student[0]} px, {student[1]}; give teachers of the "
            "same size"
        )
    if config.data.unlabelled == "rest":
        _check_labels(Path(folder) / "labels.json", records)
    predict = runner.make_predict(model, text_encoders.without_text_encoder(model, variables))
    encode = text_encoders.make_encode(model, variables, processor)
    names, read = ["identity"], encode
    if config.data.teacher_flip_tta:
        names, read = [*names, "horizontal_flip"], partial(pipeline.text_fields, encode)
    look: runner.Predict = partial(
        tta.predict_views, predict, views=[tta.VIEWS[name] for name in names]
    )

    def answer(records: Sequence[Record]) -> np.ndarray:
        texts = read([record["text"] for record in records])
        batches = pipeline.eval_batches(records, texts, batch_size=config.batch_size)
        return np.concatenate([look(batch)[batch["valid"], ..., :1] for batch in batches])

    return answer


def _check_labels(path: Path, records: Sequence[Record]) -> None:
    """Raises UserError where a run's labelled pictures are among these."""
    if not path.exists():  # a model folder, which does not say
        return
    learned = set(label_subset.read_ids(path)) & {record["id"] for record in records}
    if learned:
        raise UserError(
            f"--config.data.teachers: {path.parent} has learned the masks of {len(learned)} of the "
            f"{len(records)} pictures that are unlabelled here; give teachers that were trained "
            "with the same data.label_fraction and data.label_seed"
        )


def _write(path: Path, records: Sequence[Record], masks: np.ndarray) -> None:
    ids = np.array([record["id"] for record in records])
    with files.atomic_write(path) as part, part.open("wb") as file:
        np.savez_compressed(file, ids=ids, masks=masks)


def _read(path: Path, records: Sequence[Record], size: int) -> np.ndarray:
    try:
        with np.load(path) as kept:
            ids, masks = kept["ids"].tolist(), kept["masks"]
    except Exception as error:  # of zip, zlib or NumPy's header
        raise UserError(
            f"{path}: missing or damaged ({error!r}); give another --workdir"
        ) from error
    same = ids == [record["id"] for record in records]
    if not same or masks.shape != (len(ids), size, size, 1):
        raise UserError(
            f"{path}: masks of {len(ids)} pictures that are not the {len(records)} unlabelled ones "
            "of this run; give another --workdir, or the same data"
        )
    return masks

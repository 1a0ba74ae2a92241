"""Offline pseudo-labels from an ensemble of teachers, computed before training.

This is noisy student training (arXiv 1911.04252): the teachers predict masks of the original
images, and the student learns them on augmented views.
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
    """Adds pseudo-labels from `data.teachers` to unlabelled records, if there are teachers.

    A pixel is foreground if the mean of the teachers' probabilities is at least 0.5. The masks are
    stored in the work directory, so that a resumed run does not load the teachers again.

    Args:
      records: Unlabelled records, at the model's image size.
      config: Resolved config.
      workdir: Work directory of the run.

    Raises:
      UserError: The config has no loss for pseudo-labels or no unlabelled images, a teacher does
        not fit, or the stored masks are damaged or belong to other images.
    """
    if not config.data.teachers:
        if config.data.teacher_flip_tta:
            raise UserError(
                "--config.data.teacher_flip_tta: there are no teachers to average over; set "
                "data.teachers, or set it to false"
            )
        return records
    if not records or not config.loss.get("pseudo_labels"):
        raise UserError(
            "--config.data.teachers: pseudo-labels need unlabelled images and a loss; set "
            "data.unlabelled and loss.pseudo_labels, or leave it empty"
        )
    size = config.model.image_size
    masks = np.zeros((len(records), size, size, 1), np.uint8)
    # Process 0 predicts for a long time: without a barrier before it, the connection times out.
    distributed.barrier()
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
        print(f"{folder}: predicts {len(records)} unlabelled images", flush=True)
        total = total + teacher(records)
    masks = np.asarray(total / len(teachers) >= overlap.THRESHOLD, np.uint8)
    _write(path, records, masks)
    return masks


def teacher_folders(config: ConfigDict) -> list[str]:
    """Returns the folders of `data.teachers`.

    Raises:
      UserError: An empty or repeated name.
    """
    folders = [folder.strip() for folder in config.data.teachers.split(",")]
    if not all(folders) or len(set(folders)) < len(folders):
        raise UserError(
            f"--config.data.teachers={config.data.teachers}: expected comma-separated work "
            "directories without repetitions"
        )
    return folders


def open_teacher(folder: str, records: Sequence[Record], config: ConfigDict) -> Teacher:
    """Loads a trained model as a function: records -> probabilities (N, S, S, 1) float32.

    With `data.teacher_flip_tta` the probabilities are the mean over the image and its horizontal
    flip, which gets the left-right swapped prompt.

    Args:
      folder: Work directory of a run, or a model folder.
      records: Unlabelled records, S x S pixels.
      config: Config of the student.

    Raises:
      UserError: The folder holds no segmentation model, the model has another image size or resize
        method, or it was trained on masks of these images.
    """
    if not Path(folder).is_dir():
        raise UserError(f"--config.data.teachers: {folder}: no such folder; give a work directory")
    model, variables, processor = inference.load_segmentation_model(folder)
    teacher = (processor.image_size, processor.resize_method)
    student = (config.model.image_size, config.data.resize)
    if teacher != student:
        raise UserError(
            f"--config.data.teachers: {folder} takes images of {teacher[0]} px, resize "
            f"{teacher[1]!r}; expected {student[0]} px, resize {student[1]!r}, as in this run"
        )
    if config.data.unlabelled == "rest":
        _check_labels(Path(folder) / "labels.json", records)
    predict = runner.make_predict(model, text_encoders.without_text_encoder(model, variables))
    encode = text_encoders.make_encode(model, variables, processor)
    views, encode_fields = ["identity"], encode
    if config.data.teacher_flip_tta:
        views = [*views, "horizontal_flip"]
        encode_fields = partial(pipeline.text_fields, encode)
    predict_views: runner.Predict = partial(
        tta.predict_views, predict, views=[tta.VIEWS[name] for name in views]
    )

    def predict_records(records: Sequence[Record]) -> np.ndarray:
        texts = encode_fields([record["text"] for record in records])
        batches = pipeline.eval_batches(records, texts, batch_size=config.batch_size)
        return np.concatenate([predict_views(batch)[batch["valid"], ..., :1] for batch in batches])

    return predict_records


def _check_labels(path: Path, records: Sequence[Record]) -> None:
    """Raises UserError if a teacher was trained on masks of these records."""
    if not path.exists():  # a model folder, which does not list its training images
        return
    trained_on = set(label_subset.read_ids(path)) & {record["id"] for record in records}
    if trained_on:
        raise UserError(
            f"--config.data.teachers: {path.parent} was trained on the masks of {len(trained_on)} "
            f"of the {len(records)} images that are unlabelled here; expected teachers with the "
            "same data.label_fraction and data.label_seed"
        )


def _write(path: Path, records: Sequence[Record], masks: np.ndarray) -> None:
    ids = np.array([record["id"] for record in records])
    with files.atomic_write(path) as part, part.open("wb") as file:
        np.savez_compressed(file, ids=ids, masks=masks)


def _read(path: Path, records: Sequence[Record], size: int) -> np.ndarray:
    try:
        with np.load(path) as archive:
            ids, masks = archive["ids"].tolist(), archive["masks"]
    except Exception as error:  # zipfile, zlib and NumPy raise different errors
        raise UserError(
            f"{path}: missing or damaged ({error!r}); give another --workdir"
        ) from error
    same = ids == [record["id"] for record in records]
    if not same or masks.shape != (len(ids), size, size, 1):
        raise UserError(
            f"{path}: holds masks of {len(ids)} images, but not of the {len(records)} unlabelled "
            "images of this run; give another --workdir, or the same data"
        )
    return masks

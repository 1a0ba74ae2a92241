"""Prepares datasets: resizes them once and writes them to the cache folder.

Datasets on disk become a folder of array_record files by TFDS, which is imported where it is used.
The synthetic dataset becomes a single file and needs no TFDS.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from biclip_jax.core.errors import DataError
from biclip_jax.data.builders import single_file, synthetic
from biclip_jax.data.builders.prepared import verify, write_checksums
from biclip_jax.data.image_io import RESIZE_METHODS
from biclip_jax.data.layouts import read_layout, read_unlabelled, read_variants
from biclip_jax.data.schema import SPLITS, Example, Split

# Part of every folder's hash: increase it whenever the same source would give other records.
FORMAT = 2


def prepare(
    name: str,
    *,
    data_dir: str | os.PathLike[str],
    image_size: int,
    source_dir: str | os.PathLike[str] | None = None,
    layout: str | None = None,
    prompt: str | None = None,
    percent: int = 100,
    resize: str = "antialiased",
    num_examples: dict[Split, int] | None = None,
    labelled: bool = True,
) -> Path:
    """Writes a prepared dataset, unless it exists; verifies its checksums.

    The name of the folder or file contains `name`, `image_size` and a hash of the source: the
    names, sizes and times of its files, all prompts, and `resize` if it is not the default.

    Args:
      name: "synthetic", or a config of `builders.layout`: "qata_cov19", "mosmed_plus",
        "kvasir_seg", "clinicdb", "folder".
      data_dir: Parent folder of prepared datasets.
      image_size: Side of images and masks in pixels.
      source_dir: Folder of the dataset on disk; not for "synthetic".
      layout: Name in `layouts.LAYOUTS`; None detects it.
      prompt: Prompt to use in the medvlsm layout, see `read_layout`.
      percent: Published subset to use in the medclipseg layout, see `read_layout`.
      resize: Value of `image_io.RESIZE_METHODS`; ignored by "synthetic", which draws at
        `image_size`.
      num_examples: Sizes of the splits, only for "synthetic"; the defaults are 800, 100 and 200.
      labelled: False reads the source with `layouts.read_unlabelled`; masks may be missing and are
        then empty.

    Returns:
      The prepared folder or file, for `open_split`.

    Raises:
      DataError: An argument, the source or the prepared dataset is invalid.
    """
    if not 8 <= image_size <= 4096:
        raise DataError(f"image_size: found {image_size}; expected 8 to 4096 pixels.")
    if name == "synthetic":
        subset = None if percent == 100 else percent
        _refuse_arguments(name, source=source_dir, layout=layout, prompt=prompt, percent=subset)
        return _prepare_synthetic(Path(data_dir), image_size, num_examples or {})
    _refuse_arguments(name, num_examples=num_examples)
    make_builder, identity = _folder_builder(
        name,
        image_size,
        resize,
        source_dir,
        layout=layout,
        prompt=prompt,
        percent=percent,
        labelled=labelled,
    )
    folder = Path(data_dir) / f"{name}-{image_size}-{_digest(identity)}"
    if not folder.exists():
        _write(make_builder, folder)
    verify(folder)
    return folder


def _refuse_arguments(name: str, **arguments: object) -> None:
    for argument, value in arguments.items():
        if value is not None:
            raise DataError(
                f"data.{argument}: found {value!r}; expected none for {name!r}; remove it."
            )


def _prepare_synthetic(data_dir: Path, image_size: int, num_examples: dict[Split, int]) -> Path:
    for split, size in num_examples.items():
        if split not in SPLITS or size < 1:
            raise DataError(
                f"num_examples: found {split!r}: {size}; expected train, val or test, each at "
                "least 1."
            )
    sizes = synthetic.DEFAULT_SIZES | num_examples
    digest = _digest([sizes[split] for split in SPLITS])
    path = data_dir / f"synthetic-{image_size}-{digest}{single_file.SUFFIX}"
    if not path.exists():
        data_dir.mkdir(parents=True, exist_ok=True)
        splits = {
            split: list(synthetic.encoded_examples(split, sizes[split], image_size))
            for split in SPLITS
        }
        single_file.write(path, splits, {"name": "synthetic", "image_size": image_size})
    single_file.verify(path)
    return path


def _digest(identity: object) -> str:
    return hashlib.sha256(json.dumps([FORMAT, identity]).encode()).hexdigest()[:10]


def _folder_builder(
    name: str,
    image_size: int,
    resize: str,
    source_dir: str | os.PathLike[str] | None,
    *,
    layout: str | None,
    prompt: str | None,
    percent: int,
    labelled: bool,
) -> tuple[Callable, object]:
    """Returns a function from data_dir to the builder, and what identifies this dataset."""
    from biclip_jax.data.builders.layout import CONFIGS, LayoutDataset, check_files

    known = [config.name for config in CONFIGS]
    if name not in known:
        raise DataError(f"name: found {name!r}; expected synthetic, {', '.join(known)}.")
    if source_dir is None:
        raise DataError(
            "data.source: not set; expected the folder of the dataset; give "
            "--config.data.source=DIR."
        )
    if resize not in RESIZE_METHODS:
        methods = ", ".join(RESIZE_METHODS)
        raise DataError(f"resize: found {resize!r}; expected one of {methods}.")
    if labelled:
        examples = read_layout(source_dir, layout, prompt, percent)
        variants = read_variants(source_dir, examples, layout, percent)
    else:
        examples, variants = read_unlabelled(source_dir), {}

    def make_builder(data_dir: Path) -> LayoutDataset:
        return LayoutDataset(
            data_dir=data_dir,
            config=name,
            examples=examples,
            variants=variants,
            image_size=image_size,
            channels=check_files(os.fspath(source_dir), examples, resize),
            resize=resize,
            file_format="array_record",
        )

    identity: list[object] = [_source_identity(Path(source_dir), examples), variants]
    # The default method is left out, so that folders prepared before the option keep their names.
    return make_builder, identity if resize == RESIZE_METHODS[0] else [*identity, resize]


def _source_identity(root: Path, examples: list[Example]) -> list:
    """Returns relative names, sizes and times of all files, with the prompts, in order."""
    return [
        [
            example.split,
            *_file_identity(root, example.image_path),
            *(_file_identity(root, example.mask_path) if example.mask_path else ("no mask",)),
            example.text,
        ]
        for example in examples
    ]


def _file_identity(root: Path, path: str) -> tuple[str, int, int]:
    status = os.stat(path)
    return os.path.relpath(path, root), status.st_size, status.st_mtime_ns


def _write(make_builder: Callable, folder: Path) -> None:
    """Builds next to `folder` and renames at the end, so that no incomplete folder remains."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import shuffle

    tfds.disable_progress_bar()
    # Above this size TFDS spills to disk through TensorFlow; the encoded split fits in memory.
    shuffle.MAX_MEM_BUFFER_SIZE = sys.maxsize
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".incomplete-", dir=folder.parent))
    try:
        builder = make_builder(scratch)
        # TFDS prints the name of the scratch folder, which is deleted afterwards.
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare(
                download_config=tfds.download.DownloadConfig(try_download_gcs=False)
            )
        built = Path(builder.data_dir)
        write_checksums(built)
        _publish(built, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _publish(built: Path, folder: Path) -> None:
    """Moves the built dataset into place, unless another process has already done so."""
    try:
        built.rename(folder)
    except OSError:
        if not folder.exists():
            raise

"""Writes data sets once as array_record files.

TFDS is imported where it is used, so that importing `biclip_jax.data` stays light.
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
from biclip_jax.data.builders.prepared import verify, write_checksums
from biclip_jax.data.image_io import RESIZE_METHODS
from biclip_jax.data.layouts import read_layout, read_unlabelled, read_variants
from biclip_jax.data.schema import SPLITS, Example, Split

# Part of every folder's name: raise it whenever the same source would give other records.
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
    """Writes a data set as array_record files, or finds it written and undamaged.

    The folder's name holds `name`, `image_size` and a hash of the source: the names, sizes and
    times of its files, and all sentences; and `resize`, where it is another than by default.

    Args:
      name: "synthetic", or a config of `builders.layout`: "qata_cov19", "mosmed_plus",
        "kvasir_seg", "clinicdb", "folder".
      data_dir: where prepared sets lie.
      image_size: side of pictures and masks in pixels.
      source_dir: the folder on disk; not for "synthetic".
      layout: a name of `layouts.LAYOUTS`, or None to look.
      prompt: the prompt to take in the medvlsm layout, see `read_layout`.
      percent: the published subset to take in the medclipseg layout, see `read_layout`.
      resize: of `image_io.RESIZE_METHODS`; "synthetic" draws at `image_size` and has no use for it.
      num_examples: sizes of the splits, for "synthetic" only; 800, 100 and 200 where left out.
      labelled: false takes what `layouts.read_unlabelled` finds; masks may be lacking, and empty
        ones then stand for them.

    Returns:
      The prepared folder, for `open_split`.

    Raises:
      DataError: an argument, the source, or the prepared folder does not hold together.
    """
    if not 8 <= image_size <= 4096:
        raise DataError(f"image_size: found {image_size}; expected 8 to 4096 pixels; change it.")
    if name == "synthetic":
        subset = None if percent == 100 else percent
        _refuse(name, source=source_dir, layout=layout, prompt=prompt, percent=subset)
        make, identity = _synthetic(image_size, num_examples or {})
    else:
        _refuse(name, num_examples=num_examples)
        make, identity = _from_folder(
            name,
            image_size,
            resize,
            source_dir,
            layout=layout,
            prompt=prompt,
            percent=percent,
            labelled=labelled,
        )
    digest = hashlib.sha256(json.dumps([FORMAT, identity]).encode()).hexdigest()[:10]
    folder = Path(data_dir) / f"{name}-{image_size}-{digest}"
    if not folder.exists():
        _write(make, folder)
    verify(folder)
    return folder


def _refuse(name: str, **arguments: object) -> None:
    for argument, value in arguments.items():
        if value is not None:
            raise DataError(f"{argument}: found {value!r}; expected none for {name!r}; drop it.")


def _synthetic(image_size: int, num_examples: dict[Split, int]) -> tuple[Callable, object]:
    """Returns data_dir -> builder, and what tells this set from others."""
    from biclip_jax.data.builders.synthetic import DEFAULT_SIZES, Synthetic

    for split, size in num_examples.items():
        if split not in SPLITS or size < 1:
            raise DataError(
                f"num_examples: found {split!r}: {size}; expected train, val or test, each at "
                "least 1; change it."
            )
    sizes = DEFAULT_SIZES | num_examples

    def make(data_dir: Path) -> Synthetic:
        return Synthetic(
            data_dir=data_dir,
            image_size=image_size,
            num_examples=sizes,
            file_format="array_record",
        )

    return make, [sizes[split] for split in SPLITS]


def _from_folder(
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
    """Returns data_dir -> builder, and what tells this set from others."""
    from biclip_jax.data.builders.layout import CONFIGS, LayoutDataset, check_files

    known = [config.name for config in CONFIGS]
    if name not in known:
        raise DataError(f"name: found {name!r}; expected synthetic, {', '.join(known)}.")
    if source_dir is None:
        raise DataError(
            f"source: found none; expected the folder of {name!r}; give --config.data.source=DIR."
        )
    if resize not in RESIZE_METHODS:
        methods = ", ".join(RESIZE_METHODS)
        raise DataError(f"resize: found {resize!r}; expected one of {methods}; choose one.")
    if labelled:
        examples = read_layout(source_dir, layout, prompt, percent)
        variants = read_variants(source_dir, examples, layout, percent)
    else:
        examples, variants = read_unlabelled(source_dir), {}

    def make(data_dir: Path) -> LayoutDataset:
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

    identity: list[object] = [_identity(Path(source_dir), examples), variants]
    # Sets that were prepared before there was a choice keep their names.
    return make, identity if resize == RESIZE_METHODS[0] else [*identity, resize]


def _identity(root: Path, examples: list[Example]) -> list:
    """Names relative to the root, sizes and times of all files, with the sentences, in order."""
    return [
        [
            example.split,
            *_stamp(root, example.image_path),
            *(_stamp(root, example.mask_path) if example.mask_path else ("no mask",)),
            example.text,
        ]
        for example in examples
    ]


def _stamp(root: Path, path: str) -> tuple[str, int, int]:
    status = os.stat(path)
    return os.path.relpath(path, root), status.st_size, status.st_mtime_ns


def _write(make: Callable, folder: Path) -> None:
    """Builds beside `folder` and renames at the end: what was interrupted is never found."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import shuffle

    tfds.disable_progress_bar()
    # Above this size TFDS spills to disk through TensorFlow; the encoded split fits in memory.
    shuffle.MAX_MEM_BUFFER_SIZE = sys.maxsize
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".incomplete-", dir=folder.parent))
    try:
        builder = make(scratch)
        # What TFDS prints names the scratch folder, which is gone a moment later.
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
    """Moves the built set into place; where another process was faster, its set stays."""
    try:
        built.rename(folder)
    except OSError:
        if not folder.exists():
            raise

"""Checkpoints with orbax: the last two and the best, each with a SHA-256 manifest.

    workdir/checkpoints/last/<step>/   the newest two
    workdir/checkpoints/best/<step>/   the one with the best validation score

The manifest of a step (`<step>.sha256.json`) is next to the step's folder and is written last: a
step without a manifest was interrupted and is ignored. Files are verified before they are
restored; if a step is damaged, the next older one is used.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import signal
import socket
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from biclip_jax.core import files
from biclip_jax.core.errors import UserError
from biclip_jax.training.state import TrainState, step_of

KEEP_LAST = 2


def save(folder: Path, state: TrainState, meta: dict[str, Any], keep: int = KEEP_LAST) -> Path:
    """Writes one step and deletes all but the newest `keep`.

    Args:
      folder: Folder of one kind of checkpoint, such as workdir/checkpoints/last.
      state: Host arrays (`distributed.to_host`).
      meta: Progress as JSON values: best score, best step, evaluations since then.
      keep: Number of steps to keep.

    Returns:
      The step's folder.

    Raises:
      UserError: The folder cannot be written; the existing steps stay intact.
    """
    step = folder / str(step_of(state))
    try:
        _discard(step)
        with _checkpointer() as checkpointer:
            items = ocp.args.Composite(
                state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)
            )
            checkpointer.save(step.absolute(), args=items)
        _write_json(_manifest_path(step), _digests(step))
    except OSError as error:
        raise UserError(
            f"{step}: cannot be written ({error.strerror or error}); free disk space or make the "
            "folder writable, then run the same command again"
        ) from error
    for old in complete_steps(folder)[:-keep]:
        _discard(old)
    return step


def restore_latest(
    folder: Path, template: TrainState, log: Callable[[str], None]
) -> tuple[TrainState, dict[str, Any]] | None:
    """Restores the newest intact step, or returns None if there is none.

    Args:
      folder: As in `save`.
      template: A state with the expected shapes and dtypes.
      log: Called with a one-line message for each damaged step that is skipped.

    Returns:
      The state and its meta.

    Raises:
      UserError: Steps exist but none is intact, or the shapes are those of another model.
    """
    damaged: list[Path] = []
    for step in reversed(complete_steps(folder)):
        problem = integrity_error(step)
        if problem is None:
            # Without its manifest a step does not count towards the steps to keep.
            for manifest in map(_manifest_path, damaged):
                manifest.rename(manifest.with_suffix(".damaged"))
            return _restore(step, template)
        damaged.append(step)
        log(f"{step}: damaged ({problem}); skipped, falling back to an older checkpoint")
    if damaged:
        raise UserError(f"{folder}: no intact checkpoint; delete the folder to start again")
    return None


def integrity_error(step: Path) -> str | None:
    """Compares a step's files with its manifest; returns the first difference, or None."""
    try:
        expected = json.loads(_manifest_path(step).read_text())
    except (OSError, ValueError):
        return "its manifest is missing or unreadable"
    found = _digests(step)
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            return f"{name} differs from its recorded SHA-256"
    return None


def remove_incomplete(folder: Path) -> None:
    """Removes the remains of interrupted saves: folders and manifests that have no counterpart."""
    if not folder.is_dir():
        return
    complete = {step.name for step in complete_steps(folder)}
    for path in folder.iterdir():
        if path.name.split(".")[0] not in complete or ".tmp" in path.name:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextlib.contextmanager
def lock(workdir: Path) -> Iterator[None]:
    """Locks a work directory for one job; the system releases the lock when the process ends.

    Raises:
      UserError: Another job holds the lock; the message names host, process and start time.
    """
    path = workdir / "lock"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")  # noqa: SIM115
    except OSError as error:
        raise UserError(
            f"{workdir}: cannot be written ({error.strerror}); choose another --workdir"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            raise UserError(
                f"{workdir}: in use by another job ({file.read().strip()}); "
                "wait for it, or choose another --workdir"
            ) from error
        file.truncate(0)
        file.write(f"{socket.gethostname()}, process {os.getpid()}, since {time.ctime()}")
        file.flush()
        yield


class StopSignal:
    """Records SIGTERM or SIGINT, so that the training loop can save and exit between steps.

    Attributes:
      received: Number of the signal, or None. The exit status is 128 + received.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: types.FrameType | None) -> None:
        self.received = number
        print("stopping after this step; repeat the signal to stop immediately", flush=True)
        self._restore_handlers()


def _restore(step: Path, template: TrainState) -> tuple[TrainState, dict[str, Any]]:
    # NumPy arrays: with several processes, orbax rejects host-local device arrays.
    expected = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), template)
    try:
        with _checkpointer() as checkpointer:
            items = ocp.args.Composite(
                state=ocp.args.StandardRestore(expected), meta=ocp.args.JsonRestore()
            )
            restored = checkpointer.restore(step.absolute(), args=items)
        # orbax does not check shapes and dtypes.
        jax.tree.map(_require_same_spec, expected, restored.state)
    except (ValueError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{step}: does not match the model of the config ({reason}); "
            "use another --workdir, or the config that the run started with"
        ) from error
    return restored.state, restored.meta


def _require_same_spec(expected: np.ndarray, found: np.ndarray) -> None:
    if (expected.shape, expected.dtype) != (found.shape, found.dtype):
        raise ValueError(
            f"found {found.dtype} {found.shape}, expected {expected.dtype} {expected.shape}"
        )


def _checkpointer() -> ocp.Checkpointer:
    """Returns a checkpointer for this process only.

    With several processes one of them reads and writes, and the others do not wait for it.
    """
    index = jax.process_index()
    multiprocessing = ocp.options.MultiprocessingOptions(
        primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"process_{index}"
    )
    options = ocp.CompositeOptions(multiprocessing_options=multiprocessing)
    handler = ocp.CompositeCheckpointHandler(composite_options=options)
    return ocp.Checkpointer(handler, multiprocessing_options=multiprocessing)


def complete_steps(folder: Path) -> list[Path]:
    """Returns the complete steps, oldest first."""
    if not folder.is_dir():
        return []
    steps = [p for p in folder.iterdir() if p.name.isdigit() and _manifest_path(p).exists()]
    return sorted(steps, key=lambda p: int(p.name))


def _manifest_path(step: Path) -> Path:
    return step.with_name(f"{step.name}.sha256.json")


def _digests(step: Path) -> dict[str, str]:
    paths = sorted(p for p in step.rglob("*") if p.is_file())
    return {str(p.relative_to(step)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


def _discard(step: Path) -> None:
    # Delete the manifest first, which makes the step incomplete.
    _manifest_path(step).unlink(missing_ok=True)
    if step.exists():
        shutil.rmtree(step)


def _write_json(path: Path, value: Any) -> None:
    with files.atomic_write(path) as part:
        part.write_text(json.dumps(value))

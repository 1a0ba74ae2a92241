"""Checkpoints by orbax: the last two and the best, each under a SHA-256 manifest.

    workdir/checkpoints/last/<step>/   the newest two
    workdir/checkpoints/best/<step>/   the one with the best validation score

A manifest lies beside each step's folder (`<step>.sha256.json`) and is written
after it: a step without one was interrupted and does not count. Bytes that
changed on disk are found before anything is restored, and the next older step
is taken instead.
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
    """Writes one step and forgets all but the newest `keep`.

    Args:
      folder: of this kind of checkpoint, such as workdir/checkpoints/last.
      state: host arrays (`parallel.to_host`).
      meta: JSON values: data position, metrics, early-stopping counters.
      keep: number of steps that stay.

    Returns:
      The step's folder.

    Raises:
      UserError: the folder cannot be written; what was there before is intact.
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
            f"{step}: could not be written ({error.strerror or error}); free space on the disk or "
            "make the folder writable, then run the same command again"
        ) from error
    for old in complete_steps(folder)[:-keep]:
        _discard(old)
    return step


def restore_latest(
    folder: Path, template: TrainState, say: Callable[[str], None]
) -> tuple[TrainState, dict[str, Any]] | None:
    """The newest intact step, or None where there is none.

    Args:
      folder: as in `save`.
      template: a state of the right shapes and dtypes.
      say: told, in a sentence, of each damaged step that is passed over.

    Raises:
      UserError: steps exist but none is intact, or its shapes are another model's.
    """
    found = complete_steps(folder)
    for step in reversed(found):
        problem = integrity_error(step)
        if problem is None:
            return _restore(step, template)
        # Set aside, so that it takes no intact step's place among those that are kept.
        _manifest_path(step).rename(_manifest_path(step).with_suffix(".damaged"))
        say(f"{step}: damaged ({problem}); set aside, falling back to an older checkpoint")
    if found:
        raise UserError(f"{folder}: no intact checkpoint; delete the folder to start again")
    return None


def integrity_error(step: Path) -> str | None:
    """What is wrong with a step's files, or None: compared with the manifest by SHA-256."""
    try:
        expected = json.loads(_manifest_path(step).read_text())
    except (OSError, ValueError):
        return "its manifest is missing or unreadable"
    found = _digests(step)
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            return f"{name} is not what was written"
    return None


def remove_incomplete(folder: Path) -> None:
    """Removes what an interrupted save left: folders without a manifest, manifests without one."""
    if not folder.is_dir():
        return
    complete = {step.name for step in complete_steps(folder)}
    for path in folder.iterdir():
        if path.name.split(".")[0] not in complete or ".tmp" in path.name:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextlib.contextmanager
def lock(workdir: Path) -> Iterator[None]:
    """Keeps a work directory for one job; the system releases it with the process.

    Raises:
      UserError: another job holds it (naming host, process and start).
    """
    path = workdir / "lock"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")  # noqa: SIM115
    except OSError as error:
        raise UserError(
            f"{workdir}: cannot be written ({error.strerror}); choose another"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            raise UserError(
                f"{workdir}: another job is at work there ({file.read().strip()}); "
                "wait for it, or give another --workdir"
            ) from error
        file.truncate(0)
        file.write(f"{socket.gethostname()}, process {os.getpid()}, since {time.ctime()}")
        file.flush()
        yield


class StopSignal:
    """Remembers SIGTERM or SIGINT, so that the loop can save and leave between two steps.

    Attributes:
      received: the signal's number, or None. The exit status is 128 + received.
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
        print("stopping after this step; the same signal again stops at once", flush=True)
        self._restore_handlers()


def _restore(step: Path, template: TrainState) -> tuple[TrainState, dict[str, Any]]:
    # Numpy, not device arrays: in a run of several processes orbax refuses host-local ones.
    like = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), template)
    try:
        with _checkpointer() as checkpointer:
            items = ocp.args.Composite(
                state=ocp.args.StandardRestore(like), meta=ocp.args.JsonRestore()
            )
            restored = checkpointer.restore(step.absolute(), args=items)
        # orbax takes another shape or dtype as it comes.
        jax.tree.map(_require_same_kind, like, restored.state)
    except (ValueError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{step}: holds another model than the configuration describes ({reason}); "
            "use another workdir, or the configuration that the run began with"
        ) from error
    return restored.state, restored.meta


def _require_same_kind(expected: np.ndarray, found: np.ndarray) -> None:
    if (expected.shape, expected.dtype) != (found.shape, found.dtype):
        raise ValueError(
            f"found {found.dtype} {found.shape}, expected {expected.dtype} {expected.shape}"
        )


def _checkpointer() -> ocp.Checkpointer:
    """Of this process alone: of several in a run one reads and writes, and none waits for it."""
    index = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"process_{index}"
    )
    options = ocp.CompositeOptions(multiprocessing_options=alone)
    handler = ocp.CompositeCheckpointHandler(composite_options=options)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def complete_steps(folder: Path) -> list[Path]:
    """Complete steps, oldest first."""
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if p.name.isdigit() and _manifest_path(p).exists()]
    return sorted(found, key=lambda p: int(p.name))


def _manifest_path(step: Path) -> Path:
    return step.with_name(f"{step.name}.sha256.json")


def _digests(step: Path) -> dict[str, str]:
    files = sorted(p for p in step.rglob("*") if p.is_file())
    return {str(p.relative_to(step)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def _discard(step: Path) -> None:
    # The manifest first: from here on the step does not count.
    _manifest_path(step).unlink(missing_ok=True)
    if step.exists():
        shutil.rmtree(step)


def _write_json(path: Path, value: Any) -> None:
    with files.atomic_write(path) as part:
        part.write_text(json.dumps(value))

"""Writers of training metrics: console, JSON lines and TensorBoard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from biclip_jax.core import files


class Writer:
    """Writes metrics to the console, to metrics.jsonl and to TensorBoard if it is installed.

    Attributes:
      console: Console for other messages of the run (`console.print`).
    """

    def __init__(self, workdir: Path, num_steps: int, first_step: int) -> None:
        self.console = Console(highlight=False)
        self._lines: TextIO = open(_trimmed(workdir / "metrics.jsonl", first_step), "a")  # noqa: SIM115
        self._tensorboard = _tensorboard(workdir / "tensorboard", first_step)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        self._progress = Progress(
            *columns, console=self.console, disable=not self.console.is_terminal
        )
        self._task = self._progress.add_task("training", total=num_steps, completed=first_step)

    def __enter__(self) -> Writer:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        self._lines.close()
        if self._tensorboard:
            self._tensorboard.close()

    def advance(self, step: int) -> None:
        """Moves the progress bar to `step`."""
        self._progress.update(self._task, completed=step)

    def write(self, step: int, split: str, values: dict[str, float]) -> None:
        """Writes one line to metrics.jsonl and the console, and one TensorBoard point per value."""
        self._lines.write(json.dumps({"step": step, "split": split, **values}) + "\n")
        self._lines.flush()
        for name, value in values.items():
            if self._tensorboard:
                self._tensorboard.add_scalar(f"{split}/{name}", value, step)
        if split == "train" and self.console.is_terminal:
            loss = f"loss {values['loss']:.4f}" if "loss" in values else "steps skipped"
            self._progress.update(self._task, description=loss)
        else:
            shown = "  ".join(f"{name} {_format(value)}" for name, value in values.items())
            self.console.print(f"step {step:>6}  {split:<5}  {shown}", soft_wrap=True)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads the lines of metrics.jsonl; drops a last line that a crash truncated."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def _trimmed(path: Path, first_step: int) -> Path:
    """Drops the lines written after the checkpoint from which the run resumes."""
    rows = [row for row in read_metrics(path) if row["step"] <= first_step]
    with files.atomic_write(path) as part:
        part.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _tensorboard(folder: Path, first_step: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=first_step + 1)


def _format(value: float) -> str:
    if isinstance(value, int):
        return str(value)
    return f"{value:.2e}" if 0 < abs(value) < 1e-2 else f"{value:.4f}"

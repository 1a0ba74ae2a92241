"""Trains variants of one experiment, with several seeds and shares of labels, and compares them.

    python -m biclip_jax.ablate --config qata:small --variants ef_unet,published,full \\
        --seeds 0,1,2 --label-fractions 0.01,1 --workdir runs/ablation --config.data.source=DIR \\
        --evaluate "--subset 500 --corruptions motion_blur,low_contrast --severities 2,4"

Each run is `biclip_jax.train` in WORKDIR/VARIANT/FRACTION/SEED and tested there; --evaluate adds
`biclip_jax.evaluate` with those arguments. The same command again goes on where it stopped and
repeats nothing; runs that were added are trained, too. Writes ablation.json and ablation.md, the
table with mean and spread over the seeds.

--jobs 2 has two runs at a time, each on its share of the CPU's cores: several small programs use
them better than one large one. On a GPU or TPU leave it at 1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import queue
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any, NamedTuple

from biclip_jax.core import config as config_lib
from biclip_jax.core import files, runtime
from biclip_jax.core.errors import UserError
from biclip_jax.evaluation import arguments
from biclip_jax.evaluation.report import comparison

# How a training ends by SIGINT or SIGTERM: then the comparison ends, too. Whatever else kills one,
# such as want of memory, leaves the others to run.
STOPPED = {-2: 130, -15: 143, 130: 130, 143: 143}
Cores = set[int] | None  # of the CPU, that a run is kept to
KEPT = (*comparison.METRICS, "interval_95")  # of each run's test
FINISHED = "finished"  # in the folder of an evaluation that ended well


class Cell(NamedTuple):
    """One run of the comparison.

    Attributes:
      variant: of `configs/variants.py` or of the page.
      fraction: share of the labels.
      seed: of the run.
      workdir: of the run, below the comparison's.
    """

    variant: str
    fraction: float
    seed: int
    workdir: Path


def compare(args: argparse.Namespace, overrides: Sequence[str]) -> dict[str, Any]:
    """Trains what is missing, then writes and prints the table.

    Raises:
      UserError: a configuration that cannot be, or runs that failed (after all others).
    """
    root = Path(args.workdir)
    cells = [
        Cell(variant, fraction, seed, root / variant / f"labels_{fraction}" / f"seed_{seed}")
        for fraction in args.label_fractions
        for seed in args.seeds
        for variant in args.variants
    ]
    commands = {cell: command_of(cell, args.config, overrides) for cell in cells}
    # Every mistake before the first hour.
    commands = {cell: command for cell, command in commands.items() if check(cell, command)}
    cells = list(commands)
    if not cells:
        raise UserError("nothing to run; give --label-fractions below 1, or other --variants")
    root.mkdir(parents=True, exist_ok=True)

    running: set[subprocess.Popen] = set()
    tasks = (
        lambda cell: train(cell, commands[cell], running),
        lambda cell: evaluate(cell, args.evaluate, running),
    )
    failed = failures(cells, tasks, args.jobs, running)
    finished = [cell for cell in cells if cell not in failed]
    rows = [row_of(group, root, args.evaluate) for group in grouped(finished)]
    outcome = {
        "command": f"python -m biclip_jax.ablate {shlex.join(args.argv)}",
        "rows": rows,
        "runs": {
            str(cell.workdir.relative_to(root)): f"python -m biclip_jax.train {shlex.join(command)}"
            for cell, command in commands.items()
        },
    }
    files.write_json(root / "ablation.json", outcome)
    with files.atomic_write(root / "ablation.md") as part:
        part.write_text(comparison.markdown(rows), encoding="utf-8")
    print(comparison.table(rows))
    print(f"table  {root / 'ablation.md'}\njson   {root / 'ablation.json'}")
    if failed:
        names = ", ".join(str(cell.workdir) for cell in failed)
        raise UserError(f"{len(failed)} of {len(cells)} runs failed, see the logs in {names}")
    return outcome


def command_of(cell: Cell, config: str, overrides: Sequence[str]) -> list[str]:
    """The arguments of `biclip_jax.train` for one run."""
    joined = f"{config},{cell.variant}" if ":" in config else f"{config}:{cell.variant}"
    return [
        "--config",
        joined,
        *overrides,
        f"--config.seed={cell.seed}",
        f"--config.data.label_fraction={cell.fraction}",
        "--workdir",
        str(cell.workdir),
    ]


def check(cell: Cell, command: Sequence[str]) -> bool:
    """Whether there is anything to run; says so where all labels leave no picture without.

    Raises:
      UserError: a run cannot be, or another one lies in its place.
    """
    config = config_lib.load_config(command[1], list(command[2:-2]))
    if not config.final_test:
        raise UserError("--config.final_test: the table is made of the test results; leave it on")
    if config.data.unlabelled == "rest" and cell.fraction == 1:
        print(f"{cell.workdir}: left out, all pictures have labels")
        return False
    path = cell.workdir / "config.json"
    if not path.exists():
        return True
    # Written by the run, not configured.
    encoders = ("model.text.sha256", "model.image.sha256", "model.encoders.sha256")
    changed = config_lib.changed_fields(path, json.loads(config.to_json()), encoders)
    if changed:
        raise UserError(
            f"{path}: a run with another configuration lies there: {config_lib.format_changes(changed)}; "
            "give another --workdir, or the same fields"
        )
    return True


def failures(
    cells: Sequence[Cell],
    tasks: Sequence[Callable[[Cell], bool]],
    jobs: int,
    running: set[subprocess.Popen],
) -> list[Cell]:
    """Does the tasks of every cell in turn, some cells at once; the cells where one is false.

    A signal to one of the runs begins nothing more, and waits for the others; SIGTERM to this
    process ends them, too, and SIGINT has reached them by itself. They save.

    Args:
      cells: of the comparison.
      tasks: what is done for a cell.
      at_once: cells at a time.
      running: the processes that the tasks have begun.
    """
    num_workers = min(jobs, len(cells))
    shares: queue.SimpleQueue[Cores] = queue.SimpleQueue()
    for cores in shares_of_cores(num_workers):
        shares.put(cores)
    stop = threading.Event()

    def keep_to_cores() -> None:
        if (cores := shares.get()) is not None:
            os.sched_setaffinity(0, cores)  # of this thread, and of what it starts

    def work(cell: Cell) -> bool:
        try:
            return all(not stop.is_set() and task(cell) for task in tasks)
        except BaseException:
            stop.set()
            raise

    def end(*_: Any) -> None:
        stop.set()
        for process in tuple(running):
            process.terminate()

    before = signal.signal(signal.SIGTERM, end)
    try:
        with futures.ThreadPoolExecutor(num_workers, initializer=keep_to_cores) as pool:
            runs = [pool.submit(work, cell) for cell in cells]
            try:
                done = [run.result() for run in runs]
            except KeyboardInterrupt:
                stop.set()
                sys.exit(STOPPED[-signal.SIGINT])
    finally:
        signal.signal(signal.SIGTERM, before)
    return [cell for cell, well in zip(cells, done, strict=True) if not well]


def shares_of_cores(jobs: int) -> list[Cores]:
    """This process's cores in equal shares; None where one run has all, or the system asks not."""
    if jobs == 1 or not hasattr(os, "sched_setaffinity"):
        return [None] * jobs
    cores = sorted(os.sched_getaffinity(0))
    if jobs > len(cores):
        raise UserError(f"--jobs {jobs}: expected at most {len(cores)}, the cores there are")
    return [set(cores[i::jobs]) for i in range(jobs)]


def train(cell: Cell, command: Sequence[str], running: set[subprocess.Popen]) -> bool:
    """Runs one training, or goes on with it; true when its test results are there."""
    if results_path(cell).exists():
        return True
    print(f"{cell.workdir}: trains", flush=True)
    cell.workdir.mkdir(parents=True, exist_ok=True)
    _run(["biclip_jax.train", *command], cell.workdir / "train.log", running)
    return results_path(cell).exists()


def evaluate(cell: Cell, asked: Sequence[str], running: set[subprocess.Popen]) -> bool:
    """Runs one evaluation as --evaluate asks for it; true when it is there or none is asked."""
    folder = evaluation_folder(cell, asked)
    if not asked or (folder / FINISHED).exists():
        return True
    print(f"{cell.workdir}: is evaluated", flush=True)
    command = ["--workdir", str(cell.workdir), *asked, "--output", str(folder)]
    if _run(["biclip_jax.evaluate", *command], cell.workdir / "evaluate.log", running):
        return False
    # results.json is there before an evaluation ends.
    (folder / FINISHED).touch()
    return True


def _run(command: Sequence[str], log_path: Path, running: set[subprocess.Popen]) -> int:
    """Runs a door of the package; its exit status. A signal that ended it ends the comparison."""
    # A process of its own: a run that dies takes none of the others with it.
    with log_path.open("a", encoding="utf-8") as log:
        program = [sys.executable, "-m", *command]
        process = subprocess.Popen(program, stdout=log, stderr=subprocess.STDOUT)
        running.add(process)
        status = process.wait()
        running.remove(process)
    if status in STOPPED:
        sys.exit(STOPPED[status])
    if status:
        lines = log_path.read_text(encoding="utf-8").splitlines()
        print(f"{log_path.parent}: failed: {lines[-1] if lines else status}", flush=True)
    return status


def results_path(cell: Cell) -> Path:
    """Where a finished run has its test results."""
    return cell.workdir / "test" / "results.json"


def evaluation_folder(cell: Cell, asked: Sequence[str]) -> Path:
    """Where the results of --evaluate are: each question has a folder."""
    digest = hashlib.sha256(shlex.join(asked).encode()).hexdigest()[:8]
    return cell.workdir / "evaluation" / digest


def grouped(cells: Sequence[Cell]) -> list[list[Cell]]:
    """The runs of each variant and share, over the seeds."""
    groups: dict[tuple[float, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.fraction, cell.variant), []).append(cell)
    return list(groups.values())


def row_of(group: Sequence[Cell], root: Path, asked: Sequence[str]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds, in [0, 1], and each seed's value and folder.

    The deviation is that of a sample; None for one seed.

    Args:
      group: runs that differ in their seeds alone.
      root: of the comparison.
      asked: of --evaluate; the row has what it found.

    Raises:
      UserError: a file that a run left is damaged.
    """
    found = {cell: read_json(results_path(cell)) for cell in group}
    config = read_json(group[0].workdir / "config.json")
    model = config["model"]
    row: dict[str, Any] = {
        "variant": group[0].variant,
        "label_fraction": group[0].fraction,
        "num_labelled": read_json(group[0].workdir / "labels.json")["num_images"],
        "image_encoder": comparison.image_encoder(model),
        **comparison.over_seeds([result["conditions"]["original"] for result in found.values()]),
        "empty_text": comparison.over_seeds([r["conditions"]["empty"] for r in found.values()]),
    }
    if asked:
        paths = [evaluation_folder(cell, asked) / "results.json" for cell in group]
        row["evaluation"] = comparison.summarize_evaluations([read_json(path) for path in paths])
    row["config"] = config
    row["seeds"] = {
        str(cell.seed): {
            "run": str(cell.workdir.relative_to(root)),
            **{name: result["conditions"]["original"][name] for name in KEPT},
        }
        for cell, result in found.items()
    }
    return row


def read_json(path: Path) -> dict[str, Any]:
    """A file that a finished run left.

    Raises:
      UserError: it cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: damaged ({error}); delete its run and start again") from error


def _parse_list(text: str, option: str, kind: type) -> list[Any]:
    try:
        values = [kind(part) for part in text.split(",") if part]
    except ValueError as error:
        raise UserError(f"{option} {text}: expected {kind.__name__}s with commas") from error
    if not values or len(set(values)) < len(values):
        raise UserError(f"{option} {text}: expected a list without repetitions")
    return values


def _evaluation(text: str) -> list[str]:
    try:
        asked = shlex.split(text)
    except ValueError as error:
        raise UserError(f"--evaluate {text}: {error}; expected arguments as in a shell") from error
    if asked:  # a mistake is told now, not after the first training
        given = arguments.parse(["--workdir=", *asked])
        if given.workdir or given.output:
            raise UserError(f"--evaluate {text}: each run has its own folders; leave them out")
    return asked


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    runtime.run_command(_main, argv)


def _main(argv: list[str]) -> None:
    parser = config_lib.config_parser(__doc__)
    parser.add_argument("--variants", required=True, metavar="A,B")
    parser.add_argument("--seeds", default="0", metavar="0,1")
    parser.add_argument("--label-fractions", default="1", metavar="0.01,1")
    parser.add_argument(
        "--evaluate", default="", metavar="'ARGS'", help="also biclip_jax.evaluate with ARGS"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time")
    args, overrides = parser.parse_known_args(argv)
    for field, option in (("seed", "--seeds"), ("data.label_fraction", "--label-fractions")):
        if any(override.startswith(f"--config.{field}=") for override in overrides):
            raise UserError(f"--config.{field}: belongs to the table here; give {option}")
    if args.jobs < 1:
        raise UserError(f"--jobs {args.jobs}: expected at least 1 run at a time")
    args.evaluate = _evaluation(args.evaluate)
    args.argv, args.workdir = argv, args.workdir or "runs/ablation"
    args.variants = _parse_list(args.variants, "--variants", str)
    args.seeds = _parse_list(args.seeds, "--seeds", int)
    args.label_fractions = _parse_list(args.label_fractions, "--label-fractions", float)
    compare(args, overrides)


if __name__ == "__main__":
    main()

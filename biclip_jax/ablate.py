"""Trains several methods with several seeds and label fractions, and compares them.

    biclip ablate --config qata:small --variants ef_unet,published,full \\
        --seeds 0,1,2 --label-fractions 0.01,1 --workdir runs/ablation --config.data.source=DIR \\
        --evaluate "--subset 500 --corruptions motion_blur,low_contrast --severities 2,4"

Every run is a `biclip train` in WORKDIR/VARIANT/FRACTION/SEED, with its test. --evaluate adds a
`biclip evaluate` with the given arguments. The same command resumes, repeats nothing that is
finished, and trains runs that were added. Writes ablation.json and the table ablation.md, with mean
and standard deviation over the seeds.

--jobs 2 trains two runs at a time, each on its share of the CPU cores: several small programs use
the cores better than one large one. On a GPU or TPU leave it at 1.
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

# Exit statuses of a run after SIGINT or SIGTERM, which end the comparison too. After any other
# failure, such as running out of memory, the other runs continue.
STOPPED = {-2: 130, -15: 143, 130: 130, 143: 143}
Cores = set[int] | None  # CPU cores of a run
SEED_SCORES = (*comparison.METRICS, "interval_95")  # of the test of each seed
FINISHED = "finished"  # marker file of a successful evaluation


class Cell(NamedTuple):
    """One run of the comparison.

    Attributes:
      variant: Variant of `configs/variants.py` or of the config.
      fraction: Fraction of the labels.
      seed: Seed of the run.
      workdir: Work directory of the run, inside that of the comparison.
    """

    variant: str
    fraction: float
    seed: int
    workdir: Path


def compare(args: argparse.Namespace, overrides: Sequence[str]) -> dict[str, Any]:
    """Trains the missing runs, then writes and prints the table.

    Raises:
      UserError: An invalid config, or failed runs (raised after all others have finished).
    """
    root = Path(args.workdir)
    cells = [
        Cell(variant, fraction, seed, root / variant / f"labels_{fraction}" / f"seed_{seed}")
        for fraction in args.label_fractions
        for seed in args.seeds
        for variant in args.variants
    ]
    commands = {cell: command_of(cell, args.config, overrides) for cell in cells}
    # Report every mistake before the first run.
    commands = {cell: command for cell, command in commands.items() if should_run(cell, command)}
    cells = list(commands)
    if not cells:
        raise UserError("nothing to run; set --label-fractions below 1, or other --variants")
    root.mkdir(parents=True, exist_ok=True)

    running: set[subprocess.Popen] = set()
    tasks = (
        lambda cell: train(cell, commands[cell], running),
        lambda cell: evaluate(cell, args.evaluate, running),
    )
    failed = run_all(cells, tasks, args.jobs, running)
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
    """Returns the arguments of `biclip train` for one run."""
    name = f"{config},{cell.variant}" if ":" in config else f"{config}:{cell.variant}"
    return [
        "--config",
        name,
        *overrides,
        f"--config.seed={cell.seed}",
        f"--config.data.label_fraction={cell.fraction}",
        "--workdir",
        str(cell.workdir),
    ]


def should_run(cell: Cell, command: Sequence[str]) -> bool:
    """Validates a run; returns False if it uses unlabelled images but all images have labels.

    Raises:
      UserError: An invalid config, or the work directory holds another run.
    """
    config = config_lib.load_config(command[1], list(command[2:-2]))
    if not config.final_test:
        raise UserError("--config.final_test: the table needs the test results; set it to true")
    if config.data.unlabelled == "rest" and cell.fraction == 1:
        print(f"{cell.workdir}: skipped, all images have labels")
        return False
    path = cell.workdir / "config.json"
    if not path.exists():
        return True
    # Written by the run, not part of the config.
    hashes = ("model.text.sha256", "model.image.sha256", "model.encoders.sha256")
    changed = config_lib.changed_fields(path, json.loads(config.to_json()), hashes)
    if changed:
        raise UserError(
            f"{path}: found a run with another config: {config_lib.format_changes(changed)}; give "
            "another --workdir, or the same fields"
        )
    return True


def run_all(
    cells: Sequence[Cell],
    tasks: Sequence[Callable[[Cell], bool]],
    jobs: int,
    running: set[subprocess.Popen],
) -> list[Cell]:
    """Runs the tasks of every cell; returns the cells in which a task returned False.

    After a signal to one of the runs no new run starts, and the others finish. SIGTERM to this
    process is passed on to the runs, SIGINT reaches them directly; they save their state.

    Args:
      cells: Runs of the comparison.
      tasks: Functions to call for every cell, in order.
      jobs: Number of cells at a time.
      running: Processes that the tasks have started.
    """
    num_workers = min(jobs, len(cells))
    core_sets: queue.SimpleQueue[Cores] = queue.SimpleQueue()
    for cores in split_cores(num_workers):
        core_sets.put(cores)
    stop = threading.Event()

    def pin_to_cores() -> None:
        if (cores := core_sets.get()) is not None:
            os.sched_setaffinity(0, cores)  # this thread and its child processes

    def work(cell: Cell) -> bool:
        try:
            return all(not stop.is_set() and task(cell) for task in tasks)
        except BaseException:
            stop.set()
            raise

    def terminate(*_: Any) -> None:
        stop.set()
        for process in tuple(running):
            process.terminate()

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        with futures.ThreadPoolExecutor(num_workers, initializer=pin_to_cores) as pool:
            runs = [pool.submit(work, cell) for cell in cells]
            try:
                done = [run.result() for run in runs]
            except KeyboardInterrupt:
                stop.set()
                sys.exit(STOPPED[-signal.SIGINT])
    finally:
        signal.signal(signal.SIGTERM, previous)
    return [cell for cell, succeeded in zip(cells, done, strict=True) if not succeeded]


def split_cores(jobs: int) -> list[Cores]:
    """Splits the cores of this process evenly; None for one job or without CPU affinity."""
    if jobs == 1 or not hasattr(os, "sched_setaffinity"):
        return [None] * jobs
    cores = sorted(os.sched_getaffinity(0))
    if jobs > len(cores):
        raise UserError(f"--jobs {jobs}: expected at most {len(cores)}, the number of cores")
    return [set(cores[i::jobs]) for i in range(jobs)]


def train(cell: Cell, command: Sequence[str], running: set[subprocess.Popen]) -> bool:
    """Trains one run, or resumes it; returns True if its test results exist."""
    if results_path(cell).exists():
        return True
    print(f"{cell.workdir}: training", flush=True)
    cell.workdir.mkdir(parents=True, exist_ok=True)
    _run(["biclip_jax.train", *command], cell.workdir / "train.log", running)
    return results_path(cell).exists()


def evaluate(cell: Cell, evaluate_args: Sequence[str], running: set[subprocess.Popen]) -> bool:
    """Runs the evaluation of --evaluate; returns True if it succeeded or none is requested."""
    folder = evaluation_folder(cell, evaluate_args)
    if not evaluate_args or (folder / FINISHED).exists():
        return True
    print(f"{cell.workdir}: evaluating", flush=True)
    command = ["--workdir", str(cell.workdir), *evaluate_args, "--output", str(folder)]
    if _run(["biclip_jax.evaluate", *command], cell.workdir / "evaluate.log", running):
        return False
    # results.json alone does not tell: it exists before an evaluation ends.
    (folder / FINISHED).touch()
    return True


def _run(command: Sequence[str], log_path: Path, running: set[subprocess.Popen]) -> int:
    """Runs a command in a process; returns its exit status. A signal ends the comparison."""
    # A separate process, so that a run that crashes does not affect the others.
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
    """Returns the path of the test results of a finished run."""
    return cell.workdir / "test" / "results.json"


def evaluation_folder(cell: Cell, evaluate_args: Sequence[str]) -> Path:
    """Returns the folder of an evaluation: one per set of --evaluate arguments."""
    digest = hashlib.sha256(shlex.join(evaluate_args).encode()).hexdigest()[:8]
    return cell.workdir / "evaluations" / digest


def grouped(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Groups the runs by variant and label fraction."""
    groups: dict[tuple[float, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.fraction, cell.variant), []).append(cell)
    return list(groups.values())


def row_of(group: Sequence[Cell], root: Path, evaluate_args: Sequence[str]) -> dict[str, Any]:
    """Summarizes runs that differ only in their seed.

    Args:
      group: The runs.
      root: Work directory of the comparison.
      evaluate_args: Arguments of --evaluate; its results are added to the row.

    Returns:
      Mean and sample standard deviation over the seeds (None for one seed), in [0, 1], and the
      scores and the folder of every seed.

    Raises:
      UserError: A damaged result file.
    """
    tests = {cell: read_json(results_path(cell)) for cell in group}
    config = read_json(group[0].workdir / "config.json")
    model = config["model"]
    row: dict[str, Any] = {
        "variant": group[0].variant,
        "label_fraction": group[0].fraction,
        "num_labelled": read_json(group[0].workdir / "labels.json")["num_images"],
        "image_encoder": comparison.image_encoder(model),
        **comparison.over_seeds([result["conditions"]["original"] for result in tests.values()]),
        "empty_text": comparison.over_seeds([r["conditions"]["empty"] for r in tests.values()]),
    }
    if evaluate_args:
        paths = [evaluation_folder(cell, evaluate_args) / "results.json" for cell in group]
        row["evaluation"] = comparison.summarize_evaluations([read_json(path) for path in paths])
    row["config"] = config
    row["seeds"] = {
        str(cell.seed): {
            "run": str(cell.workdir.relative_to(root)),
            **{name: result["conditions"]["original"][name] for name in SEED_SCORES},
        }
        for cell, result in tests.items()
    }
    return row


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file of a finished run.

    Raises:
      UserError: The file cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: damaged ({error}); delete the run and start again") from error


def _parse_list(text: str, option: str, kind: type) -> list[Any]:
    try:
        values = [kind(part) for part in text.split(",") if part]
    except ValueError as error:
        raise UserError(
            f"{option} {text}: expected comma-separated values of type {kind.__name__}"
        ) from error
    if not values or len(set(values)) < len(values):
        raise UserError(f"{option} {text}: expected a list without repetitions")
    return values


def _evaluation(text: str) -> list[str]:
    try:
        evaluate_args = shlex.split(text)
    except ValueError as error:
        raise UserError(f"--evaluate {text}: {error}; expected arguments as in a shell") from error
    if evaluate_args:  # report mistakes now, not after the first training
        parsed = arguments.parse(["--workdir=", *evaluate_args])
        if parsed.workdir or parsed.output:
            raise UserError(f"--evaluate {text}: remove the folders; every run has its own")
    return evaluate_args


def main(argv: list[str] | None = None) -> None:
    """Runs `biclip ablate`."""
    runtime.run_command(_main, argv)


def _main(argv: list[str]) -> None:
    parser = config_lib.config_parser("ablate", __doc__)
    parser.add_argument("--variants", required=True, metavar="A,B")
    parser.add_argument("--seeds", default="0", metavar="0,1")
    parser.add_argument("--label-fractions", default="1", metavar="0.01,1")
    parser.add_argument(
        "--evaluate", default="", metavar="'ARGS'", help="also run biclip evaluate with ARGS"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="number of runs at a time")
    args, overrides = parser.parse_known_args(argv)
    for field, option in (("seed", "--seeds"), ("data.label_fraction", "--label-fractions")):
        if any(override.startswith(f"--config.{field}=") for override in overrides):
            raise UserError(f"--config.{field}: set it with {option}")
    if args.jobs < 1:
        raise UserError(f"--jobs {args.jobs}: expected at least 1")
    args.evaluate = _evaluation(args.evaluate)
    args.argv, args.workdir = argv, args.workdir or "runs/ablation"
    args.variants = _parse_list(args.variants, "--variants", str)
    args.seeds = _parse_list(args.seeds, "--seeds", int)
    args.label_fractions = _parse_list(args.label_fractions, "--label-fractions", float)
    compare(args, overrides)


if __name__ == "__main__":
    main()

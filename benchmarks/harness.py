"""One piece of work by several implementations, each in a process of its own, in turn.

The processes are alive together: every round takes one call of each, so that a machine that becomes
slower does so for all. What a worker prints is JSON, one line an answer.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

PAUSE = 0.3  # seconds, in which another process's threads stop waiting for work


class Work(NamedTuple):
    """What one call does, and how much that is.

    Attributes:
      repeat: one call, done when it returns.
      flops: multiplications and additions of one call; None: not counted.
    """

    repeat: Callable[[], Any]
    flops: float | None = None


def answer(
    make: Callable[[], Work], peak_mib: Callable[[], int], settle: Callable[[], None]
) -> None:
    """A worker's life: builds, calls, settles, then one call for each line it is sent."""
    work = make()
    built_mib, load = resident_mib(), round(os.getloadavg()[0], 2)
    first_s = seconds_of(work.repeat)
    settle()
    _say({"first_s": first_s, "built_mib": built_mib, "load": load, "flops": work.flops})
    for _ in sys.stdin:
        _say({"s": seconds_of(work.repeat)})
    _say({"peak_mib": peak_mib()})


def seconds_of(call: Callable[[], Any]) -> float:
    """One call, by the clock."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def in_turn(
    commands: dict[str, Sequence[str]], repetitions: int, apart: bool
) -> dict[str, dict[str, Any]]:
    """{implementation: its measurements, or {"error": the last thing it said}}.

    Args:
      commands: {implementation: command line of its worker}.
      repetitions: warm calls of each.
      apart: one implementation to its end before the next begins: where memory is for one only.
    """
    found: dict[str, dict[str, Any]] = {}
    for group in [[name] for name in commands] if apart else [list(commands)]:
        workers: dict[str, _Worker] = {}
        for name in group:
            # One after the other: the first call, with its compilation, is timed, too.
            workers[name] = _start(commands[name])
            found[name] = {**_hear(workers[name]), "warm_s": []}
        for _ in range(repetitions):
            for name, worker in workers.items():
                time.sleep(PAUSE)
                found[name]["warm_s"].append(_ask(worker).get("s"))
        for name, worker in workers.items():
            found[name] |= _end(worker)
    return found


class _Worker(NamedTuple):
    process: subprocess.Popen
    log: IO[str]  # a file: a pipe that nobody reads would fill


def _start(command: Sequence[str]) -> _Worker:
    log = tempfile.TemporaryFile("w+")  # noqa: SIM115
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return _Worker(subprocess.Popen(command, text=True, stderr=log, **pipes), log)


def _hear(worker: _Worker) -> dict[str, Any]:
    """The next answer; empty where the worker has ended without one."""
    for line in worker.process.stdout or ():
        if line.startswith("{"):
            return json.loads(line)
    return {}


def _ask(worker: _Worker) -> dict[str, Any]:
    if worker.process.poll() is not None or worker.process.stdin is None:
        return {}
    worker.process.stdin.write("\n")
    worker.process.stdin.flush()
    return _hear(worker)


def _end(worker: _Worker) -> dict[str, Any]:
    out, _ = worker.process.communicate()
    if not worker.process.returncode:
        return json.loads(out.splitlines()[-1])
    worker.log.seek(0)
    said = [line for line in worker.log.read().splitlines() if line.strip()]
    return {"error": said[-1] if said else f"exit status {worker.process.returncode}"}


def _say(facts: dict[str, Any]) -> None:
    print(json.dumps(facts), flush=True)


def compare(found: dict[str, dict[str, Any]], batch: int) -> dict[str, Any]:
    """One line of figures: medians, quartiles, memory; ratios above 1 are in favour of jax.

    "before" is older code of ours, and not among those of which the better is taken.
    """
    entry: dict[str, Any] = {}
    flops = found.get("jax", {}).get("flops")
    if flops:
        entry["gflop"] = round(flops / 1e9, 1)
    median = {}
    for name, facts in found.items():
        if "error" in facts:
            entry[f"{name}_error"] = facts["error"]
            continue
        median[name] = statistics.median(facts["warm_s"])
        entry[f"{name}_ms"] = round(1e3 * median[name], 1)
        entry[f"{name}_ms_quartiles"] = [
            round(1e3 * s, 1) for s in statistics.quantiles(facts["warm_s"])[::2]
        ]
        entry[f"{name}_images_per_s"] = round(batch / median[name], 3)
        entry[f"{name}_first_s"] = round(facts["first_s"], 2)
        entry |= {f"{name}_{field}": facts[field] for field in ("built_mib", "peak_mib", "load")}
        if flops:
            entry[f"{name}_gflop_per_s"] = round(flops / median[name] / 1e9, 1)
    if "jax" not in median:
        return entry
    for name in median.keys() - {"jax"}:
        entry[f"speed_over_{name}"] = round(median[name] / median["jax"], 2)
    others = [seconds for name, seconds in median.items() if name not in ("jax", "before")]
    if others:
        entry["speed_over_best"] = round(min(others) / median["jax"], 2)
    return entry


def lines_of(path: Path) -> Iterator[dict[str, Any]]:
    """The complete lines of a file of results; a last one that was cut off is left out."""
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def resident_mib() -> int:
    """Resident memory of this process now (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() // 2**20


def peak_resident_mib() -> int:
    """The largest resident memory that this process had (Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

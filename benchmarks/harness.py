"""Times several implementations of the same work, each in its own process, interleaved.

The processes run concurrently and every round takes one call of each, so that a change of the
machine's speed affects all of them. A worker prints one JSON line per answer.
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

PAUSE = 0.3  # seconds, until the spinning threads of another process go to sleep


class Work(NamedTuple):
    """A piece of work to time.

    Attributes:
      repeat: Function that performs one call and returns when it is done.
      flops: Multiplications and additions of one call; None if they are not counted.
    """

    repeat: Callable[[], Any]
    flops: float | None = None


def serve(
    make: Callable[[], Work], peak_mib: Callable[[], int], settle: Callable[[], None]
) -> None:
    """Runs a worker: builds, makes the first call, then one call per line of standard input."""
    work = make()
    built_mib, load = resident_mib(), round(os.getloadavg()[0], 2)
    first_s = seconds_of(work.repeat)
    settle()
    _send({"first_s": first_s, "built_mib": built_mib, "load": load, "flops": work.flops})
    for _ in sys.stdin:
        _send({"s": seconds_of(work.repeat)})
    _send({"peak_mib": peak_mib()})


def seconds_of(call: Callable[[], Any]) -> float:
    """Returns the seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def interleave(
    commands: dict[str, Sequence[str]], repetitions: int, sequential: bool
) -> dict[str, dict[str, Any]]:
    """Returns {implementation: its measurements, or {"error": its last line of output}}.

    Args:
      commands: {implementation: command of its worker}.
      repetitions: Warm calls per implementation.
      sequential: Finishes one implementation before the next, if memory suffices only for one.
    """
    results: dict[str, dict[str, Any]] = {}
    for group in [[name] for name in commands] if sequential else [list(commands)]:
        workers: dict[str, _Worker] = {}
        for name in group:
            # Sequential, because the first call, with its compilation, is timed too.
            workers[name] = _start(commands[name])
            results[name] = {**_receive(workers[name]), "warm_s": []}
        for _ in range(repetitions):
            for name, worker in workers.items():
                time.sleep(PAUSE)
                results[name]["warm_s"].append(_request(worker).get("s"))
        for name, worker in workers.items():
            results[name] |= _end(worker)
    return results


class _Worker(NamedTuple):
    process: subprocess.Popen
    log: IO[str]  # a file, because an unread pipe would fill up


def _start(command: Sequence[str]) -> _Worker:
    log = tempfile.TemporaryFile("w+")  # noqa: SIM115
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return _Worker(subprocess.Popen(command, text=True, stderr=log, **pipes), log)


def _receive(worker: _Worker) -> dict[str, Any]:
    """Returns the next answer; empty if the worker has exited without one."""
    for line in worker.process.stdout or ():
        if line.startswith("{"):
            return json.loads(line)
    return {}


def _request(worker: _Worker) -> dict[str, Any]:
    if worker.process.poll() is not None or worker.process.stdin is None:
        return {}
    worker.process.stdin.write("\n")
    worker.process.stdin.flush()
    return _receive(worker)


def _end(worker: _Worker) -> dict[str, Any]:
    out, _ = worker.process.communicate()
    if not worker.process.returncode:
        return json.loads(out.splitlines()[-1])
    worker.log.seek(0)
    output = [line for line in worker.log.read().splitlines() if line.strip()]
    return {"error": output[-1] if output else f"exit status {worker.process.returncode}"}


def _send(facts: dict[str, Any]) -> None:
    print(json.dumps(facts), flush=True)


def compare(results: dict[str, dict[str, Any]], batch: int) -> dict[str, Any]:
    """Summarizes measurements: medians, quartiles, memory, speed ratios (above 1: jax is faster).

    "before" is another checkout of this project and does not count for `speed_over_best`.
    """
    entry: dict[str, Any] = {}
    flops = results.get("jax", {}).get("flops")
    if flops:
        entry["gflop"] = round(flops / 1e9, 1)
    median = {}
    for name, facts in results.items():
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
    """Yields the lines of a result file; skips a truncated last line."""
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def resident_mib() -> int:
    """Returns the resident memory of this process in MiB (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() // 2**20


def peak_resident_mib() -> int:
    """Returns the peak resident memory of this process in MiB (Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

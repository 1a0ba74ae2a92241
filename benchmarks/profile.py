"""Profile of one warm train step, by jax's profiler.

    python -m benchmarks.profile --config qata --output profile [--config.batch_size=4 ...]

Prints one JSON line per group of operations, the longest first: seconds and calls on all lines of
  the device, and their share of the step. The trace is written to the output folder, for xprof,
  TensorBoard or Perfetto. On CPUs, operations run concurrently and can be nested, so shares need
  not add up to 1.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections import defaultdict
from pathlib import Path

from benchmarks import biclip
from biclip_jax.core import config as config_lib
from biclip_jax.core import runtime

# Events of the runtime in the host plane of a CPU, which are not operations.
_RUNTIME = re.compile(
    r"^(end: |Thunk|Tfrt|Pjrt|PjRt|PjitFunction|Parse|Allocate|Execute|ThreadpoolListener|\$|.*::)"
)
LARGEST = 25


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="qata")
    parser.add_argument("--output", type=Path, required=True, help="folder of the trace")
    args, overrides = parser.parse_known_args()
    config = config_lib.load_config(args.config, overrides)
    runtime.set_xla_flags()
    runtime.keep_freed_memory()
    seconds = record(config, args.output)
    facts = {"config": config.name, "batch_size": config.batch_size, "step_s": round(seconds, 4)}
    print(json.dumps(facts | {"dtype": config.model.dtype}))
    for line in summary(newest(args.output), seconds)[:LARGEST]:
        print(json.dumps(line))


def record(config, folder: Path) -> float:
    """Writes the trace of the third step and returns its seconds."""
    import jax

    work = biclip.train_step_ours(config)
    work.repeat()
    work.repeat()
    with jax.profiler.trace(str(folder)):
        start = time.perf_counter()
        work.repeat()
        return time.perf_counter() - start


def newest(folder: Path) -> Path:
    """Returns the newest trace below a folder."""
    return max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)


def summary(path: Path, step_seconds: float) -> list[dict]:
    """Groups operations by their name without its number, the longest first."""
    from jax.profiler import ProfileData

    seconds: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    planes = list(ProfileData.from_file(str(path)).planes)
    devices = [plane for plane in planes if "/device:" in plane.name]
    for plane in devices or planes:
        for line in plane.lines:
            # GPU and TPU planes repeat operations in lines of modules, scopes and steps.
            if devices and not re.search(r"Stream|XLA Ops", line.name):
                continue
            for event in line.events:
                if _RUNTIME.match(event.name):
                    continue
                kind = re.sub(r"([._]\d+|\.clone|\.remat)+$", "", event.name)
                seconds[kind] += event.duration_ns / 1e9
                calls[kind] += 1
    return [
        {
            "operation": kind,
            "seconds": round(seconds[kind], 5),
            "calls": calls[kind],
            "share_of_step": round(seconds[kind] / step_seconds, 4),
        }
        for kind in sorted(seconds, key=lambda kind: -seconds[kind])
    ]


if __name__ == "__main__":
    main()

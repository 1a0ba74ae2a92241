"""Where the time of a train step goes: one warm step under jax's profiler.

    python -m benchmarks.profile --config qata --output profile [--config.batch_size=4 ...]

Prints one JSON line a group of operations, the longest first: seconds and calls on all of the
device's lines, and the share of the step's time that this is. The trace itself lies under the
output folder, for xprof, TensorBoard or Perfetto. On a CPU several operations run at once, and some
contain others: shares need not add up to 1.
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

# Of a CPU's host plane: what runs programs, not what an operation does.
_RUNTIME = re.compile(
    r"^(end: |Thunk|Tfrt|Pjrt|PjRt|PjitFunction|Parse|Allocate|Execute|ThreadpoolListener|\$|.*::)"
)
LARGEST = 25


def main() -> None:
    """The command line."""
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
    """Writes the trace of one step, after two others; its seconds."""
    import jax

    work = biclip.train_step_ours(config)
    work.repeat()
    work.repeat()
    with jax.profiler.trace(str(folder)):
        start = time.perf_counter()
        work.repeat()
        return time.perf_counter() - start


def newest(folder: Path) -> Path:
    """The last trace below a folder."""
    return max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)


def summary(path: Path, step_seconds: float) -> list[dict]:
    """Operations by kind (their name without its number), the longest first."""
    from jax.profiler import ProfileData

    seconds: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    planes = list(ProfileData.from_file(str(path)).planes)
    devices = [plane for plane in planes if "/device:" in plane.name]
    for plane in devices or planes:
        for line in plane.lines:
            # A GPU's or TPU's plane repeats its operations in lines of modules, scopes and steps.
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

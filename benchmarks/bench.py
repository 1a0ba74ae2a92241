"""Speed and memory of biclip_jax, PyTorch eager and `torch.compile`, interleaved in one run.

    python -m benchmarks.bench --suite cpu --output bench.jsonl
    python -m benchmarks.bench --suite cpu --cases published_train bert --batches 1
    python -m benchmarks.bench --cases bert --implementations jax --before OLDER_CHECKOUT
    python -m benchmarks.bench --table bench.jsonl --plot bench.png

All implementations get the same shapes and threads, random weights, and noise as images. Every case
is one JSON line: the medians of the warm calls, the time of the first call (including compilation),
memory after building and at its peak, and the speed ratios; above 1, ours is faster. The FLOPs of a
case are counted from our program and compared with the ceiling of the machine, which is measured
first: the faster matrix product of 4096^3, of jax or PyTorch. Cases that are already in the file
  are skipped; `--retry-failed` repeats the failed ones. Needs the extra `parity`; on a GPU, a
  PyTorch build for it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import biclip, encoders, harness, medclipseg
from benchmarks.harness import Work
from biclip_jax.core import config as config_lib
from biclip_jax.core import runtime

IMPLEMENTATIONS = ("jax", "torch", "torch_compile")
CEILING = "matmul_4096"
CONFIGS = {"published": "qata:published", "full": "qata:full"}


class Case(NamedTuple):
    """A row of the table.

    Attributes:
      name: Key of `MAKERS`.
      batch: Images or prompts per call.
      dtype: dtype of the computation; parameters are float32.
    """

    name: str
    batch: int
    dtype: str = "float32"


CPU = [
    Case(CEILING, 1),
    *(Case(name, batch) for name in ("published_train", "published_inference") for batch in (1, 4)),
    *(Case(name, batch) for name in ("vit_b16", "bert") for batch in (1, 8)),
    *(
        Case(f"medclipseg_{variant}_{work}", batch)
        for variant in medclipseg.VARIANTS
        for work, batches in medclipseg.BATCHES.items()
        for batch in batches
    ),
]
GPU = [
    *(Case(CEILING, 1, dtype) for dtype in ("bfloat16", "float32")),
    *(
        Case(f"{method}_train", batch, "bfloat16")
        for method in ("published", "full")
        for batch in (16, 64, 256)
    ),
    *(Case("published_train", batch) for batch in (16, 64)),
    *(Case("published_inference", batch, "bfloat16") for batch in (16, 64)),
    *(Case(name, batch) for name in ("vit_b16", "bert") for batch in (16, 64)),
    *(Case(f"medclipseg_clip_{work}", batch) for work in ("pass", "train") for batch in (16, 64)),
    Case("medclipseg_clip_samples", 1),
]
SUITES = {"cpu": CPU, "gpu": GPU}
SMALL = {CEILING, *(f"{method}_{kind}" for method in CONFIGS for kind in ("train", "inference"))}


def main() -> None:
    """Runs missing cases, or a single worker, or shows the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", choices=tuple(SUITES), default="cpu")
    parser.add_argument("--cases", nargs="+", help="names of cases of the suite")
    parser.add_argument("--batches", nargs="+", type=int, help="batch sizes of the suite")
    parser.add_argument("--small", action="store_true", help="only a tiny BiCLIP, for a trial")
    parser.add_argument("--repetitions", type=int, default=7, help="warm calls per implementation")
    parser.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS)
    parser.add_argument(
        "--before",
        type=Path,
        metavar="CHECKOUT",
        help="another checkout of this project to compare with",
    )
    parser.add_argument("--output", type=Path, help="file of JSON lines to append to")
    parser.add_argument("--retry-failed", action="store_true", help="also repeat failed cases")
    parser.add_argument("--table", type=Path, help="print such a file as a table and run nothing")
    parser.add_argument("--plot", type=Path, help="plot the ratios of the file to this path")
    parser.add_argument("--worker", nargs=4, metavar=("IMPLEMENTATION", "CASE", "BATCH", "DTYPE"))
    args = parser.parse_args()
    if args.worker:
        implementation, name, batch, dtype = args.worker
        return work(implementation, Case(name, int(batch), dtype), args.small)
    if not args.table:
        run(args)
    path = args.table or args.output
    if path:
        entries = latest(harness.lines_of(path))
        print(table(entries))
        if args.plot:
            plot(entries, args.plot)


def run(args: argparse.Namespace) -> None:
    """Runs every case of the suite that is not in the file; writes each line immediately."""
    cases = select_cases(SUITES[args.suite], args.cases, args.batches)
    cases = [case for case in cases if not args.small or case.name in SMALL]
    recorded = harness.lines_of(args.output) if args.output else ()
    recorded = [entry for entry in latest(recorded) if entry["small"] == args.small]
    done = [case_of(entry) for entry in recorded if not (args.retry_failed and failed(entry))]
    for case in cases:
        if case in done:
            continue
        entry = measure(case, args)
        print(json.dumps(entry), flush=True)
        if args.output:
            with args.output.open("a") as file:
                file.write(json.dumps(entry) + "\n")


def case_of(entry: dict[str, Any]) -> Case:
    """Returns the case of a line."""
    return Case(entry["case"], entry["batch"], entry["dtype"])


def failed(entry: dict[str, Any]) -> bool:
    """Returns whether a worker of this line failed."""
    return any(name.endswith("_error") for name in entry)


def latest(entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the last line of each case; a repeated case replaces a failed one."""
    return list({(case_of(entry), entry["small"]): entry for entry in entries}.values())


def select_cases(suite: Sequence[Case], names: Sequence[str] | None, batches: Any) -> list[Case]:
    """Selects cases by name and batch size; the ceilings are always included, first.

    Raises:
      SystemExit: A name is not in the suite.
    """
    known = {case.name for case in suite}
    unknown = set(names or ()) - known
    if unknown:
        sys.exit(f"--cases: {', '.join(unknown)}; expected some of {', '.join(sorted(known))}")
    return [
        case
        for case in suite
        if case.name == CEILING
        or ((not names or case.name in names) and (not batches or case.batch in batches))
    ]


def measure(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """Measures one case and returns its line."""
    command = [sys.executable, "-m", "benchmarks.bench", *["--small"] * args.small, "--worker"]
    implementations = args.implementations or IMPLEMENTATIONS
    if case.name == CEILING or case.name.endswith("samples"):  # torch.compile changes neither
        implementations = [name for name in implementations if name != "torch_compile"]
    rest = [case.name, str(case.batch), case.dtype]
    repetitions = min(args.repetitions, 3) if case.name.endswith("samples") else args.repetitions
    commands = {name: [*command, name, *rest] for name in implementations}
    if args.before:
        checkout = args.before.resolve()
        environment = ["env", "-C", str(checkout), f"PYTHONPATH={checkout}"]
        commands["before"] = [*environment, *command, "jax", *rest]
    # Two large networks do not fit into the memory of a GPU.
    results = harness.interleave(commands, repetitions, sequential=args.suite == "gpu")
    line = {"case": case.name, "batch": case.batch, "dtype": case.dtype, "small": args.small}
    return line | harness.compare(results, case.batch)


def work(implementation: str, case: Case, small: bool) -> None:
    """Runs a worker, see `harness.serve`."""
    if implementation == "jax":
        runtime.set_xla_flags()
        runtime.keep_freed_memory()
    # As after the first training step.
    settle = runtime.trim_memory if implementation == "jax" else lambda: None
    make = partial(MAKERS[case.name], case, small, implementation)
    harness.serve(make, partial(peak_mib, implementation), settle)


def peak_mib(implementation: str) -> int:
    """Returns the peak memory in MiB: of the GPU if there is one, otherwise of the process."""
    if implementation == "jax":
        import jax

        used = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        return used // 2**20 if used else harness.peak_resident_mib()
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() // 2**20
    return harness.peak_resident_mib()


def biclip_work(method: str, kind: str, case: Case, small: bool, implementation: str) -> Work:
    """Returns one method of `configs/variants.py` at 224 px and width 64."""
    config = config_lib.load_config(CONFIGS[method] + ",smoke" * small, [])
    config.batch_size, config.model.dtype = case.batch, case.dtype
    # CutMix needs two rows.
    config.views.strong.cutmix = config.views.strong.cutmix if case.batch > 1 else 0.0
    if implementation != "jax":
        return biclip.twin(config, kind, implementation == "torch_compile")
    return biclip.train_step_ours(config) if kind == "train" else biclip.inference_ours(config)


def matmul(case: Case, small: bool, implementation: str) -> Work:
    """Returns the product of two matrices, the ceiling of the machine."""
    side = 256 if small else 4096
    count = 2.0 * side**3
    if implementation == "jax":
        import jax

        x = jax.random.normal(jax.random.key(0), (side, side), case.dtype)
        product = jax.jit(lambda x: x @ x)
        return Work(lambda: product(x).block_until_ready(), count)
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    y = torch.randn(side, side, dtype=getattr(torch, case.dtype), device=device)

    def repeat() -> None:
        torch.matmul(y, y)
        if device == "cuda":
            torch.cuda.synchronize()

    return Work(repeat, count)


def encoders_work(case: Case, _small: bool, implementation: str) -> Work:
    """Returns a forward pass of an encoder with all hidden states."""
    if implementation == "jax":
        return encoders.ours(case.name, case.batch)
    return encoders.twin(case.name, case.batch, implementation == "torch_compile")


def medclipseg_work(variant: str, kind: str, case: Case, _small: bool, implementation: str) -> Work:
    """Returns a pass, a train step or 30 samples of MedCLIPSeg."""
    if implementation == "jax":
        return medclipseg.ours(variant, kind, case.batch)
    return medclipseg.twin(variant, kind, case.batch, implementation == "torch_compile")


MAKERS: dict[str, Callable[[Case, bool, str], Work]] = {
    CEILING: matmul,
    **{
        f"{method}_{kind}": partial(biclip_work, method, kind)
        for method in CONFIGS
        for kind in ("train", "inference")
    },
    **dict.fromkeys(encoders.NAMES, encoders_work),
    **{
        f"medclipseg_{variant}_{kind}": partial(medclipseg_work, variant, kind)
        for variant in medclipseg.VARIANTS
        for kind in medclipseg.BATCHES
    },
}


def ceilings(entries: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Returns {dtype: GFLOP/s} of the faster matrix product."""
    return {
        entry["dtype"]: max(entry.get(f"{name}_gflop_per_s", 0) for name in ("jax", "torch"))
        for entry in entries
        if entry["case"] == CEILING
    }


def table(entries: Sequence[dict[str, Any]]) -> str:
    """Formats lines as a Markdown table."""
    top = ceilings(entries)
    rows = [
        "| case | batch | dtype | ours, ms | torch | torch.compile | over eager | "
        "over the faster | over before | images/s | of the ceiling | "
        "first call, s: ours / torch / compile | peak MiB: ours / torch / compile |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for entry in entries:

        def of(field: str, entry: dict[str, Any] = entry) -> list[str]:
            return [str(entry.get(f"{name}_{field}", "-")) for name in IMPLEMENTATIONS]

        reached, ceiling = entry.get("jax_gflop_per_s"), top.get(entry["dtype"])
        share = f"{100 * reached / ceiling:.0f} %" if reached and ceiling else "-"
        cells = [entry["case"], str(entry["batch"]), entry["dtype"], *of("ms")]
        cells += [str(entry.get(f"speed_over_{name}", "-")) for name in ("torch", "best", "before")]
        cells += [of("images_per_s")[0], share]
        cells += [" / ".join(of("first_s")), " / ".join(of("peak_mib"))]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def plot(entries: Sequence[dict[str, Any]], path: Path) -> None:
    """Plots the speed ratios to the other implementations, one pair of bars per case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [entry for entry in entries if "speed_over_best" in entry and entry["case"] != CEILING]
    figure, axes = pyplot.subplots(figsize=(8, 0.45 * len(rows) + 1.2), layout="constrained")
    for offset, name, label in (
        (-0.2, "torch", "PyTorch, eager"),
        (0.2, "torch_compile", "torch.compile"),
    ):
        ratios = [row.get(f"speed_over_{name}", 0) for row in rows]
        positions = [i + offset for i in range(len(rows))]
        bars = axes.barh(positions, ratios, height=0.38, label=label)
        axes.bar_label(bars, [f"{ratio:.2f}" if ratio else "" for ratio in ratios], padding=2)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(
        range(len(rows)), [f"{r['case']}, batch {r['batch']}, {r['dtype']}" for r in rows]
    )
    axes.invert_yaxis()
    axes.set_xlabel("speed of biclip_jax relative to the other (above 1: biclip_jax is faster)")
    axes.margins(x=0.12)
    figure.legend(loc="outside upper right", ncols=2)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()

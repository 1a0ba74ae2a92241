"""Speed and memory: ours, PyTorch eager and `torch.compile`, in turn in one run.

    python -m benchmarks.bench --suite cpu --output bench.jsonl
    python -m benchmarks.bench --suite cpu --cases published_train bert --batches 1
    python -m benchmarks.bench --cases bert --implementations jax --before OLDER_CHECKOUT
    python -m benchmarks.bench --table bench.jsonl --plot bench.png

The same shapes and threads, random weights, noise for pictures. Every case has one JSON line: the
medians of the warm calls, the time of the first call (compilation included), memory after building
and at its peak, and the ratios; above 1 they are in our favour. The work of a case is counted from
our program, and set against this machine's own ceiling: the better matrix product of 4096^3, jax's
or PyTorch's, taken first. Cases that stand in the file already are not run again;
`--retry-failed` does so with those that failed. Needs the extra `parity`; on a GPU, PyTorch for it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import biclip, harness, medclipseg
from benchmarks import encoders as encoders
from benchmarks.harness import Work
from biclip_jax.core import config as config_lib
from biclip_jax.core import runtime

IMPLEMENTATIONS = ("jax", "torch", "torch_compile")
CEILING = "matmul_4096"
PAGES = {"published": "qata:published", "full": "qata:full"}


class Case(NamedTuple):
    """A row of the table.

    Attributes:
      name: of `MAKERS`.
      batch: pictures or sentences of one call.
      dtype: of the computation, parameters are float32.
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
SMALL = {CEILING, *(f"{method}_{kind}" for method in PAGES for kind in ("train", "inference"))}


def main() -> None:
    """Runs what is missing, or one worker of it, or shows what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", choices=tuple(SUITES), default="cpu")
    parser.add_argument("--cases", nargs="+", help="of the suite, by name")
    parser.add_argument("--batches", nargs="+", type=int, help="of the suite's")
    parser.add_argument("--small", action="store_true", help="tiny BiCLIP alone, to try it out")
    parser.add_argument("--repetitions", type=int, default=7, help="warm calls of each")
    parser.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS)
    parser.add_argument(
        "--before",
        type=Path,
        metavar="CHECKOUT",
        help="of this project, whose code takes calls in turn, too",
    )
    parser.add_argument("--output", type=Path, help="file of JSON lines that is added to")
    parser.add_argument("--retry-failed", action="store_true", help="cases of the file, too")
    parser.add_argument("--table", type=Path, help="prints such a file as tables and runs nothing")
    parser.add_argument("--plot", type=Path, help="draws the ratios of the file to this picture")
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
    """Every case of the suite that the file has not yet; one line each, at once."""
    cases = chosen(SUITES[args.suite], args.cases, args.batches)
    cases = [case for case in cases if not args.small or case.name in SMALL]
    there = harness.lines_of(args.output) if args.output else ()
    there = [entry for entry in latest(there) if entry["small"] == args.small]
    done = [case_of(entry) for entry in there if not (args.retry_failed and failed(entry))]
    for case in cases:
        if case in done:
            continue
        entry = measure(case, args)
        print(json.dumps(entry), flush=True)
        if args.output:
            with args.output.open("a") as file:
                file.write(json.dumps(entry) + "\n")


def case_of(entry: dict[str, Any]) -> Case:
    """The case of a line."""
    return Case(entry["case"], entry["batch"], entry["dtype"])


def failed(entry: dict[str, Any]) -> bool:
    """Whether a worker of this line ended before its time."""
    return any(name.endswith("_error") for name in entry)


def latest(entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last line of each case, where a failed one was measured again."""
    return list({(case_of(entry), entry["small"]): entry for entry in entries}.values())


def chosen(suite: Sequence[Case], names: Sequence[str] | None, batches: Any) -> list[Case]:
    """The suite's cases of these names and batches; always its ceilings, which come first.

    Raises:
      SystemExit: a name that the suite has not.
    """
    known = {case.name for case in suite}
    unknown = set(names or ()) - known
    if unknown:
        sys.exit(f"--cases: {', '.join(unknown)}; this suite has {', '.join(sorted(known))}")
    return [
        case
        for case in suite
        if case.name == CEILING
        or ((not names or case.name in names) and (not batches or case.batch in batches))
    ]


def measure(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """The line of one case."""
    command = [sys.executable, "-m", "benchmarks.bench", *["--small"] * args.small, "--worker"]
    asked = args.implementations or IMPLEMENTATIONS
    if case.name == CEILING or case.name.endswith("samples"):  # neither would be compiled
        asked = [name for name in asked if name != "torch_compile"]
    rest = [case.name, str(case.batch), case.dtype]
    repetitions = min(args.repetitions, 3) if case.name.endswith("samples") else args.repetitions
    commands = {name: [*command, name, *rest] for name in asked}
    if args.before:
        place = args.before.resolve()
        there = ["env", "-C", str(place), f"PYTHONPATH={place}"]
        commands["before"] = [*there, *command, "jax", *rest]
    # Two large networks at once are too much for a GPU's memory.
    found = harness.in_turn(commands, repetitions, apart=args.suite == "gpu")
    line = {"case": case.name, "batch": case.batch, "dtype": case.dtype, "small": args.small}
    return line | harness.compare(found, case.batch)


def work(implementation: str, case: Case, small: bool) -> None:
    """A worker: what `harness.answer` is sent and says, by standard input and output."""
    if implementation == "jax":
        runtime.set_xla_flags()
        runtime.keep_freed_memory()
    # As training does after its first step.
    settle = runtime.trim_memory if implementation == "jax" else lambda: None
    make = partial(MAKERS[case.name], case, small, implementation)
    harness.answer(make, partial(peak_mib, implementation), settle)


def peak_mib(implementation: str) -> int:
    """The largest memory so far: of the GPU where there is one, of the process otherwise."""
    if implementation == "jax":
        import jax

        used = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        return used // 2**20 if used else harness.peak_resident_mib()
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() // 2**20
    return harness.peak_resident_mib()


def biclip_work(method: str, kind: str, case: Case, small: bool, implementation: str) -> Work:
    """One method of `configs/variants.py` at 224 px and width 64."""
    config = config_lib.load_config(PAGES[method] + ",smoke" * small, [])
    config.batch_size, config.model.dtype = case.batch, case.dtype
    # Pairs need two rows.
    config.views.strong.cutmix = config.views.strong.cutmix if case.batch > 1 else 0.0
    if implementation != "jax":
        return biclip.twin(config, kind, implementation == "torch_compile")
    return biclip.train_step_ours(config) if kind == "train" else biclip.inference_ours(config)


def matmul(case: Case, small: bool, implementation: str) -> Work:
    """The product of two matrices: what this machine can do at all."""
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
    """A forward pass of a tower with all hidden states."""
    if implementation == "jax":
        return encoders.ours(case.name, case.batch)
    return encoders.twin(case.name, case.batch, implementation == "torch_compile")


def medclipseg_work(variant: str, kind: str, case: Case, _small: bool, implementation: str) -> Work:
    """A pass, a train step or 30 samples of MedCLIPSeg."""
    if implementation == "jax":
        return medclipseg.ours(variant, kind, case.batch)
    return medclipseg.twin(variant, kind, case.batch, implementation == "torch_compile")


MAKERS: dict[str, Callable[[Case, bool, str], Work]] = {
    CEILING: matmul,
    **{
        f"{method}_{kind}": partial(biclip_work, method, kind)
        for method in PAGES
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
    """{dtype: GFLOP/s} of the better matrix product."""
    return {
        entry["dtype"]: max(entry.get(f"{name}_gflop_per_s", 0) for name in ("jax", "torch"))
        for entry in entries
        if entry["case"] == CEILING
    }


def table(entries: Sequence[dict[str, Any]]) -> str:
    """A file's lines as a Markdown table."""
    top = ceilings(entries)
    rows = [
        "| case | batch | dtype | ours, ms | torch | torch.compile | over eager | "
        "over the better | over before | images/s | of the ceiling | "
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
    """Our speed over each of the others' as bars, one pair a case."""
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
        places = [i + offset for i in range(len(rows))]
        bars = axes.barh(places, ratios, height=0.38, label=label)
        axes.bar_label(bars, [f"{ratio:.2f}" if ratio else "" for ratio in ratios], padding=2)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(
        range(len(rows)), [f"{r['case']}, batch {r['batch']}, {r['dtype']}" for r in rows]
    )
    axes.invert_yaxis()
    axes.set_xlabel("speed of biclip_jax over the other's (right of 1: ours is faster)")
    axes.margins(x=0.12)
    figure.legend(loc="outside upper right", ncols=2)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()

"""Summarizes scores on the training dataset and on other datasets (domain generalization).

    biclip evaluate --workdir runs/busi --split test --surface-metrics
    biclip evaluate --workdir runs/busi --source BUSUC_DIR --surface-metrics --no-baselines
    biclip generalization runs/busi runs/kvasir --output generalization.json

Reads the results of `biclip evaluate` in WORKDIR/evaluation: `test` is in domain (ID), every
`NAME-test` of --source is out of domain (OOD). Prints one row each, the means over the ID and the
OOD rows, and the harmonic mean (HM) of both, as MedCLIPSeg reports them (arXiv 2602.20423).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from biclip_jax.core import files, runtime
from biclip_jax.core.errors import UserError
from biclip_jax.evaluation.report import tables

ID, OOD, HM = "ID", "OOD", "HM"
# The last two exist if every evaluation used --surface-metrics.
METRICS = ("dice_global", "dice_mean", "dsc", "nsd_2d")


def compare(workdirs: Sequence[Path]) -> dict[str, Any]:
    """Collects the scores of all runs and averages them.

    Args:
      workdirs: Work directories of training runs, each on another dataset.

    Returns:
      rows: {workdir, trained_on, tested_on, domain, num_images, and each of `METRICS` that all
      rows have, 0 to 1}; mean: {ID, OOD, HM: {metric: value}}.

    Raises:
      UserError: No scores on the run's own test split or on another dataset, or an unreadable file.
    """
    rows = [row for workdir in workdirs for row in _rows(workdir)]
    if all(row["domain"] == ID for row in rows):
        raise UserError(
            f"{', '.join(map(str, workdirs))}: no scores on other datasets; create them with "
            f"biclip evaluate --workdir {workdirs[0]} --source DIR --no-baselines"
        )
    metrics = [name for name in METRICS if all(name in row for row in rows)]
    if not metrics:
        tested = ", ".join(f"{row['workdir']} on {row['tested_on']}" for row in rows)
        raise UserError(f"{tested}: no common metric; evaluate them again")
    facts = ("workdir", "trained_on", "tested_on", "domain", "num_images")
    rows = [{name: row[name] for name in (*facts, *metrics)} for row in rows]
    return {"rows": rows, "mean": means(rows, metrics)}


def means(rows: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> dict[str, dict[str, float]]:
    """Returns the mean over the rows of each domain, and the harmonic mean of both.

    Args:
      rows: Rows of both domains.
      metrics: Metrics that every row has.
    """
    mean = {
        domain: {
            name: statistics.fmean(row[name] for row in rows if row["domain"] == domain)
            for name in metrics
        }
        for domain in (ID, OOD)
    }
    both = {name: statistics.harmonic_mean([mean[ID][name], mean[OOD][name]]) for name in metrics}
    return {**mean, HM: both}


def table(results: Mapping[str, Any]) -> str:
    """Formats the rows and means as a table, in percent."""
    metrics = list(results["mean"][ID])

    def percent(scores: Mapping[str, float]) -> dict[str, str]:
        return {name: f"{100 * scores[name]:.2f}" for name in metrics}

    lines = [
        {**{name: str(value) for name, value in row.items()}, **percent(row)}
        for row in results["rows"]
    ]
    for domain, scores in results["mean"].items():
        summary = "harmonic mean" if domain == HM else f"mean, {domain}"
        lines.append(dict.fromkeys(lines[0], "") | {"trained_on": summary, **percent(scores)})
    columns = ("trained_on", "tested_on", "domain", "num_images", *metrics)
    return tables.format_table(lines, columns)


def _rows(workdir: Path) -> list[dict[str, Any]]:
    folder = workdir / "evaluation"
    own = folder / "test" / "results.json"
    if not own.is_file():
        raise UserError(
            f"{own}: missing; evaluate the run's own test split first: biclip evaluate --workdir "
            f"{workdir} --split test"
        )
    trained_on, scores = _read(own)
    rows = [{"tested_on": trained_on, "domain": ID, **scores}]
    for path in sorted(folder.glob("*-test/results.json")):
        tested_on, scores = _read(path)
        rows.append({"tested_on": tested_on, "domain": OOD, **scores})
    return [{"workdir": str(workdir), "trained_on": trained_on, **row} for row in rows]


def _read(path: Path) -> tuple[str, dict[str, float]]:
    """Returns the dataset's name, the number of images, and the scores with original prompts."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        data, original = results["data"], results["conditions"]["original"]
        scores = {**original, **results.get("surface_metrics", {})}
        if data == "folder":
            data = Path(results["config"]["data"]["source"]).name
        metrics = {name: float(scores[name]) for name in METRICS if name in scores}
        return data, {"num_images": int(original["num_images"]), **metrics}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not a result file of evaluate ({error}); evaluate again"
        ) from error


def main(argv: list[str] | None = None) -> None:
    """Runs `biclip generalization`."""
    runtime.run_command(_main, argv)


def _main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="biclip generalization",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "workdirs", nargs="+", type=Path, help="work directories, one per training dataset"
    )
    parser.add_argument("--output", type=Path, help="JSON file for rows and means")
    args = parser.parse_args(argv)
    results = compare(args.workdirs)
    print(table(results))
    if args.output:
        with files.atomic_write(args.output) as part:
            part.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])

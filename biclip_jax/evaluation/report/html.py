"""HTML report of a run, from the files in its work directory.

Names and prompts come from untrusted files, so the template escapes everything. Images are
embedded: the page loads nothing from elsewhere.
"""

from __future__ import annotations

import base64
import contextlib
import csv
import json
import os
import shlex
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from biclip_jax.core import files
from biclip_jax.core.errors import UserError
from biclip_jax.evaluation.report import figures, plots, published, tables

TEMPLATE = "report.html.jinja"
KINDS = ("dice_global", "dice_mean", "iou_global", "iou_mean")
IMAGES = {
    "overlays.png": "Best, median and worst images by Dice: the reference is outlined in green, "
    "the prediction filled in orange.",
    "uncertainty.png": "Entropy of the predicted probability; yellow is most uncertain. It does "
    "not show where the model is confidently wrong.",
}
PLOTS = {"calibration": "reliability.png", "corruptions": "corruptions.png"}
PNG = b"\x89PNG\r\n\x1a\n"


def write_report(workdir: Path, path: Path, version: str) -> Path:
    """Writes the report of the run in `workdir` and returns `path`.

    Args:
      workdir: Work directory of a training run.
      path: Path of the HTML file.
      version: Version of biclip_jax, shown at the end.

    Raises:
      UserError: `workdir` is not the work directory of a run, or a file in it is corrupt.
    """
    page = render({**contents(workdir), "version": version})
    with files.atomic_write(path) as part:
        part.write_text(page, encoding="utf-8")
    return path


def render(page: Mapping[str, Any]) -> str:
    """Renders the report from the result of `contents` and the version."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "interval": _interval, "figure": _figure}
    return environment.get_template(TEMPLATE).render(page, kinds=KINDS)


def contents(workdir: Path) -> dict[str, Any]:
    """Reads the contents of the report from a work directory.

    Raises:
      UserError: See `write_report`.
    """
    config = _read_json(workdir / "config.json", "give the --workdir of a training run")
    with _corrupt_file_errors(workdir / "config.json", "give the --workdir of a training run"):
        title, facts, data = str(config["name"]), _facts(config), str(config["data"]["name"])
        share = 100 * float(config["data"].get("label_fraction", 1.0))
    missing: list[dict[str, str]] = []
    labels = _labels(workdir, missing)
    evaluations = [_evaluation(folder, workdir, data) for folder in _folders(workdir)]
    if not evaluations:
        missing.append({"what": "Scores on a split", "command": _command("evaluate", workdir)})
    for evaluation in evaluations:
        missing += evaluation["missing"]
    return {
        "title": title,
        "facts": facts | labels,
        "evaluations": evaluations,
        "published": _published(data, share, evaluations),
        "corrupted": _corrupted(data, evaluations),
        "curves": _curves(workdir, missing),
        "config": json.dumps(_without_paths(config), indent=2),
        "missing": missing,
    }


def _facts(config: Mapping[str, Any]) -> dict[str, Any]:
    model, data = config["model"], config["data"]
    if model.get("kind") == "medclipseg":
        architecture = {"encoders": model["variant"], "adapters": model["num_layers"]}
        pretrained = model["encoders"]["weights"]
        architecture["weights"] = "pretrained" if pretrained else "random initialization"
    else:
        architecture = {"U-Net width": model["width"], "text encoder": model["text"]["encoder"]}
        architecture["image encoder"] = model.get("image", {}).get("encoder", "cnn")
    return {
        "data": data["name"],
        "image size": f"{model['image_size']} px",
        **architecture,
        "prompts in training": data["text_condition"],
        "batch size": config["batch_size"],
        "seed": config["seed"],
    }


def _labels(workdir: Path, missing: list[dict[str, str]]) -> dict[str, Any]:
    path = workdir / "labels.json"
    if not path.is_file():
        missing.append({"what": "Number of labelled images", "command": _train(workdir)})
        return {}
    labels = _read_json(path, "train again")
    with _corrupt_file_errors(path, "train again"):
        return {
            "labelled training images": int(labels["num_images"]),
            "labelled patients": int(labels["num_patients"]),
        }


def _train(workdir: Path) -> str:
    return _command("train", workdir, "--config", "NAME")


def _command(command: str, workdir: Path, *options: str) -> str:
    return shlex.join(["biclip", command, "--workdir", str(workdir), *options])


def _folders(workdir: Path) -> list[Path]:
    """Returns the evaluation folders: the test split first, the test after training last."""
    folders = sorted(path.parent for path in workdir.glob("evaluation/*/results.json"))
    folders.sort(key=lambda folder: folder.name != "test")
    after_training = workdir / "test"
    return [*folders, after_training] if (after_training / "results.json").is_file() else folders


def _evaluation(folder: Path, workdir: Path, data: str) -> dict[str, Any]:
    """Reads one evaluation: scores, calibration, corruptions, cases, images and missing parts.

    Args:
      folder: Folder of the evaluation.
      workdir: Work directory of the run.
      data: Name of the training dataset.
    """
    path = folder / "results.json"
    fix = f"delete it; {_command('evaluate', workdir)} writes it again"
    results = _read_json(path, fix)
    after_training = folder == workdir / "test"
    with _corrupt_file_errors(path, fix):
        split = "test" if after_training else str(results["split"])
        section = {
            "name": "Test after training" if after_training else f"Evaluation: {folder.name}",
            "split": split,
            "subset": int(results.get("subset") or 0),
            "data": "" if after_training else str(results["data"]),
            "size": str(results["size"]),
            "rows": _score_rows(results),
            "unavailable": [str(name) for name in results.get("unavailable", [])],
            "tta": _tta(results),
            "members": _uncertainty(results, "ensemble_uncertainty"),
            "sampling": _uncertainty(results, "sampling"),
            "surface_metrics": dict(results.get("surface_metrics", {})),
            "flip_consistency": _flip_consistency(results),
            "calibration": _calibration(results),
            "corruptions": _corruptions(results),
            "original": {kind: float(results["conditions"]["original"][kind]) for kind in KINDS},
            "num_images": int(results["conditions"]["original"]["num_images"]),
        }
    section["cases"] = _cases(folder / "per_image.csv", fix)
    section["images"] = [
        {"name": name, "caption": caption, "uri": _data_uri(folder / name)}
        for name, caption in IMAGES.items()
        if (folder / name).is_file()
    ]
    for key, name in PLOTS.items():
        uri = _data_uri(folder / name) if (folder / name).is_file() else ""
        section[f"{key}_plot"] = uri if section[key] else ""
    section["missing"] = [] if after_training else _missing_parts(section, folder, workdir, data)
    return section


def _missing_parts(
    section: Mapping[str, Any], folder: Path, workdir: Path, data: str
) -> list[dict[str, str]]:
    command = _evaluate_command(section, folder, workdir, data)
    options = {
        "calibration": "--calibration",
        "corruptions": "--corruptions all",
        "tta": "--tta",
        "flip_consistency": "--flip-consistency",
    }
    missing = [
        {"what": f"{section['name']}: {key}", "command": f"{command} {option}"}
        for key, option in options.items()
        if not section[key]
    ]
    present = {image["name"] for image in section["images"]}
    files = [name for name in IMAGES if name not in present]
    files += [] if section["cases"] else ["per_image.csv"]
    missing += [{"what": f"{section['name']}: {name}", "command": command} for name in files]
    for key, name in PLOTS.items():
        if section[key] and not section[f"{key}_plot"]:
            again = f"{command} {options[key]}"
            missing.append({"what": f"{section['name']}: {name}", "command": again})
    return missing


def _evaluate_command(section: Mapping[str, Any], folder: Path, workdir: Path, data: str) -> str:
    """Returns the command that evaluates the same images into the same folder."""
    options, name = ["--split", section["split"]], section["split"]
    other_dataset = f"{section['data']}-{name}"
    if section["data"] != data or folder.name.startswith(other_dataset):
        options, name = [*options, "--source", "DIR"], other_dataset
    if section["subset"]:
        options += ["--subset", str(section["subset"])]
        name += f"-{section['subset']}"
    if folder.name != name:
        options += ["--output", str(folder)]
    if not any(row["group"] == "baseline" for row in section["rows"]):
        options.append("--no-baselines")
    return _command("evaluate", workdir, *options)


def _score_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    groups = {
        "condition": results["conditions"],
        "members": results.get("members", {}),
        "views": {"original_tta": results["tta"]["original_tta"]} if "tta" in results else {},
        "baseline": results.get("baselines", {}),
    }
    return [
        {"name": str(name), "group": group, **_scores(cell)}
        for group, cells in groups.items()
        for name, cell in cells.items()
    ]


def _scores(cell: Mapping[str, Any]) -> dict[str, Any]:
    intervals = {}
    for kind in KINDS:
        low, high = cell["interval_95"][kind]
        intervals[kind] = [float(low), float(high)]
    values = {kind: float(cell[kind]) for kind in KINDS}
    return {"num_images": int(cell["num_images"]), "interval": intervals, **values}


def _tta(results: Mapping[str, Any]) -> dict[str, Any] | None:
    uncertainty = _uncertainty(results, "tta")
    return uncertainty and {"views": [str(v) for v in results["tta"]["views"]], **uncertainty}


def _uncertainty(results: Mapping[str, Any], key: str) -> dict[str, float | None] | None:
    """Reads the uncertainty of a mean over views, samples or ensemble members."""
    numbers = ("mean_entropy", "mean_mutual_information", "error_auroc")
    return {n: _number(results[key][n]) for n in numbers} if key in results else None


def _flip_consistency(results: Mapping[str, Any]) -> dict[str, float] | None:
    if "flip_consistency" not in results:
        return None
    return {kind: float(results["flip_consistency"][kind]) for kind in KINDS}


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _calibration(results: Mapping[str, Any]) -> dict[str, Any] | None:
    if "calibration" not in results:
        return None
    section = results["calibration"]
    names = ("ece", "brier", "nll", "error_auroc")
    return {
        "temperature": float(section["temperature"]),
        "fitted_on": str(section["fitted_on"]),
        "at_limit": bool(section["at_limit"]),
        "num_pixels": int(section["num_pixels"]),
        **{when: {n: _number(section[when][n]) for n in names} for when in ("before", "after")},
    }


def _corruptions(results: Mapping[str, Any]) -> dict[str, Any] | None:
    if "corruptions" not in results:
        return None
    cells = {name: c for name, c in results["corruptions"].items() if name != "mean"}
    severities = sorted({int(severity) for rows in cells.values() for severity in rows})
    rows: dict[str, dict[str, list[float | None]]] = {
        kind: {
            name: [float(c[str(s)][kind]) if str(s) in c else None for s in severities]
            for name, c in cells.items()
        }
        for kind in ("dice_global", "dice_mean")
    }
    return {"severities": severities, **rows}


def _cases(path: Path, fix: str) -> list[dict[str, Any]]:
    """Returns the best, median and worst lines of per_image.csv, or none without the file."""
    if not path.is_file():
        return []
    with _corrupt_file_errors(path, fix), open(path, newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
        scores = [float(line["dice_original"]) for line in lines]
        return [
            {
                "band": band,
                "id": tables.read_csv_cell(lines[row]["id"]),
                "text": tables.read_csv_cell(lines[row]["text"]),
                "dice": scores[row],
            }
            for band, rows in figures.bands(scores).items()
            for row in rows
        ]


def _published(
    data: str, share: float, evaluations: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Returns published results on the dataset with this run among them, best first.

    Args:
      data: Name of the dataset.
      share: Share of its labels that the run was trained on, in percent.
      evaluations: Evaluations of the run.
    """
    ours = _on_test(data, evaluations)
    rows = [{**row._asdict(), "ours": False} for row in published.published_on(data)]
    if not rows or ours is None:
        return []
    for kind in ("global", "mean"):
        rows.append(
            {
                "method": "this run",
                "kind": kind,
                "dice": 100 * ours["original"][f"dice_{kind}"],
                "iou": 100 * ours["original"][f"iou_{kind}"],
                "num_images": ours["num_images"],
                "labels": share,
                "source": ours["name"],
                "ours": True,
            }
        )
    return sorted(rows, key=lambda row: (-row["labels"], row["kind"], -row["dice"]))


def _on_test(data: str, evaluations: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Returns the evaluation on the full test split of the training dataset."""
    full_split = (e for e in evaluations if e["split"] == "test" and not e["subset"])
    return next((e for e in full_split if e["data"] in ("", data)), None)


def _corrupted(data: str, evaluations: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns published results on corrupted images with the score of this run per setting."""
    ours = _on_test(data, [e for e in evaluations if e["corruptions"]])
    if ours is None:
        return []
    rows = []
    for row in published.published_on_corrupted(data):
        section, value = ours["corruptions"], None
        if row.severity in section["severities"] and row.name in section["dice_global"]:
            column = section["severities"].index(row.severity)
            value = section["dice_global"][row.name][column]
        rows.append({**row._asdict(), "ours": value})
    return rows


def _curves(workdir: Path, missing: list[dict[str, str]]) -> str:
    path = workdir / "metrics.jsonl"
    lines = _metrics(path) if path.is_file() else []
    if not lines:
        missing.append({"what": "Training curves", "command": _train(workdir)})
        return ""
    with tempfile.TemporaryDirectory() as folder:
        png = Path(folder) / "curves.png"
        with _corrupt_file_errors(path, "train again"):
            plots.plot_curves(lines, png)
        return _data_uri(png)


def _metrics(path: Path) -> list[dict[str, Any]]:
    """Reads the lines of metrics.jsonl; skips a last line cut off by a crash."""
    texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
    lines = []
    for number, text in enumerate(texts, start=1):
        try:
            lines.append(json.loads(text))
        except ValueError as error:
            if number < len(texts):
                raise UserError(
                    f"{path}: line {number} is not JSON ({error}); remove it or train again"
                ) from error
    return lines


def _without_paths(value: Any) -> Any:
    """Replaces paths in a config by their last component, because reports are shared."""
    if isinstance(value, Mapping):
        return {k: _without_paths(v) for k, v in value.items() if k != "cache_dir"}
    return Path(value).name if isinstance(value, str) and os.sep in value else value


def _data_uri(path: Path) -> str:
    content = path.read_bytes()
    if not content.startswith(PNG):
        raise UserError(f"{path}: not a PNG image; delete it or evaluate again")
    return "data:image/png;base64," + base64.b64encode(content).decode()


def _read_json(path: Path, fix: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}); {fix}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: found a {type(value).__name__}; expected a JSON object; {fix}")
    return value


@contextlib.contextmanager
def _corrupt_file_errors(path: Path, fix: str) -> Iterator[None]:
    """Raises a UserError for missing fields and values of another type."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, csv.Error) as error:
        problem = f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: not in the format of biclip_jax ({problem}); {fix}") from error


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def _interval(ends: Sequence[float]) -> str:
    return f"{100 * ends[0]:.2f} to {100 * ends[1]:.2f}"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"

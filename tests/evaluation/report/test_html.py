"""HTML report of a run: contents, missing parts, escaping, damaged files."""

import copy
import json
import shlex
from html.parser import HTMLParser

import pytest

from biclip_jax.core import files
from biclip_jax.core.errors import UserError
from biclip_jax.evaluation import runner
from biclip_jax.evaluation.metrics import calibration, overlap
from biclip_jax.evaluation.report import html, plots, tables
from biclip_jax.evaluation.robustness import flip_consistency
from tests.evaluation import test_runner as stub

HOSTILE = """<script>alert("1")</script>' onload='x"""
BAD_ID = "=<img src=http://evil.example/x.png>"
CONFIG = {
    "name": "mine & <b>yours</b>",
    "seed": 3,
    "batch_size": 4,
    "data": {
        "name": "qata_cov19",
        "source": "/home/somebody/qata",
        "cache_dir": "/scratch/somebody/",
        "text_condition": "original",
        "label_fraction": 0.25,
    },
    "model": {"image_size": 8, "width": 2, "text": {"encoder": "scratch", "weights": ""}},
}


class ParsedPage(HTMLParser):
    """Tags, links, event handlers and text of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.links, self.words = [], [], []
        self.handlers, self.skipping = [], False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.skipping = tag == "style"
        self.links += [v for k, v in attrs if k in ("src", "href", "srcset", "data", "action")]
        self.handlers += [k for k, _ in attrs if k.startswith("on")]

    def handle_data(self, data):
        if not self.skipping:
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def predict(batch):
    return 0.05 + 0.9 * stub.predict(batch)


def evaluated(folder, **extra):
    """Writes the files of an evaluation of the stub predictor; returns the results."""
    records = [
        {**r, "id": BAD_ID, "text": HOSTILE} if i == 0 else r for i, r in enumerate(stub.RECORDS)
    ]
    outcome = runner.evaluate(
        predict,
        stub.encode,
        records,
        folder=folder,
        conditions=("original", "empty", "contradictory"),
        batch_size=4,
        extra={"split": "test", "data": "qata_cov19", "subset": None, **extra},
    )
    counts = runner.pixel_histogram(predict, stub.encode, records, 4)
    outcome["calibration"] = calibration.report(counts, counts)
    plots.plot_reliability(outcome["calibration"], folder / "reliability.png")
    members = runner.evaluate_members([predict, stub.predict], stub.encode, records, batch_size=4)
    outcome |= members
    counts = flip_consistency.count_agreement(predict, stub.encode, records, 4)
    outcome["flip_consistency"] = overlap.summarize(counts)
    outcome["tta"] = runner.evaluate_tta(predict, stub.encode, records, batch_size=4)
    outcome["baselines"] = runner.image_free_results(records, records, records)
    corruption_counts = runner.evaluate_corruptions(
        lambda corruption: predict,
        stub.encode,
        records,
        names=("motion_blur", "gamma"),
        severities=(2, 4),
        batch_size=4,
    )
    outcome["corruptions"] = runner.corruption_results(corruption_counts)
    cells = {name: rows for name, rows in outcome["corruptions"].items() if name != "mean"}
    original = outcome["conditions"]["original"]
    plots.plot_corruptions(cells, original, folder / "corruptions.png")
    files.write_json(folder / "results.json", outcome)
    return outcome


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """(work directory, results) of a run with all parts of the report."""
    workdir = tmp_path_factory.mktemp("full")
    (workdir / "config.json").write_text(json.dumps(CONFIG))
    (workdir / "labels.json").write_text('{"num_images": 1429, "num_patients": 987, "ids": []}')
    lines = [
        {"step": step, "split": split, "loss": 1 / step, "dice_global": 0.5, "dice_mean": 0.4}
        for step in (1, 2)
        for split in ("train", "val")
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "spl'
    (workdir / "metrics.jsonl").write_text(text)
    return workdir, evaluated(workdir / "evaluation/test")


@pytest.fixture(scope="module")
def page(full):
    workdir, _ = full
    path = html.write_report(workdir, workdir / "report.html", "9.9")
    return path.read_text(encoding="utf-8")


def test_the_page_shows_the_numbers_of_the_results(page, full):
    outcome, text = full[1], ParsedPage(page).text
    scores = {**outcome["conditions"], **outcome["baselines"], **outcome["members"]}
    scores["original_tta"] = outcome["tta"]["original_tta"]
    for name, cell in scores.items():
        low, high = cell["interval_95"]["dice_global"]
        start = f"{name} {cell['num_images']} {100 * cell['dice_global']:.2f} "
        assert start + f"{100 * low:.2f} to {100 * high:.2f}" in text
        for kind in ("dice_mean", "iou_global", "iou_mean"):
            low, high = cell["interval_95"][kind]
            assert f"{100 * cell[kind]:.2f} {100 * low:.2f} to {100 * high:.2f}" in text
    for when, label in (("before", "uncalibrated"), ("after", "temperature scaling")):
        row = [outcome["calibration"][when][n] for n in ("ece", "brier", "nll", "error_auroc")]
        assert " ".join([label, *(f"{value:.4f}" for value in row)]) in text
    assert f"Temperature {outcome['calibration']['temperature']:.4f}" in text
    original = outcome["conditions"]["original"]
    for kind in ("dice_global", "dice_mean"):
        cells = [outcome["corruptions"]["gamma"][s][kind] for s in ("2", "4")]
        row = [f"{100 * value:.2f}" for value in (original[kind], *cells)]
        assert " ".join(["gamma", *row]) in text
    assert "1429" in text and "987" in text and "9.9" in text
    assert "contradictory" in text  # unavailable
    uncertainty = outcome["ensemble_uncertainty"]
    assert f"Ensemble: mean entropy {uncertainty['mean_entropy']:.4f} nats" in text
    assert f"{uncertainty['mean_mutual_information']:.4f} is disagreement between members" in text
    swapped = [100 * outcome["flip_consistency"][kind] for kind in ("dice_global", "dice_mean")]
    assert "Dice global {:.2f}, Dice mean {:.2f}".format(*swapped) in text


def test_the_facts_name_both_encoders(page, tmp_path):
    text = ParsedPage(page).text
    assert "text encoder scratch" in text
    assert "image encoder cnn" in text  # default of runs without the field
    model = {**CONFIG["model"], "image": {"encoder": "clip_rn50"}}
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "model": model}))
    assert html.contents(tmp_path)["facts"]["image encoder"] == "clip_rn50"


def test_the_page_loads_nothing_runs_no_scripts_and_escapes_names(page):
    parsed = ParsedPage(page)
    assert parsed.links
    assert all(link.startswith("data:image/png;base64,") for link in parsed.links)
    assert len(parsed.links) == 5  # overlays, uncertainty, reliability, corruptions, curves
    assert not parsed.handlers
    assert not {"script", "iframe", "object", "link", "b"} & set(parsed.tags)
    for text in (HOSTILE, BAD_ID, "mine & <b>yours</b>"):
        assert text in parsed.text
    assert "<script" not in page and "url(" not in page and "@import" not in page


def test_the_page_contains_no_local_paths(page):
    assert "somebody" not in page and "scratch/" not in page
    assert '"source": "qata"' in ParsedPage(page).text


def test_published_results_are_shown_with_those_of_the_run(page, full):
    original, text = full[1]["conditions"]["original"], ParsedPage(page).text
    assert "BiCLIP 90.59 82.81 global 100 2113 arXiv 2603.00156" in text
    for kind in ("global", "mean"):
        dice, iou = (100 * original[f"{name}_{kind}"] for name in ("dice", "iou"))
        assert f"this run {dice:.2f} {iou:.2f} {kind} 25 11 Evaluation: test" in text
    blur = full[1]["corruptions"]["motion_blur"]["2"]["dice_global"]
    assert f"motion blur, kernel 7 BiCLIP 88.01 {100 * blur:.2f} arXiv" in text
    assert "Gaussian noise, sd 0.1 BiCLIP 87.23 - arXiv" in text  # not evaluated in this run


@pytest.mark.parametrize(
    ("data", "extra"),
    [
        ("kvasir_seg", {}),
        ("qata_cov19", {"subset": 11}),
        ("qata_cov19", {"split": "val"}),
        ("qata_cov19", None),
    ],
)
def test_no_published_results_for_other_data_or_subsets(tmp_path, full, data, extra):
    config = {**CONFIG, "data": {**CONFIG["data"], "name": data}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    changed = {"data": "elsewhere"} if extra is None else {"data": data, **extra}
    folder = tmp_path / "evaluation/test"
    folder.mkdir(parents=True)
    files.write_json(folder / "results.json", {**full[1], **changed})
    contents = html.contents(tmp_path)
    assert contents["published"] == contents["corrupted"] == []


def test_missing_parts_are_listed_with_their_commands(tmp_path, full):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    text = ParsedPage(html.render({**html.contents(tmp_path), "version": "1"})).text
    assert f"Scores on a split: biclip evaluate --workdir {tmp_path}" in text
    assert "Training curves: biclip train" in text
    assert "Number of labelled images" in text
    optional = ("calibration", "tta", "corruptions", "flip_consistency")
    required = {k: v for k, v in full[1].items() if k not in optional}
    for name in ("evaluation/val", "test"):
        (tmp_path / name).mkdir(parents=True)
        files.write_json(tmp_path / name / "results.json", {**required, "split": "val"})
    (tmp_path / "evaluation/other-test").mkdir()
    elsewhere = {**full[1], "data": "other"}
    files.write_json(tmp_path / "evaluation/other-test/results.json", elsewhere)
    missing = {part["what"]: part["command"] for part in html.contents(tmp_path)["missing"]}
    # An evaluation on another dataset with complete results but without plots.
    reliability = missing["Evaluation: other-test: reliability.png"]
    assert reliability.endswith("--split test --source DIR --calibration")
    assert missing["Evaluation: other-test: corruptions.png"].endswith("DIR --corruptions all")
    assert "Evaluation: val: reliability.png" not in missing
    assert "Scores on a split" not in missing
    assert missing["Evaluation: val: calibration"].endswith("--split val --calibration")
    assert missing["Evaluation: val: flip_consistency"].endswith("--split val --flip-consistency")
    assert missing["Evaluation: val: corruptions"].endswith("--split val --corruptions all")
    assert missing["Evaluation: val: tta"].endswith("--split val --tta")
    assert {"Evaluation: val: overlays.png", "Evaluation: val: per_image.csv"} <= set(missing)
    assert not any("Test after training" in what for what in missing)


def test_commands_evaluate_the_same_images_into_the_same_folder(tmp_path, full):
    workdir = tmp_path / "my run; $HOME"
    (workdir / "evaluation").mkdir(parents=True)
    (workdir / "config.json").write_text(json.dumps(CONFIG))
    partial = {k: v for k, v in full[1].items() if k not in ("calibration", "baselines")}
    for name in ("test-3", "mine", "qata_cov19-test-3"):
        (workdir / "evaluation" / name).mkdir()
        results = {**partial, "subset": 3}
        files.write_json(workdir / "evaluation" / name / "results.json", results)
    missing = {part["what"]: part["command"] for part in html.contents(workdir)["missing"]}
    start = ["biclip", "evaluate", "--workdir", str(workdir), "--split", "test"]
    more = {
        "test-3": [],
        "mine": ["--output", str(workdir / "evaluation/mine")],
        "qata_cov19-test-3": [],
    }
    for name, options in more.items():
        source = ["--source", "DIR"] if name.startswith("qata") else []
        expected = [*start, *source, "--subset", "3", *options, "--no-baselines", "--calibration"]
        assert shlex.split(missing[f"Evaluation: {name}: calibration"]) == expected
    train = shlex.split(missing["Training curves"])
    assert train[-4:] == ["--workdir", str(workdir), "--config", "NAME"]


def test_a_complete_run_has_no_missing_parts(full):
    assert html.contents(full[0])["missing"] == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", None),
        ("config.json", "{"),
        ("config.json", "[]"),
        ("config.json", '{"name": "x"}'),
        ("config.json", json.dumps({k: v for k, v in CONFIG.items() if k != "name"})),
        ("config.json", json.dumps({**CONFIG, "data": "here"})),
        ("config.json", json.dumps({**CONFIG, "data": {**CONFIG["data"], "label_fraction": "x"}})),
        ("config.json", json.dumps({**CONFIG, "model": {**CONFIG["model"], "image": "cnn"}})),
        ("labels.json", '{"num_images": Infinity, "num_patients": 1}'),
        ("labels.json", '{"num_images": "many"}'),
        ("metrics.jsonl", '{"step": 1\n{"step": 2, "split": "val"}\n'),
        ("metrics.jsonl", "[1]\n[2]\n"),
        ("evaluation/test/results.json", "null"),
        ("evaluation/test/results.json", '{"split": "test"}'),
        ("evaluation/test/per_image.csv", "id,text\na,b\n"),
        ("evaluation/test/per_image.csv", "id,text,dice_original\na,b,high\n"),
        ("evaluation/test/overlays.png", "<svg/>"),
    ],
)
def test_errors_name_the_damaged_file(tmp_path, full, name, content):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    folder = tmp_path / "evaluation/test"
    folder.mkdir(parents=True)
    files.write_json(folder / "results.json", full[1])
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        html.write_report(tmp_path, tmp_path / "report.html", "1")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("tta", "mean_entropy"), "high"),
        (("tta", "error_auroc"), [1]),
        (("ensemble_uncertainty", "mean_entropy"), "high"),
        (("flip_consistency", "dice_mean"), "high"),
        (("members", "member_0", "dice_mean"), None),
        (("calibration", "before", "ece"), "high"),
        (("calibration", "after", "nll"), {}),
        (("calibration", "num_pixels"), float("inf")),
        (("conditions", "original", "num_images"), float("inf")),
        (("conditions", "original", "interval_95", "dice_mean"), [0.5]),
        (("subset",), "some"),
    ],
)
def test_rejects_results_with_invalid_values(tmp_path, full, keys, value):
    results = copy.deepcopy(full[1])
    owner = results
    for name in keys[:-1]:
        owner = owner[name]
    owner[keys[-1]] = value
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "evaluation/test").mkdir(parents=True)
    files.write_json(tmp_path / "evaluation/test/results.json", results)
    with pytest.raises(UserError, match=r"results\.json: not in the format of biclip_jax"):
        html.write_report(tmp_path, tmp_path / "report.html", "1")


@pytest.mark.parametrize(
    "field", ["conditions", "calibration", "tta", "corruptions", "members", "flip_consistency"]
)
def test_rejects_results_with_invalid_sections(tmp_path, full, field):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    folder = tmp_path / "evaluation/test"
    folder.mkdir(parents=True)
    files.write_json(folder / "results.json", {**full[1], field: [1, 2]})
    with pytest.raises(UserError, match=r"results\.json: not in the format of biclip_jax"):
        html.contents(tmp_path)


def test_cases_are_the_bands_of_per_image_csv(full):
    evaluation = html.contents(full[0])["evaluations"][0]
    cases = evaluation["cases"]
    dice = {r["id"]: r for r in cases}
    assert [c["band"] for c in cases] == ["best"] * 3 + ["median"] * 3 + ["worst"] * 3
    scores = [c["dice"] for c in cases]
    assert scores[:3] == sorted(scores, reverse=True)[:3]
    assert min(scores) == scores[6] and set(dice) <= {BAD_ID, *(f"p{i}" for i in range(11))}
    assert tables.read_csv_cell("'" + BAD_ID) == BAD_ID
    assert tables.read_csv_cell("'tis text") == "'tis text"

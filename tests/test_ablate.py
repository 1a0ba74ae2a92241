"""The ablate command: which runs it starts, which it skips, and the table of results."""

import json
import os
import signal
import statistics
import threading
import time
from pathlib import Path

import pytest

from biclip_jax import ablate
from biclip_jax.core import config as config_lib
from biclip_jax.evaluation.report import comparison

SCORES = {"unet": {0: 0.5, 1: 0.7}, "full": {0: 0.8, 1: 0.9}}
needs_affinity = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="requires CPU affinity"
)


class Commands(list):
    """Commands of the training runs; `evaluations` holds those of the evaluations."""

    def __init__(self, evaluations):
        super().__init__()
        self.evaluations = evaluations


@pytest.fixture
def trainings(monkeypatch):
    """Replaces the training process; returns (commands, {run: exit status of a failure})."""
    commands = Commands([])
    evaluations = commands.evaluations

    def run(command):
        if "biclip_jax.evaluate" in command:
            return evaluation(command)
        commands.append(command)
        config_name = command[command.index("--config") + 1]
        variant = config_lib.load_config(config_name, []).name.rsplit("smoke_", 1)[1]
        seed = int(next(c for c in command if "config.seed=" in c).split("=")[1])
        workdir = Path(command[-1])
        if (variant, seed) in failures:
            return failures[variant, seed]
        score = dict.fromkeys(comparison.METRICS, SCORES[variant][seed])
        score["interval_95"] = {name: [0.1, 0.9] for name in comparison.METRICS}
        conditions = {"original": score, "empty": dict.fromkeys(comparison.METRICS, 0.1)}
        (workdir / "test").mkdir(parents=True)
        (workdir / "test/results.json").write_text(json.dumps({"conditions": conditions}))
        (workdir / "labels.json").write_text('{"num_images": 32}')
        fields = command[command.index("--config") + 2 : -2]
        config = config_lib.load_config(config_name, fields)
        (workdir / "config.json").write_text(config.to_json())
        return 0

    def evaluation(command):
        argv = command[command.index("biclip_jax.evaluate") + 1 :]
        evaluations.append(argv)
        workdir, folder = Path(argv[1]), Path(argv[-1])
        original = json.loads((workdir / "test/results.json").read_text())["conditions"]["original"]
        low = {name: original[name] - 0.2 for name in comparison.METRICS}
        results = {"num_images": 8, "conditions": {"original": original}}
        results["flip_consistency"] = original
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").write_text(json.dumps(results))
        if "evaluate" in failures:  # fails after writing a part of the results
            return failures["evaluate"]
        results["corruptions"] = {argv[3]: {"2": low, "4": low}, "mean": low}
        (folder / "results.json").write_text(json.dumps(results))
        return 0

    class Process:
        def __init__(self, command, **_):
            self.command = command

        def wait(self):
            return run(self.command)

    failures = {}
    monkeypatch.setattr(ablate.subprocess, "Popen", Process)
    return commands, failures


def start(tmp_path, *options):
    """Runs the command; returns its exit status."""
    argv = ["--config", "default:smoke", "--variants", "unet,full", "--workdir", str(tmp_path)]
    with pytest.raises(SystemExit) as stopped:
        ablate.main([*argv, *options])
    return stopped.value.code


def test_trains_every_variant_and_seed_once_with_the_same_overrides(trainings, tmp_path):
    commands, _ = trainings
    assert start(tmp_path, "--seeds", "0,1", "--config.batch_size=4") == 0
    assert len(commands) == 4
    assert all("--config.batch_size=4" in command for command in commands)
    assert len({command[-1] for command in commands}) == 4
    assert start(tmp_path, "--seeds", "0,1", "--config.batch_size=4") == 0
    assert len(commands) == 4  # finished runs are skipped


def test_the_table_has_mean_and_deviation_and_links_every_run(trainings, tmp_path, capsys):
    start(tmp_path, "--seeds", "0,1")
    outcome = json.loads((tmp_path / "ablation.json").read_text())
    rows = {row["variant"]: row for row in outcome["rows"]}
    for variant, scores in SCORES.items():
        summary = rows[variant]["dice_global"]
        assert summary["mean"] == pytest.approx(statistics.fmean(scores.values()))
        assert summary["sd"] == pytest.approx(statistics.stdev(scores.values()))
        for seed, score in scores.items():
            run = rows[variant]["seeds"][str(seed)]
            assert run["dice_mean"] == score
            assert run["interval_95"]["dice_mean"] == [0.1, 0.9]
            assert (tmp_path / run["run"] / "test/results.json").exists()
            assert run["run"] in (tmp_path / "ablation.md").read_text()
            assert run["run"] in outcome["runs"]
    assert "85.00 ± 7.07" in capsys.readouterr().out


def test_one_seed_has_no_deviation(trainings, tmp_path):
    start(tmp_path)
    rows = json.loads((tmp_path / "ablation.json").read_text())["rows"]
    assert [row["dice_global"]["sd"] for row in rows] == [None, None]
    assert "±" not in (tmp_path / "ablation.md").read_text()


@pytest.mark.parametrize("status", [2, -9, -11])
def test_a_failed_run_does_not_stop_the_others_and_is_retried(trainings, tmp_path, capsys, status):
    commands, failures = trainings
    failures["unet", 0] = status
    assert start(tmp_path) == 2
    assert "1 of 2 runs failed" in capsys.readouterr().err
    rows = json.loads((tmp_path / "ablation.json").read_text())["rows"]
    assert [row["variant"] for row in rows] == ["full"]
    failures.clear()
    assert start(tmp_path) == 0
    assert len(commands) == 3


@pytest.mark.parametrize(("status", "code"), [(-15, 143), (-2, 130), (143, 143)])
def test_a_signal_stops_the_comparison(trainings, tmp_path, status, code):
    commands, failures = trainings
    failures["unet", 0] = status
    assert start(tmp_path) == code
    assert len(commands) == 1


def test_rejects_a_workdir_with_runs_of_another_config(trainings, tmp_path, capsys):
    commands, _ = trainings
    start(tmp_path)
    assert start(tmp_path, "--config.optim.learning_rate=0.5") == 2
    assert "optim.learning_rate (0.002 -> 0.5)" in capsys.readouterr().err
    assert len(commands) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--variants", "unet,fulll"], "variant 'fulll': unknown"),
        (["--config.batch_sise=4"], "did you mean batch_size"),
        (["--seeds", "0,x"], "expected comma-separated values of type int"),
        (["--seeds", "1,1"], "without repetitions"),
        (["--label-fractions", ""], "expected a list"),
        (["--config.seed=3"], "set it with --seeds"),
        (["--config.final_test=false"], "set it to true"),
        (["--evaluate", "--workdir x"], "every run has its own"),
        (["--evaluate", "--out y"], "unrecognized arguments: --out"),
        (["--evaluate", "--corruptions jpg"], "'jpg'; expected all, or some of"),
        (["--jobs", "0"], "--jobs 0: expected at least 1"),
        (["--variants", "semi"], "nothing to run"),
        (["--evaluate", "'"], "expected arguments as in a shell"),
    ],
)
def test_rejects_invalid_options_before_any_run(trainings, tmp_path, capsys, options, message):
    commands, _ = trainings
    assert start(tmp_path / "new", *options) == 2
    assert message in capsys.readouterr().err
    assert not commands
    assert not (tmp_path / "new").exists()


def test_label_fractions_have_separate_rows(trainings, tmp_path):
    commands, _ = trainings
    start(tmp_path, "--label-fractions", "0.01,1")
    rows = json.loads((tmp_path / "ablation.json").read_text())["rows"]
    assert [(row["label_fraction"], row["variant"]) for row in rows] == [
        (0.01, "unet"),
        (0.01, "full"),
        (1.0, "unet"),
        (1.0, "full"),
    ]
    assert "--config.data.label_fraction=0.01" in commands[0]


def test_skips_semi_supervised_runs_without_unlabelled_images(
    trainings, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(SCORES, "semi", {0: 0.6})
    start(tmp_path, "--variants", "unet,semi", "--label-fractions", "0.01,1")
    assert "semi/labels_1.0/seed_0: skipped" in capsys.readouterr().out
    rows = json.loads((tmp_path / "ablation.json").read_text())["rows"]
    assert [(row["label_fraction"], row["variant"]) for row in rows] == [
        (0.01, "unet"),
        (0.01, "semi"),
        (1.0, "unet"),
    ]


def test_every_run_is_evaluated_once_and_added_to_its_row(trainings, tmp_path, capsys):
    commands, _ = trainings
    options = ["--evaluate", "--corruptions jpeg --severities 2,4"]
    start(tmp_path, "--seeds", "0,1", *options)
    start(tmp_path, "--seeds", "0,1", *options)
    assert len(commands) == len(commands.evaluations) == 4
    assert all("--corruptions jpeg" in " ".join(e) for e in commands.evaluations)
    rows = json.loads((tmp_path / "ablation.json").read_text())["rows"]
    corruptions = {row["variant"]: row["evaluation"]["corruptions"] for row in rows}
    assert corruptions["full"]["jpeg"]["4"]["dice_mean"]["mean"] == pytest.approx(0.65)
    assert corruptions["full"]["mean"]["dice_global"]["sd"] == pytest.approx(0.0707, abs=1e-4)
    assert rows[0]["evaluation"]["num_images"] == 8
    for name in ("dice_global", "dice_mean"):
        assert rows[0]["evaluation"]["flip_consistency"][name]["mean"] == pytest.approx(0.6)
        assert rows[0]["evaluation"]["conditions"]["original"][name]["mean"] == pytest.approx(0.6)
    assert "65.00 ± 7.07" in capsys.readouterr().out


def test_other_evaluation_arguments_have_separate_results(trainings, tmp_path):
    commands, _ = trainings
    start(tmp_path, "--evaluate", "--corruptions jpeg")
    start(tmp_path, "--seeds", "0,1", "--evaluate", "--corruptions gamma")
    assert len(commands.evaluations) == 2 + 4
    rows = json.loads((tmp_path / "ablation.json").read_text())["rows"]
    assert all(row["evaluation"]["corruptions"].keys() == {"gamma", "mean"} for row in rows)


def test_a_failed_evaluation_is_reported_and_retried(trainings, tmp_path, capsys):
    commands, failures = trainings
    failures["evaluate"] = 2
    assert start(tmp_path, "--evaluate", "--subset 8") == 2
    assert "2 of 2 runs failed" in capsys.readouterr().err
    failures.clear()
    assert start(tmp_path, "--evaluate", "--subset 8") == 0
    assert len(commands) == 2
    assert len(commands.evaluations) == 4


@pytest.mark.parametrize("name", ["test/results.json", "config.json", "labels.json"])
def test_errors_name_the_damaged_file_of_a_run(trainings, tmp_path, capsys, name):
    start(tmp_path)
    path = tmp_path / "unet/labels_1.0/seed_0" / name
    path.write_text(path.read_text()[:-2])
    assert start(tmp_path) == 2
    assert f"{path}: damaged" in capsys.readouterr().err


@needs_affinity
def test_parallel_runs_split_the_cores(trainings, tmp_path, monkeypatch):
    commands, _ = trainings
    core_sets = []
    monkeypatch.setattr(ablate.os, "sched_getaffinity", lambda _: {0, 1, 2})
    monkeypatch.setattr(ablate.os, "sched_setaffinity", lambda _, cores: core_sets.append(cores))
    assert start(tmp_path, "--seeds", "0,1", "--jobs", "2") == 0
    assert len(commands) == 4
    # One thread may have run all cells.
    assert core_sets in ([{0, 2}, {1}], [{1}, {0, 2}], [{0, 2}])
    assert start(tmp_path / "more", "--seeds", "0,1", "--jobs", "4") == 2


def test_two_cells_run_in_parallel():
    cells = [ablate.Cell("full", 1.0, seed, None) for seed in (0, 1)]
    barrier = threading.Barrier(2, timeout=30)
    task = [lambda cell: barrier.wait() >= 0 and cell.seed == 1]
    assert ablate.run_all(cells, task, 2, set()) == cells[:1]


SLEEPER = ["timeit", "-n", "1", "-r", "1", "import time; time.sleep(60)"]


@needs_affinity
def test_a_run_uses_the_cores_of_its_thread(tmp_path):
    cells = [ablate.Cell("full", 1.0, seed, None) for seed in (0, 1)]
    command = ["timeit", "-n", "1", "-r", "1", "import os; print(len(os.sched_getaffinity(0)))"]

    def task(cell):
        return ablate._run(command, tmp_path / str(cell.seed), set()) == 0

    num_cores = len(os.sched_getaffinity(0))
    if num_cores < 2:
        pytest.skip("requires two cores")
    assert ablate.run_all(cells, [task], 2, set()) == []
    shares = sorted(int((tmp_path / str(seed)).read_text().split()[0]) for seed in (0, 1))
    assert shares == [num_cores // 2, num_cores - num_cores // 2]
    assert len(os.sched_getaffinity(0)) == num_cores


def test_sigterm_stops_the_runs_and_starts_no_more(tmp_path):
    cells = [ablate.Cell("full", 1.0, seed, None) for seed in (0, 1)]
    running, started = set(), []

    def task(cell):
        started.append(cell)
        return ablate._run(SLEEPER, tmp_path / "log", running) == 0

    def send():
        while not running:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=send)
    sender.start()
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        ablate.run_all(cells, [task], 1, running)
    sender.join()
    assert stopped.value.code == 143
    assert started == cells[:1] and not running
    assert signal.getsignal(signal.SIGTERM) is before

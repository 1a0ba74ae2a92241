"""Benchmarks: alternating workers, comparison of their measurements, a small end-to-end run."""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import bench, harness, medclipseg

ROOT = Path(__file__).parent.parent
WORKER = """
from benchmarks import harness
calls = []
def make():
    return harness.Work(lambda: calls.append(0), 4e9)
harness.serve(make, lambda: len(calls), lambda: None)
"""


def command(code):
    return [sys.executable, "-c", code]


def test_workers_alternate_and_a_failure_does_not_stop_the_others(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(harness, "PAUSE", 0.0)
    commands = {"jax": command(WORKER), "torch": command("raise SystemExit('no compiler')")}
    for sequential in (False, True):
        results = harness.interleave(commands, 3, sequential)
        # The first call and three warm calls.
        assert results["jax"]["peak_mib"] == 4
        assert len(results["jax"]["warm_s"]) == 3 and min(results["jax"]["warm_s"]) >= 0
        assert results["torch"]["error"] == "no compiler"


def measured(*seconds, first_s=9.0, flops=None):
    facts = {"first_s": first_s, "warm_s": list(seconds), "built_mib": 1, "peak_mib": 2}
    return {**facts, "load": 0.5, "flops": flops}


def test_speedups_are_ratios_of_medians():
    results = {
        "jax": measured(0.5, 2.0, 0.4, flops=2e9),
        "torch": measured(1.0, 1.5, 0.9),
        "torch_compile": measured(0.25, 0.2, 9.0),
        "before": measured(0.1, 0.1, 0.1),
    }
    entry = harness.compare(results, batch=4)
    assert entry["speed_over_before"] == 0.2
    assert (entry["jax_ms"], entry["jax_first_s"]) == (500.0, 9.0)
    assert (entry["jax_images_per_s"], entry["jax_gflop_per_s"]) == (8.0, 4.0)
    assert (entry["speed_over_torch"], entry["speed_over_torch_compile"]) == (2.0, 0.5)
    assert entry["speed_over_best"] == 0.5


def test_compares_with_an_older_checkout(tmp_path):
    """The worker of the older checkout reports its number of calls as memory."""
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks/bench.py").write_text(WORKER)
    for name in ("__init__.py", "harness.py"):
        shutil.copy(ROOT / "benchmarks" / name, tmp_path / "benchmarks")
    args = argparse.Namespace(
        small=True, implementations=["jax"], before=tmp_path, repetitions=2, suite="cpu"
    )
    entry = bench.measure(bench.Case(bench.CEILING, 1), args)
    assert "speed_over_before" in entry and "speed_over_best" not in entry
    assert entry["before_peak_mib"] == 3 < entry["jax_peak_mib"]


def test_the_medclipseg_benchmark_has_no_dropout():
    assert medclipseg.model_ours("unimedclip").text_encoder.dropout == 0


def test_a_failed_implementation_is_reported_and_not_compared():
    results = {"jax": measured(0.5, 0.5), "torch_compile": {"error": "no compiler"}}
    entry = harness.compare(results, batch=1)
    assert entry["torch_compile_error"] == "no compiler"
    assert not any(name.startswith("speed") for name in entry)


def test_suites_are_filtered_by_case_and_batch():
    for suite in bench.SUITES.values():
        assert {case.name for case in suite} <= bench.MAKERS.keys()
        assert len(set(suite)) == len(suite)
    cases = bench.select_cases(bench.CPU, ["bert", "vit_b16"], [8])
    assert [(case.name, case.batch) for case in cases] == [
        ("matmul_4096", 1),
        ("vit_b16", 8),
        ("bert", 8),
    ]
    with pytest.raises(SystemExit, match="--cases: gpt; expected some of bert,"):
        bench.select_cases(bench.CPU, ["gpt"], None)


def test_the_table_shows_the_share_of_peak_and_skips_a_truncated_line(
    tmp_path,
):
    lines = [
        {"case": "matmul_4096", "batch": 1, "dtype": "float32", "jax_gflop_per_s": 150.0},
        {"case": "bert", "batch": 8, "dtype": "float32", "jax_gflop_per_s": 100.0},
    ]
    lines[0]["torch_gflop_per_s"] = 200.0
    lines[1] |= {"jax_ms": 3.0, "torch_ms": 4.5, "speed_over_best": 1.5, "speed_over_torch": 1.5}
    path = tmp_path / "bench.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"case": "be')
    entries = list(harness.lines_of(path))
    assert entries == lines
    last = bench.table(entries).splitlines()[-1]
    assert (
        last.startswith("| bert | 8 | float32 | 3.0 | 4.5 | - | 1.5 | 1.5 |") and "| 50 % |" in last
    )
    bench.plot(entries, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").stat().st_size > 1000


def test_retry_failed_measures_failed_cases_again(tmp_path, monkeypatch):
    path, measured_cases = tmp_path / "bench.jsonl", []
    facts = {"dtype": "float32", "small": False}
    path.write_text(
        "".join(
            json.dumps({"case": name, "batch": 1, **facts, **entry}) + "\n"
            for name, entry in (
                ("matmul_4096", {"jax_ms": 1.0}),
                ("bert", {"torch_compile_error": "no compiler"}),
            )
        )
    )

    def measure(case, _args):
        measured_cases.append(case.name)
        return {"case": case.name, "batch": case.batch, **facts, "jax_ms": 2.0}

    monkeypatch.setattr(bench, "measure", measure)
    options = ["bench", "--cases", "bert", "--batches", "1", "--output", str(path)]
    for more, expected in (([], []), (["--retry-failed"], ["bert"]), (["--retry-failed"], [])):
        measured_cases.clear()
        monkeypatch.setattr(sys, "argv", [*options, *more])
        bench.main()
        assert measured_cases == expected
    assert [e.get("jax_ms") for e in bench.latest(harness.lines_of(path))] == [1.0, 2.0]


@pytest.mark.slow
def test_the_gpu_script_runs_end_to_end_and_skips_finished_cases(tmp_path):
    pytest.importorskip("torch")
    script = [ROOT / "benchmarks/gpu_all.sh", "--small", tmp_path, "--repetitions", "2"]
    script += ["--implementations", "jax", "torch", "--batches", "16"]
    script += ["--cases", "full_train"]
    subprocess.run(script, check=True, timeout=900)
    files = [tmp_path / name for name in ("bench.jsonl", "profile.jsonl")]
    before = [path.read_text() for path in files]
    entries = list(harness.lines_of(files[0]))
    cases = {(entry["case"], entry["dtype"]) for entry in entries}
    ceilings = {(bench.CEILING, "bfloat16"), (bench.CEILING, "float32")}
    assert cases == ceilings | {("full_train", "bfloat16")}
    for entry in entries:
        assert entry["speed_over_torch"] > 0 and entry["jax_gflop_per_s"] > 0
    profile = [json.loads(line) for line in before[1].splitlines()]
    assert profile[0]["step_s"] > 0 and {"operation", "seconds", "calls"} <= profile[1].keys()
    assert "full_train" in (tmp_path / "bench.md").read_text()
    assert (tmp_path / "bench.png").exists() and (tmp_path / "machine.txt").read_text()
    subprocess.run(script, check=True, timeout=300)
    assert [path.read_text() for path in files] == before

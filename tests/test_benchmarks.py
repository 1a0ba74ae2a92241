"""The benchmarks: workers in turn, what is made of their figures, the whole way at small size."""

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
harness.answer(make, lambda: len(calls), lambda: None)
"""


def command(code):
    return [sys.executable, "-c", code]


def test_workers_take_turns_and_one_that_fails_stops_nobody(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(harness, "PAUSE", 0.0)
    commands = {"jax": command(WORKER), "torch": command("raise SystemExit('no compiler')")}
    for apart in (False, True):
        found = harness.in_turn(commands, 3, apart)
        # The first call and three warm ones.
        assert found["jax"]["peak_mib"] == 4
        assert len(found["jax"]["warm_s"]) == 3 and min(found["jax"]["warm_s"]) >= 0
        assert found["torch"]["error"] == "no compiler"


def measured(*seconds, first_s=9.0, flops=None):
    facts = {"first_s": first_s, "warm_s": list(seconds), "built_mib": 1, "peak_mib": 2}
    return {**facts, "load": 0.5, "flops": flops}


def test_ratios_are_of_medians_and_above_one_where_ours_is_faster():
    found = {
        "jax": measured(0.5, 2.0, 0.4, flops=2e9),
        "torch": measured(1.0, 1.5, 0.9),
        "torch_compile": measured(0.25, 0.2, 9.0),
        "before": measured(0.1, 0.1, 0.1),
    }
    entry = harness.compare(found, batch=4)
    assert entry["speed_over_before"] == 0.2
    assert (entry["jax_ms"], entry["jax_first_s"]) == (500.0, 9.0)
    assert (entry["jax_images_per_s"], entry["jax_gflop_per_s"]) == (8.0, 4.0)
    assert (entry["speed_over_torch"], entry["speed_over_torch_compile"]) == (2.0, 0.5)
    assert entry["speed_over_best"] == 0.5


def test_older_code_takes_turns_with_ours(tmp_path):
    """A checkout whose worker counts its calls in place of its memory."""
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


def test_our_side_of_medclipseg_has_no_dropout_as_the_twin():
    assert medclipseg.model_ours("unimedclip").text_encoder.dropout == 0


def test_an_implementation_that_failed_is_named_and_not_compared():
    found = {"jax": measured(0.5, 0.5), "torch_compile": {"error": "no compiler"}}
    entry = harness.compare(found, batch=1)
    assert entry["torch_compile_error"] == "no compiler"
    assert not any(name.startswith("speed") for name in entry)


def test_every_case_can_be_made_and_a_suite_is_cut_by_name_and_batch():
    for suite in bench.SUITES.values():
        assert {case.name for case in suite} <= bench.MAKERS.keys()
        assert len(set(suite)) == len(suite)
    found = bench.chosen(bench.CPU, ["bert", "vit_b16"], [8])
    assert [(case.name, case.batch) for case in found] == [
        ("matmul_4096", 1),
        ("vit_b16", 8),
        ("bert", 8),
    ]
    with pytest.raises(SystemExit, match="--cases: gpt; this suite has bert,"):
        bench.chosen(bench.CPU, ["gpt"], None)


def test_the_table_gives_the_share_of_the_better_product_and_a_line_that_was_cut_off_is_left(
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


def test_a_case_that_failed_is_measured_again_where_that_is_asked_for(tmp_path, monkeypatch):
    path, asked = tmp_path / "bench.jsonl", []
    facts = {"dtype": "float32", "small": False}
    path.write_text(
        "".join(
            json.dumps({"case": name, "batch": 1, **facts, **found}) + "\n"
            for name, found in (
                ("matmul_4096", {"jax_ms": 1.0}),
                ("bert", {"torch_compile_error": "no compiler"}),
            )
        )
    )

    def measure(case, _args):
        asked.append(case.name)
        return {"case": case.name, "batch": case.batch, **facts, "jax_ms": 2.0}

    monkeypatch.setattr(bench, "measure", measure)
    options = ["bench", "--cases", "bert", "--batches", "1", "--output", str(path)]
    for more, expected in (([], []), (["--retry-failed"], ["bert"]), (["--retry-failed"], [])):
        asked.clear()
        monkeypatch.setattr(sys, "argv", [*options, *more])
        bench.main()
        assert asked == expected
    assert [e.get("jax_ms") for e in bench.latest(harness.lines_of(path))] == [1.0, 2.0]


@pytest.mark.slow
def test_the_gpu_s_script_goes_its_whole_way_and_repeats_nothing(tmp_path):
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

"""Runs with several processes: equal results, one writer, a lost process, restarts."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from biclip_jax.core import distributed
from biclip_jax.core.errors import UserError

OPTIONS = [
    *("--config", "default:smoke", "--config.optim.name=sgd", "--config.optim.learning_rate=0.03"),
    # Neither is divisible by the batch size of 8.
    *("--config.data.num_examples.train=30", "--config.data.num_examples.val=7"),
    "--config.final_test=False",
]
MESH = ("--config.parallel.mode=mesh", "--config.parallel.shard=all")
ON_DEVICE = ("--config.data.on_device=True", "--config.data.steps_per_call=2")
TIMEOUT = 300  # seconds, for a run


class Job:
    """The processes of a run with their logs."""

    def __init__(self, folder, workdir, options=(), processes=2, devices=2):
        with socket.socket() as free_socket:
            free_socket.bind(("localhost", 0))
            address = f"localhost:{free_socket.getsockname()[1]}"
        flags = (
            f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
        )
        environment = {"BICLIP_COORDINATOR": address, "BICLIP_NUM_PROCESSES": str(processes)}
        environment |= {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        environment |= {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}
        environment |= {"JAX_COMPILATION_CACHE_DIR": str(folder / "programs")}
        command = [sys.executable, "-m", "biclip_jax.train", "--workdir", str(workdir)]
        command += [*OPTIONS, f"--config.data.cache_dir={folder / 'data'}", *options]
        self.logs = [folder / f"{workdir.name}_{index}.log" for index in range(processes)]
        self.processes = []
        for index, log in enumerate(self.logs):
            env = {**os.environ, **environment, "BICLIP_PROCESS_ID": str(index)}
            with open(log, "w") as out:
                process = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT)
            self.processes.append(process)

    def statuses(self):
        try:
            return [process.wait(TIMEOUT) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()

    def text(self, index):
        return self.logs[index].read_text()

    def wait_for(self, condition):
        deadline = time.monotonic() + TIMEOUT
        while not condition():
            assert time.monotonic() < deadline, [self.text(i) for i in range(len(self.logs))]
            assert all(process.poll() is None for process in self.processes), self.text(0)
            time.sleep(0.1)


def saved_steps(workdir):
    return sorted(int(p.name.split(".")[0]) for p in workdir.glob("checkpoints/last/*.sha256.json"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Returns a folder for all runs, which share prepared data and compiled programs."""
    return tmp_path_factory.mktemp("multihost")


@pytest.fixture(scope="module")
def single(folder):
    """Returns the work directory of a run of one process with four devices."""
    job = Job(folder, folder / "single", processes=1, devices=4)
    assert job.statuses() == [0], job.text(0)
    return folder / "single"


def metrics_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def check_same_metrics(found, expected):
    for found_row, expected_row in zip(found, expected, strict=True):
        assert found_row.keys() == expected_row.keys()
        for name in found_row.keys() - {"split", "images_per_second"}:
            np.testing.assert_allclose(found_row[name], expected_row[name], rtol=1e-3, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [("pmap", ()), ("mesh", MESH), ("on_device", ON_DEVICE), ("on_device_mesh", ON_DEVICE + MESH)],
)
def test_two_processes_with_two_devices_equal_one_with_four(folder, single, name, options):
    """Uses SGD, which does not hide a wrong scale; each of seven images is validated once."""
    workdir = folder / name
    job = Job(folder, workdir, options)
    assert job.statuses() == [0, 0], job.text(0)
    assert "on 4 x cpu in 2 processes" in job.text(0)
    # The second process prints and writes nothing.
    assert "step " not in job.text(1) and str(workdir) not in job.text(1)
    rows = metrics_of(workdir)
    check_same_metrics(metrics_of(single), rows)
    assert [row["num_images"] for row in rows if row["split"] == "val"] == [7, 7]
    expected, found = (load_file(run / "model/model.safetensors") for run in (single, workdir))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-4, rtol=1e-4, err_msg=name)


@pytest.mark.slow
def test_pseudo_labels_are_those_of_process_0(folder, single):
    options = ("--config", "default:smoke,semi", "--config.data.label_fraction=0.5")
    options += (f"--config.data.teachers={single / 'model'}", "--config.num_steps=2")
    runs = [folder / "pseudo_labels_1", folder / "pseudo_labels_2"]
    for processes, run in zip((1, 2), runs, strict=True):
        job = Job(folder, run, options, processes=processes, devices=4 // processes)
        assert job.statuses() == [0] * processes, job.text(0)
    expected, found = (np.load(run / "teacher_masks.npz")["masks"] for run in runs)
    np.testing.assert_array_equal(expected, found)
    check_same_metrics(metrics_of(runs[0]), metrics_of(runs[1]))


@pytest.mark.slow
def test_resumes_with_another_mode_and_number_of_processes(folder):
    """Starts on a mesh of two processes with sharded state; continues with pmap, then a mesh."""
    workdir = folder / "modes"
    adamw = ("--config.optim.name=adamw", "--config.optim.learning_rate=1e-3")  # has a state
    assert Job(folder, workdir, (*adamw, *MESH)).statuses() == [0, 0]
    expected = [row for row in metrics_of(workdir) if row["step"] > 4]
    for processes, mode in ((1, ()), (2, MESH)):
        shutil.rmtree(workdir / "checkpoints/last/8")
        (workdir / "checkpoints/last/8.sha256.json").unlink()
        options = (*adamw, *mode)
        job = Job(folder, workdir, options, processes=processes, devices=4 // processes)
        assert job.statuses() == [0] * processes, job.text(0)
        assert "resumes after step 4 of 8" in job.text(0)
        check_same_metrics(expected, metrics_of(workdir)[-len(expected) :])


@pytest.mark.slow
def test_lost_process_ends_the_run_and_the_next_start_resumes(folder):
    workdir, options = folder / "lost", ["--config.num_steps=100000", "--config.eval_every=4"]
    job = Job(folder, workdir, options)
    job.wait_for(lambda: saved_steps(workdir))
    job.processes[1].kill()
    first, second = job.statuses()
    assert second == -signal.SIGKILL
    # Either a collective fails first, or jax notices missing heartbeats.
    if first == 1:
        assert "process 0 of 2 lost its connection to the others" in job.text(0)
        assert "start all of them again" in job.text(0) and "Traceback" not in job.text(0)
    else:
        assert first == -signal.SIGABRT and "another task died" in job.text(0)
    before = saved_steps(workdir)[-1]
    job = Job(folder, workdir, options)
    job.wait_for(lambda: saved_steps(workdir)[-1] > before)
    # One process receives the signal; all stop after the same step.
    job.processes[1].send_signal(signal.SIGTERM)
    assert job.statuses() == [128 + signal.SIGTERM] * 2
    assert f"resumes after step {before}" in job.text(0)
    assert f"stopped by a signal after step {saved_steps(workdir)[-1]}; saved" in job.text(0)


@pytest.mark.slow
def test_user_error_ends_all_processes(folder):
    workdir = folder / "other"
    assert Job(folder, workdir, ["--config.num_steps=2"]).statuses() == [0, 0]
    job = Job(folder, workdir, ["--config.num_steps=2", "--config.batch_size=4"])
    first, second = job.statuses()
    assert first == 2 and second not in (0, 2)
    assert "was started with another config: batch_size (8 -> 4)" in job.text(0)
    assert "Traceback" not in job.text(0)


@pytest.fixture
def calls(monkeypatch):
    """Records the arguments of `jax.distributed.initialize`."""
    recorded = []
    monkeypatch.setattr(
        jax.distributed, "initialize", lambda **arguments: recorded.append(arguments)
    )
    return recorded


PLAIN = {"BICLIP_COORDINATOR": "a:1", "BICLIP_NUM_PROCESSES": "4", "BICLIP_PROCESS_ID": "2"}
SLURM = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        (PLAIN, {"coordinator_address": "a:1", "num_processes": 4, "process_id": 2}),
        (SLURM, {}),
        ({**SLURM, "SLURM_NTASKS": "1"}, None),
        ({"BICLIP_DISTRIBUTED": "auto"}, {}),
        ({**PLAIN, **SLURM, "BICLIP_DISTRIBUTED": "off"}, None),
    ],
)
def test_initialize_follows_the_environment(environment, expected, calls):
    distributed.initialize(environment)
    for arguments in calls:
        assert arguments.pop("shutdown_timeout_seconds") == 24 * 3600
    assert calls == ([] if expected is None else [expected])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"BICLIP_PROCESS_ID": ""}, "BICLIP_PROCESS_ID: not set; expected all of"),
        ({"BICLIP_PROCESS_ID": "4"}, "'4' of BICLIP_NUM_PROCESSES '4'"),
        ({"BICLIP_NUM_PROCESSES": "two"}, "expected integers"),
        ({"BICLIP_DISTRIBUTED": "on"}, "'on'; expected auto, off"),
    ],
)
def test_rejects_an_incomplete_environment(change, message, calls):
    with pytest.raises(UserError, match=message):
        distributed.initialize({**PLAIN, **change})
    assert not calls


def test_failed_connection_raises_user_error(monkeypatch):
    def fail(**_):
        raise RuntimeError("deadline exceeded\nmore")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(UserError, match=r"did not connect \(deadline exceeded\)"):
        distributed.initialize(PLAIN)


def test_single_process_does_not_communicate(tmp_path):
    tree, facts = {"x": np.ones(2)}, {"step": 3}
    assert distributed.broadcast_from_main(tree, facts) == (tree, facts)
    assert distributed.agree_on_signal(15, communicate=False) == 15
    assert distributed.agree_on_signal(None, communicate=True) is None
    with distributed.only_main_writes(tmp_path) as folder, distributed.exit_on_error():
        assert folder == tmp_path
    with pytest.raises(UserError, match="as it was"), distributed.exit_on_error():
        raise UserError("as it was")

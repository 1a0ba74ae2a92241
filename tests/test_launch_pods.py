"""Launch scripts for several hosts, with dry runs and stand-ins for the cluster commands."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parent.parent / "launch"
# Arguments that a shell could misinterpret.
OPTIONS = ["--config", "qata:small", '--config.note=it\'s "so" $HOME `x` a;b & *', ""]
SLURM = ("slurm.sh", ["4", "/shared/my runs/x", *OPTIONS])
TPU_VM = ("tpu_vm.sh", ["train", "pod", "/shared/my runs/x", *OPTIONS])
GKE = ("gke.sh", ["tpus", "gcr.io/mine/biclip:1", "v5litepod-16", "2", "--", "--workdir=/w"])
CLOUD = {"PROJECT": "mine", "ZONE": "us-west4-a", "RESTART_PAUSE": "0"}
TRAIN = ["-m", "biclip_jax.train", "--workdir", "/shared/my runs/x", *OPTIONS]

# Logs its arguments and exits with the next status in the file `statuses`.
# sbatch also runs the script that follows its options, as the cluster would.
STAND_IN = """#!{python}
import json, os, pathlib, sys
here = pathlib.Path(__file__).parent
with open(here / "log", "a") as log:
    log.write(json.dumps([pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]) + "\\n")
if sys.argv[0].endswith("sbatch"):
    command = sys.argv[1:]
    while command[0].startswith("--"):
        command.pop(0)
    os.execv(command[0], command)
statuses = here / "statuses"
first, *others = statuses.read_text().split() if statuses.exists() else ["0"]
statuses.write_text(" ".join(others or ["0"]))
sys.exit(int(first))
"""


def environment(tmp_path, **extra):
    return {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | extra


def run(script, arguments, tmp_path, **extra):
    return subprocess.run(
        [LAUNCH / script, *arguments],
        env=environment(tmp_path, **extra),
        capture_output=True,
        text=True,
        timeout=30,
    )


def dry_run(script, arguments, tmp_path, **extra):
    """Returns the commands that a dry run prints, as lists of arguments."""
    completed = run(script, ["--dry-run", *arguments], tmp_path, **extra)
    assert completed.returncode == 0, completed.stderr
    assert not (tmp_path / "log").exists()
    return [shlex.split(line) for line in completed.stdout.splitlines()]


def calls(tmp_path):
    return [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]


@pytest.fixture
def stand_ins(tmp_path):
    for name in ("sbatch", "srun", "gcloud", "xpk"):
        (tmp_path / name).write_text(STAND_IN.format(python=sys.executable))
        (tmp_path / name).chmod(0o755)
    return tmp_path


@pytest.mark.parametrize("script", ["slurm.sh", "tpu_vm.sh", "gke.sh"])
def test_scripts_have_valid_syntax(script):
    subprocess.run(["bash", "-n", LAUNCH / script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", LAUNCH / script], check=True)


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("slurm.sh", []),
        ("slurm.sh", ["2"]),
        ("tpu_vm.sh", ["train"]),
        ("tpu_vm.sh", ["train", "pod"]),
        ("tpu_vm.sh", ["install", "pod"]),
        ("tpu_vm.sh", ["start", "pod"]),
        ("gke.sh", GKE[1][:4]),
        ("gke.sh", [*GKE[1][:4], "--workdir=/w"]),
    ],
)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_missing_arguments_print_the_usage(tmp_path, script, arguments, dry):
    completed = run(script, [*dry, *arguments], tmp_path, WORKLOAD="w", **CLOUD)
    assert completed.returncode == 2
    assert f"launch/{script} [--dry-run]" in completed.stderr
    assert "set -u" not in completed.stderr


@pytest.mark.parametrize(
    ("script", "arguments", "extra", "message"),
    [
        ("slurm.sh", ["two", "w"], {}, "NODES is 'two'"),
        ("slurm.sh", ["0", "w"], {}, "NODES is '0'"),
        ("slurm.sh", ["2", "w"], {"GPUS_PER_NODE": "all"}, "GPUS_PER_NODE is 'all'"),
        (*TPU_VM, {"ZONE": "z"}, "PROJECT is not set"),
        (*TPU_VM, {"PROJECT": "p"}, "ZONE is not set"),
        ("tpu_vm.sh", ["create", "pod"], CLOUD | {"VERSION": "v"}, "TYPE is not set"),
        ("tpu_vm.sh", ["create", "pod"], CLOUD | {"TYPE": "t"}, "VERSION is not set"),
        ("tpu_vm.sh", ["train", "pod", "runs/x"], CLOUD, "WORKDIR is 'runs/x'"),
        ("tpu_vm.sh", ["install", "pod", "no.whl"], CLOUD, "no.whl: no such file"),
        (*GKE, CLOUD, "WORKLOAD is not set"),
        (*GKE, {"WORKLOAD": "w", "ZONE": "z"}, "PROJECT is not set"),
        (*GKE, {"WORKLOAD": "w", "PROJECT": "p"}, "ZONE is not set"),
        ("gke.sh", [*GKE[1][:5], "--config", "x"], CLOUD | {"WORKLOAD": "w"}, "no --workdir"),
    ],
)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_rejects_invalid_arguments_and_variables(stand_ins, script, arguments, extra, message, dry):
    completed = run(script, [*dry, *arguments], stand_ins, **extra)
    assert completed.returncode == 2
    assert message in completed.stderr
    assert not (stand_ins / "log").exists()


def test_slurm_command(tmp_path):
    (command,) = dry_run(*SLURM, tmp_path)
    tasks = ["--nodes=4", "--ntasks=4", "--ntasks-per-node=1"]
    job = ["--job-name=biclip_jax", "--signal=B:TERM@120", "--requeue", "--open-mode=append"]
    step = ["srun", *tasks, "--kill-on-bad-exit=1", "env", "JAX_LOCAL_DEVICE_IDS=0"]
    script = str(LAUNCH / "slurm.sh")
    assert command == [
        *["sbatch", *tasks, *job, "--gpus-per-node=1", script, "--job", "3"],
        *[*step, "python", *TRAIN],
    ]


def test_slurm_resources_come_from_the_environment(tmp_path):
    resources = {"GPUS_PER_NODE": "4", "CPUS_PER_NODE": "32", "TIME": "1-0", "PARTITION": "a100"}
    (command,) = dry_run(*SLURM, tmp_path, MAX_RESTARTS="7", **resources)
    job, step = command[: command.index("--job")], command[command.index("--job") + 1 :]
    assert {"--gpus-per-node=4", "--cpus-per-task=32", "--time=1-0", "--partition=a100"} < set(job)
    assert step[0] == "7"
    assert {"--cpus-per-task=32", "JAX_LOCAL_DEVICE_IDS=0,1,2,3"} < set(step)
    (command,) = dry_run(*SLURM, tmp_path, GPUS_PER_NODE="0")
    assert not any("gpus" in word or "JAX_LOCAL" in word for word in command)


@pytest.mark.parametrize(
    ("statuses", "status", "starts"),
    [
        ([0], 0, 1),
        ([1, 0], 0, 2),
        ([134, 137, 0], 0, 3),
        ([1, 1, 1, 1, 0], 1, 4),
        ([2, 0], 2, 1),
        ([130, 0], 130, 1),
        # Without a signal to the job: Slurm terminated the step after losing a process.
        ([143, 0], 0, 2),
    ],
)
def test_slurm_restarts_after_losing_a_process(stand_ins, statuses, status, starts):
    (expected,) = dry_run(*SLURM, stand_ins)
    (stand_ins / "statuses").write_text(" ".join(map(str, statuses)))
    completed = run(*SLURM, stand_ins)
    assert completed.returncode == status
    step = expected[expected.index("srun") :]
    assert calls(stand_ins) == [expected] + [step] * starts


def test_slurm_forwards_the_time_limit_and_does_not_restart(stand_ins):
    """Uses scancel: a SIGTERM to srun would kill the processes with SIGKILL."""
    (stand_ins / "srun").write_text(
        f"#!/bin/bash\ncd {stand_ins}\ntrap 'touch killed; exit 137' TERM\n"
        "echo start >> started\nwhile [ ! -e scancelled ]; do sleep 0.05; done\n"
        "sleep 0.3; touch saved; exit 143\n"
    )
    (stand_ins / "scancel").write_text(f'#!/bin/bash\necho "$*" > {stand_ins}/scancelled\n')
    (stand_ins / "scancel").chmod(0o755)
    job = subprocess.Popen(
        [LAUNCH / "slurm.sh", "--job", "3", "srun"], env=environment(stand_ins, SLURM_JOB_ID="17")
    )
    wait_for(stand_ins / "started")
    job.terminate()
    assert job.wait(timeout=10) == 143
    assert (stand_ins / "scancelled").read_text() == "--signal=TERM 17\n"
    assert (stand_ins / "saved").exists()
    assert not (stand_ins / "killed").exists()
    assert (stand_ins / "started").read_text() == "start\n"


def wait_for(path):
    end = time.monotonic() + 10
    while not path.exists():
        assert time.monotonic() < end, f"{path} was not created"
        time.sleep(0.02)


def gcloud(verb, *arguments):
    where = ["--project=mine", "--zone=us-west4-a"]
    return ["gcloud", "compute", "tpus", "tpu-vm", verb, *arguments, *where]


def remote(command):
    """Returns the arguments that the shell of a host parses from --command of a gcloud line."""
    (line,) = [word for word in command if word.startswith("--command=")]
    return shlex.split(line.removeprefix("--command="))


def test_tpu_vm_create_and_delete(stand_ins):
    extra = CLOUD | {"TYPE": "v5litepod-16", "VERSION": "v2-alpha-tpuv5-lite"}
    what = ["--accelerator-type=v5litepod-16", "--version=v2-alpha-tpuv5-lite", "--spot"]
    expected = [gcloud("create", "pod", *what), gcloud("delete", "pod", "--quiet")]
    pairs = [["create", "pod", "--spot"], ["delete", "pod"]]
    printed = [dry_run("tpu_vm.sh", pair, stand_ins, **extra)[0] for pair in pairs]
    for pair in pairs:
        assert run("tpu_vm.sh", pair, stand_ins, **extra).returncode == 0
    assert printed == calls(stand_ins) == expected


def test_tpu_vm_install(stand_ins):
    wheel = stand_ins / "my wheels" / "biclip_jax-1-py3-none-any.whl"
    wheel.parent.mkdir()
    wheel.touch()
    pip = ["python3.11", "-m", "pip", "install"]
    extra = CLOUD | {"PYTHON": "python3.11"}
    copy, install = dry_run("tpu_vm.sh", ["install", "pod", str(wheel)], stand_ins, **extra)
    assert copy == gcloud("scp", str(wheel), "pod:", "--worker=all")
    assert install[:7] == [*gcloud("ssh", "pod", "--worker=all")[:7]]
    assert remote(install) == [*pip, f"./{wheel.name}[tpu,train]"]
    assert run("tpu_vm.sh", ["install", "pod", str(wheel)], stand_ins, **extra).returncode == 0
    assert calls(stand_ins) == [copy, install]
    (stand_ins / "log").unlink()
    for what, target in {
        "git+https://x.org/b.git": "biclip_jax[tpu,train] @ git+https://x.org/b.git",
        "/shared/b.whl": "/shared/b.whl[tpu,train]",
    }.items():
        (install,) = dry_run("tpu_vm.sh", ["install", "pod", what], stand_ins, **extra)
        assert remote(install) == [*pip, target]


def test_tpu_vm_does_not_install_after_a_failed_copy(stand_ins):
    (stand_ins / "b.whl").touch()
    (stand_ins / "statuses").write_text("1")
    completed = run("tpu_vm.sh", ["install", "pod", str(stand_ins / "b.whl")], stand_ins, **CLOUD)
    assert completed.returncode == 1
    assert len(calls(stand_ins)) == 1


@pytest.mark.parametrize(
    ("statuses", "status", "starts"),
    [
        ([0], 0, 1),
        # Between two starts, processes left by a lost connection are stopped.
        ([1, 0, 0], 0, 2),
        ([255, 255, 1, 0, 0], 0, 3),
        ([1] * 7, 1, 4),
        ([2, 0], 2, 1),
        ([130, 0], 130, 1),
        ([143, 0], 143, 1),
    ],
)
def test_tpu_vm_restarts_after_a_crash(stand_ins, statuses, status, starts):
    (train,) = dry_run(*TPU_VM, stand_ins, **CLOUD)
    (stop,) = dry_run("tpu_vm.sh", ["stop", "pod"], stand_ins, **CLOUD)
    assert train[:7] == stop[:7] == gcloud("ssh", "pod", "--worker=all")[:7]
    assert remote(train) == ["exec", "env", "BICLIP_DISTRIBUTED=auto", "python3", *TRAIN]
    assert remote(stop)[:5] == ["pkill", "-TERM", "-o", "-f", "[b]iclip_jax[.]train"]
    (stand_ins / "statuses").write_text(" ".join(map(str, statuses)))
    completed = run(*TPU_VM, stand_ins, **CLOUD)
    assert completed.returncode == status
    assert calls(stand_ins) == [train] + [stop, train] * (starts - 1)


def test_tpu_vm_forwards_a_signal_and_waits_for_the_run(stand_ins):
    """The stand-in's `train` exits with 143 after its `stop` was called."""
    (stand_ins / "gcloud").write_text(
        f"#!/bin/bash\ncd {stand_ins}\nif [[ $* = *pkill* ]]; then touch stop; exit; fi\n"
        "echo start >> started\nwhile [ ! -e stop ]; do sleep 0.05; done\n"
        "sleep 0.3; touch saved; exit 143\n"
    )
    script = subprocess.Popen([LAUNCH / TPU_VM[0], *TPU_VM[1]], env=environment(stand_ins, **CLOUD))
    wait_for(stand_ins / "started")
    script.terminate()
    assert script.wait(timeout=10) == 143
    assert (stand_ins / "saved").exists()
    assert (stand_ins / "started").read_text() == "start\n"


def test_gke_command(stand_ins):
    arguments = [*GKE[1], *OPTIONS]
    extra = CLOUD | {"WORKLOAD": "qata-1", "MAX_RESTARTS": "5"}
    (command,) = dry_run("gke.sh", arguments, stand_ins, **extra)
    assert command[:-1] == [
        *["xpk", "workload", "create", "--cluster=tpus", "--workload=qata-1", "--project=mine"],
        *["--zone=us-west4-a", "--docker-image=gcr.io/mine/biclip:1", "--tpu-type=v5litepod-16"],
        *["--num-slices=2", "--max-restarts=5", "--restart-on-exit-codes=1,3-126"],
        *["--termination-grace-period-seconds=120", "--env=BICLIP_DISTRIBUTED=auto"],
    ]
    program = ["exec", "python3", "-m", "biclip_jax.train", "--workdir=/w"]
    assert remote(command) == [*program, *OPTIONS]
    (stand_ins / "statuses").write_text("3")
    assert run("gke.sh", arguments, stand_ins, **extra).returncode == 3
    assert calls(stand_ins) == [command]

"""launch/local.sh: restarts after a crash, but not after an error that would recur."""

import os
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "launch/local.sh"


@pytest.mark.parametrize(
    ("statuses", "status", "starts"),
    [
        ([0], 0, 1),
        ([137, 0], 0, 2),
        ([1, 1, 1, 1, 0], 1, 4),
        ([2, 0], 2, 1),
        ([143, 0], 143, 1),
        ([130, 0], 130, 1),
    ],
)
def test_restarts_after_a_crash(tmp_path, statuses, status, starts):
    """Replaces python by a script that takes one exit status per start from a file."""
    (tmp_path / "statuses").write_text("\n".join(map(str, statuses)) + "\n")
    stand_in = tmp_path / "python"
    stand_in.write_text(
        f'#!/bin/bash\necho "$@" >> {tmp_path}/log\n'
        f'status=$(head -1 {tmp_path}/statuses)\nsed -i 1d {tmp_path}/statuses\nexit "$status"\n'
    )
    stand_in.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    completed = subprocess.run([SCRIPT, "runs/x", "--config", "qata"], env=environment)
    assert completed.returncode == status
    calls = (tmp_path / "log").read_text().splitlines()
    assert calls == ["-m biclip_jax.train --workdir runs/x --config qata"] * starts


def test_a_dry_run_prints_the_command():
    command = [SCRIPT, "--dry-run", "runs/an x", "--config", "qata"]
    completed = subprocess.run(
        command, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True
    )
    expected = r"python -m biclip_jax.train --workdir runs/an\ x --config qata" + "\n"
    assert (completed.returncode, completed.stdout) == (0, expected)


def test_prints_the_usage_without_a_work_directory():
    completed = subprocess.run([SCRIPT], capture_output=True, text=True)
    assert completed.returncode == 2
    assert "launch/local.sh [--dry-run] WORKDIR" in completed.stderr


def test_forwards_a_signal_and_waits_for_the_run(tmp_path):
    stand_in = tmp_path / "python"
    stand_in.write_text(
        f"#!/bin/bash\ntrap 'sleep 0.3; touch {tmp_path}/saved; exit 143' TERM\n"
        f"touch {tmp_path}/started\nwhile true; do sleep 0.05; done\n"
    )
    stand_in.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = subprocess.Popen([SCRIPT, "runs/x"], env=environment)
    while not (tmp_path / "started").exists():
        time.sleep(0.02)
    script.terminate()
    assert script.wait(timeout=10) == 143
    assert (tmp_path / "saved").exists()

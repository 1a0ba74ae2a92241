"""The launch script: restarts after a crash, and not after an error that would come again."""

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
def test_restarts(tmp_path, statuses, status, starts):
    """With a stand-in for python that takes its exit statuses from a file, one a start."""
    (tmp_path / "statuses").write_text("\n".join(map(str, statuses)) + "\n")
    stand_in = tmp_path / "python"
    stand_in.write_text(
        f'#!/bin/bash\necho "$@" >> {tmp_path}/log\n'
        f'status=$(head -1 {tmp_path}/statuses)\nsed -i 1d {tmp_path}/statuses\nexit "$status"\n'
    )
    stand_in.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run([SCRIPT, "runs/x", "--config", "qata"], env=environment)
    assert done.returncode == status
    calls = (tmp_path / "log").read_text().splitlines()
    assert calls == ["-m biclip_jax.train --workdir runs/x --config qata"] * starts


def test_a_dry_run_prints_the_command():
    command = [SCRIPT, "--dry-run", "runs/an x", "--config", "qata"]
    done = subprocess.run(command, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True)
    expected = r"python -m biclip_jax.train --workdir runs/an\ x --config qata" + "\n"
    assert (done.returncode, done.stdout) == (0, expected)


def test_without_a_work_directory_it_says_how():
    done = subprocess.run([SCRIPT], capture_output=True, text=True)
    assert done.returncode == 2
    assert "launch/local.sh [--dry-run] WORKDIR" in done.stderr


def test_a_signal_reaches_the_run_and_waits_for_it(tmp_path):
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

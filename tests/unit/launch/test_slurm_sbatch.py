"""launch/slurm.sbatch with a stand-in for SLURM, and the example of a hostfile."""

import os
import re
import subprocess

import pytest

from longctx.train.signals import EXIT_CODE


def sbatch(root, tmp_path, code, folder=None):
    """Runs the script where `srun` ends with `code`; its exit code and what was called."""
    for name in ("srun", "scontrol"):
        stand_in = tmp_path / name
        end = f"exit {code}" if name == "srun" else ""
        stand_in.write_text(f'#!/bin/sh\nprintf "%s\\n" "{name} $*" >> {tmp_path}/called\n{end}\n')
        stand_in.chmod(0o755)
    variables = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    script = ["bash", str(root / "launch" / "slurm.sbatch"), "recipe=pi", "run_dir='a b'"]
    done = subprocess.run(script, cwd=folder or root, env=variables, check=False)
    called = tmp_path / "called"
    return done.returncode, called.read_text().splitlines() if called.exists() else []


@pytest.mark.parametrize("code", [0, 1, 143, EXIT_CODE])
def test_only_a_run_that_saved_goes_back_into_the_queue(code, root, tmp_path):
    started = "srun --kill-on-bad-exit=1 python train.py recipe=pi run_dir='a b'"
    again = ["scontrol requeue 7"] if code == EXIT_CODE else []
    assert sbatch(root, tmp_path, code) == (code, [started, *again])


def test_outside_the_repository_nothing_starts(root, tmp_path):
    assert sbatch(root, tmp_path, 0, tmp_path) == (2, [])


def test_the_signal_goes_to_the_ranks_and_in_time(root):
    text = (root / "launch" / "slurm.sbatch").read_text()
    (asked,) = re.findall(r"^#SBATCH --signal=(.*)$", text, re.M)
    assert asked == "USR1@600"  # B: would signal the shell, which waits for srun
    assert "#SBATCH --requeue" in text and "#SBATCH --open-mode=append" in text


def test_hostfile_as_deepspeed_reads_it(root):
    from deepspeed.launcher.runner import fetch_hostfile

    found = fetch_hostfile(str(root / "launch" / "hostfile.example"))
    assert dict(found) == {"node0": 8, "node1": 8}

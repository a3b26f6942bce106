"""Start commands, shares of the machine, process groups."""

import os
import signal
import sys
import time

import pytest

from hydra_plugins.longctx_jobs import _jobs as jobs
from hydra_plugins.longctx_jobs._jobs import Job, Share, command, environment, shares
from longctx.errors import UserError
from tests.helpers.process import alive, descendants, wait_until

GPUS = [str(i) for i in range(8)]


def test_shares_divide_gpus_and_cores():
    assert shares("torchrun", None, 2, GPUS, 64) == [
        Share(4, ("0", "1", "2", "3"), 8),
        Share(4, ("4", "5", "6", "7"), 8),
    ]
    assert shares("torchrun", 2, 3, GPUS, 64)[2] == Share(2, ("4", "5"), 10)
    assert shares("python", None, 2, GPUS, 64) == [Share(1, ("0",), 32), Share(1, ("1",), 32)]
    assert shares("torchrun", None, 2, [], 2) == [Share(1, (), 1), Share(1, (), 1)]
    assert shares("deepspeed", 4, 1, [], 2) == [Share(4, (), 1)]


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (("mpirun", 1, 1, GPUS, 8), "hydra.launcher.kind=mpirun is not one of torchrun, deepspeed"),
        (("torchrun", 0, 1, GPUS, 8), "hydra.launcher.nproc=0 must be at least 1"),
        (("torchrun", 1, 0, GPUS, 8), "hydra.launcher.parallel=0 must be at least 1"),
        (("python", 2, 1, GPUS, 8), "hydra.launcher.kind=python starts one process, not nproc=2"),
        (("torchrun", 4, 3, GPUS, 8), "parallel=3 jobs of 4 processes need 12 GPUs: there are 8"),
        (("torchrun", None, 9, GPUS, 8), "parallel=9 jobs of 1 processes need 9 GPUs"),
    ],
)
def test_what_cannot_be_shared_is_refused(given, line):
    with pytest.raises(UserError) as error:
        shares(*given)
    assert line in str(error.value)


def test_commands():
    share, cpu = Share(2, ("4", "5"), 8), Share(2, (), 8)
    tail = ["train.py", "seed=1"]
    assert command("python", share, 1, ["train.py"], ["seed=1"]) == [sys.executable, *tail]
    torchrun = command("torchrun", share, 29400, ["train.py"], ["seed=1"])
    assert torchrun[1:3] == ["-m", "torch.distributed.run"] and torchrun[-2:] == tail
    assert " --nproc_per_node 2 " in " ".join(torchrun) and "29400" in torchrun
    on_gpus = " ".join(command("deepspeed", share, 1, ["train.py"], ["seed=1"]))
    assert "--include localhost:4,5 train.py" in on_gpus and "--num_gpus" not in on_gpus
    assert "--num_gpus 2 train.py" in " ".join(command("deepspeed", cpu, 1, ["train.py"], []))


def test_environment():
    outside = {"RANK": "0", "MASTER_PORT": "1", "CUDA_VISIBLE_DEVICES": "0,1,4,5", "HOME": "/h"}
    share = Share(2, ("4", "5"), 8)
    assert environment("torchrun", share, outside) == {
        "HOME": "/h",
        "OMP_NUM_THREADS": "8",
        "CUDA_VISIBLE_DEVICES": "4,5",
        jobs.DRIVER: str(os.getpid()),
    }
    assert "CUDA_VISIBLE_DEVICES" not in environment("deepspeed", share, outside)
    assert environment("python", share, {"OMP_NUM_THREADS": "3"})["OMP_NUM_THREADS"] == "3"


# A launcher with a rank in a session of its own, as torchrun makes them; both ignore SIGTERM.
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if len(sys.argv) == 1:
    subprocess.Popen([sys.executable, __file__, "rank"], start_new_session=True)
print("up", flush=True)
time.sleep(600)
"""


def test_stop_leaves_nothing(tmp_path):
    script = tmp_path / "stubborn.py"
    script.write_text(STUBBORN)
    job = Job([sys.executable, str(script)], os.environ, tmp_path / "log")
    wait_until(lambda: (tmp_path / "log").read_text().count("up") == 2, 30, None)
    below = descendants(job.pid)
    assert len(below) == 2 and job.code() is None
    begin = time.monotonic()
    jobs.stop([job], grace=0.5)
    assert job.wait() == -signal.SIGKILL
    wait_until(lambda: not alive(below), 5, None)
    assert 0.5 <= time.monotonic() - begin < 5


def test_stop_waits_for_a_job_that_saves(tmp_path):
    save = "trap 'sleep 0.7; echo saved; exit 75' TERM; echo up; while :; do sleep 0.05; done"
    job = Job(["bash", "-c", save], os.environ, tmp_path / "log")
    wait_until(lambda: "up" in (tmp_path / "log").read_text(), 30, None)
    jobs.stop([job], grace=30)
    assert job.wait() == 75
    assert "saved" in (tmp_path / "log").read_text()


def test_output_is_appended(tmp_path):
    for word in ("first", "second"):
        assert Job(["echo", word], os.environ, tmp_path / "log").wait() == 0
    assert (tmp_path / "log").read_text() == "first\nsecond\n"

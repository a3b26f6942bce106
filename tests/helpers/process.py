"""Real command lines, for tests: start, watch, kill."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.helpers.spawn import free_port

ROOT = Path(__file__).resolve().parent.parent.parent
BIN = Path(sys.executable).parent


def start(command: list[str], log: Path) -> subprocess.Popen:
    """Starts a command from the repository root, its output in `log`."""
    drop = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {k: v for k, v in os.environ.items() if k not in drop}
    env["PATH"] = f"{BIN}:{env['PATH']}"
    with log.open("w") as out:
        return subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )


def torchrun(arguments: list[str], program: tuple[str, ...] = ("train.py",)) -> list[str]:
    """`train.py`, or another program, on two ranks."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    return [*launcher, "--master_port", str(free_port()), *program, *arguments]


def deepspeed(arguments: list[str]) -> list[str]:
    """`deepspeed train.py` as users type it, on two ranks."""
    launcher = [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port())]
    return [*launcher, "train.py", *arguments]


def descendants(pid: int) -> list[int]:
    """All living processes below `pid`, itself included."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if fields[0] != "Z":
            parents[int(entry.parent.name)] = int(fields[1])
    found = [pid] if pid in parents else []
    for parent in found:
        found += [child for child, above in parents.items() if above == parent]
    return found


def ranks(pid: int) -> list[int]:
    """The processes of `train.py` below `pid`, by rank."""
    found = {}
    for process in descendants(pid):
        place = Path(f"/proc/{process}")
        try:
            pairs = (place / "environ").read_bytes().split(b"\0")
            command = (place / "cmdline").read_bytes().split(b"\0")
        except OSError:  # it has ended
            continue
        variables = dict(x.partition(b"=")[::2] for x in pairs)
        if b"RANK" in variables and any(x.endswith(b"train.py") for x in command):
            found[int(variables[b"RANK"])] = process
    return [found[rank] for rank in sorted(found)]


def alive(pids: list[int]) -> list[int]:
    """Those of `pids` that still run."""
    return [p for p in pids if p in descendants(p)]


def kill_tree(process: subprocess.Popen) -> None:
    """SIGKILL to a process and everything below it, by pid."""
    for pid in descendants(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def wait_until(
    what: Callable[[], object], seconds: float, process: subprocess.Popen | None
) -> None:
    """Waits until `what()` is true; fails after `seconds`, or when `process` ends before."""
    limit = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < limit, "timed out"
        assert process is None or process.poll() is None, "the process ended early"
        time.sleep(0.01)


def lines(path: Path) -> list[str]:
    """The finished lines of a file that may not exist yet."""
    return path.read_text().splitlines() if path.exists() else []

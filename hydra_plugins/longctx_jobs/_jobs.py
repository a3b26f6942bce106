"""One job of a sweep: its start command, its share of the machine, its process group.

A job is the entry point under a launcher, in a session of its own: one signal to the group reaches
launcher and ranks, and nothing of one job is left for the next. Costs a process start per job.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from longctx.errors import UserError

KINDS = ("torchrun", "deepspeed", "python")
GRACE = 60.0  # seconds a job has to save after SIGTERM, before SIGKILL
DRIVER = "LONGCTX_DRIVER"  # process id of the sweep; longctx/parallel/orphans.py ends with it
# What a launcher around the sweep, or an earlier one, may have left for its own ranks.
FOREIGN = {
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "CROSS_RANK",
    "CROSS_SIZE", "GROUP_RANK", "ROLE_RANK", "MASTER_ADDR", "MASTER_PORT",
}  # fmt: skip


@dataclass(frozen=True)
class Share:
    """The part of this machine that one job gets.

    Args:
        nproc: processes.
        devices: their GPUs, as CUDA_VISIBLE_DEVICES names them; empty: CPU.
        threads: CPU threads per process.
    """

    nproc: int
    devices: tuple[str, ...]
    threads: int


def shares(
    kind: str, nproc: int | None, parallel: int, devices: Sequence[str], cores: int
) -> list[Share]:
    """What each of `parallel` jobs gets.

    Args:
        kind: `torchrun | deepspeed | python`.
        nproc: processes per job. None: as many as its part of the GPUs, on CPU one.
        parallel: jobs at a time.
        devices: GPUs of this machine that the sweep may use; empty: none.
        cores: CPU cores.

    Raises:
        UserError: if a number makes no sense or there are too few GPUs.
    """
    if kind not in KINDS:
        raise UserError(f"hydra.launcher.kind={kind} is not one of {', '.join(KINDS)}")
    if parallel < 1:
        raise UserError(f"hydra.launcher.parallel={parallel} must be at least 1")
    if kind == "python" and nproc not in (None, 1):
        raise UserError(
            f"hydra.launcher.kind=python starts one process, not nproc={nproc}: "
            "take kind=torchrun or kind=deepspeed"
        )
    each = 1 if kind == "python" else nproc
    each = max(1, len(devices) // parallel) if each is None else each
    if each < 1:
        raise UserError(f"hydra.launcher.nproc={nproc} must be at least 1")
    if devices and parallel * each > len(devices):
        raise UserError(
            f"hydra.launcher.parallel={parallel} jobs of {each} processes need "
            f"{parallel * each} GPUs: there are {len(devices)}"
        )
    threads = max(1, cores // (parallel * each))
    return [
        Share(each, tuple(devices[i * each : (i + 1) * each]), threads) for i in range(parallel)
    ]


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def program(started: str) -> list[str]:
    """What trains: the script that was started, or the package's own command as a module.

    Args:
        started: `sys.argv[0]` of this process.

    >>> program("/repository/train.py"), program("/environment/bin/longctx train")
    (['/repository/train.py'], ['-m', 'longctx', 'train'])
    """
    script = Path(started)
    if script.suffix == ".py" and script.name != "__main__.py":
        return [str(script.resolve())]
    return ["-m", "longctx", "train"]


def command(
    kind: str, share: Share, port: int, program: Sequence[str], arguments: Sequence[str]
) -> list[str]:
    """How a job is started.

    Args:
        kind: `torchrun | deepspeed | python`.
        share: its processes and GPUs.
        port: for the rendezvous of its processes.
        program: the script, or `-m` and a module, before its arguments.
        arguments: of the command.
    """
    start: list[str] = []
    if kind == "torchrun":
        start = ["-m", "torch.distributed.run", "--nnodes", "1", "--nproc_per_node"]
        start += [str(share.nproc), "--master_addr", "127.0.0.1", "--master_port", str(port)]
    elif kind == "deepspeed":
        start = ["-m", "deepspeed.launcher.runner", "--no_local_rank", "--master_port", str(port)]
        if share.devices:  # --num_gpus would take the first ones, whatever is visible
            start += ["--include", "localhost:" + ",".join(share.devices)]
        else:
            start += ["--num_gpus", str(share.nproc)]
        if program[0] == "-m":
            program = ["--module", *program[1:]]
    return [sys.executable, *start, *program, *arguments]


def environment(kind: str, share: Share, outside: Mapping[str, str]) -> dict[str, str]:
    """The variables of a job.

    Args:
        kind: `torchrun | deepspeed | python`.
        share: its processes and GPUs.
        outside: the variables of the sweep itself.
    """
    found = {
        key: value
        for key, value in outside.items()
        if key not in FOREIGN and not key.startswith("TORCHELASTIC_")
    }
    found[DRIVER] = str(os.getpid())
    found.setdefault("OMP_NUM_THREADS", str(share.threads))
    if share.devices and kind == "deepspeed":
        found.pop("CUDA_VISIBLE_DEVICES", None)  # --include counts the machine's GPUs
    elif share.devices:
        found["CUDA_VISIBLE_DEVICES"] = ",".join(share.devices)
    return found


def devices() -> list[str]:
    """This machine's GPUs that may be used, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    import torch

    count = torch.cuda.device_count()
    return [x for x in named.split(",") if x][:count] if named else [str(i) for i in range(count)]


@contextmanager
def ends_by_exception() -> Iterator[None]:
    """SIGTERM and SIGUSR1 raise SystemExit in the body, so that its jobs are ended first."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, _: Any) -> None:
        sys.exit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Job:
    """A running job.

    Args:
        start: its command.
        variables: its environment.
        log: where its output goes, after what is there already. None: where this process prints.
    """

    def __init__(
        self, start: Sequence[str], variables: Mapping[str, str], log: Path | None
    ) -> None:
        self._begin = time.monotonic()
        with log.open("ab") if log else nullcontext() as out:
            self._process = subprocess.Popen(
                start, env=variables, stdin=subprocess.DEVNULL, stdout=out,
                stderr=subprocess.STDOUT if log else None, start_new_session=True,
            )  # fmt: skip
        self.pid = self._process.pid
        self._seen: set[int] = set()

    @property
    def seconds(self) -> float:
        """Wall time since the start."""
        return time.monotonic() - self._begin

    def code(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        return self._process.poll()

    def wait(self) -> int:
        """Its exit code, once it has ended."""
        return self._process.wait()

    def signal(self, number: int) -> None:
        """Sends a signal to launcher and ranks."""
        for group in self._groups():
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(group, number)

    def alive(self) -> bool:
        """Whether anything of it still runs."""
        return self.code() is None or bool(self._groups())

    def _groups(self) -> set[int]:
        """Its living process groups; torchrun gives each rank one, which outlives torchrun."""
        processes = _processes()
        ours = {pid for pid, p in processes.items() if p.session in {self.pid, *self._seen}}
        grown = True
        while grown:
            below = {pid for pid, p in processes.items() if p.parent in ours}
            grown = not below <= ours
            ours |= below
        self._seen |= {processes[pid].group for pid in ours}
        return {processes[pid].group for pid in ours}


def stop(jobs: Iterable[Job], grace: float = GRACE) -> None:
    """Ends jobs: they are asked, may save for `grace` seconds, and are then killed."""
    left = list(jobs)
    for job in left:
        job.signal(signal.SIGTERM)
    limit = time.monotonic() + grace
    try:
        while any(job.alive() for job in left) and time.monotonic() < limit:
            time.sleep(0.05)
    finally:  # a second Ctrl-C ends the wait
        for job in left:
            job.signal(signal.SIGKILL)


class _Process(NamedTuple):
    parent: int
    group: int
    session: int


def _processes() -> dict[int, _Process]:
    """Every living process of this machine, by its id (Linux)."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError):
            state, *numbers = entry.read_text().rsplit(")", 1)[1].split()[:4]
            if state not in "ZX":
                found[int(entry.parent.name)] = _Process(*map(int, numbers))
    return found

"""Several processes on gloo, for tests: a module-level function runs on every rank."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch.multiprocessing


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _entry(rank: int, function: Callable[..., None], world: int, port: int, args: Any) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    torch.set_num_threads(1)
    function(*args)


@contextmanager
def without_gpus() -> Iterator[None]:
    """Children started here see no GPU: the ranks of a test share a machine that may have one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setenv("DS_ACCELERATOR", "cpu")
        yield


def spawn(function: Callable[..., None], world: int, *args: Any) -> None:
    """Runs `function(*args)` on `world` ranks; an exception on any rank is raised here."""
    with without_gpus():
        torch.multiprocessing.spawn(_entry, (function, world, free_port(), args), world)

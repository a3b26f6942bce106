"""Several processes on gloo, for tests: a module-level function runs on every rank."""

import os
import socket
from collections.abc import Callable
from typing import Any

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


def spawn(function: Callable[..., None], world: int, *args: Any) -> None:
    """Runs `function(*args)` on `world` ranks; an exception on any rank is raised here."""
    torch.multiprocessing.spawn(_entry, (function, world, free_port(), args), world)

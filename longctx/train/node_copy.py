"""One copy of the weights per machine while its ranks start, whatever dtype they are stored in.

Ranks that load a checkpoint in the dtype it is stored in share the operating system's page cache.
If the run trains in another one (Llama-2 is stored in fp16), the first rank of each machine casts
the weights once into a temporary directory (TMPDIR) that all of them load from and that is then
removed: files that are mapped stay readable. Costs that disk space, bytes per weight times weights,
until the ranks have their shards, and writing it once.
"""

import dataclasses
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from longctx.config import RunConfig
from longctx.errors import UserError
from longctx.models.cast_copy import cast_copy, needs_cast, stored_in
from longctx.models.files import DTYPES
from longctx.parallel.mesh import Mesh
from longctx.train.log import say

ROOM = 1.05  # of the copy's bytes that must be free
PREFIX = "longctx-weights-"


@contextmanager
def node_copy(run: RunConfig, mesh: Mesh, wanted: bool = True) -> Iterator[RunConfig]:
    """The run, with the model at this machine's copy where one is needed. Collective.

    Args:
        run: the run.
        mesh: the ranks.
        wanted: whether the weights will be read.

    Yields:
        `run`, or the same with another `model.path`; the tokenizer's stays.
    """
    if mesh.ranks == 1 or run.model.path is None or not wanted:
        yield run
        return
    hosts: list[str] = [""] * mesh.ranks
    dist.all_gather_object(hosts, socket.gethostname())
    mine = [rank for rank, host in enumerate(hosts) if host == hosts[mesh.rank]]
    made = _try(run, len(mine)) if len(mine) > 1 and mine[0] == mesh.rank else None
    places: list[str | None] = [None] * mesh.ranks
    try:
        dist.all_gather_object(places, made)
        place = places[mine[0]]
        if place is None or not Path(place).is_dir():  # another container's disk
            yield run
        else:
            tokenizer = run.model.tokenizer_path
            model = dataclasses.replace(run.model, path=place, tokenizer=tokenizer)
            yield dataclasses.replace(run, model=model)
        if any(places):
            mesh.barrier()  # all have mapped it
    finally:
        if made:
            shutil.rmtree(made, ignore_errors=True)


def _try(run: RunConfig, ranks: int) -> str | None:
    """This machine's copy; None where none is needed or possible: then each rank has its own."""
    try:
        return _make(run, ranks)
    except UserError:
        return None  # every rank reports an unreadable file itself, as it loads
    except Exception as error:
        say(f"warning: {run.model.path} for each of {ranks} ranks, as no copy can be made: {error}")
        return None


def _make(run: RunConfig, ranks: int) -> str | None:
    path, dtype = str(run.model.path), DTYPES[run.train.dtype]
    stored = stored_in(path)
    size = needs_cast(stored, dtype) if stored else 0
    if stored is None or not size:
        return None
    root = Path(tempfile.gettempdir())
    _sweep(root)
    what = f"{path} is not stored in {run.train.dtype}: {size / 1e9:,.2f} GB"
    if shutil.disk_usage(root).free < ROOM * size:
        say(f"warning: {what} for each of {ranks} ranks, as {root} has no room for a copy (TMPDIR)")
        return None
    say(f"{what} are cast once for {ranks} ranks, in {root}")
    target = tempfile.mkdtemp(prefix=f"{_own()}{os.getpid()}-", dir=root)
    try:
        cast_copy(stored, Path(target), dtype)
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise
    return target


def _own() -> str:
    return f"{PREFIX}{socket.gethostname()}-"


def _sweep(root: Path) -> None:
    """Removes the copies of processes of this machine that were killed."""
    for left in root.glob(f"{_own()}*"):
        number = left.name.removeprefix(_own()).partition("-")[0]
        if number.isdigit() and not Path("/proc", number).exists():
            shutil.rmtree(left, ignore_errors=True)

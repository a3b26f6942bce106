"""Which rank this process is, its part of a batch, and the few collectives the trainer needs.

The same code runs under `deepspeed`, `torchrun` and plain `python` (then a world of one, without
opening a port), with NCCL on GPUs and gloo on CPU.
"""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from longctx.batch import Batch
from longctx.errors import UserError

T = TypeVar("T")
WHOLE = ("contexts", "context_mask")  # every rank's tokens see all contexts of their row


@dataclass(frozen=True)
class Mesh:
    """Two axes: rows are dealt out along the first, the tokens of a row along the second.

    Args:
        dp_rank: this process along the data-parallel axis.
        dp_size: its length.
        device: where this rank's model lives.
        sp_rank: this process along the axis of the tokens; neighbouring ranks share a row.
        sp_size: its length.
        sp_group: the ranks that share a row with this one; None where it has rows of its own.
    """

    dp_rank: int
    dp_size: int
    device: torch.device
    sp_rank: int = 0
    sp_size: int = 1
    sp_group: dist.ProcessGroup | None = None

    @property
    def rank(self) -> int:
        """This process among all."""
        return self.dp_rank * self.sp_size + self.sp_rank

    @property
    def ranks(self) -> int:
        """How many there are."""
        return self.dp_size * self.sp_size

    @property
    def main(self) -> bool:
        """Whether this rank writes files and prints."""
        return self.rank == 0

    def sum(self, value: float) -> float:
        """The sum of `value` over all ranks, in float64."""
        return self.sums(value)[0]

    def sums(self, *values: float) -> list[float]:
        """The sum of each value over all ranks, in float64, in one exchange."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return [float(value) for value in total.tolist()]

    def least(self, value: float) -> float:
        """The smallest `value` of all ranks."""
        found = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(found, op=dist.ReduceOp.MIN)
        return float(found)

    def same(self, value: T) -> T:
        """The first rank's value; a small object, pickled."""
        values = [value]
        dist.broadcast_object_list(values, src=0, device=self.device)
        return values[0]

    def barrier(self) -> None:
        """Waits for all ranks."""
        dist.barrier()


def shard(batch: Batch, mesh: Mesh) -> Batch:
    """The tokens of this rank: the sp_rank-th of sp_size equal parts of each row (`parallel.sp`).

    Ranks that share a row read it whole and keep their part: no communication, and a copy of it.
    Labels are shifted already, so the last token of a part has its label here; positions are the
    true ones, which go on from the part before.

    Args:
        batch: whole rows.
        mesh: the ranks.
    """
    if mesh.sp_size == 1:
        return batch
    length = batch.tokens.shape[1]
    assert length % mesh.sp_size == 0, "RunConfig checks it"
    own = length // mesh.sp_size
    start = mesh.sp_rank * own
    parts = {
        name: x if name in WHOLE else x[:, start : start + own].contiguous()
        for name, x in batch.tensors().items()
    }
    return Batch(**parts)


def first_to(action: str) -> bool:
    """Whether this process is the first of the group to do `action`; True if that is unknown."""
    if not dist.is_initialized():
        return os.environ.get("RANK", "0") == "0"
    try:
        return int(dist.distributed_c10d._get_default_store().add(action, 1)) == 1
    except RuntimeError:  # the rank that keeps the store is gone
        return True


def rows_at_once(ranks: int, sp: int) -> int:
    """The data-parallel size: how many groups of `sp` ranks there are.

    Raises:
        UserError: if the ranks cannot be grouped so.
    """
    if ranks % sp:
        raise UserError(
            f"parallel.sp={sp} does not divide the {ranks} processes of this run: start a multiple "
            f"of {sp}"
        )
    return ranks // sp


def start(sp: int = 1, timeout: timedelta = timedelta(hours=2)) -> Mesh:
    """Joins the process group that the launcher describes in the environment.

    Args:
        sp: ranks that share a row.
        timeout: after which a collective fails that a rank never joins.

    Raises:
        UserError: if `sp` does not divide the number of processes.
    """
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if gpu else None
    if device is not None:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "nccl" if gpu else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it
            alone = dist.HashStore()
            dist.init_process_group(backend, store=alone, rank=0, world_size=1, timeout=timeout)
    rank, dp_size = dist.get_rank(), rows_at_once(dist.get_world_size(), sp)
    group = None
    if sp > 1:
        groups = [range(first, first + sp) for first in range(0, dp_size * sp, sp)]
        group = [dist.new_group(list(ranks), timeout=timeout) for ranks in groups][rank // sp]
    return Mesh(rank // sp, dp_size, device or torch.device("cpu"), rank % sp, sp, group)

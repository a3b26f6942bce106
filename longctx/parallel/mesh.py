"""Which rank this process is, and the few collectives the trainer needs.

The same code runs under `deepspeed`, `torchrun` and plain `python` (then a world of one, without
opening a port), with NCCL on GPUs and gloo on CPU.
"""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Mesh:
    """The data-parallel axis.

    Args:
        dp_rank: this process along it.
        dp_size: its length.
        device: where this rank's model lives.
    """

    dp_rank: int
    dp_size: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this rank writes files and talks."""
        return self.dp_rank == 0

    def sum(self, value: float) -> float:
        """The sum of `value` over all ranks, in float64."""
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return float(total)

    def barrier(self) -> None:
        """Waits for all ranks."""
        dist.barrier()


def first_to(deed: str) -> bool:
    """Whether this process is the first of the group to do `deed`; True when nobody can tell."""
    if not dist.is_initialized():
        return os.environ.get("RANK", "0") == "0"
    try:
        return int(dist.distributed_c10d._get_default_store().add(deed, 1)) == 1
    except RuntimeError:  # the rank that keeps the store is gone
        return True


def start(timeout: timedelta = timedelta(hours=2)) -> Mesh:
    """Joins the process group that the launcher describes in the environment.

    Args:
        timeout: after which a collective that some rank never joins fails.
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
    return Mesh(dist.get_rank(), dist.get_world_size(), device or torch.device("cpu"))

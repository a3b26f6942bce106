"""Ranks started by SLURM itself: `srun python train.py ...`, one task a rank, no other launcher.

torchrun and `deepspeed` describe the process group in the environment; srun does so in variables of
its own. Only a job step of several tasks counts: the shell of `sbatch` or `salloc` has SLURM's
variables too, but is no rank.
"""

import re
from collections.abc import Mapping


def ranks(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE and so on for a task of srun; empty for any other process.

    Args:
        environment: the variables of this process.
    """
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if "RANK" in environment or tasks == 1:
        return {}
    step = int(environment["SLURM_JOB_ID"]) * 7 + int(environment.get("SLURM_STEP_ID", "0"))
    return {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "WORLD_SIZE": str(tasks),
        # The first host holds rank 0; a port that all tasks compute and other steps do not.
        "MASTER_ADDR": environment.get("MASTER_ADDR")
        or first_host(environment["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": environment.get("MASTER_PORT") or str(20000 + step % 12000),
    }


def first_host(nodes: str) -> str:
    """The first name of a SLURM host list.

    >>> first_host("gpu-[007-009,012],login1")
    'gpu-007'
    >>> first_host("rack[2-3]n[01-04]-ib,x")
    'rack2n01-ib'
    """
    first = re.match(r"(?:[^,\[\]]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0]) if first else nodes

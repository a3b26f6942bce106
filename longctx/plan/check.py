"""Before a run starts: what it needs against what this machine has free.

Refuses only what is beyond the plan's error. A run that is small against the memory by a crude
bound is let through after its sketch is made (a tenth of a second); others cost what a plan does.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from longctx.config import RunConfig
from longctx.errors import UserError
from longctx.plan.budget import Budget, Planner
from longctx.plan.machine import GIB, Machine
from longctx.plan.search import smallest, typed
from longctx.recipe import Recipe
from longctx.train.loss import LOGITS_BYTES

ERROR = 1.15  # a plan may be off by this factor
PROCESS = 1.0  # GiB that a process holds before it has a model: torch, transformers, deepspeed


def here(ranks: int) -> Machine | None:
    """This machine, with what one rank finds free on it; None if that cannot be told.

    Args:
        ranks: of the run.
    """
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return Machine(gpus=ranks, gpu_memory=free / GIB, reserve=0.02 * total / GIB)
    free_ram = _free_ram()
    if free_ram is None:
        return None
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or ranks)
    return Machine(gpus=ranks, gpu_memory=free_ram / local, reserve=PROCESS, is_gpu=False)


def require_fit(
    run: RunConfig, recipe: Recipe, ranks: int, least: Callable[[float], float] = float
) -> None:
    """Ends a run that cannot fit, before anything is loaded.

    Args:
        run: the run; with `force` nothing is asked.
        recipe: what it trains.
        ranks: of the run.
        least: the smallest of what all ranks find, so that all decide alike.

    Raises:
        UserError: if it needs more than there is, with the smallest change that helps.
    """
    machine = None if run.force else here(ranks)
    if machine is not None:
        machine = replace(machine, gpu_memory=least(machine.gpu_memory))
    if machine is None or _bound(run, recipe) < machine.gpu_memory / 2:
        return
    planner = Planner(recipe)
    try:
        budget = planner.budget(run, machine)
    except (RuntimeError, TypeError, AttributeError):
        return  # an architecture that does not run without values: no reason to refuse it
    if not exceeds(budget):
        return
    change = smallest(planner, run, machine)
    helps = f"{typed(change)} would make it fit" if change else "no setting makes it fit"
    raise UserError(
        f"this run needs about {budget.peak / GIB + machine.reserve:.3g} GiB a rank at "
        f"{budget.moment}, and {machine.gpu_memory:.3g} GiB are free: {helps}; force=true starts "
        "it all the same"
    )


def exceeds(budget: Budget) -> bool:
    """Whether a run is beyond the memory by more than the plan's error."""
    return budget.peak / GIB > ERROR * budget.machine.gpu_memory


def _bound(run: RunConfig, recipe: Recipe) -> float:
    """GiB that a run certainly stays below: all states on each rank, all that linear layers see."""
    model: Any = recipe.sketch(run)
    parameters: int = sum(p.numel() for p in model.parameters())
    seen: int = sum(
        m.in_features + m.out_features for m in model.modules() if isinstance(m, nn.Linear)
    )
    tokens = run.train.micro_batch_rows * (run.data.seq_len + run.contexts.tokens)
    return (32 * parameters + 4 * 4 * tokens * seen + 8 * LOGITS_BYTES) / GIB + PROCESS


def _free_ram() -> float | None:
    """GiB of memory and swap that can still be had here, also inside a container."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    known = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if ":" in line}
    if "MemAvailable" not in known:
        return None
    free = known["MemAvailable"] + known.get("SwapFree", 0)
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        used = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        free = min(free, limit - int(used["anon"]))
    except (OSError, ValueError, KeyError):
        pass  # no limit
    return free / GIB

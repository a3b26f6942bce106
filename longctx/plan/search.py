"""The smallest change that makes a run fit, in the order of what it costs."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from longctx.config import RunConfig
from longctx.errors import UserError
from longctx.plan.budget import Budget, Planner
from longctx.plan.machine import Machine

TILE = 4096  # tokens
MOST_GPUS = 1024

Change = tuple[str, Any]  # an override, as it is typed, and its value


def changes(run: RunConfig, machine: Machine) -> Iterator[list[Change]]:
    """What could be changed, cheapest first; each is a list of values that go further and further.

    Recomputing costs a forward pass; tiles a forward of the FFN; ZeRO 2 and 3 and sp communication;
    a smaller micro-batch more passes; CPU memory its bus; GPUs money.
    """
    parallel, train = run.parallel, run.train
    if not parallel.activation_checkpointing:
        yield [("parallel.activation_checkpointing", True)]
    if not parallel.mlp_tile and run.data.seq_len > TILE:
        yield [("parallel.mlp_tile", TILE)]
    if parallel.zero_stage < 3 and machine.gpus > 1:
        yield [("parallel.zero_stage", s) for s in range(max(1, parallel.zero_stage + 1), 4)]
    spread = [s for s in (2, 4, 8, 16, 32, 64) if s > parallel.sp and machine.gpus % s == 0]
    if spread := [s for s in spread if run.data.seq_len % s == 0]:
        yield [("parallel.sp", s) for s in spread]
    rows = [m for m in range(train.micro_batch_rows - 1, 0, -1) if train.micro_batch_rows % m == 0]
    if rows:
        yield [("train.micro_batch_rows", m) for m in rows]
    if machine.is_gpu:  # a CPU's memory is the device's: nothing to move, nothing to add
        yield from _beyond(run, machine)


def _beyond(run: RunConfig, machine: Machine) -> Iterator[list[Change]]:
    """CPU memory, and more GPUs."""
    parallel = run.parallel
    if not parallel.offload_checkpoints:
        yield [("parallel.offload_checkpoints", True)]
    if not parallel.offload_optimizer and parallel.zero_stage:
        yield [("parallel.offload_optimizer", True)]
    if not parallel.offload_parameters:
        yield [("parallel.offload_parameters", True)]
    more = [machine.gpus * 2**k for k in range(1, 11) if machine.gpus * 2**k <= MOST_GPUS]
    if more:
        yield [("gpus", g) for g in more]


def applied(run: RunConfig, machine: Machine, chosen: list[Change]) -> tuple[RunConfig, Machine]:
    """The run and machine after some changes.

    Raises:
        UserError: if they contradict each other.
    """
    parts: dict[str, dict[str, Any]] = {"parallel": {}, "train": {}}
    for key, value in chosen:
        if key == "gpus":
            machine = replace(machine, gpus=value)
            continue
        group, _, name = key.partition(".")
        parts[group][name] = value
    changed = {group: replace(getattr(run, group), **new) for group, new in parts.items() if new}
    return replace(run, **changed), machine


def smallest(planner: Planner, run: RunConfig, machine: Machine) -> list[Change] | None:
    """The changes to make, or None if none of them is enough.

    One alone where one is enough, the first in the order of cost; else as many as it takes in that
    order, without those that turn out not to be needed.

    Args:
        planner: of the run's recipe.
        run: what does not fit.
        machine: where.
    """
    ladder = list(changes(run, machine))
    for steps in ladder:
        for change in steps:
            if _fits(planner, run, machine, [change]):
                return [change]
    taken: list[Change] = []
    for steps in ladder:
        for change in steps:
            tried = [c for c in taken if c[0] != change[0]] + [change]
            found = _budget(planner, run, machine, tried)
            if found is None:
                continue
            taken = tried
            if found.fits:
                return _needed(planner, run, machine, taken)
    return None


def _needed(
    planner: Planner, run: RunConfig, machine: Machine, taken: list[Change]
) -> list[Change]:
    """Of the changes taken, those that it does not fit without; dearer ones are dropped first."""
    for change in reversed(taken[:-1]):
        rest = [c for c in taken if c != change]
        if _fits(planner, run, machine, rest):
            taken = rest
    return taken


def _fits(planner: Planner, run: RunConfig, machine: Machine, chosen: list[Change]) -> bool:
    found = _budget(planner, run, machine, chosen)
    return found is not None and found.fits


def _budget(
    planner: Planner, run: RunConfig, machine: Machine, chosen: list[Change]
) -> Budget | None:
    """None where the changes cannot be made."""
    try:
        return planner.budget(*applied(run, machine, chosen))
    except UserError:
        return None


def typed(chosen: list[Change]) -> str:
    """As it is typed on a command line."""
    return " ".join(f"{key}={str(v).lower() if isinstance(v, bool) else v}" for key, v in chosen)

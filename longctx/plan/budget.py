"""Whether a run fits: what a rank holds at each moment of a step, against its memory."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from longctx.config import RunConfig
from longctx.parallel.mesh import rows_at_once
from longctx.plan import speed, step
from longctx.plan.machine import GIB, Machine
from longctx.plan.states import (
    ADAM,
    GATHERED,
    GRADIENTS,
    MASTER,
    UPDATE,
    WEIGHTS,
    Sizes,
    States,
    reduction,
    states,
)
from longctx.recipe import Recipe
from longctx.train.sequence_parallel import require_spreadable

START, REDUCE, STEP, SAVE = "start", "reduction", "update", "saving"
KEPT_BY_CHECKPOINT = 12  # bytes per trained parameter of a rank's share while it is written
Parts = dict[str, float]


@dataclass(frozen=True)
class Budget:
    """A run on a machine.

    Args:
        run: the run.
        machine: its ranks.
        sizes: of its model.
        moments: bytes on the device at each moment's peak, by part.
        host: bytes in CPU memory of one rank, by part; empty where the CPU is the device.
        time: of a step.
    """

    run: RunConfig
    machine: Machine
    sizes: Sizes
    moments: dict[str, Parts]
    host: Parts
    time: speed.Time

    @property
    def moment(self) -> str:
        """When most is held."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def peak(self) -> float:
        """Bytes at that moment, without the reserve."""
        return sum(self.moments[self.moment].values())

    @property
    def margin(self) -> float:
        """GiB of the device that are left; below zero they are missing."""
        return self.machine.gpu_memory - self.machine.reserve - self.peak / GIB

    @property
    def host_margin(self) -> float:
        """GiB of the rank's CPU memory that are left."""
        return self.machine.host_memory - sum(self.host.values()) / GIB

    @property
    def fits(self) -> bool:
        """Whether both suffice."""
        return self.margin >= 0 and self.host_margin >= 0


class Planner:
    """Makes budgets of one recipe; what does not depend on what changed is kept.

    Args:
        recipe: what the runs train.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._steps: dict[str, step.Peaks] = {}

    def budget(self, run: RunConfig, machine: Machine) -> Budget:
        """The budget of a run.

        Raises:
            UserError: if ranks cannot be grouped, the rows of a step dealt out, or a row shared.
        """
        passes = run.train.accumulation(rows_at_once(machine.gpus, run.parallel.sp))
        model: Any = self.recipe.sketch(run)
        if run.parallel.sp > 1:
            require_spreadable(model.get_decoder(), run.parallel.sp)
        trained = self.recipe.trainable(model)
        wanted = [p for p in trained.values() if p.requires_grad]
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
        sizes = Sizes(
            parameters=sum(p.numel() for p in model.parameters()),
            trained=sum(p.numel() for p in wanted),
            largest=max((p.numel() for p in wanted), default=0),
        )
        time = speed.time(run, self.recipe, model, sizes, machine)
        held = states(run, sizes, machine)
        moments = self._moments(run, model, sizes, machine, held, passes)
        host = held.host if machine.is_gpu else {}
        if machine.is_gpu and run.parallel.offload_checkpoints:
            host = {**host, "checkpointed layer inputs": _offloaded(run, model)}
        return Budget(run, machine, sizes, moments, host, time)

    def _moments(
        self, run: RunConfig, model: Any, of: Sizes, machine: Machine, held: States, passes: int
    ) -> dict[str, Parts]:
        on_host = {} if machine.is_gpu else {k: v for k, v in held.host.items() if k != UPDATE}
        kept = _sum(held.kept, on_host)
        stage, width = run.parallel.zero_stage, 2 if run.train.dtype == "bf16" else 4
        early = dict(kept)  # before the first micro-batch has left its gradients
        if passes == 1 and stage < 3:
            early.pop(GRADIENTS, None)
        begun = {**early, GRADIENTS: max(early.get(GRADIENTS, 0), width * float(of.largest))}
        found: dict[str, Parts] = {START: _start(run, of, machine)}
        for moment, places in self._step(run, model).items():
            top = moment == f"{step.DECODER} {step.BACKWARD}"
            below = kept if moment.endswith((step.BACKWARD, step.EMBEDDING)) else early
            found[moment] = _sum(begun if top else below, places)
        if copied := reduction(run, of, machine):
            found[REDUCE] = _sum(kept, {"reduction's copy": copied})
        found[STEP] = _sum(held.update, {} if machine.is_gpu else held.host)
        if not machine.is_gpu:
            steady = {p: kept[p] for p in (WEIGHTS, MASTER, ADAM) if p in kept}
            share = KEPT_BY_CHECKPOINT * of.trained / machine.gpus
            found[SAVE] = _sum(steady, {"checkpoint's share": share})
        return found

    def _step(self, run: RunConfig, model: Any) -> step.Peaks:
        parallel = run.parallel
        key = str((
            run.data.seq_len, run.train.micro_batch_rows, run.train.dtype, parallel.sp,
            parallel.activation_checkpointing, parallel.mlp_tile, parallel.offload_checkpoints,
            run.contexts, run.attention, run.teacher, run.adapter,
        ))  # fmt: skip
        if key not in self._steps:
            self._steps[key] = step.activations(run, self.recipe, model, parallel.sp)
        return self._steps[key]


def _start(run: RunConfig, of: Sizes, machine: Machine) -> Parts:
    """While the engine is built: stages 1 and 2 copy the trained weights into one tensor.

    A GPU gets a stage 3 model in shards, a parameter at a time (`Engine`); a CPU had it whole.
    """
    width = 2 if run.train.dtype == "bf16" else 4
    stage, n, gpu = run.parallel.zero_stage, machine.gpus, machine.is_gpu
    whole = width * of.parameters
    parts: Parts = {WEIGHTS: whole}
    if stage == 3 and gpu:
        parts = {GATHERED: width * of.largest}
        if not run.parallel.offload_parameters:
            parts[WEIGHTS] = whole / n
    if stage in (1, 2):
        parts["flat copy"] = width * of.trained
    if stage and not (gpu and run.parallel.offload_optimizer):
        parts[MASTER] = 4 * of.trained / n
    return parts


def _offloaded(run: RunConfig, model: Any) -> float:
    """Bytes of the layer inputs of one micro-batch; the sketch's layers may be cut by now."""
    width = 2 if run.train.dtype == "bf16" else 4
    tokens = run.train.micro_batch_rows * run.data.seq_len / run.parallel.sp
    config = run.model.architecture or {}
    layers = config.get("num_hidden_layers", model.config.num_hidden_layers)
    return float(width * tokens * model.config.hidden_size * layers)


def _sum(*parts: Parts) -> Parts:
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part)
    return {name: float(size) for name, size in total.items() if size}

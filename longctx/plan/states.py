"""Bytes that do not depend on tokens: weights, gradients, optimizer, and what ZeRO keeps for them.

P parameters of w bytes, T of them trained, n ranks. Mixed precision keeps, per trained parameter,
an fp32 copy and two Adam moments; stage 1 shards these over the ranks, 2 also the gradients, 3 also
the weights. The buffers are DeepSpeed's, read off its code and measured (benchmarks/plan.py).
"""

from dataclasses import dataclass

from longctx.config import RunConfig
from longctx.parallel.deepspeed_config import bucket_elements
from longctx.plan.machine import Machine

LIVE = 1_000_000_000  # elements that ZeRO 3 keeps gathered at most, and updates at a time
PLAIN_BUCKET = 500_000_000  # gradients that stage 0 copies into one to reduce them
FP32 = 4

WEIGHTS, MASTER, ADAM, GRADIENTS = "weights", "fp32 weights", "Adam moments", "gradients"
BUFFERS, GATHERED, UPDATE = "communication buffers", "gathered weights", "update's temporaries"


@dataclass(frozen=True)
class Sizes:
    """Counts of a model.

    Args:
        parameters: all.
        trained: of them, those with a gradient.
        largest: of the largest tensor that is trained.
    """

    parameters: int
    trained: int
    largest: int


@dataclass(frozen=True)
class States:
    """Bytes of one rank.

    Args:
        kept: by part, on the device during forward and backward.
        host: by part, in CPU memory.
        update: by part, on the device while the optimizer steps, instead of activations.
    """

    kept: dict[str, float]
    host: dict[str, float]
    update: dict[str, float]


def states(run: RunConfig, of: Sizes, machine: Machine) -> States:
    """What a rank holds of weights and optimizer, and when.

    Args:
        run: the run.
        of: its model.
        machine: its ranks.
    """
    n, stage = machine.gpus, run.parallel.zero_stage
    width = 2 if run.train.dtype == "bf16" else FP32
    shard = of.trained / n if stage else of.trained
    bucket = width * min(bucket_elements(machine.is_gpu), of.parameters)
    device: dict[str, float] = {WEIGHTS: width * of.parameters / (n if stage == 3 else 1)}
    device[MASTER] = FP32 * shard if stage else 0
    device[ADAM] = 2 * FP32 * shard
    device[GRADIENTS] = width * (shard if stage >= 2 else of.trained)
    device[BUFFERS] = bucket if stage else 0
    if stage == 3:
        device[BUFFERS] += bucket  # prefetching
        device[GATHERED] = width * min(of.parameters, LIVE)
    host: dict[str, float] = {}
    update = _update(of, shard, stage, width, machine.is_gpu)
    after = {WEIGHTS: device[WEIGHTS], MASTER: device[MASTER], ADAM: device[ADAM]}
    after[GRADIENTS] = width * shard
    if run.parallel.offload_optimizer:
        for part in (MASTER, ADAM):
            host[part], after[part] = device.pop(part), 0
        host[UPDATE], update = update, 0
        host[GRADIENTS] = FP32 * shard
        after[GRADIENTS] = device[GRADIENTS] if stage == 1 else 0
        if stage >= 2:
            device[GRADIENTS] = width * of.largest  # they leave as they come
    if run.parallel.offload_parameters:
        host[WEIGHTS], after[WEIGHTS] = device.pop(WEIGHTS), 0
    after[BUFFERS], after[UPDATE] = device[BUFFERS], update
    return States(_filled(device), _filled(host), _filled(after))


def _update(of: Sizes, shard: float, stage: int, width: int, gpu: bool) -> float:
    """Bytes beside weights, gradients and optimizer while AdamW runs."""
    if stage == 0:  # tensor by tensor; all at once on a GPU
        return FP32 * (of.trained if gpu else 2 * of.largest)
    temporaries = 1 if gpu else 2  # of the flat shard: a root, and on CPU a quotient
    at_once = min(shard, LIVE) if stage == 3 else shard
    return FP32 * at_once * (1 + temporaries)  # and the gradient in fp32


def reduction(run: RunConfig, of: Sizes, machine: Machine) -> float:
    """Bytes of the copy that stage 0 makes to reduce all gradients; no activation is left then."""
    if run.parallel.zero_stage or machine.gpus == 1:
        return 0.0
    return (2 if run.train.dtype == "bf16" else FP32) * float(min(of.trained, PLAIN_BUCKET))


def _filled(parts: dict[str, float]) -> dict[str, float]:
    return {part: float(size) for part, size in parts.items() if size}

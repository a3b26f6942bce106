"""Time of a step: FLOPs over what a GPU reaches, bytes over what a link carries. No overlap.

Model FLOPs are those of `longctx/train/meter.py`; checkpointing runs the forward pass again, tiles
the FFN's once more. What is sent is what a rank sends, from the algorithms' bounds.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from longctx.batch import Batch
from longctx.config import RunConfig
from longctx.parallel.mesh import rows_at_once
from longctx.plan.machine import Machine
from longctx.plan.states import Sizes
from longctx.recipe import Recipe
from longctx.train import meter


@dataclass(frozen=True)
class Time:
    """Of one optimizer step of one rank.

    Args:
        flops: by part; of them, the model's own.
        sent: bytes by part.
        seconds: by part.
    """

    flops: dict[str, float]
    sent: dict[str, float]
    seconds: dict[str, float]

    @property
    def total(self) -> float:
        """Seconds of a step."""
        return sum(self.seconds.values())


def step_flops(run: RunConfig, model: Any) -> float:
    """Model FLOPs of one row of the run, taken as one document, with its contexts."""
    positions = torch.arange(run.data.seq_len)[None]
    contexts = None
    if run.contexts.count:
        contexts = torch.empty(1, run.contexts.count, run.contexts.size, device="meta")
    return meter.batch_flops(meter.counts(model), Batch(positions, positions, positions, contexts))


def ffn_share(model: Any) -> float:
    """The part of the multiplying weights that is in the decoder's and encoder's FFNs."""
    ffn = [m for name, m in model.named_modules() if name.rpartition(".")[2] == "mlp"]
    within: int = sum(meter.matmul_weights(m) for m in ffn)
    return float(within / max(1, meter.matmul_weights(model)))


def teacher_flops(run: RunConfig, recipe: Recipe, model: Any) -> float:
    """FLOPs of one row of an online teacher: a forward pass over contexts and row."""
    if not recipe.distils or run.teacher.source != "online":
        return 0.0
    tokens = run.data.seq_len + run.contexts.tokens
    decoder = model.get_decoder()
    weights = meter.matmul_weights(decoder) + model.get_output_embeddings().weight.numel()
    attention: float = 2.0 * meter.attention_width(decoder) * tokens**2
    return attention + float(2.0 * weights * tokens)


def time(run: RunConfig, recipe: Recipe, model: Any, of: Sizes, machine: Machine) -> Time:
    """Of a step, by part.

    Args:
        run: the run.
        recipe: what it trains.
        model: its sketch, whole.
        of: its counts.
        machine: what it runs on.
    """
    sp = run.parallel.sp
    passes = run.train.accumulation(rows_at_once(machine.gpus, sp))
    rows = run.train.micro_batch_rows * passes / sp
    own = rows * step_flops(run, model)
    flops = {"model": own, "teacher": rows * teacher_flops(run, recipe, model)}
    if run.parallel.activation_checkpointing:
        flops["checkpointing"] = own / 3
    if run.parallel.mlp_tile:
        flops["tiles"] = own / 3 * ffn_share(model)
    sent, host = _sent(run, model, of, machine, passes)
    speed = machine.peak * 1e12 * machine.fraction
    seconds = {part: x / speed for part, x in flops.items() if x}
    seconds |= {part: x / machine.bandwidth for part, x in sent.items() if x}
    seconds |= {part: x / (machine.host_link * 1e9) for part, x in host.items() if x}
    return Time({k: v for k, v in flops.items() if v}, sent | host, seconds)


def _sent(
    run: RunConfig, model: nn.Module, of: Sizes, machine: Machine, passes: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes that a rank sends to others, and to and from CPU memory, in a step."""
    n, parallel = machine.gpus, run.parallel
    width = 2 if run.train.dtype == "bf16" else 4
    part = (n - 1) / n
    often = passes if parallel.zero_stage >= 2 else 1
    sent: dict[str, float] = {}
    if n > 1:
        sent["reduce gradients"] = part * width * of.trained * often
        gathers = 2 * passes if parallel.zero_stage == 3 else 1
        gathered = of.parameters if parallel.zero_stage == 3 else of.trained
        sent["gather weights"] = part * width * gathered * gathers
    config: Any = getattr(model, "config", None)
    tokens = run.train.micro_batch_rows * run.data.seq_len / parallel.sp * passes
    if parallel.sp > 1:
        heads, dim = config.num_attention_heads, meter.attention_width(model)
        share = (getattr(config, "num_key_value_heads", None) or heads) / heads
        again = 3 if parallel.activation_checkpointing else 2
        sent["all-to-all"] = (
            again * tokens * width * dim * (2 + 2 * share) * (parallel.sp - 1) / parallel.sp
        )
    host: dict[str, float] = {}
    if parallel.offload_checkpoints:
        host["checkpoints to CPU and back"] = (
            2 * tokens * width * config.hidden_size * config.num_hidden_layers
        )
    if parallel.offload_optimizer:
        host["gradients and weights to CPU and back"] = 2 * width * of.trained / n
    if parallel.offload_parameters:
        host["weights from CPU"] = 2 * passes * width * of.parameters / n
    return sent, host

"""Speed and memory of a step: model FLOPs, the device's peak, bytes held at most.

Model FLOPs count what is needed once (no recompute, no masked pair): for T tokens
`6 * N * T + 12 * hq * d * pairs`, N the weights that multiply (all matrices, the head once, not the
input embedding), pairs those of a query and a key that attend, summed over layers: the attention
method counts them (`Method.pairs`), inside documents. Frozen weights need no gradient of their own:
`4 * N * T`. What reads contexts counts their tokens.
"""

import resource
import time
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import nn

from longctx.attention.method import Method
from longctx.batch import Batch
from longctx.models.export.restore import recorded

# Dense bf16 tensor-core peaks, FLOP/s, from the vendors' data sheets; the key is part of the name.
PEAKS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}


def matmul_weights(model: nn.Module) -> int:
    """Weights that multiply every token: matrices, without the input embedding."""
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    matrices = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    tied = [m for m in model.modules() if isinstance(m, nn.Linear) and id(m.weight) in embedded]
    assert len(tied) <= 1
    return matrices


def attention_width(model: nn.Module) -> int:
    """Layers x query heads x head size: the width of `QK^T` and `PV`, summed over layers."""
    config: Any = model.config
    heads = int(config.num_attention_heads)
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return int(config.num_hidden_layers) * heads * int(size)


@dataclass(frozen=True)
class Counts:
    """What a model's FLOPs are made of; weights that are frozen count two thirds.

    Args:
        weights: that multiply the tokens of a row.
        width: query heads x head size, of a layer.
        method: the attention over them.
        layers: of the model.
        context_weights: that multiply the tokens of its contexts.
        context_width: `attention_width` inside a context.
        cross_width: the same between a row and its contexts.
    """

    weights: float
    width: int
    method: Method
    layers: int
    context_weights: float = 0.0
    context_width: int = 0
    cross_width: int = 0


def counts(model: Any) -> Counts:
    """What the FLOPs of a model are made of; one with an encoder has `cross_attending()` layers."""
    layers = int(model.config.num_hidden_layers)
    own = Counts(_needed(model), attention_width(model) // layers, recorded(model.config), layers)
    if not hasattr(model, "cross_attending"):
        return own
    cross = [layer.cross_attn for layer in model.cross_attending()]
    reading = [model.encoder, *(part for c in cross for part in (c.k_proj, c.v_proj))]
    context_weights = sum(_needed(part) for part in reading)
    return replace(
        own,
        weights=own.weights - context_weights,
        context_weights=context_weights,
        context_width=attention_width(model.encoder),
        cross_width=sum(c.q_proj.out_features for c in cross),
    )


def _needed(part: nn.Module) -> float:
    linear = [m.weight for m in part.modules() if isinstance(m, nn.Linear)]
    frozen = sum(w.numel() for w in linear if not w.requires_grad)
    return matmul_weights(part) - frozen / 3


def batch_flops(of: Counts, batch: Batch) -> float:
    """Model FLOPs of training on one batch, with its contexts: those attend in both directions."""
    pairs = of.method.pairs(batch.positions, of.layers)
    total = 6.0 * of.weights * batch.positions.numel() + 12.0 * of.width * pairs
    if batch.contexts is None:
        return total
    _, c, length = batch.contexts.shape
    tokens = batch.contexts.numel()
    inside = of.context_width * tokens * length
    across = of.cross_width * batch.positions.numel() * c * length
    return total + 6.0 * of.context_weights * tokens + 12.0 * (inside + across)


@cache
def peak_flops(device: torch.device) -> float:
    """FLOP/s this process could reach: the data sheet's, or a measured fp32 matmul on CPU."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = [peak for part, peak in PEAKS.items() if part in name]
        if known:
            return known[0]
    side = 1024 if device.type == "cpu" else 8192
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    square = torch.ones(side, side, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(4):
        begin = time.perf_counter()
        float((square @ square)[0, 0])
        best = min(best, time.perf_counter() - begin)
    return 2.0 * side**3 / best


def peak_memory(device: torch.device) -> int:
    """Bytes: most ever allocated on the GPU, or most ever resident on CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

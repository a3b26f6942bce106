"""Speed and memory of a step: model FLOPs, the device's peak, bytes held at most.

Model FLOPs are causal and document-aware (no recompute, no masked half): for T tokens
`6 * N * T + 6 * L * (hq * d) * sum(len^2)` over documents, N the weights that multiply (all
matrices, the head once, not the input embedding). Frozen weights need no gradient of their own:
`4 * N * T`. What reads contexts counts their tokens; layers that see a part of the past count that.
"""

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from longctx.batch import Batch
from longctx.models.choose import attention_method
from longctx.models.export.restore import RECORD

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


def step_flops(weights: float, width: int, positions: Tensor) -> float:
    """Model FLOPs of training on one batch.

    Args:
        weights: `matmul_weights`.
        width: `attention_width`.
        positions: `[b s]`; a document of n tokens adds n(n-1)/2 to their sum, so the sum of n^2
            is twice the sum of positions plus the tokens.
    """
    tokens = positions.numel()
    squares = 2 * int(positions.sum()) + tokens
    return 6.0 * weights * tokens + 6.0 * width * squares


@dataclass(frozen=True)
class Counts:
    """What a model's FLOPs are made of; weights that are frozen count two thirds.

    Args:
        weights: that multiply the tokens of a row.
        width: `attention_width` over them, of the layers that see all of the past.
        context_weights: that multiply the tokens of its contexts.
        context_width: `attention_width` inside a context.
        cross_width: the same between a row and its contexts.
        sparse_width: the same of the layers that see a part of the past.
        seen: keys that a query there sees, from its position. None: there are no such layers.
    """

    weights: float
    width: int
    context_weights: float = 0.0
    context_width: int = 0
    cross_width: int = 0
    sparse_width: int = 0
    seen: Callable[[Tensor], Tensor] | None = None


def counts(model: Any) -> Counts:
    """What the FLOPs of a model are made of; one with an encoder has `cross_attending()` layers."""
    width = attention_width(model)
    if not hasattr(model, "cross_attending"):
        return _hybrid(model, width) or Counts(_needed(model), width)
    cross = [layer.cross_attn for layer in model.cross_attending()]
    reading = [model.encoder, *(part for c in cross for part in (c.k_proj, c.v_proj))]
    context_weights = sum(_needed(part) for part in reading)
    return Counts(
        weights=_needed(model) - context_weights,
        width=width,
        context_weights=context_weights,
        context_width=attention_width(model.encoder),
        cross_width=sum(c.q_proj.out_features for c in cross),
    )


def _hybrid(model: Any, width: int) -> Counts | None:
    """The counts of a model whose attention lets some layers forget; None for others."""
    record = getattr(model.config, RECORD, None)
    method: Any = attention_method(record) if record else None
    if not hasattr(method, "seen"):
        return None
    layers = int(model.config.num_hidden_layers)
    sparse = width // layers * sum(method.evicts(layer) for layer in range(layers))
    return Counts(_needed(model), width - sparse, sparse_width=sparse, seen=method.seen)


def _needed(part: nn.Module) -> float:
    linear = [m.weight for m in part.modules() if isinstance(m, nn.Linear)]
    frozen = sum(w.numel() for w in linear if not w.requires_grad)
    return matmul_weights(part) - frozen / 3


def batch_flops(of: Counts, batch: Batch) -> float:
    """Model FLOPs of training on one batch, with its contexts: those attend in both directions."""
    total = step_flops(of.weights, of.width, batch.positions)
    if of.seen is not None:
        total += 12.0 * of.sparse_width * float(of.seen(batch.positions).sum())
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

"""Attention in parts that are merged by their log-sum-exp, exact in forward and backward.

A part is one flash call of some queries, turned by so many positions, against one slice of keys.
Parts over different keys of the same queries merge into one softmax:

    lse = log(sum_a exp(lse_a)),    out = sum_a exp(lse_a - lse) out_a

The backward pass needs no gradient of a log-sum-exp: the gradient of a part is what its own flash
backward gives when it is handed the merged output and the merged log-sum-exp, since both enter it
only through softmax weights `exp(score - lse)` and `sum(grad * out)`. Saved for it: query, key,
value, output and one number a row. No part's scores exist at once; turned queries exist a block at
a time.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from longctx.attention.ops.flash import flash as flash  # noqa: PLC0414 - parts are merged elsewhere too
from longctx.attention.ops.flash import flash_backward
from longctx.attention.ops.parts import Block, Part


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Sequence[Block],
    turns: dict[str, Tensor],
    inv_freq: Tensor | None,
    scaling: float | None,
) -> Tensor:
    """One softmax over all parts of each block.

    Args:
        query: `[b hq m d]`, rotated.
        key: `[b hk n d]`, rotated.
        value: `[b hk n d]`.
        blocks: every query row in exactly one.
        turns: by name, `[m]` positions by which each query is rotated further, or `[n]` each key.
        inv_freq: `[d/2]`, radians per position; fewer where only the first dimensions rotate; None
            without turns.
        scaling: factor on the scores; None: d ** -0.5.

    Returns:
        `[b hq m d]`.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if not query.is_cuda:
        blocks = [block.leaves() for block in blocks]
    merged: Any = _Merged.apply
    out: Tensor = merged(query, key, value, blocks, turns, inv_freq, scaling)
    return out


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        blocks: Sequence[Block],
        turns: dict[str, Tensor],
        inv_freq: Tensor | None,
        scaling: float,
    ) -> Tensor:
        out = torch.empty_like(query)
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        total = query.new_empty(query.shape[:3], dtype=wide)
        groups = query.shape[1] // key.shape[1]
        for block in blocks:
            whole = slice(block.start, block.stop)
            merged = out[:, :, whole]
            merged = merged.zero_() if out.dtype == wide else torch.zeros_like(merged, dtype=wide)
            total[:, :, whole] = -torch.inf
            for part in block.parts:
                heads, _, rows = part.of(block, groups)
                q, k, v = _operands(query, key, value, block, part, turns, inv_freq)
                found = flash(q, k, v, part.causal, scaling)
                o, lse = (part.back(x, len(query)) for x in found)
                own = slice(rows.start - block.start, rows.stop - block.start)
                sums = part.own(total[:, heads, rows])
                part.own(merged[:, heads, own]).lerp_(o.to(wide), (lse - sums).sigmoid()[..., None])
                sums.copy_(torch.logaddexp(sums, lse))
                del q, k, v, o, found  # before those of the next part exist
            if out.dtype != wide:
                out[:, :, whole] = merged
        ctx.save_for_backward(query, key, value, out, total, inv_freq, *turns.values())
        ctx.names, ctx.blocks, ctx.scaling = tuple(turns), blocks, scaling
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse, inv_freq, *given = ctx.saved_tensors
        turns = dict(zip(ctx.names, given, strict=True))
        groups = query.shape[1] // key.shape[1]
        d_query = torch.empty_like(query)
        d_key, d_value = (torch.zeros_like(x, dtype=lse.dtype) for x in (key, value))
        for block in ctx.blocks:
            d_rows = d_query[:, :, block.start : block.stop]
            wide = d_rows.dtype == lse.dtype
            d_rows = d_rows.zero_() if wide else torch.zeros_like(d_rows, dtype=lse.dtype)
            for part in block.parts:
                heads, key_heads, rows = part.of(block, groups)
                q, k, v = _operands(query, key, value, block, part, turns, inv_freq)
                g, h, z = (part.cut(x[:, heads, rows]) for x in (grads[0], out, lse))
                own = slice(rows.start - block.start, rows.stop - block.start)
                d_own = part.own(d_rows[:, heads, own])
                for keys in part.slabs():
                    seen = slice(keys.start - part.start, keys.stop - part.start)
                    slab = (k, v) if part.fold else (k[:, :, seen], v[:, :, seen])
                    found = flash_backward(q, *slab, g, h, z, part.causal, ctx.scaling)
                    d_q, d_k, d_v = (part.back(x, len(query)) for x in found)
                    d_own += _turned(d_q, turns, part.turn, rows, inv_freq, -1)
                    d_k = _turned(d_k, turns, part.key_turn, keys, inv_freq, -1)
                    for total, x in ((d_key, d_k), (d_value, d_v)):
                        part.own(total[:, key_heads, keys], keys=True).add_(x)
                    del found, slab, d_q, d_k, d_v  # before those of the next slab exist
            if not wide:
                d_query[:, :, block.start : block.stop] = d_rows
        d_key = d_key.to(key.dtype)  # one after the other: the wide one is free before the next
        d_value = d_value.to(value.dtype)
        return d_query, d_key, d_value, None, None, None, None


def _operands(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block: Block,
    part: Part,
    turns: dict[str, Tensor],
    inv_freq: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the kernel of a part gets: turned, and reversed or folded where the part is."""
    heads, key_heads, rows = part.of(block, query.shape[1] // key.shape[1])
    keys = slice(part.start, part.stop)
    q = _turned(query[:, heads, rows], turns, part.turn, rows, inv_freq, 1)
    k = _turned(key[:, key_heads, keys], turns, part.key_turn, keys, inv_freq, 1)
    v = value[:, key_heads, keys]
    return part.cut(q), part.cut(k, keys=True), part.cut(v, keys=True)


def _turned(
    x: Tensor,
    turns: dict[str, Tensor],
    turn: str | None,
    rows: slice,
    inv_freq: Tensor | None,
    sign: int,
) -> Tensor:
    """`x` `[b h rows d]` rotated by `sign * turns[turn]` positions; angles and sums in fp32."""
    if turn is None:
        return x
    assert inv_freq is not None
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    angles = turns[turn][rows].to(wide)[:, None] * inv_freq.to(wide) * sign
    cos, sin = angles.cos(), angles.sin()
    half = angles.shape[1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    turned = torch.empty_like(x)
    turned[..., :half] = (first * cos).sub_(second * sin)
    turned[..., half : 2 * half] = (second * cos).add_(first * sin)
    turned[..., 2 * half :] = rest
    return turned

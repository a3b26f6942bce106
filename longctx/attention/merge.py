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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
SLAB = 1024  # keys whose gradients one backward call makes: what a part holds, whatever its length


@dataclass(frozen=True)
class Part:
    """A slice of keys for the rows of a block.

    Args:
        start: first key.
        stop: one past the last key.
        turn: name of the rotation that the queries get, a key of `turns`; None: as they are.
        causal: as many keys as rows, and row r sees those up to `start + r`; else all of them.
        flipped: with `causal`, row r sees those from `start + r` on.
        key_turn: name of the rotation that the keys get, a key of `turns`; None: as they are.
    """

    start: int
    stop: int
    turn: str | None = None
    causal: bool = False
    flipped: bool = False
    key_turn: str | None = None

    def slabs(self) -> list[slice]:
        """Its keys in slices of `SLAB` at most; a causal part is one slice."""
        step = max(1, self.stop - self.start if self.causal else SLAB)
        return [slice(i, min(i + step, self.stop)) for i in range(self.start, self.stop, step)]


@dataclass(frozen=True)
class Block:
    """Query rows `start:stop` and the parts that they see, together every key once."""

    start: int
    stop: int
    parts: Sequence[Part]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Sequence[Block],
    turns: dict[str, Tensor],
    inv_freq: Tensor,
    scaling: float | None,
) -> Tensor:
    """One softmax over all parts of each block.

    Args:
        query: `[b hq m d]`, rotated.
        key: `[b hk n d]`, rotated.
        value: `[b hk n d]`.
        blocks: every query row in exactly one.
        turns: by name, `[m]` positions by which each query is rotated further, or `[n]` each key.
        inv_freq: `[d/2]`, radians per position; fewer where only the first dimensions rotate.
        scaling: factor on the scores; None: d ** -0.5.

    Returns:
        `[b hq m d]`.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
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
        inv_freq: Tensor,
        scaling: float,
    ) -> Tensor:
        out = torch.empty_like(query)
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        total = query.new_empty(query.shape[:3], dtype=wide)
        for block in blocks:
            rows = slice(block.start, block.stop)
            merged: Tensor | None = None
            lse: Tensor | None = None
            for part in block.parts:
                q, k, v = _operands(query, key, value, rows, part, turns, inv_freq)
                o, part_lse = _flash(q, k, v, part.causal, scaling)
                if part.flipped:
                    o, part_lse = o.flip(2), part_lse.flip(2)
                if merged is None or lse is None:
                    merged = out[:, :, rows].copy_(o) if out.dtype == wide else o.to(wide)
                    lse = part_lse.to(wide)
                else:
                    merged.lerp_(o.to(wide), (part_lse - lse).sigmoid()[..., None])
                    lse = torch.logaddexp(lse, part_lse)
                del q, k, v, o  # before those of the next part exist
            assert merged is not None and lse is not None
            if out.dtype != wide:
                out[:, :, rows] = merged
            total[:, :, rows] = lse
        ctx.save_for_backward(query, key, value, out, total, inv_freq, *turns.values())
        ctx.names, ctx.blocks, ctx.scaling = tuple(turns), blocks, scaling
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse, inv_freq, *given = ctx.saved_tensors
        turns = dict(zip(ctx.names, given, strict=True))
        d_query = torch.empty_like(query)
        d_key, d_value = (torch.zeros_like(x, dtype=lse.dtype) for x in (key, value))
        for block in ctx.blocks:
            rows = slice(block.start, block.stop)
            grad, o, total = grads[0][:, :, rows], out[:, :, rows], lse[:, :, rows]
            d_rows = torch.zeros_like(grad, dtype=lse.dtype)
            for part in block.parts:
                q, k, v = _operands(query, key, value, rows, part, turns, inv_freq)
                g, h, z = (x.flip(2) if part.flipped else x for x in (grad, o, total))
                d_part = torch.zeros_like(d_rows)
                for keys in part.slabs():
                    own = slice(keys.start - part.start, keys.stop - part.start)
                    seen = k[:, :, own], v[:, :, own]
                    found = _flash_backward(q, *seen, g, h, z, part.causal, ctx.scaling)
                    d_q, d_k, d_v = (x.flip(2) if part.flipped else x for x in found)
                    d_part += d_q
                    d_key[:, :, keys] += _turned(d_k, turns, part.key_turn, keys, inv_freq, -1)
                    d_value[:, :, keys] += d_v
                    del found, d_q, d_k, d_v  # before those of the next slab exist
                d_rows += _turned(d_part, turns, part.turn, rows, inv_freq, -1)
            d_query[:, :, rows] = d_rows
        d_key = d_key.to(key.dtype)  # one after the other: the wide one is free before the next
        d_value = d_value.to(value.dtype)
        return d_query, d_key, d_value, None, None, None, None


def _operands(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: slice,
    part: Part,
    turns: dict[str, Tensor],
    inv_freq: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the kernel of a part gets: turned, and reversed where the part is flipped."""
    keys = slice(part.start, part.stop)
    q = _turned(query[:, :, rows], turns, part.turn, rows, inv_freq, 1)
    k = _turned(key[:, :, keys], turns, part.key_turn, keys, inv_freq, 1)
    v = value[:, :, keys]
    return (q.flip(2), k.flip(2), v.flip(2)) if part.flipped else (q, k, v)


def _turned(
    x: Tensor, turns: dict[str, Tensor], turn: str | None, rows: slice, inv_freq: Tensor, sign: int
) -> Tensor:
    """`x` `[b h rows d]` rotated by `sign * turns[turn]` positions; angles and sums in fp32."""
    if turn is None:
        return x
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


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, scaling: float) -> tuple[Tensor, Tensor]:
    """(output `[b hq m d]`, log-sum-exp `[b hq m]`) of one part, on the device's flash kernel."""
    aten = torch.ops.aten
    if not q.is_cuda:
        o, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, scale=scaling
        )
        return o, lse
    if q.dtype in HALF and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256:
        found = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scaling)
        return found[0], found[1][:, :, : q.shape[2]]
    return _dense(q, k, v, causal, scaling)


def _flash_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    o: Tensor,
    lse: Tensor,
    causal: bool,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one part, given the merged output and log-sum-exp."""
    aten = torch.ops.aten
    if not q.is_cuda:
        found = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, o, lse.contiguous(), 0.0, causal, scale=scaling
        )
    elif q.dtype in HALF and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256:
        none = torch.empty(0, dtype=torch.int64, device=q.device)
        seed = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of dropout, which there is not
        found = aten._scaled_dot_product_flash_attention_backward(
            grad.contiguous(), q, k, v, o.contiguous(), lse.contiguous(), none, none,
            q.shape[2], k.shape[2], 0.0, causal, seed, none, scale=scaling,
        )  # fmt: skip
    else:
        found = _dense_backward(q, k, v, grad, o, lse, causal, scaling)
    return found[0], found[1], found[2]


def _scores(q: Tensor, k: Tensor, causal: bool, scaling: float) -> Tensor:
    """`[b hk g m n]` in fp32: what is left where a device has no flash kernel for a type."""
    b, heads, m, d = q.shape
    grouped = q.reshape(b, k.shape[1], heads // k.shape[1], m, d).float()
    scores = grouped @ k.float().mT[:, :, None] * scaling
    if causal:
        live = torch.ones(m, k.shape[2], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~live, -torch.inf)
    return scores


def _dense(q: Tensor, k: Tensor, v: Tensor, causal: bool, scaling: float) -> tuple[Tensor, Tensor]:
    scores = _scores(q, k, causal, scaling)
    lse = scores.logsumexp(-1)
    out = (scores - lse[..., None]).exp() @ v.float()[:, :, None]
    return out.reshape(q.shape).to(q.dtype), lse.reshape(q.shape[:3])


def _dense_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    o: Tensor,
    lse: Tensor,
    causal: bool,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    scores = _scores(q, k, causal, scaling)
    shape = (*scores.shape[:3], q.shape[2])
    weights = (scores - lse.reshape(shape)[..., None]).exp()
    g = grad.reshape(*shape, -1).float()
    inner = (g * o.reshape(*shape, -1).float()).sum(-1, keepdim=True)
    d_scores = weights * (g @ v.float().mT[:, :, None] - inner) * scaling
    d_q = (d_scores @ k.float()[:, :, None]).reshape(q.shape)
    d_k = (d_scores.mT @ q.reshape(*shape, -1).float()).sum(2)
    d_v = (weights.mT @ g).sum(2)
    return d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype)

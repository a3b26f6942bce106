"""Cross-attention of a decoder layer to encoder states, and how it enters a stock decoder.

Three ways to compute one result, chosen by what a call needs, for s query rows and n states:
with gradients, keys and values of the layer exist once and the mask is broadcast; without, long
contexts are projected slab by slab and merged by log-sum-exp, so no n-wide keys exist; and for a
few rows (decoding) W_k goes into the query and W_v into the output, so that only the states are
read: 2 s n hq e multiplications for a state size e, against 2 n e hk d for projecting them.
Source: CEPE (2402.16617) section 3.1; no rope, no causal mask, no bias, no gate.
"""

import copy
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longctx.attention.ops.flash import HALF, flash
from longctx.config.typed import choice
from longctx.errors import UserError

SLAB_BYTES = 256 << 20  # keys and values of one slab
SCORES_BYTES = 256 << 20  # fp32 scores that exist at once in the absorbed form
INIT = ("zero", "copy", "normal")
PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}


class CrossAttention(nn.Module):
    """`o(softmax(q(norm(x)) k(states) / sqrt(d)) v(states))`; zero where nothing can be seen.

    Args:
        layer: the decoder layer that it is for: heads, norm, type and device are the layer's.
        width: size of an encoder state, e.
    """

    def __init__(self, layer: Any, width: int) -> None:
        super().__init__()
        own, weight = layer.self_attn, layer.self_attn.q_proj.weight
        self.head_dim = int(own.head_dim)
        self.heads = int(own.q_proj.out_features) // self.head_dim
        self.key_heads = int(own.k_proj.out_features) // self.head_dim
        self.scaling = self.head_dim**-0.5
        outer = int(own.q_proj.in_features)
        self.width, self.inner = width, int(own.k_proj.out_features)
        like: dict[str, Any] = {"bias": False, "dtype": weight.dtype, "device": weight.device}
        self.layernorm = copy.deepcopy(layer.post_attention_layernorm)
        self.q_proj = nn.Linear(outer, own.q_proj.out_features, **like)
        self.k_proj = nn.Linear(width, self.inner, **like)
        self.v_proj = nn.Linear(width, self.inner, **like)
        self.o_proj = nn.Linear(own.q_proj.out_features, outer, **like)

    def forward(self, hidden: Tensor, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """The term to add to the residual stream.

        Args:
            hidden: `[b s h]`, not yet normed.
            states: `[b n e]`.
            mask: `[b n]` bool, True on states that may be seen; None: all of them.

        Returns:
            `[b s h]`; zero in rows whose mask is empty.
        """
        b, s, _ = hidden.shape
        query = self.q_proj(self.layernorm(hidden)).view(b, s, -1, self.head_dim).transpose(1, 2)
        form = self.projected
        if not torch.is_grad_enabled():
            if self.absorbs(s):
                form = self.absorbed
            elif states.shape[1] > self.slab(states):
                form = self.streamed
        out = form(query, states, mask)
        result: Tensor = self.o_proj(out.transpose(1, 2).reshape(b, s, -1))
        return result

    def absorbs(self, rows: int) -> bool:
        """Whether `rows` query rows cost less in the absorbed form than with projected keys."""
        return rows * self.heads * (self.width - self.head_dim) < self.width * self.inner

    def slab(self, states: Tensor) -> int:
        """How many states are projected at once without gradients."""
        return max(1, SLAB_BYTES // (2 * len(states) * self.inner * states.element_size()))

    def projected(self, query: Tensor, states: Tensor, mask: Tensor | None) -> Tensor:
        """All keys and values at once, with a backward pass.

        Args:
            query: `[b hq s d]`.
            states: `[b n e]`.
            mask: `[b n]` bool or None.

        Returns:
            `[b hq s d]`.
        """
        key, value = self._keys_and_values(states)
        shared = self.key_heads < self.heads
        half = query.dtype in HALF
        if shared and query.is_cuda and (mask is not None or not half):
            # CUDA shares key heads in its flash kernel alone, which knows no mask and no fp32.
            groups = self.heads // self.key_heads
            key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
            shared = False
        seen, some = None, None
        if mask is not None:
            some = mask.any(1, keepdim=True)
            seen = (mask | ~some)[:, None, None, :]  # no kernel gets a row without any key
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=seen, scale=self.scaling, enable_gqa=shared
        )
        return out if some is None else out * some[:, :, None, None]

    def streamed(self, query: Tensor, states: Tensor, mask: Tensor | None) -> Tensor:
        """Keys and values of one slab of states at a time; no backward pass. As `projected`."""
        if mask is None:
            return self._stream(query, states.split(self.slab(states), dim=1))
        rows = []
        for q, x, seen in zip(query.split(1), states.split(1), mask, strict=True):
            real = seen.nonzero()[:, 0].split(self.slab(x))
            rows.append(self._stream(q, (x[:, own] for own in real if len(own))))
        return torch.cat(rows)

    def _stream(self, query: Tensor, slabs: Iterable[Tensor]) -> Tensor:
        """Flash calls over slabs of states, merged by their log-sum-exp in fp32 at least."""
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        out: Tensor | None = None
        total: Tensor | None = None
        for slab in slabs:
            o, lse = flash(query, *self._keys_and_values(slab), False, self.scaling)
            o, lse = o.to(wide), lse.to(wide)
            if out is None or total is None:
                out, total = o, lse
            else:
                out.lerp_(o, (lse - total).sigmoid()[..., None])
                total = torch.logaddexp(total, lse)
        return torch.zeros_like(query) if out is None else out.to(query.dtype)

    def absorbed(self, query: Tensor, states: Tensor, mask: Tensor | None) -> Tensor:
        """Without keys and values: exact, since nothing depends on positions. As `projected`."""
        b, _, _, d = query.shape
        n, width = states.shape[1:]
        w_k = self.k_proj.weight.view(self.key_heads, d, width)
        w_v = self.v_proj.weight.view(self.key_heads, d, width)
        grouped = query.reshape(b, self.key_heads, -1, d)  # the heads that share a key, and rows
        inner = (grouped @ w_k).reshape(b, -1, width)
        mixed = torch.empty_like(inner)
        step = max(1, SCORES_BYTES // (4 * b * max(1, n)))
        for start in range(0, inner.shape[1], step):
            rows = slice(start, start + step)
            weights = _weights(inner[:, rows], states, mask, self.scaling)
            mixed[:, rows] = weights.to(states.dtype) @ states
        out = mixed.view(b, self.key_heads, -1, width) @ w_v.mT
        return out.reshape(query.shape)

    def _keys_and_values(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """`[b hk n d]` each."""
        b, n, _ = states.shape
        key, value = (
            project(states).view(b, n, self.key_heads, self.head_dim).transpose(1, 2)
            for project in (self.k_proj, self.v_proj)
        )
        return key, value


def _weights(query: Tensor, states: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Softmax weights `[b r n]` of rows `[b r e]` over states, in fp32 at least; 0 if unseen."""
    if query.dtype not in HALF:
        scores = query @ states.mT
    elif query.is_cuda:
        scores = torch.bmm(query, states.mT, out_dtype=torch.float32)
    else:
        scores = query.float() @ states.float().mT
    scores = scores.mul_(scaling)
    if mask is None:
        return scores.softmax(-1)
    unseen = ~mask[:, None, :]
    return scores.masked_fill_(unseen, -torch.inf).softmax(-1).masked_fill_(unseen, 0.0)


def require_llama_style(decoder: Any) -> None:
    """Raises UserError unless the decoder's layers add attention and FFN to one plain residual."""
    kind = decoder.config.model_type
    inner: Any = getattr(decoder, "model", None)
    if getattr(inner, "layers", None) is None or not hasattr(decoder, "lm_head"):
        raise UserError(f"cross-attention fits into Llama-style decoders, and {kind!r} is not one")
    for layer in inner.layers:
        if hasattr(layer, "cross_attn"):
            raise UserError("this decoder has cross-attention already: load it again without")
        parts = {name for name, _ in layer.named_children()}
        separate = all(hasattr(layer, p) for p in PARTS) and hasattr(layer.self_attn, "q_proj")
        if parts != PARTS or not separate or hasattr(layer, "residual_multiplier"):
            raise UserError(
                f"cross-attention fits into Llama-style layers (attention and FFN behind a norm "
                f"each, added unscaled to one residual), not into those of {kind!r}: "
                f"{', '.join(sorted(parts))}"
            )


def insert(layer: Any, width: int) -> None:
    """Gives a decoder layer its `cross_attn`, between self-attention and FFN.

    The layer stays the stock class: its input and the states are passed as keyword arguments to
    `self_attn`, and the cross-attention of (residual + output) is added to its output. So no state
    is kept on modules, and a layer that is recomputed in the backward pass sees the same states.

    Args:
        layer: of a Llama-style decoder.
        width: size of an encoder state.
    """
    layer.cross_attn = CrossAttention(layer, width)
    layer.register_forward_pre_hook(_lend, with_kwargs=True)
    layer.self_attn.register_forward_hook(_add, with_kwargs=True)


def _lend(layer: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """Hands the layer's input and its cross-attention on to its self-attention."""
    if named.get("cross_states") is None:
        return None
    residual = args[0] if args else named["hidden_states"]
    return args, {**named, "cross_residual": residual, "cross_attention": layer.cross_attn}


def _add(attention: Any, args: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
    """Self-attention's output with cross-attention's added; as it is where there is no context."""
    attend = named.get("cross_attention")
    if attend is None:
        return None
    added = attend(named["cross_residual"] + output[0], named["cross_states"], named["cross_mask"])
    return (output[0] + added, *output[1:])


@torch.no_grad()
def initialise(layer: Any, init: str) -> None:
    """Starts a layer's cross-attention from its self-attention; biases and head norms have no copy.

    Args:
        layer: with `cross_attn`.
        init: of the output projection: `zero`, so that training starts at the decoder itself;
            `copy` of self-attention's; `normal` (Kaiming). Queries are a copy, keys and values the
            first input columns, as many as a state has; what is wider than the decoder gets zeros.

    Raises:
        UserError: if `init` is none of them.
    """
    choice(init, INIT, "init")
    own, cross = layer.self_attn, layer.cross_attn
    cross.layernorm.load_state_dict(layer.post_attention_layernorm.state_dict())
    cross.q_proj.weight.copy_(own.q_proj.weight)
    width = min(cross.k_proj.in_features, own.k_proj.in_features)
    for name in ("k_proj", "v_proj"):
        weight = getattr(cross, name).weight
        weight.zero_()
        weight[:, :width] = getattr(own, name).weight[:, :width]
    if init == "zero":
        cross.o_proj.weight.zero_()
    elif init == "copy":
        cross.o_proj.weight.copy_(own.o_proj.weight)
    else:
        nn.init.kaiming_normal_(cross.o_proj.weight)

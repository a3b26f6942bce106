"""Keys cached unrotated, for a rope whose angles change with the length of the call (dynamic NTK).

The rotary module hands out the identity, so that queries and keys reach the attention, and keys the
cache, as they were projected; here they are rotated with the frequencies of this call before the
method sees them. Cost: every call rotates all n keys of each layer again, and not only its own.

With n tokens so far, every query of a call sees every key at the angles of length n. So decoding
token t is the last row of a prefill of t + 1 tokens, exactly for one layer. Cached keys and values
of deeper layers come from hidden states of calls that were shorter: no cache can change those, and
what is left of the difference beyond the window L is that. The earlier rows of a prefill see the
angles of its whole length. Within L all is equal.
Source: YaRN (2309.00071) section 3.3 on caching before rotation; transformers' `dynamic` formula.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from longctx import rope as scaling
from longctx.attention.ops import causal
from longctx.attention.ops.oracle import rotate
from longctx.config.rope import RopeConfig


def wanted(config: PreTrainedConfig) -> bool:
    """Whether the angles of this model depend on the length of the call."""
    return bool(config.rope_parameters.get("rope_type") == "dynamic")


def identity(x: Tensor, position_ids: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine `[b s d]` that leave queries and keys as they are."""
    cos = torch.ones(*position_ids.shape, 2 * half, dtype=x.dtype, device=x.device)
    return cos, torch.zeros_like(cos)


def rotating(name: str, attend: Callable[..., Any]) -> Callable[..., Any]:
    """The attention `attend` behind the rotation of its queries and keys.

    Args:
        name: of the method, for messages.
        attend: what a method has, with transformers' attention-interface signature.
    """

    def attend_rotated(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        positions = causal.check_interface(name, module, attention_mask, kwargs)
        inv_freq = frequencies(kwargs["rotary"], positions)
        padding = None if attention_mask is None else attention_mask.bool()
        at = key_positions(positions, padding, key.shape[2])
        query, key = _rotated(query, positions, inv_freq), _rotated(key, at, inv_freq)
        return attend(module, query, key, value, attention_mask, *args, **kwargs)

    return attend_rotated


def frequencies(rotary: Any, positions: Tensor) -> Tensor:
    """Inverse frequencies `[d/2]` in float64 for the longest position of a call.

    From the call alone, not from the rotary module's state: a layer that is run again in the
    backward pass gets the same ones.

    Args:
        rotary: the model's rotary module.
        positions: `[b s]`, of the queries of the call.
    """
    config = rotary.config
    rope = RopeConfig("dynamic_ntk", factor=config.rope_parameters["factor"])
    base, window = float(config.rope_parameters["rope_theta"]), config.max_position_embeddings
    dim = 2 * rotary.inv_freq.numel()
    return scaling.inv_freq(rope, base, window, dim, positions.max() + 1)[0]


def key_positions(positions: Tensor, padding: Tensor | None, n: int) -> Tensor:
    """Positions of all n keys, of which the last s belong to the queries.

    A cached row holds one document: its real tokens have consecutive positions, and the first query
    says where they are.

    Args:
        positions: `[b s]` or `[1 s]`, of the queries.
        padding: `[b n]` bool, True on real tokens; None: all are real.
        n: keys.

    Returns:
        `[b n]` or `[1 n]`; anything on padding.
    """
    s = positions.shape[1]
    if n == s:
        return positions
    if padding is None:
        return positions[:, :1] + torch.arange(s - n, s, device=positions.device)
    count = padding.cumsum(1)
    first = padding[:, n - s :].long().argmax(1, keepdim=True)  # real query of each row
    own = positions.expand(len(padding), s).gather(1, first)
    return own + count - count.gather(1, first + n - s)


def _rotated(x: Tensor, positions: Tensor, inv_freq: Tensor) -> Tensor:
    """`x` `[b h s d]` rotated to `positions` `[b s]`; angles and sums in fp32 at least."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    angles = positions[:, None, :, None].to(wide) * inv_freq.to(wide)
    return rotate(x.to(wide), angles).to(x.dtype)

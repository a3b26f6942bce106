"""Causal attention inside segments, on torch's scaled_dot_product_attention.

Each segment (`segments.py`) gets one causal call on views of the row. Cost: the pairs inside
segments and one concatenation of the output (8 rows of 256 tokens in 26 documents: 0.8 times one
undivided call, forward and backward); exactly one call when no row restarts and none is padded. No
s x s mask exists; only a prefill that continues a cache builds one, of `QUERY_BLOCK` rows.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longctx.attention.ops import segments
from longctx.errors import UserError

QUERY_BLOCK = 512  # query rows per mask when a prefill continues a cache


# What changes the result in transformers' attention interface and is not honoured here.
FOREIGN = ("sliding_window", "softcap", "s_aux", "position_bias", "cache", "cu_seq_lens_q")


def check_interface(name: str, module: Any, mask: Tensor | None, rest: dict[str, Any]) -> Tensor:
    """Refuses every mask that would be dropped; returns the position ids.

    Args:
        name: the attention method, for the message.
        module: the attention layer.
        mask: what transformers hands on as the mask.
        rest: the keyword arguments of transformers' attention interface.

    Raises:
        UserError: if the mask is not a `[b s]` padding mask, positions are missing, or an argument
            asks for something else than causal attention inside documents.
    """
    if mask is not None and mask.dim() != 2:
        raise UserError(
            f"attention {name!r} honours a [b s] padding mask, not a mask of shape "
            f"{list(mask.shape)}; mark documents by positions that restart at 0"
        )
    for key in FOREIGN:
        if rest.get(key) is not None:
            raise UserError(
                f"attention {name!r} does not honour {key}; the model needs another one"
            )
    if rest.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise UserError(f"attention {name!r} is causal and the model asks for both directions")
    positions = rest.get("position_ids")
    if positions is None or positions.dim() != 2:
        raise UserError(
            f"attention {name!r} needs position_ids [b s] to tell documents apart, and this "
            "architecture does not hand them to its attention"
        )
    assert isinstance(positions, Tensor)
    return positions


def causal_in_segments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    padding: Tensor | None,
    scaling: float | None,
    dropout: float,
    first_layer: bool = True,
) -> Tensor:
    """Causal attention that stays inside a segment; zero where a query is padding.

    Args:
        query: `[b hq s d]`, rotated.
        key: `[b hk n d]`, rotated; n > s when a cache holds n - s earlier keys.
        value: `[b hk n d]`.
        positions: `[b s]` or `[1 s]`; a segment starts at the row's first real token and where a
            position is 0.
        padding: `[b n]` bool, True on real tokens; None: all are real.
        scaling: factor on the scores; None: d ** -0.5.
        dropout: probability of dropping an attention weight.
        first_layer: check the positions of a cached call (one host-device round trip).

    Returns:
        `[b s hq d]`.

    Raises:
        UserError: if positions restart in a cached row.
    """
    length = query.shape[2]
    if key.shape[2] != length:
        return _cached(query, key, value, positions, padding, scaling, dropout, first_layer)
    if padding is None and not bool((positions[:, 1:] == 0).any()):
        return sdpa(query, key, value, scaling, dropout, causal=length > 1).transpose(1, 2)

    def document(q: Tensor, k: Tensor, v: Tensor, first: int) -> Tensor:
        return sdpa(q, k, v, scaling, dropout, causal=True)

    return segments.segmented(query, key, value, positions, padding, document)


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    dropout: float,
    causal: bool,
    mask: Tensor | None = None,
) -> Tensor:
    """One call, `[b h s d]`; key heads are shared inside the kernel where a fused one can do it."""
    groups = query.shape[1] // key.shape[1]
    shared = groups > 1
    if shared and query.is_cuda and query.dtype not in (torch.float16, torch.bfloat16):
        # Outside half precision CUDA has no fused kernel for shared heads; the dense one it
        # falls back to needs s x s scores.
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        shared = False
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=causal,
        scale=scaling,
        enable_gqa=shared,
    )


def _cached(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    padding: Tensor | None,
    scaling: float | None,
    dropout: float,
    first_layer: bool,
) -> Tensor:
    b, _, s, _ = query.shape
    total = key.shape[2]
    past = total - s
    index = torch.arange(total, device=key.device)
    real = padding if padding is None else padding[:, past:]
    if first_layer:
        expected = index[None, past:] if padding is None else padding.cumsum(1)[:, past:] - 1
        restarts = positions < expected
        if bool((restarts if real is None else restarts & real).any()):
            raise UserError(
                "positions restart in a row that continues a cache; a cached row holds one document"
            )
    if s == 1 and padding is None:
        return sdpa(query, key, value, scaling, dropout, causal=False).transpose(1, 2)
    blocks = []
    for start in range(0, s, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, s)
        own = index[past + start : past + stop, None]
        seen = index[None, : past + stop]
        live = (seen <= own)[None, None]
        if padding is not None:
            # A padded query sees itself: a row without any key would be NaN.
            live = (live & padding[:, None, None, : past + stop]) | (seen == own)
        keys, values = key[:, :, : past + stop], value[:, :, : past + stop]
        mask = live.expand(b, 1, stop - start, past + stop)
        part = query[:, :, start:stop]
        blocks.append(sdpa(part, keys, values, scaling, dropout, causal=False, mask=mask))
    out = torch.cat(blocks, dim=2).transpose(1, 2)
    return out if real is None else out * real[:, :, None, None]

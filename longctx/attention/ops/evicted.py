"""What LongGen's two sparse patterns share: which layers are full, and a cache that has evicted.

Most layers see a static, position-only part of the past; a few in the middle see all of it. What a
sparse layer will not need again may leave its cache, so a cached call gets the kept keys and the
new ones, `longctx/models/evicting_cache.py`, and works out from positions which ones it got.
Cost of a cached call: s x (kept + seen new) pairs, `ROWS` query rows at a time.
Source: Ge et al. 2410.01485; what it does not state is marked in docs/methods/longgen.md.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from longctx.attention.ops import causal, segments
from longctx.errors import UserError

HOURGLASS = "hourglass"
ROWS = 512  # query rows per mask of a cached call


class Pattern(Protocol):
    """What a LongGen method says of itself; its sparse layers are all alike."""

    @property
    def whole(self) -> int:
        """Keys, the query's own included, up to which a single token sees every cached one."""

    def evicts(self, layer: int) -> bool:
        """Whether a layer is sparse."""

    def kept_tokens(self, past: int) -> int:
        """Entries a sparse layer holds per key head after `past` tokens."""

    def seen(self, past: Tensor) -> Tensor:
        """Keys that a query after so many tokens sees, its own included; mean over key heads."""

    def kept_positions(self, past: Tensor, key_heads: Tensor) -> Tensor:
        """Positions of those entries, `[b h|1 kept_tokens(past.max())]`, -1 where a row has less.

        Args:
            past: `[b]` tokens of each row so far.
            key_heads: `[h]`, their numbers in the model.
        """

    def sees(self, i: Tensor, j: Tensor, key_heads: Tensor) -> Tensor:
        """Which pairs attend in a sparse layer; positions in the document, key head numbers."""


def plan(layers: int) -> list[int]:
    """The full layers of an hourglass: all but the first and the last third, rounded down.

    Fewer than three layers have no third: all of them are full.

    >>> plan(32) == list(range(10, 22)), plan(3), plan(2)
    (True, [1], [0, 1])
    """
    third = layers // 3
    return list(range(third, layers - third))


def resolved(full_layers: str | Sequence[int], layers: int) -> list[int]:
    """The full layers of a model as indices.

    Args:
        full_layers: `hourglass`, or indices from 0.
        layers: of the model.

    Raises:
        UserError: if an index is none of the model's, or stands twice.
    """
    if isinstance(full_layers, str):
        return plan(layers)
    for layer in full_layers:
        if not 0 <= layer < layers:
            raise UserError(
                f"attention.full_layers has {layer}, and the model's layers are 0 to {layers - 1}"
            )
    return sorted(full_layers)


def check_full_layers(full_layers: Any) -> None:
    """Raises UserError unless it is `hourglass` or a list of different layer indices."""
    if isinstance(full_layers, str):
        if full_layers != HOURGLASS:
            raise UserError(
                f"attention.full_layers={full_layers!r} is neither {HOURGLASS!r} nor a list of "
                "layer indices"
            )
        return
    indices: list[Any] = list(full_layers) if isinstance(full_layers, Sequence) else [None]
    if any(isinstance(layer, bool) or not isinstance(layer, int) for layer in indices):
        raise UserError(f"attention.full_layers={full_layers} is not a list of layer indices")
    twice = sorted({layer for layer in indices if indices.count(layer) > 1})
    if twice:
        raise UserError(f"attention.full_layers has layer {twice[0]} more than once")


def cache_bytes(
    pattern: Pattern,
    layers: int,
    key_heads: int,
    head_dim: int,
    tokens: int,
    element: int = 2,
    rows: int = 1,
) -> int:
    """Bytes of the keys and values that a model holds after a document of some length.

    Args:
        pattern: the method, with its layers known.
        layers: of the model.
        key_heads: hk.
        head_dim: d.
        tokens: length of the document.
        element: bytes of a number.
        rows: b.
    """
    kept = pattern.kept_tokens(tokens)
    held = sum(kept if pattern.evicts(layer) else tokens for layer in range(layers))
    return 2 * rows * key_heads * head_dim * element * held


def attend(
    pattern: Pattern,
    name: str,
    module: nn.Module,
    tensors: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    rest: dict[str, Any],
    document: segments.Document,
) -> tuple[Tensor, None]:
    """What transformers' attention interface returns, for a full or a sparse layer.

    Args:
        pattern: the method.
        name: its name, for messages.
        module: the attention layer.
        tensors: query `[b hq s d]`, key and value `[b hk n d]`, rotated, cached keys first.
        mask: `[b total]`, True on real tokens, or None; evicted columns are counted in it.
        scaling: factor on the scores; None: d ** -0.5.
        dropout: of attention weights; honoured by full layers.
        rest: the keyword arguments of transformers' attention interface.
        document: sparse attention of a whole document.

    Returns:
        `[b s hq d]`, and None for the weights.

    Raises:
        UserError: if a mask or argument asks for something that would not be honoured.
    """
    query, key, value = tensors
    layer = getattr(module, "layer_idx", 0) or 0
    fresh = key.shape[2] == query.shape[2]
    if fresh and pattern.evicts(layer):
        # A row may continue a cache that holds nothing of it: all was padding.
        mask = mask if mask is None else mask[:, -key.shape[2] :]
        return causal.by_documents(name, module, query, key, value, mask, dropout, rest, document)
    positions = causal.check_interface(name, module, mask, rest)
    padding = None if mask is None else mask.bool()
    if not pattern.evicts(layer):
        out = causal.causal_in_segments(
            query, key, value, positions, padding, scaling, dropout, layer == 0
        )
        return out, None
    if dropout:
        raise UserError(f"attention {name!r} has no attention dropout, and the model asks for it")
    heads = rest.get("key_heads")
    heads = torch.arange(key.shape[1]) if heads is None else heads
    if query.shape[2] == 1 and padding is None and key.shape[2] <= pattern.whole and layer:
        return causal.sdpa(query, key, value, scaling, 0.0, causal=False).transpose(1, 2), None
    out = _cached(pattern, name, tensors, positions, padding, heads.to(key.device), scaling)
    return out, None


def _cached(
    pattern: Pattern,
    name: str,
    tensors: tuple[Tensor, Tensor, Tensor],
    positions: Tensor,
    padding: Tensor | None,
    key_heads: Tensor,
    scaling: float | None,
) -> Tensor:
    """New tokens of documents that a cache holds in part: masks of `ROWS` rows, by positions."""
    query, key, value = tensors
    s = query.shape[2]
    real = torch.ones_like(positions, dtype=torch.bool) if padding is None else padding[:, -s:]
    past = positions[:, 0] if padding is None else padding[:, :-s].sum(1)
    own = (past[:, None] + real.cumsum(1) - 1).masked_fill(~real, -1)
    wrong = (real & (positions != own)).any().long()
    bad, least, most = torch.stack((wrong, past.min(), past.max())).tolist()
    if bad:
        raise UserError(
            f"attention {name!r}: {segments.RESTART}, from 0 at its first token, in a row that "
            "continues a cache"
        )
    if hasattr(pattern, "ring") and s == 1 and key.shape[2] == pattern.whole <= least:
        # The new token was written over the oldest: all that is held is seen, in any order.
        return causal.sdpa(query, key, value, scaling, 0.0, causal=False).transpose(1, 2)
    filled = None if padding is None else padding[:, :-s]
    before = _before(pattern, name, key.shape[2] - s, past, most, filled, key_heads)
    shape = (max(len(before), len(own)), before.shape[1], -1)
    at = torch.cat((before.expand(shape), own[:, None].expand(shape)), dim=2)
    out = torch.cat(list(_by_rows(pattern, tensors, at, own, key_heads, scaling)), dim=2)
    out = out.transpose(1, 2)
    return out if padding is None else out * real[:, :, None, None]


def _before(
    pattern: Pattern,
    name: str,
    held: int,
    past: Tensor,
    most: int,
    padding: Tensor | None,
    key_heads: Tensor,
) -> Tensor:
    """Positions of the cached entries, `[b|1 h|1 held]`, -1 where there is none.

    Args:
        pattern: the method.
        name: its name.
        held: cached entries.
        past: `[b]` tokens of each row so far.
        most: the largest of them.
        padding: of the columns so far, `[b columns]`, or None.
        key_heads: `[hk]`.

    Raises:
        UserError: if there are neither as many as the pattern keeps nor as many as there were.
    """
    if held == pattern.kept_tokens(most):
        return pattern.kept_positions(past, key_heads)
    if padding is None and held == most:
        return torch.arange(held, device=past.device)[None, None]
    if padding is not None and held == padding.shape[1]:
        return (padding.cumsum(1) - 1).masked_fill(~padding, -1)[:, None]
    raise UserError(
        f"attention {name!r}: a row that continues a cache with {held} keys after {most} tokens, "
        f"of which it keeps {pattern.kept_tokens(most)}"
    )


def _by_rows(
    pattern: Pattern,
    tensors: tuple[Tensor, Tensor, Tensor],
    at: Tensor,
    own: Tensor,
    key_heads: Tensor,
    scaling: float | None,
) -> Iterator[Tensor]:
    """Attention of `ROWS` queries after another, `[b hq rows d]`.

    Args:
        pattern: the method.
        tensors: query, key and value.
        at: positions of the keys, `[b|1 hk|1 n]`, -1 where there is none.
        own: positions of the queries, `[b|1 s]`, -1 on padding.
        key_heads: `[hk]`.
        scaling: factor on the scores; None: d ** -0.5.
    """
    query, key, value = tensors
    b, heads, s, _ = query.shape
    held = key.shape[2] - s
    index = torch.arange(key.shape[2], device=key.device)
    for start in range(0, s, ROWS):
        stop = min(start + ROWS, s)
        end = held + stop
        i, j = own[:, None, start:stop, None], at[:, :, None, :end]
        live = pattern.sees(i, j, key_heads[:, None, None]) & (j >= 0)
        # A padded query sees itself: a row without any key would be NaN.
        live = live | ((i < 0) & (index[:end] == index[held + start : end, None]))
        keys, values = key[:, :, :end], value[:, :, :end]
        if s > ROWS:
            seen = live.flatten(0, 2).any(0).nonzero()[:, 0]
            live, keys, values = live[..., seen], keys[:, :, seen], values[:, :, seen]
        if live.shape[1] > 1:
            live = live.repeat_interleave(heads // live.shape[1], dim=1)
        live = live.expand(b, -1, -1, -1)
        part = query[:, :, start:stop]
        yield causal.sdpa(part, keys, values, scaling, 0.0, causal=False, mask=live)

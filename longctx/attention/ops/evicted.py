"""Attention over a cache that has evicted: new tokens against the keys that a sparse layer kept.

The call gets the kept keys and the new ones (`longctx/models/evicting_cache.py`) and works out from
positions which ones it got. Cost: s x (kept + seen new) pairs, `ROWS` query rows at a time.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from longctx.attention.ops import causal, segments
from longctx.errors import UserError

ROWS = 512  # query rows per mask of a cached call


class Pattern(Protocol):
    """The part of `attention.method.EvictingMethod` that is asked here; documented there."""

    @property
    def name(self) -> str:
        """Of the method."""

    @property
    def whole(self) -> int:
        """Keys up to which a single query sees all."""

    def sees(self, i: Tensor, j: Tensor, key_heads: Tensor) -> Tensor:
        """Which pairs attend."""

    def kept_tokens(self, past: int) -> int:
        """How many entries are held."""

    def kept_positions(self, past: Tensor, key_heads: Tensor) -> Tensor:
        """Which ones."""

    def ring(self) -> tuple[int, int] | None:
        """Sinks and window of a ring."""


def attend(
    pattern: Pattern,
    tensors: tuple[Tensor, Tensor, Tensor],
    positions: Tensor,
    padding: Tensor | None,
    numbers: Sequence[int],
    scaling: float | None,
    first_layer: bool,
) -> Tensor:
    """New tokens of documents that a cache holds in part: masks of `ROWS` rows, by positions.

    Args:
        pattern: the method.
        tensors: query `[b hq s d]`, key and value `[b hk n d]`, rotated, held keys first.
        positions: `[b s]` or `[1 s]`, of the new tokens.
        padding: `[b total]` bool, True on real tokens, evicted ones counted too; None: all are.
        numbers: `[hk]`, of the key heads in the model.
        scaling: factor on the scores; None: d ** -0.5.
        first_layer: check the positions even where no mask is needed.

    Returns:
        `[b s hq d]`.

    Raises:
        UserError: if positions do not continue those in the cache, or it holds another number of
            keys than the method keeps.
    """
    query, key, value = tensors
    s = query.shape[2]
    if s == 1 and padding is None and key.shape[2] <= pattern.whole and not first_layer:
        return causal.sdpa(query, key, value, scaling, 0.0, causal=False).transpose(1, 2)
    key_heads = torch.tensor(numbers, device=key.device)
    real = torch.ones_like(positions, dtype=torch.bool) if padding is None else padding[:, -s:]
    past = positions[:, 0] if padding is None else padding[:, :-s].sum(1)
    own = (past[:, None] + real.cumsum(1) - 1).masked_fill(~real, -1)
    wrong = (real & (positions != own)).any().long()
    bad, least, most = torch.stack((wrong, past.min(), past.max())).tolist()
    if bad:
        raise UserError(
            f"attention {pattern.name!r}: {segments.RESTART}, from 0 at its first token, in a "
            "row that continues a cache"
        )
    if pattern.ring() and s == 1 and key.shape[2] == pattern.whole <= least:
        # The new token was written over the oldest: all that is held is seen, in any order.
        return causal.sdpa(query, key, value, scaling, 0.0, causal=False).transpose(1, 2)
    filled = None if padding is None else padding[:, :-s]
    before = _before(pattern, key.shape[2] - s, past, most, filled, key_heads)
    shape = (max(len(before), len(own)), before.shape[1], -1)
    at = torch.cat((before.expand(shape), own[:, None].expand(shape)), dim=2)
    out = torch.cat(list(_by_rows(pattern, tensors, at, own, key_heads, scaling)), dim=2)
    out = out.transpose(1, 2)
    return out if padding is None else out * real[:, :, None, None]


def _before(
    pattern: Pattern,
    held: int,
    past: Tensor,
    most: int,
    padding: Tensor | None,
    key_heads: Tensor,
) -> Tensor:
    """Positions of the cached entries, `[b|1 h|1 held]`, -1 where there is none.

    Args:
        pattern: the method.
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
        f"attention {pattern.name!r}: a row that continues a cache with {held} keys after {most} "
        f"tokens, of which it keeps {pattern.kept_tokens(most)}"
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

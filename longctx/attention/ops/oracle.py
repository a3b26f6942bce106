"""The oracle: any attention definition as dense float64 attention.

It materialises every score and rotates the query of every pair by that pair's own distance, so it
costs s x s x d per head: for tests of at most a few hundred tokens.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Definition = Callable[[Tensor, Tensor, int, Tensor], tuple[Tensor, Tensor]]


def documents(positions: Tensor, padding: Tensor | None = None) -> Tensor:
    """Number of the document of each token: one more at each real token whose position is 0.

    Args:
        positions: `[b n]`.
        padding: `[b n]` bool, True on real tokens.

    Returns:
        `[b n]` int64; -1 on padding.
    """
    starts = positions == 0
    if padding is None:
        return starts.cumsum(1)
    return (starts & padding).cumsum(1).masked_fill(~padding, -1)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotates pairs (k, k + d/2) of the last axis, transformers' layout of RoPE.

    Args:
        x: `[... d]`.
        angles: `[... d/2]`, radians.
    """
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def attend(
    definition: Definition,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    padding: Tensor | None = None,
    inv_freq: Tensor | None = None,
    scaling: float | None = None,
    layer: int = 0,
) -> Tensor:
    """Dense attention by a definition, in float64 and differentiable.

    Args:
        definition: `(i, j, layer, head) -> (live, distance)` on index tensors.
        query: `[b hq s d]`, before rotation; the last s of the n tokens.
        key: `[b hk n d]`, before rotation.
        value: `[b hk n d]`.
        positions: `[b n]` of all tokens; a document starts where they are 0.
        padding: `[b n]` bool, True on real tokens.
        inv_freq: `[d/2]`, radians per position; None: scores without rotation.
        scaling: factor on the scores; None: d ** -0.5.
        layer: layer index, for definitions that differ by layer.

    Returns:
        `[b s hq d]` float64, zero where a query is padding or attends to nothing.
    """
    b, heads, s, d = query.shape
    n = key.shape[2]
    query, key, value = (x.double() for x in (query, key, value))
    key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    own = documents(positions, padding)
    i, j = positions[:, None, n - s :, None], positions[:, None, None, :]
    live, distance = definition(i, j, layer, torch.arange(heads)[None, :, None, None])
    order = torch.arange(n)
    live = live & (order[None, :] <= order[n - s :, None])
    live = live & (own[:, None, n - s :, None] == own[:, None, None, :])
    if padding is not None:
        live = live & padding[:, None, n - s :, None] & padding[:, None, None, :]
    live = live.expand(b, heads, s, n)
    if inv_freq is None:
        scores = query @ key.transpose(2, 3)
    else:
        angles = distance.expand(b, heads, s, n)[..., None].double() * inv_freq.double()
        scores = (rotate(query[:, :, :, None], angles) * key[:, :, None]).sum(-1)
    scores = scores * (d**-0.5 if scaling is None else scaling)
    # A finite floor: a row with no key at all must come out as zero, with a gradient of zero.
    floor = torch.finfo(torch.float64).min
    weights = scores.masked_fill(~live, floor).softmax(-1).masked_fill(~live, 0.0)
    return (weights @ value).transpose(1, 2)

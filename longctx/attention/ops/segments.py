"""Rows cut into segments: the real tokens of one document in one row.

Attention that depends on positions runs on each segment by itself, on views of the row;
neighbouring rows that are cut alike share their calls. No mask exists. One host-device round trip
a layer.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from longctx.errors import UserError

# (query [r hq m d], key [r hk n d], value, first) -> [r hq m d]: attention of the last m tokens of
# a document of n, whose first token is at position `first`.
Document = Callable[[Tensor, Tensor, Tensor, int], Tensor]

RESTART = "positions must rise by one inside a document"


def in_documents(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    padding: Tensor | None,
    document: Document,
    first_layer: bool = True,
) -> Tensor:
    """Any attention that stays inside a segment and depends on positions; zero on padding.

    Args:
        query: `[b hq s d]`.
        key: `[b hk n d]`; n > s when a cache holds n - s earlier keys of one document a row.
        value: `[b hk n d]`.
        positions: `[b s]` or `[1 s]`.
        padding: `[b n]` bool, True on real tokens; None: all are real.
        document: attention of one document.
        first_layer: check the positions (one host-device round trip).

    Returns:
        `[b s hq d]`.

    Raises:
        UserError: if the positions of a document do not rise by one, or restart in a cached row.
    """
    b, _, s, _ = query.shape
    past = key.shape[2] - s
    positions = positions.expand(b, s)
    real = torch.ones_like(positions, dtype=torch.bool)
    real = real if padding is None else padding[:, past:]
    if first_layer:
        _check_rising(positions, real, cached=past > 0)
    if not past:
        return segmented(query, key, value, positions, padding, document)
    rows = []
    before = torch.full_like(positions[:, 0], past) if padding is None else padding[:, :past].sum(1)
    begin = positions.gather(1, real.long().argmax(1, keepdim=True))[:, 0] - before
    if first_layer and bool(((begin < 0) & real.any(1)).any()):
        raise UserError(f"{RESTART} in a row that continues a cache")
    for count, (row, first) in _alike(begin, padding):
        q, k, v = (x[row : row + count] for x in (query, key, value))
        if padding is None or bool(padding[row].all()):
            rows.append(document(q, k, v, first))
            continue
        own, seen = real[row].nonzero()[:, 0], padding[row].nonzero()[:, 0]
        zeros = torch.zeros_like(q)
        if len(own):
            part = document(q[:, :, own], k[:, :, seen], v[:, :, seen], first)
            zeros = zeros.index_copy(2, own, part)
        rows.append(zeros)
    return _joined(rows, 0).transpose(1, 2)


def require_beginning(name: str, first: int) -> None:
    """Raises UserError if a document does not start at position 0."""
    if first:
        raise UserError(
            f"attention {name!r} needs documents that start at position 0, not at {first}: with "
            "padding on the left, pass position_ids as generate() makes them"
        )


def _check_rising(positions: Tensor, real: Tensor, cached: bool) -> None:
    """Positions of real tokens rise by one from each to the next, or restart at 0."""
    index = torch.arange(positions.shape[1], device=positions.device)
    seen = torch.where(real, index, -1).cummax(1).values  # the last real token up to here
    last = torch.cat([torch.full_like(seen[:, :1], -1), seen[:, :-1]], dim=1)
    step = positions - positions.gather(1, last.clamp(min=0))
    wrong = real & (last >= 0) & (step != 1) & (cached | (positions != 0))
    if bool(wrong.any()):
        raise UserError(f"{RESTART} in a row that continues a cache" if cached else RESTART)


def _alike(begin: Tensor, padding: Tensor | None) -> list[tuple[int, tuple[int, int]]]:
    """Neighbouring rows of a cache that are cut alike: (how many, (the first of them, begin))."""
    found: list[tuple[int, tuple[int, int]]] = []
    same = [True] * len(begin)
    if padding is not None:
        same[1:] = (padding[1:] == padding[:-1]).all(1).tolist()
    for row, first in enumerate(begin.tolist()):
        if row and same[row] and found[-1][1][1] == first:
            found[-1] = (found[-1][0] + 1, found[-1][1])
        else:
            found.append((1, (row, first)))
    return found


def segmented(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    padding: Tensor | None,
    document: Document,
) -> Tensor:
    """One call per segment, and neighbouring rows that are cut alike together: only views."""
    b, heads, s, _ = query.shape
    runs = _runs(positions.expand(b, s), padding)
    parts = [_cut(x, [count for count, _ in runs], 0) for x in (query, key, value)]
    out, row = [], 0
    for (count, segments), *rows in zip(runs, *parts, strict=True):
        lengths = [length for length, _ in segments]
        real = None
        if padding is not None and sum(lengths) < s:
            real = padding[row].nonzero().squeeze(1)
        kept = rows if real is None else [x.index_select(2, real) for x in rows]
        pieces = zip(*(_cut(x, lengths, 2) for x in kept), segments, strict=True)
        done = [document(q, k, v, first) for q, k, v, (_, first) in pieces]
        if real is None:
            out.append(_joined(done, 2))
        else:
            zeros = query.new_zeros(count, heads, s, value.shape[3])
            out.append(zeros.index_copy(2, real, torch.cat(done, dim=2)) if done else zeros)
        row += count
    return _joined(out, 0).transpose(1, 2)


def _cut(x: Tensor, sizes: list[int], dim: int) -> tuple[Tensor, ...]:
    """`x` in pieces; one alone is `x` itself, whose gradient then needs no copy either."""
    return (x,) if len(sizes) == 1 else tuple(x.split(sizes, dim=dim))


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    """The parts in a row; one alone is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)


def _runs(positions: Tensor, padding: Tensor | None) -> list[tuple[int, list[tuple[int, int]]]]:
    """Neighbouring rows that are cut alike: (how many, segments: real tokens, first position)."""
    b, s = positions.shape
    real = torch.ones_like(positions, dtype=torch.bool) if padding is None else padding
    starts = (positions == 0) & real
    document = starts.cumsum(1) + torch.arange(b, device=positions.device)[:, None] * (s + 1)
    owners, counts = torch.unique_consecutive(document[real], return_counts=True)
    firsts = positions[real][counts.cumsum(0) - counts]
    rows: list[list[tuple[int, int]]] = [[] for _ in range(b)]
    for owner, count, first in torch.stack((owners, counts, firsts)).T.tolist():
        rows[owner // (s + 1)].append((count, first))
    alike = (real[1:] == real[:-1]).all(1).tolist()
    runs: list[tuple[int, list[tuple[int, int]]]] = []
    for row, segments in enumerate(rows):
        if row and alike[row - 1] and segments == runs[-1][1]:
            runs[-1] = (runs[-1][0] + 1, segments)
        else:
            runs.append((1, segments))
    return runs

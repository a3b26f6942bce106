"""Sinks and a recent window as blocks for `merge.py`: exact to the token, without a mask.

A query at index i sees keys `i - W < j <= i` and the first S keys. For a chunk of rows that is a
causal square of its own keys, keys that all rows see, and a square whose left edge falls one key a
row: that one is causal when rows and keys are reversed. The chunks of a block share the calls of
their squares. Cost: s (W + S) pairs.
"""

from collections.abc import Iterator

from longctx.attention.ops.parts import Block, Part

ROWS = 512  # of a chunk, a leaf of `parts.py` that is doubled
CHUNKS = 4  # of a block: more make fewer calls, whose operands leave the CPU's cache


def blocks(
    m: int,
    n: int,
    window: int,
    sinks: int,
    turn: str | None,
    key_turn: str | None,
    rows: int | None = None,
) -> Iterator[Block]:
    """Blocks of the last m of n tokens; indices in the document, from 0.

    Args:
        m: query rows.
        n: keys.
        window: W, tokens, the query's own included.
        sinks: S, tokens.
        turn: name of the queries' rotation where they meet sinks outside the window.
        key_turn: name of those sinks' own rotation.
        rows: of a chunk at most; None: `ROWS`.
    """
    row = n - m
    every = window + (sinks if turn is None and key_turn is None else 0)  # rows that see all
    while row < n:
        first = row - window + 1  # of the keys in the window of the block's first query
        if row < every:
            stop = min(every, n)
            parts = [Part(row, stop, causal=True), Part(0, row)]
        elif first <= sinks:  # the window still covers some of the sinks: a query at a time
            stop = row + 1
            parts = [Part(row, stop), Part(first, row), Part(0, first, turn, key_turn=key_turn)]
        else:
            chunk = min(max(1, min(rows or ROWS, window - 1)), n - row)
            stop = row + min(CHUNKS, (n - row) // chunk) * chunk
            parts = [*_chunks(row, stop, chunk, window)]
            parts += [Part(0, sinks, turn, key_turn=key_turn)]
        yield Block(row - (n - m), stop - (n - m), parts)
        row = stop


def _chunks(row: int, stop: int, chunk: int, window: int) -> Iterator[Part]:
    """The window of rows `row:stop`, that are whole chunks."""
    yield Part(row, stop, causal=True, fold=chunk)
    if window > 1:
        first = row - window + 1
        yield Part(first, first + stop - row, causal=True, flipped=True, fold=chunk)
    for start in range(row, stop, chunk):
        rows = (start - row, start - row + chunk)
        yield Part(start + chunk - window + 1, start, rows=rows)

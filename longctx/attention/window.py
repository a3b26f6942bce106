"""Sinks and a recent window as blocks for `merge.py`: exact to the token, without a mask.

A query at index i sees keys `i - W < j <= i` and the first S keys. For a block of m rows that is a
causal square of its own keys, keys that all rows see, and a square whose left edge falls one key a
row: that one is causal when rows and keys are reversed. Cost: s (W + S) pairs.
"""

from collections.abc import Iterator

from longctx.attention.merge import Block, Part

ROWS = 512  # of a block: more make fewer calls, and up to ROWS / 2 wasted pairs a row


def blocks(
    m: int, n: int, window: int, sinks: int, turn: str | None, key_turn: str | None
) -> Iterator[Block]:
    """Blocks of the last m of n tokens; indices in the document, from 0.

    Args:
        m: query rows.
        n: keys.
        window: W, tokens, the query's own included.
        sinks: S, tokens.
        turn: name of the queries' rotation where they meet sinks outside the window.
        key_turn: name of those sinks' own rotation.
    """
    row = n - m
    while row < n:
        first = row - window + 1  # of the keys in the window of the block's first query
        if first <= 0:  # every key before it
            stop = min(window, n)
            parts = [Part(row, stop, causal=True), Part(0, row)]
        elif first <= sinks:  # the window still covers some of the sinks: a query at a time
            stop = row + 1
            parts = [Part(row, stop), Part(first, row), Part(0, first, turn, key_turn=key_turn)]
        else:
            stop = min(row + max(1, min(ROWS, window - 1)), n)
            last = stop - window + 1
            parts = [Part(row, stop, causal=True), Part(last, row)]
            parts += [Part(first, last, causal=True, flipped=True)] if first < row else []
            parts += [Part(0, sinks, turn, key_turn=key_turn)]
        kept = [part for part in parts if part.start < part.stop]
        yield Block(row - (n - m), stop - (n - m), kept)
        row = stop

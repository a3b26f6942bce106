"""Documents to rows: (lengths, row length, seed) -> which piece of which document goes where.

Pure integer work on lengths, no token is read: O(n log n) for n documents, 24 bytes per piece.
Two packers with one result: `concat` joins and cuts (the papers' way), `best_fit` keeps whole
every document that fits a row and spends under one percent of padding on it (best-fit decreasing;
Ding et al. 2404.10830).
"""

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Rows:
    """Rows of pieces in compressed form: row `r` holds pieces `offsets[r]:offsets[r + 1]`.

    Args:
        offsets: `[rows + 1]`.
        document: `[pieces]` index of the piece's document.
        start: `[pieces]` the piece's first token in its document.
        length: `[pieces]` tokens.
    """

    offsets: Ints
    document: Ints
    start: Ints
    length: Ints

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def pieces(self, row: int) -> list[tuple[int, int, int]]:
        """(document, start, length) of each piece of `row`, in order."""
        span = slice(self.offsets[row], self.offsets[row + 1])
        columns = (self.document[span], self.start[span], self.length[span])
        return [(int(d), int(s), int(n)) for d, s, n in zip(*columns, strict=True)]


def concat(lengths: Ints, row: int, seed: int) -> Rows:
    """Shuffle the documents, join them, cut every `row` tokens; the last row may be short.

    Args:
        lengths: `[documents]` tokens in each document.
        row: row length, tokens.
        seed: of the shuffle.
    """
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(lengths))
    ends = np.cumsum(lengths[order])
    total = int(ends[-1]) if len(ends) else 0
    cuts = np.union1d(ends, np.arange(row, total, row))  # every place where a piece ends
    cuts = cuts[cuts > 0]
    begins = np.concatenate([[0], cuts[:-1]]).astype(np.int64)
    which = np.searchsorted(ends, begins, side="right")
    offsets = np.searchsorted(begins, np.arange(0, total, row))
    return Rows(
        offsets=np.append(offsets, len(begins)).astype(np.int64),
        document=order[which].astype(np.int64),
        start=begins - (ends - lengths[order])[which],
        length=cuts - begins,
    )


def best_fit(lengths: Ints, row: int, seed: int) -> Rows:
    """Each piece goes into the fullest row that still has room for it, longest piece first.

    Only a document longer than a row is cut, into full rows and a remainder; no token is dropped.

    Args:
        lengths: `[documents]` tokens in each document.
        row: row length, tokens.
        seed: breaks ties between pieces of equal length.
    """
    whole = lengths // row
    counts = whole + (lengths % row > 0)
    document = np.repeat(np.arange(len(lengths)), counts)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    start = (np.arange(len(document)) - first) * row
    length = np.minimum(row, lengths[document] - start)
    tie = np.random.Generator(np.random.Philox(seed)).permutation(len(document))
    order = np.lexsort((tie, -length))

    row_of = np.empty(len(order), dtype=np.int64)
    open_rows: dict[int, list[int]] = {}  # room left -> rows with that much
    rooms: list[int] = []  # the keys of open_rows, sorted
    rows = 0
    for piece in order:
        need = int(length[piece])
        at = bisect_left(rooms, need)
        if at == len(rooms):
            target, room = rows, row
            rows += 1
        else:
            room = rooms[at]
            target = open_rows[room].pop()
            if not open_rows[room]:
                del open_rows[room], rooms[at]
        row_of[piece] = target
        left = room - need
        if left:
            if left not in open_rows:
                open_rows[left] = []
                insort(rooms, left)
            open_rows[left].append(target)

    by_row = order[np.argsort(row_of[order], kind="stable")]
    return Rows(
        offsets=np.searchsorted(row_of[by_row], np.arange(rows + 1)).astype(np.int64),
        document=document[by_row].astype(np.int64),
        start=start[by_row].astype(np.int64),
        length=length[by_row].astype(np.int64),
    )


PACKERS = {"concat": concat, "best_fit": best_fit}

"""The documents of several stores as one numbered list, and rows of tokens read from them.

A plan (`pack.py`, `context_windows.py`) says which piece of which document goes where; this reads
it. Keeps nothing but the plan and the stores' own indexes (21 bytes a document); tokens come from
memory maps when a row is asked for.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from longctx.batch import IGNORE

Row = dict[str, NDArray[Any]]  # a row of each Batch field, by name
Ints = NDArray[np.signedinteger[Any]]


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
        span = slice(int(self.offsets[row]), int(self.offsets[row + 1]))
        columns = (self.document[span], self.start[span], self.length[span])
        return list(zip(*(column.tolist() for column in columns), strict=True))


def smallest(values: Ints) -> Ints:
    """The same numbers in half the memory where they fit."""
    return values.astype(np.int32) if values.max(initial=0) < 2**31 else values


class Documents(Protocol):
    """What is asked of a token store."""

    @property
    def meta(self) -> dict[str, Any]:
        """Its description, with `digest`."""
        ...

    @property
    def lengths(self) -> NDArray[np.int64]:
        """`[documents]` tokens."""
        ...

    def tokens(self, i: int, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Tokens `start:stop` of document `i`."""
        ...


class Corpus:
    """Documents numbered through the stores.

    Args:
        stores: where they are, in this order.
    """

    def __init__(self, stores: Sequence[Documents]) -> None:
        self.stores = stores
        self.first = np.cumsum([0, *(len(s.lengths) for s in stores)])

    @property
    def lengths(self) -> NDArray[np.int64]:
        """`[documents]` tokens in each; concatenated at each call."""
        parts = [s.lengths for s in self.stores]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def read(self, document: int, start: int, stop: int) -> NDArray[np.int64]:
        """Tokens `start:stop` of a document, fewer where it ends before `stop`."""
        at = int(np.searchsorted(self.first, document, side="right")) - 1
        number = document - int(self.first[at])
        stop = min(stop, int(self.stores[at].lengths[number]))
        return self.stores[at].tokens(number, start, stop).astype(np.int64)

    def row(self, pieces: Iterable[tuple[int, int, int]], size: int, mask_documents: bool) -> Row:
        """Pieces of documents side by side, with labels and positions.

        A label is the next token of the same document, also where the piece ends before it.

        Args:
            pieces: (document, start, length) of each, together at most `size` tokens.
            size: tokens of the row; the rest behind the pieces is padding: token 0, not scored.
            mask_documents: positions restart and labels stop at document borders. Off: the row
                is one stream, a document's last label is the first token of the next.
        """
        tokens = np.zeros(size, dtype=np.int64)
        labels = np.full(size, IGNORE, dtype=np.int64)
        positions = np.arange(size, dtype=np.int64)
        at = 0
        for document, start, length in pieces:
            text = self.read(document, start, start + length + 1)  # one more: the last label
            end = at + length
            tokens[at:end] = text[:length]
            labels[at : at + len(text) - 1] = text[1:]
            if mask_documents:
                positions[at:end] = np.arange(length)
            elif at:
                labels[at - 1] = tokens[at]
            at = end
        if mask_documents:
            positions[at:] = np.arange(size - at)  # padding is a document of its own
        return {"tokens": tokens, "labels": labels, "positions": positions}


@dataclass(frozen=True)
class PackedRows:
    """Packed documents as rows of a batch, `[s]`.

    Args:
        corpus: the documents.
        rows: how they are packed.
        seq_len: row length s.
        mask_documents: positions restart and labels stop at document borders. Off: a row is one
            stream with positions 0 .. s-1, as PI and LongGen train.
        about: what it holds, in one line.
    """

    corpus: Corpus
    rows: Rows
    seq_len: int
    mask_documents: bool
    about: str

    def __len__(self) -> int:
        """Rows in one epoch."""
        return len(self.rows)

    def row(self, number: int) -> Row:
        """Tokens, labels and positions of one row."""
        return self.corpus.row(self.rows.pieces(number), self.seq_len, self.mask_documents)

    def describe(self) -> str:
        """What it holds, in one line."""
        return self.about

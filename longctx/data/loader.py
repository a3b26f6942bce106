"""Rows to batches: `batch = f(seed, step, dp_rank, dp_size)`, with no hidden state.

Step `n` takes rows `n * batch_rows ...` of a stream of epochs, each a fresh permutation of the same
rows, and deals them to the ranks. So a run resumes by one integer, in the same time at any step,
and the global order does not depend on the number of ranks or on accumulation.
"""

import zlib
from functools import lru_cache

import numpy as np
import torch

from longctx.batch import IGNORE, Batch
from longctx.data.pack import PACKERS, Ints
from longctx.data.store import Store
from longctx.errors import UserError


@lru_cache(maxsize=2)
def _permutation(rows: int, seed: int, epoch: int) -> Ints:
    return np.random.Generator(np.random.Philox([seed, epoch])).permutation(rows)


class PackedLoader:
    """Packed rows of one or more token stores.

    Args:
        stores: their documents together are the corpus.
        seq_len: row length s.
        packing: a name in `PACKERS`.
        mask_documents: positions restart and labels stop at document borders. Off: a row is one
            stream with positions 0 .. s-1, as PI and LongGen train.
        batch_rows: rows per step over all ranks.
        micro_batch_rows: rows per rank and micro-batch.
        seed: of packing and order.

    Raises:
        UserError: if the stores hold less than one row, or not one document.
    """

    def __init__(
        self,
        stores: list[Store],
        *,
        seq_len: int,
        packing: str,
        mask_documents: bool,
        batch_rows: int,
        micro_batch_rows: int,
        seed: int,
    ) -> None:
        self.stores = stores
        self.seq_len = seq_len
        self.packing = packing
        self.mask_documents = mask_documents
        self.batch_rows = batch_rows
        self.micro_batch_rows = micro_batch_rows
        self.seed = seed
        self.first = np.cumsum([0, *(len(s.lengths) for s in stores)])
        self.lengths = np.concatenate([s.lengths for s in stores]).astype(np.int64)
        if self.lengths.sum() < seq_len:
            raise UserError(
                f"data.store holds {int(self.lengths.sum())} tokens, "
                f"less than one row of data.seq_len={seq_len}"
            )
        self.rows = PACKERS[packing](self.lengths, seq_len, seed)

    def __len__(self) -> int:
        """Rows in one epoch."""
        return len(self.rows)

    @property
    def digest(self) -> str:
        """Changes when the tokens, their packing or their order would."""
        parts = [s.meta["digest"] for s in self.stores]
        parts += [self.packing, self.seq_len, self.mask_documents, self.seed]
        return f"{zlib.crc32(repr(parts).encode()):08x}"

    def step(self, step: int, dp_rank: int, dp_size: int) -> list[Batch]:
        """This rank's micro-batches of step `step` (counted from 0).

        The global rows of a step are dealt micro-batch by micro-batch, so the set of rows of a
        step is the same for every number of ranks and every accumulation.
        """
        micro = self.micro_batch_rows
        passes = self.batch_rows // (micro * dp_size)
        begin = step * self.batch_rows
        return [
            self.batch([begin + (p * dp_size + dp_rank) * micro + i for i in range(micro)])
            for p in range(passes)
        ]

    def batch(self, samples: list[int]) -> Batch:
        """The rows at global sample numbers `samples`: `[b s]`, b = len(samples)."""
        built = [self._row(self.row_number(n)) for n in samples]
        tokens, labels, positions = (
            torch.from_numpy(np.stack(x)) for x in zip(*built, strict=True)
        )
        return Batch(tokens=tokens, labels=labels, positions=positions)

    def row_number(self, sample: int) -> int:
        """Which row the global sample number is: epoch after epoch, each its own permutation."""
        epoch, at = divmod(sample, len(self.rows))
        return int(_permutation(len(self.rows), self.seed, epoch)[at])

    def _row(self, row: int) -> tuple[Ints, Ints, Ints]:
        tokens = np.zeros(self.seq_len, dtype=np.int64)
        labels = np.full(self.seq_len, IGNORE, dtype=np.int64)
        positions = np.arange(self.seq_len, dtype=np.int64)
        at = 0
        for document, start, length in self.rows.pieces(row):
            text = self._read(document, start, length + 1)  # one more: the last token's label
            end = at + length
            tokens[at:end] = text[:length]
            labels[at : at + len(text) - 1] = text[1:]
            if self.mask_documents:
                positions[at:end] = np.arange(length)
            elif at:
                labels[at - 1] = tokens[at]
            at = end
        if self.mask_documents:
            positions[at:] = np.arange(self.seq_len - at)  # padding is a document of its own
        return tokens, labels, positions

    def _read(self, document: int, start: int, length: int) -> Ints:
        store = int(np.searchsorted(self.first, document, side="right")) - 1
        stop = min(start + length, int(self.lengths[document]))
        found = self.stores[store].tokens(document - int(self.first[store]), start, stop)
        return found.astype(np.int64)

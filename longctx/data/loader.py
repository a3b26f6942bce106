"""Rows to batches: `batch = f(seed, step, dp_rank, dp_size)`, with no hidden state.

Step `n` takes samples `n * batch_rows ...` of one endless global order and deals them to the ranks.
A sample is a row of a source: which source, says the mixture; which row, that source's stream of
epochs, each a fresh permutation of its rows. So a run resumes by one integer, in the same time at
any step, and the global order does not depend on the number of ranks or on accumulation.
8 bytes of memory a row for the present epoch's permutation, beside what the plans take.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from longctx.batch import Batch
from longctx.config import DataConfig
from longctx.data import mixture, pack
from longctx.data.corpus import Corpus, Documents, Row
from longctx.data.pack import Ints, Rows
from longctx.errors import UserError

Change = Callable[[Row, int], Row]  # of a row, given its global sample number


def in_turn(*changes: Change | None) -> Change | None:
    """One change made of several, the first one first; None among them are left out."""
    wanted = [change for change in changes if change is not None]

    def changed(row: Row, sample: int) -> Row:
        for change in wanted:
            row = change(row, sample)
        return row

    return changed if wanted else None


class Source(Protocol):
    """Rows that can be had by number."""

    def __len__(self) -> int:
        """Rows in one epoch."""
        ...

    def row(self, number: int) -> Row:
        """The fields of one row."""
        ...

    def describe(self) -> str:
        """What it holds, in one line."""
        ...


class RowLoader:
    """Rows of one or more sources, shuffled, mixed and dealt.

    Args:
        sources: each with at least one row.
        weights: share of each source in the rows, in any unit.
        batch_rows: rows per step over all ranks.
        micro_batch_rows: rows per rank and micro-batch.
        seed: of the order.
        identity: named parts that decide tokens and order, each as text or a digest.
        change: what is done to a row before it is trained on, `(row, sample) -> row`: `row` has
            the fields of a Batch as arrays `[s]`, `sample` is its number in the global order. It
            must depend on these two alone; then rows are the same for every number of ranks and
            after a resume. It may run in another thread. None: nothing.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        weights: Sequence[float],
        *,
        batch_rows: int,
        micro_batch_rows: int,
        seed: int,
        identity: Mapping[str, str],
        change: Change | None = None,
    ) -> None:
        assert len(sources) == len(weights) and all(map(len, sources))
        self.sources = sources
        self.weights = weights
        self.mixture = mixture.Mixture(weights)
        self.batch_rows = batch_rows
        self.micro_batch_rows = micro_batch_rows
        self.seed = seed
        self.identity = dict(identity)
        self.change = change
        self._orders: dict[int, tuple[int, Ints]] = {}  # source -> (epoch, its permutation)

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
        places = [self.place(n) for n in samples]
        rows = [self.sources[source].row(row) for source, row in places]
        if self.change is not None:
            rows = [self.change(row, n) for row, n in zip(rows, samples, strict=True)]
        return Batch(**{f: torch.from_numpy(np.stack([r[f] for r in rows])) for f in rows[0]})

    def place(self, sample: int) -> tuple[int, int]:
        """(source, row) of a global sample number."""
        source, number = self.mixture.draw(sample)
        epoch, at = divmod(number, len(self.sources[source]))
        return source, int(self._order(source, epoch)[at])

    def describe(self, samples: int) -> list[str]:
        """What a run over `samples` rows draws from each source, in lines; warnings among them."""
        sizes = [len(source) for source in self.sources]
        epochs = mixture.repetition(self.weights, sizes, samples)
        lines = []
        for source, weight, times in zip(self.sources, self.weights, epochs, strict=True):
            share = f"; {weight / sum(self.weights):.1%} of the rows" if len(sizes) > 1 else ""
            lines.append(f"data: {source.describe()}{share}; {times:.3g} epochs")
            if times > mixture.MANY_EPOCHS:
                lines.append(
                    f"warning: that is {times:.3g} times the same text; "
                    f"beyond {mixture.MANY_EPOCHS} epochs repetition helps little"
                )
        return lines

    def _order(self, source: int, epoch: int) -> Ints:
        held = self._orders.get(source)
        if held is None or held[0] != epoch:
            key = [self.seed, epoch, source] if source else [self.seed, epoch]
            random = np.random.Generator(np.random.Philox(key))
            held = (epoch, random.permutation(len(self.sources[source])))
            self._orders[source] = held
        return held[1]


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


def packed(
    stores: Sequence[Documents],
    data: DataConfig,
    *,
    batch_rows: int,
    micro_batch_rows: int,
    seed: int,
    name: str = "data.store",
    change: Change | None = None,
) -> RowLoader:
    """The loader of packed rows: all stores one shuffled corpus, or with weights a source each.

    Args:
        stores: opened token stores, in the order of their paths in the configuration.
        data: how rows are made of them.
        batch_rows: rows per step over all ranks.
        micro_batch_rows: rows per rank and micro-batch.
        seed: of packing, order and the choice of short documents.
        name: of the setting that holds the stores' paths, for messages.
        change: what is done to each row, see `RowLoader`.

    Raises:
        UserError: if a source holds less than one row.
    """
    if data.weights is None:
        parts = {name: Corpus(stores)}
    else:
        parts = {f"{name}[{i}]": Corpus([store]) for i, store in enumerate(stores)}
    identity = {f"data.store[{i}]": str(s.meta["digest"]) for i, s in enumerate(stores)}
    settings = ["packing", "seq_len", "mask_documents", "weights", "long_tokens"]
    settings += ["short_keep"] if data.long_tokens is not None else []
    identity |= {f"data.{key}": str(getattr(data, key)) for key in settings}
    return RowLoader(
        [_packed_rows(corpus, data, seed, part) for part, corpus in parts.items()],
        data.weights or [1.0],
        batch_rows=batch_rows,
        micro_batch_rows=micro_batch_rows,
        seed=seed,
        identity=identity | {"seed": str(seed)},
        change=change,
    )


def _packed_rows(corpus: Corpus, data: DataConfig, seed: int, name: str) -> PackedRows:
    lengths = corpus.lengths
    after, kept = "", None
    if data.long_tokens is not None:
        kept = np.flatnonzero(mixture.keep(lengths, data.long_tokens, data.short_keep, seed))
        shares = [mixture.long_share(x, data.long_tokens) for x in (lengths, lengths[kept])]
        after = f", tokens in long documents {shares[0]:.0%} -> {shares[1]:.0%}"
        lengths = lengths[kept]
    total = int(lengths.sum())
    if total < data.seq_len:
        left = " after data.short_keep" if after else ""
        raise UserError(
            f"{name} holds {total} tokens{left}, less than one row of data.seq_len={data.seq_len}"
        )
    rows = pack.PACKERS[data.packing](lengths, data.seq_len, seed)
    facts = pack.describe(rows, lengths, data.seq_len)
    about = (
        f"{name}: {len(lengths):,} documents{after}, {total:,} tokens in {len(rows):,} rows of "
        f"{data.seq_len:,} ({data.packing}, padding {facts['padding']:.2%}, "
        f"{facts['cut']:,} documents cut)"
    )
    if kept is not None:
        rows = replace(rows, document=pack.smallest(kept[rows.document]))
    return PackedRows(corpus, rows, data.seq_len, data.mask_documents, about)

"""Rows to batches: `batch = f(seed, step, dp_rank, dp_size)`, with no hidden state.

Step `n` takes samples `n * batch_rows ...` of one endless global order and deals them to the ranks.
A sample is a row of a source: which source, says the mixture; which row, that source's stream of
epochs, each a fresh permutation of its rows. So a run resumes by one integer, in the same time at
any step, and the global order does not depend on the number of ranks or on accumulation.
8 bytes of memory a row for the present epoch's permutation, beside what the plans take.
"""

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from longctx.batch import Batch
from longctx.config import DataConfig
from longctx.data import pack
from longctx.data.corpus import Corpus, Documents, Ints, PackedRows, Row, smallest
from longctx.errors import UserError

MANY_EPOCHS = 4  # repeating text up to here is nearly as good as new text (2305.16264, section 5)
Place = tuple[int, int, int]  # step, dp_rank, dp_size
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
        self.mixture = Mixture(weights)
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
        epochs = repetition(self.weights, sizes, samples)
        lines = []
        for source, weight, times in zip(self.sources, self.weights, epochs, strict=True):
            share = f"; {weight / sum(self.weights):.1%} of the rows" if len(sizes) > 1 else ""
            lines.append(f"data: {source.describe()}{share}; {times:.3g} epochs")
            if times > MANY_EPOCHS:
                lines.append(
                    f"warning: that is {times:.3g} times the same text; "
                    f"beyond {MANY_EPOCHS} epochs repetition helps little"
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
        kept = np.flatnonzero(keep(lengths, data.long_tokens, data.short_keep, seed))
        shares = [long_share(x, data.long_tokens) for x in (lengths, lengths[kept])]
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
        rows = replace(rows, document=smallest(kept[rows.document]))
    return PackedRows(corpus, rows, data.seq_len, data.mask_documents, about)


class Steps(Protocol):
    """What is asked of a loader."""

    def step(self, step: int, dp_rank: int, dp_size: int) -> list[Batch]:
        """A rank's micro-batches of a step."""
        ...


class Prefetch:
    """A loader whose next steps are prepared in one background thread while a step computes.

    Steps may be asked for in any order; only rising ones are ready. What the loader raises is
    raised at the step that it belongs to.

    Args:
        loader: where the batches come from.
        ahead: steps prepared in advance; 0: none, and no thread.
        end: the first step that will not be asked for.
    """

    def __init__(self, loader: Steps, ahead: int, end: int) -> None:
        self.loader = loader
        self.ahead = ahead
        self.end = end
        self._thread: ThreadPoolExecutor | None = None
        self._ready: dict[Place, Future[list[Batch]]] = {}

    def step(self, step: int, dp_rank: int, dp_size: int) -> list[Batch]:
        """The loader's `step`; waits until it is ready."""
        if not self.ahead:
            return self.loader.step(step, dp_rank, dp_size)
        if self._thread is None:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        last = min(step + self.ahead, self.end - 1)
        wanted = [(n, dp_rank, dp_size) for n in range(step, max(last, step) + 1)]
        for place in self._ready.keys() - set(wanted):
            self._ready.pop(place).cancel()
        for place in wanted:
            if place not in self._ready:
                self._ready[place] = self._thread.submit(self.loader.step, *place)
        return self._ready.pop(wanted[0]).result()

    def close(self) -> None:
        """Ends the thread after its present batch. A later `step` starts a new one."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
        self._thread = None
        self._ready.clear()


class Mixture:
    """Samples dealt to weighted sources, evenly: after n samples source i had n * w_i of them.

    Each source is a clock that ticks w_i times per unit of time, first after half a period; samples
    are the ticks in order of time, then of source. After any n samples the count of source i is
    within `1/2 + w_i * sources / 2` of n * w_i (weights scaled to sum to one): at time t it is
    within 1/2 of t * w_i, so all counts together, n, are within sources / 2 of t.

    Args:
        weights: of each source, above 0; taken as the decimal numbers they are written as.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        exact = [Fraction(str(w)) for w in weights]
        parts = math.lcm(*(w.denominator for w in exact))
        whole = [int(w * parts) for w in exact]
        self.ticks = [w // math.gcd(*whole) for w in whole]  # of each source in one round
        self.round = sum(self.ticks)  # samples after which it all begins again

    def draw(self, sample: int) -> tuple[int, int]:
        """(source i, k): global sample `sample` is the k-th that source i gives, both from 0."""
        rounds, left = divmod(sample, self.round)
        # At time `left - sources / 2` at most `left` ticks are over, and at least left - sources.
        twice = max(2 * left - len(self.ticks), 0)  # that time, doubled
        counts = [(t * twice + self.round) // (2 * self.round) for t in self.ticks]
        clocks = [(self._time(i, k), i) for i, k in enumerate(counts)]
        heapq.heapify(clocks)
        for _ in range(left - sum(counts)):
            source = clocks[0][1]
            counts[source] += 1
            heapq.heapreplace(clocks, (self._time(source, counts[source]), source))
        source = clocks[0][1]
        return source, rounds * self.ticks[source] + counts[source]

    def _time(self, source: int, tick: int) -> Fraction:
        """When that tick is, in half rounds."""
        return Fraction(2 * tick + 1, self.ticks[source])


def repetition(weights: Sequence[float], rows: Sequence[int], samples: int) -> list[float]:
    """Epochs of each source in a run.

    Args:
        weights: of each source.
        rows: of each source, in one epoch.
        samples: rows that the run draws from all sources.
    """
    total = math.fsum(weights)
    return [samples * w / total / n for w, n in zip(weights, rows, strict=True)]


def keep(lengths: Ints, long_tokens: int, short_keep: float, seed: int) -> NDArray[np.bool_]:
    """Which documents stay: every long one, and short ones with a fixed probability.

    The choice is a hash of the document's number and the seed: the same on every rank and in every
    order. It raises the share of tokens in long documents; the share of each source stays what its
    weight says. Source: Fu et al. 2402.10171, per-source length up-sampling, as LongGen uses it.

    Args:
        lengths: `[documents]` tokens in each.
        long_tokens: documents of at least that many tokens are long.
        short_keep: probability that a shorter one stays.
        seed: of the choice.

    Returns:
        `[documents]`.
    """
    return (lengths >= long_tokens) | (_uniform(len(lengths), seed) < short_keep)


def _uniform(count: int, seed: int) -> NDArray[np.float64]:
    """For each number below `count` one in [0, 1): splitmix64's finaliser over number and seed."""
    golden = 0x9E3779B97F4A7C15
    with np.errstate(over="ignore"):
        x = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(golden)
        x += np.uint64((seed + 1) * 0xD1342543DE82EF95 % 2**64)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
        x ^= x >> np.uint64(31)
    return (x >> np.uint64(11)).astype(np.float64) * 2.0**-53


def long_share(lengths: Ints, long_tokens: int) -> float:
    """Share of all tokens that are in documents of at least `long_tokens`; 0 without tokens."""
    total = int(lengths.sum(dtype=np.int64))
    return int(lengths[lengths >= long_tokens].sum(dtype=np.int64)) / total if total else 0.0

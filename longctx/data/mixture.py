"""Which source a sample comes from, how often each repeats, and which short documents stay.

All stateless: functions of a sample's or a document's number. A draw takes O(sources log sources)
for any sample number, in exact integers.
"""

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from longctx.data.pack import Ints

MANY_EPOCHS = 4  # repeating text up to here is nearly as good as new text (2305.16264, section 5)


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

"""Scores of short answers, as for SQuAD, and the intervals of their means.

Source: SQuAD (1606.05250) section 6.1 and its evaluation script; Wilson 1927 for shares.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence
from math import sqrt

import numpy as np

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)
Z = 1.959964  # of a two-sided 95% interval
RESAMPLES = 1000

Interval = tuple[float, float]


def normalise(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces.

    >>> normalise("The  U.S., an  Ally!")
    'us ally'
    """
    bare = text.lower().translate(PUNCTUATION)
    return " ".join(ARTICLES.sub(" ", bare).split())


def holds(text: str, answers: Sequence[str]) -> bool:
    """Whether the text has one of the answers as a run of whole words, both normalised."""
    padded = f" {normalise(text)} "
    return any(f" {wanted} " in padded for answer in answers if (wanted := normalise(answer)))


def exact(prediction: str, answers: Sequence[str]) -> bool:
    """Exact match with one of the answers, both normalised."""
    return normalise(prediction) in {normalise(answer) for answer in answers}


def contained(prediction: str, answers: Sequence[str]) -> bool:
    """Whether one of the answers is a substring of the prediction, both normalised (sub-EM)."""
    found = normalise(prediction)
    wanted = [normalise(answer) for answer in answers]
    return any(w in found if w else not found for w in wanted)


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Harmonic mean of precision and recall over bags of words, the best of the answers'."""
    return max(_f1(normalise(prediction).split(), normalise(a).split()) for a in answers)


def _f1(found: list[str], wanted: list[str]) -> float:
    if not found or not wanted:
        return float(found == wanted)
    shared = sum((Counter(found) & Counter(wanted)).values())
    return 2 * shared / (len(found) + len(wanted))


def wilson(successes: float, trials: int) -> Interval:
    """95% interval of a share (Wilson's score interval); useful at 0 and at 1 too.

    Args:
        successes: how many.
        trials: of how many, at least 1.
    """
    share, z2 = successes / trials, Z * Z
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    spread = share * (1 - share) / trials + z2 / (4 * trials * trials)
    half = Z * sqrt(spread) / (1 + z2 / trials)
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap(values: Sequence[float]) -> Interval:
    """95% interval of a mean: percentiles over `RESAMPLES` resamples, the same at each call.

    It has no width where all values are equal: then look at `wilson`'s.
    """
    rng = np.random.default_rng(0)
    draws = rng.integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.percentile(np.asarray(values)[draws].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def interval(values: Sequence[float]) -> Interval:
    """95% interval of a mean of values from 0 to 1: the bootstrap's, or Wilson's.

    Wilson's where every value is 0 or 1, and where all are equal: there the bootstrap has no width.
    """
    if all(value in (0, 1) for value in values) or len(set(values)) == 1:
        return wilson(sum(values), len(values))
    return bootstrap(values)

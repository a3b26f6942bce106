"""Laws of mixtures: exact proportions at every prefix, no state; up-sampling without an order."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.data.loader import Mixture, keep, long_share, repetition

WEIGHTS = st.lists(
    st.sampled_from([0.01, 0.025, 0.045, 0.15, 0.5, 0.67, 1, 2, 3.5, 7]), min_size=1, max_size=7
)


@given(weights=WEIGHTS)
@settings(max_examples=60, deadline=None)
def test_every_prefix_has_its_proportions(weights):
    mixture = Mixture(weights)
    exact = [Fraction(str(w)) for w in weights]
    counts = [0] * len(weights)
    for sample in range(400):
        source, number = mixture.draw(sample)
        assert number == counts[source]
        counts[source] += 1
        for count, weight in zip(counts, exact, strict=True):
            share = weight / sum(exact)
            off = abs(count - (sample + 1) * share)
            assert off <= Fraction(1, 2) + share * len(weights) / 2


@given(weights=WEIGHTS, sample=st.integers(0, 10**15))
@settings(max_examples=100, deadline=None)
def test_any_sample_goes_on_from_the_one_before(weights, sample):
    """Draws are ticks in order of (time, source), at any distance from the start."""
    mixture = Mixture(weights)
    exact = [Fraction(str(w)) for w in weights]
    drawn = [mixture.draw(sample + i) for i in range(20)]
    times = [((k + Fraction(1, 2)) / exact[i], i) for i, k in drawn]
    assert times == sorted(times)
    for (one, k), (_, later) in itertools.combinations(enumerate(drawn), 2):
        assert drawn[one][0] != later[0] or later[1] > k[1]
    for source, weight in enumerate(exact):  # none is left out in between
        between = [k for i, k in drawn if i == source]
        assert between == list(range(between[0], between[0] + len(between))) if between else True
        share = weight / sum(exact)
        if between:
            assert abs(between[0] - sample * share) <= 2 + share * len(weights)


def test_equal_weights_take_turns():
    assert [Mixture([1, 1, 1]).draw(n) for n in range(4)] == [(0, 0), (1, 0), (2, 0), (0, 1)]
    two = [Mixture([2, 1]).draw(n)[0] for n in range(6)]
    assert two.count(0) == 4 and two.count(1) == 2


def test_repetition_is_samples_over_rows():
    assert repetition([2, 1], [100, 10], 60) == pytest.approx([0.4, 2.0])


@given(
    lengths=st.lists(st.integers(1, 9000), min_size=1, max_size=200),
    seed=st.integers(0, 2**40),
    share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    data=st.data(),
)
@settings(max_examples=50, deadline=None)
def test_a_document_is_kept_whatever_stands_beside_it(lengths, seed, share, data):
    """The choice for a document depends on its number, its length and the seed alone."""
    whole = keep(np.array(lengths), 4096, share, seed)
    number = data.draw(st.integers(0, len(lengths) - 1))
    others = [5000] * number + [lengths[number]]
    assert keep(np.array(others), 4096, share, seed)[number] == whole[number]
    assert whole[np.array(lengths) >= 4096].all()
    if share in (0.0, 1.0):
        assert (whole[np.array(lengths) < 4096] == bool(share)).all()


def test_short_documents_are_kept_with_the_probability_asked_for():
    lengths = np.full(200_000, 100)
    one, other = keep(lengths, 4096, 0.1, 0), keep(lengths, 4096, 0.1, 1)
    for kept in (one, other):
        assert kept.mean() == pytest.approx(0.1, abs=0.003)  # 4.5 sigma
    assert (one & other).mean() == pytest.approx(0.01, abs=0.001)  # seeds choose independently
    assert (one[1:] & one[:-1]).mean() == pytest.approx(0.01, abs=0.001)  # and so do neighbours


def test_long_documents_rise_from_thirty_to_seventy_percent():
    """0.3 / (0.3 + 0.7 * 0.15) is 0.74: the effect that Fu et al. describe."""
    lengths = np.array([500] * 14_000 + [6000] * 500)
    assert long_share(lengths, 4096) == pytest.approx(0.3)
    kept = lengths[keep(lengths, 4096, 0.15, 0)]
    assert 0.7 < long_share(kept, 4096) < 0.78
    assert long_share(lengths[:0], 4096) == 0


def test_a_document_of_just_the_length_is_long():
    assert keep(np.array([4095, 4096, 4097]), 4096, 0.0, 0).tolist() == [False, True, True]

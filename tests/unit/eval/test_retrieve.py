from math import log

import numpy as np
import pytest

from longctx.eval.retrieve import K1, B, Ranker

TEXTS = [
    "The cat sat on the mat.",
    "Dogs and cats are animals; a dog barks.",
    "A treatise on the motion of planets, and of the planets alone.",
    "",
    "The dog sat.",
]


def test_the_text_about_it_comes_first():
    ranker = Ranker(TEXTS)
    for query, best in (("planets?", 2), ("a MAT for the cat", 0), ("dog sat", 4)):
        order, scores = ranker.ranked(query)
        assert order[0] == best and sorted(order) == list(range(5))
        assert (np.diff(scores[order]) <= 0).all()


def test_the_formula():
    """Lucene's: log(1 + (n - df + .5) / (df + .5)) tf / (tf + k1 (1 - b + b length / mean))."""
    scores = Ranker(TEXTS).scores("planets sat planets")
    length, mean = np.array([6, 8, 12, 0, 3]), 29 / 5

    def part(df, tf):
        idf = log(1 + (5 - df + 0.5) / (df + 0.5))
        return idf * np.array(tf) / (np.array(tf) + K1 * (1 - B + B * length / mean))

    want = 2 * part(1, [0, 0, 2, 0, 0]) + part(2, [1, 0, 0, 0, 1])
    np.testing.assert_allclose(scores, want, rtol=1e-5)


def test_ties_keep_their_order():
    order, scores = Ranker(["b", "a x", "a y", "a z"]).ranked("a")
    assert order.tolist() == [1, 2, 3, 0] and scores[0] == 0


@pytest.mark.parametrize("query", ["", "...", "zebra"])
def test_nothing_in_common(query):
    order, scores = Ranker(TEXTS).ranked(query)
    assert order.tolist() == list(range(5)) and not scores.any()


@pytest.mark.parametrize("texts", [[], ["", "?!"]])
def test_nothing_to_rank(texts):
    order, scores = Ranker(texts).ranked("word")
    assert order.tolist() == list(range(len(texts))) and not scores.any()

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longctx.errors import UserError
from longctx.eval.retrieve import Ranker, Retriever, cut, same_documents
from longctx.eval.scored_windows import Window
from longctx.eval.tasks.retrieval_perplexity import (
    Reader,
    RetrievalPerplexity,
    log_weights,
    measure,
    mixture,
)
from tests.helpers.fakes import Memory, unigram
from tests.helpers.reading import BagWithEncoder, bag, bag_nll

OWN = RetrievalPerplexity(None, [0, 1, 3], [1, 3], 8, 24, 10, 2.0, 3, None)
RNG = np.random.default_rng(0)
STORE = Memory([RNG.integers(0, 5, n) for n in (60, 70, 40)])
WINDOWS = [Window(0, 10, 34, 20), Window(1, 30, 54, 40)]
FOUND = [
    ([(1, 1, 9), (2, 9, 17), (1, 33, 41)], np.array([3.0, 2.0, 0.5])),
    ([(0, 1, 9), (2, 1, 9), (0, 9, 17)], np.array([5.0, 1.0, 1.0])),
]


def run(model, own=OWN, found=FOUND):
    return measure(Reader(model, STORE, STORE, 64), own, WINDOWS, found)


def row(result, method, k):
    [found] = [r for r in result["rows"] if (r["method"], r["k"]) == (method, k)]
    return found


def text(span):
    document, start, stop = span
    return STORE.documents[document].tolist()[start:stop]


def by_hand(window, passages):
    seen = [t for span in passages for t in text(span)]
    seen += text((window.document, window.start, window.first))
    return bag_nll(text((window.document, window.first, window.stop)), seen, 5)


@given(
    nlls=st.lists(st.floats(0, 20), min_size=1, max_size=6),
    scores=st.lists(st.floats(-30, 30), min_size=6, max_size=6),
    temperature=st.floats(0.1, 10),
)
def test_the_mixture_is_one_of_probabilities(nlls, scores, temperature):
    scores = np.array(scores[: len(nlls)])
    weights = np.exp(scores / temperature - max(scores) / temperature)
    weights /= weights.sum()
    want = -np.log((weights * np.exp(-np.array(nlls))).sum())
    got = mixture(np.array(nlls)[:, None], scores, temperature)
    assert got == pytest.approx([want], rel=1e-9, abs=1e-9)
    assert np.exp(log_weights(scores, temperature)).sum() == pytest.approx(1)


def test_one_passage_is_the_plain_model_with_that_prefix():
    """Acceptance 25."""
    result, _ = run(bag(5))
    for key in ("nll", "nll_se", "tokens", "gain"):
        assert row(result, "replug", 1)[key] == pytest.approx(row(result, "contexts", 1)[key])
    want = np.concatenate([by_hand(w, s[:1]) for w, (s, _) in zip(WINDOWS, FOUND, strict=True)])
    assert row(result, "replug", 1)["nll"] == pytest.approx(want.mean(), rel=1e-5)
    assert row(result, "replug", 1)["effective_passages"] == pytest.approx(1)


def test_uniform_scores_are_the_arithmetic_mean_of_probabilities():
    """Acceptance 25."""
    level = [(spans, np.zeros(3)) for spans, _ in FOUND]
    result, _ = run(bag(5), found=level)
    want = []
    for window, (spans, _) in zip(WINDOWS, level, strict=True):
        probabilities = [np.exp(-by_hand(window, [span])) for span in spans]
        want.append(-np.log(np.mean(probabilities, axis=0)))
    assert row(result, "replug", 3)["nll"] == pytest.approx(np.mean(want), rel=1e-5)
    assert row(result, "replug", 3)["effective_passages"] == pytest.approx(3)


def test_scores_weigh():
    """A cold softmax reads the best passage alone; the scores' scale is the temperature's."""
    cold, _ = run(bag(5), replace(OWN, temperature=1e-3))
    assert row(cold, "replug", 3)["nll"] == pytest.approx(row(cold, "replug", 1)["nll"])
    scaled = [(spans, 7 * scores) for spans, scores in FOUND]
    one, _ = run(bag(5), replace(OWN, temperature=14.0), scaled)
    two, _ = run(bag(5))
    assert row(one, "replug", 3)["nll"] == pytest.approx(row(two, "replug", 3)["nll"])
    level, _ = run(bag(5), found=[(spans, np.zeros(3)) for spans, _ in FOUND])
    assert row(level, "replug", 3)["nll"] != pytest.approx(row(two, "replug", 3)["nll"], abs=1e-6)


def test_mixing_far_improbable_tokens_does_not_underflow():
    got = mixture(np.array([[2000.0], [2001.0]]), np.zeros(2), 1.0)
    assert got == pytest.approx([2000 + np.log(2) - np.log1p(np.exp(-1))])


def test_all_passages_in_one_pass():
    result, records = run(bag(5))
    want = np.concatenate([by_hand(w, s) for w, (s, _) in zip(WINDOWS, FOUND, strict=True)])
    assert row(result, "contexts", 3)["nll"] == pytest.approx(want.mean(), rel=1e-5)
    none = np.concatenate([by_hand(w, []) for w in WINDOWS])
    assert row(result, "none", 0)["nll"] == pytest.approx(none.mean(), rel=1e-5)
    gain = row(result, "contexts", 3)["gain"]
    assert gain == pytest.approx((none - want).mean(), rel=1e-3) and abs(gain) > 1e-3
    assert {r["tokens"] for r in result["rows"]} == {14 + 14}
    assert [r["passages"] for r in records if (r["method"], r["k"]) == ("contexts", 1)] == [
        [[1, 1]],
        [[0, 1]],
    ]


def test_unigram_closed_form():
    p = np.array([0.4, 0.3, 0.15, 0.1, 0.05])
    result, _ = run(unigram(p))
    targets = [t for w in WINDOWS for t in text((w.document, w.first, w.stop))]
    for r in result["rows"]:
        assert r["nll"] == pytest.approx(-np.log(p)[targets].mean(), rel=1e-6)


def test_an_encoder_reads_all_passages_and_replug_stays_in_the_decoder():
    model = BagWithEncoder(5)
    result, _ = run(model)
    front, _ = run(bag(5))
    for a, b in zip(result["rows"], front["rows"], strict=True):
        assert a["nll"] == pytest.approx(b["nll"], rel=1e-6)
    assert {shape[1:] for shape in model.encoded} == {(1, 8), (3, 8)}
    assert {shape[1] for shape in model.shapes} == {24, 24 + 8}
    assert sum(shape[0] for shape in model.shapes if shape[1] == 32) == 2 * 3  # 3 passages, once


def test_passages_are_whole_and_inside_a_document():
    spans = cut(STORE, 19)
    assert spans == [(i, s, s + 19) for i, n in ((0, 3), (1, 3), (2, 2)) for s in (1, 20, 39)[:n]]
    assert cut(Memory([[1] * 10]), 8) == [(0, 1, 9)] and cut(Memory([[1] * 9]), 8) == []


def words(tokens):
    return " ".join("abcde"[t] * 3 for t in tokens)


@pytest.fixture
def retriever():
    store = Memory([[0] * 20, [0, 1] * 10, [2] * 20])
    spans = cut(store, 9)
    return Retriever(store, spans, Ranker([words(store.tokens(*s)) for s in spans]), words)


def test_the_best_passages_are_those_of_other_documents(retriever):
    spans, scores = retriever.best([0, 0], 3, {0})
    assert spans[:2] == [(1, 1, 10), (1, 10, 19)] or spans[:2] == [(1, 10, 19), (1, 1, 10)]
    assert spans[2][0] == 2 and scores[2] == 0 and scores[0] >= scores[1] > 0
    assert retriever.best([2], 2, set())[0] == [(2, 1, 10), (2, 10, 19)]


def test_too_few_passages(retriever):
    with pytest.raises(UserError, match="5 passages, but other documents have 4"):
        retriever.best([0], 5, {0})


def test_the_same_document_is_known_in_another_store():
    ours, theirs = Memory([[1, 2, 3], [1, 2]]), Memory([[9], [1, 2, 3], [1, 2, 4], [1, 2, 3]])
    assert same_documents(ours, theirs) == {0: {1, 3}, 1: set()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_tokens": 24}, "query_tokens=24 must be below"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"replug": [0]}, r"replug=\[0\]"),
        ({"passages": []}, r"passages=\[\]"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(UserError, match=message):
        replace(OWN, **change)

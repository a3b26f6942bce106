import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longctx.errors import UserError
from longctx.eval.perplexity import (
    Text,
    bucket_ends,
    bucket_gain,
    choose_documents,
    single_pass_buckets,
    sliding_new_tokens,
    sliding_windows,
    token_matched,
)
from tests.helpers.fakes import Memory, by_position, position_nll, unigram

P = [0.5, 0.3, 0.15, 0.05]


def random_documents(*lengths):
    rng = np.random.default_rng(0)
    return Memory([rng.integers(0, len(P), n) for n in lengths])


def rows(result, key="perplexity"):
    return [row[key] for row in result["rows"]]


def test_unigram_closed_form_and_count():
    """Acceptance 1: exp(mean of -log p) over every token but the first of each document."""
    store = random_documents(300, 517)
    text = Text(store, [0, 1], 256)
    seen = np.concatenate([d[1:] for d in store.documents])
    want = math.exp(-np.log(np.array(P))[seen].mean())
    result = sliding_new_tokens(unigram(P), text, [32, 64, 200], 8, None)
    assert rows(result) == pytest.approx([want] * 3, rel=1e-6)
    assert rows(result, "tokens") == [300 - 1 + 517 - 1] * 3


@given(tokens=st.integers(2, 300), window=st.integers(2, 80), stride=st.integers(1, 79))
def test_every_token_after_the_first_is_scored_once(tokens, window, stride):
    stride = min(stride, window - 1)
    plan = list(sliding_windows(0, tokens, window, stride))
    scored = [t for w in plan for t in range(w.first, w.stop)]
    assert scored == list(range(1, tokens))
    for w in plan:
        assert w.stop - w.start == min(window, tokens)
        assert w.start == 0 or w.first - w.start >= window - stride


def test_context_of_each_token_in_the_sliding_window():
    store = Memory([[0] * 20])
    result = sliding_new_tokens(by_position(), Text(store, [0], 64), [8], 3, None)
    # first window: tokens 1..7; then 3 new ones a window, seen from the 5th place; the last has 1
    places = [*range(1, 8)] + [5, 6, 7] * 4
    assert rows(result, "nll")[0] == pytest.approx(position_nll(np.array(places[:19])).mean())
    assert len(places) == 19


def test_a_document_within_the_window_equals_full_context():
    store = Memory([[0] * 50])
    text = Text(store, [0], 64)
    full = position_nll(np.arange(1, 50)).mean()
    result = sliding_new_tokens(by_position(), text, [50, 64, 1000], 8, None)
    assert rows(result, "nll") == pytest.approx([full] * 3)


def test_the_largest_stride_gives_disjoint_windows():
    """S = W - 1: windows share one token, whose only role is to be the first context."""
    plan = list(sliding_windows(0, 1 + 5 * 7, 8, 7))
    assert [(w.start, w.stop, w.first) for w in plan] == [
        (i * 7, i * 7 + 8, i * 7 + 1) for i in range(5)
    ]


def test_documents_are_cut():
    store = random_documents(500)
    result = sliding_new_tokens(unigram(P), Text(store, [0], 64), [32], 8, 100)
    assert rows(result, "tokens") == [99]
    result = sliding_new_tokens(unigram(P), Text(store, [0], 64), [32, 200], 8, 100)
    assert rows(result, "tokens") == [199, 199] and result["document_tokens"] == 200


def test_position_buckets():
    store = Memory([[0] * 120] * 3)
    result = single_pass_buckets(by_position(), Text(store, [0, 1, 2], 256), [32, 100])
    buckets = result["rows"][1]["buckets"]
    assert [(b["start"], b["end"]) for b in buckets] == [(1, 16), (16, 32), (32, 64), (64, 100)]
    for b in buckets:
        want = position_nll(np.arange(b["start"], b["end"])).mean()
        assert b["nll"] == pytest.approx(want, rel=1e-6)
        assert b["tokens"] == 3 * (b["end"] - b["start"])
    assert rows(result, "nll")[1] == pytest.approx(position_nll(np.arange(1, 100)).mean())
    assert rows(result, "bucket_gain") == [32, 100]


@pytest.mark.parametrize(
    ("length", "ends"), [(10, [10]), (16, [16]), (17, [16, 17]), (128, [16, 32, 64, 128])]
)
def test_bucket_ends(length, ends):
    assert bucket_ends(length) == ends


@pytest.mark.parametrize(
    ("nll", "se", "gain"),
    [
        ([4, 3, 2, 1], 0.1, 128),
        ([4, 3, 2.8, 2.6], 0.1, 32),  # 0.2 is less than two errors of a difference, 0.28
        ([4, 3, 3, 2], 0.1, 128),
        ([3, 3, 3, 3], 0.0, 0),
        ([1, 2, 3, 4], None, 0),
        ([4, 3, 2.5, 9], None, 64),
    ],
)
def test_bucket_gain(nll, se, gain):
    assert bucket_gain([16, 32, 64, 128], nll, [se] * 4) == gain


def test_token_matched_scores_the_same_tokens_at_every_length():
    store = random_documents(300, 200)
    text = Text(store, [0, 1], 256)
    result = token_matched(unigram(P), text, [16, 50, 150], 10, 4)
    assert len(set(rows(result, "nll"))) == 1
    assert result["windows"] == 8 and rows(result, "tokens") == [80] * 3


def test_token_matched_varies_only_the_context():
    store = Memory([[0] * 300])
    result = token_matched(by_position(), Text(store, [0], 256), [16, 50, 150], 10, 4)
    want = [position_nll(np.arange(n - 10, n)).mean() for n in (16, 50, 150)]
    assert rows(result, "nll") == pytest.approx(want, rel=1e-6)


def test_token_matched_targets_never_overlap():
    store = Memory([[0] * 125])
    result = token_matched(by_position(), Text(store, [0], 256), [100], 10, 50)
    assert result["windows"] == 3  # 25 places to spare, 10 tokens each


def test_short_documents_are_skipped_and_counted():
    store = random_documents(10, 100, 99, 200, 150)
    assert choose_documents(store, 100, None, "store") == ([1, 3, 4], 2)
    assert choose_documents(store, 100, 2, "store") == ([1, 4], 2)
    with pytest.raises(UserError, match=r"201 tokens.*longest document of here has 200"):
        choose_documents(store, 201, None, "here")

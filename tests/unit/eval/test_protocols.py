import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longctx.errors import UserError
from longctx.eval.journal import Journal
from longctx.eval.protocols import (
    Stream,
    Text,
    bucket_ends,
    bucket_gain,
    single_pass_buckets,
    sliding_new_tokens,
    sliding_windows,
    token_matched,
    whole_window,
)
from longctx.eval.scored_windows import Window, choose_documents, mean_over, score_windows
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


# --- whole windows --------------------------------------------------------------------------------


def test_unigram_closed_form_over_every_window():
    """Windows cross the border of documents, and the last partial one is dropped."""
    store = random_documents(100, 57)
    text = Text(store, [0, 1], 256)
    nll = -np.log(np.array(P))[np.concatenate(store.documents)]
    for width, stride in ((32, 8), (50, 50), (157, 8)):
        starts = range(0, 157 - width + 1, stride)
        want = np.mean([nll[s + 1 : s + width].mean() for s in starts])
        [row] = whole_window(unigram(P), text, [width], stride, None)["rows"]
        assert row["perplexity"] == pytest.approx(math.exp(want), rel=1e-6)
        assert row["windows"] == len(starts) and row["tokens"] == len(starts) * (width - 1)


def test_one_window_over_one_document_is_full_context():
    """All protocols agree where there is a single window: N - 1 tokens, each with all before it."""
    store = Memory([[0] * 50])
    text, model = Text(store, [0], 64), by_position()
    [whole] = whole_window(model, text, [50], 8, None)["rows"]
    [single] = single_pass_buckets(model, text, [50])["rows"]
    [sliding] = sliding_new_tokens(model, text, [50], 8, None)["rows"]
    assert whole["tokens"] == single["tokens"] == sliding["tokens"] == 49
    assert whole["nll"] == single["nll"] == sliding["nll"]
    assert whole["nll"] == pytest.approx(position_nll(np.arange(1, 50)).mean())


def test_it_lies_above_the_sliding_window_at_equal_width():
    """Each window counts its early, poor tokens again."""
    store = Memory([[0] * 200])
    text, model = Text(store, [0], 64), by_position()
    [whole] = whole_window(model, text, [40], 4, None)["rows"]
    [sliding] = sliding_new_tokens(model, text, [40], 4, None)["rows"]
    assert whole["nll"] == pytest.approx(position_nll(np.arange(1, 40)).mean())
    assert whole["nll"] > sliding["nll"] + 0.01


def test_documents_are_cut_and_errors_are_over_documents():
    store = random_documents(100, 90, 80)
    [row] = whole_window(unigram(P), Text(store, [0, 2], 64), [20], 10, 60)["rows"]
    assert row["windows"] == (60 + 60 - 20) // 10 + 1 and row["clusters"] == 2
    result = whole_window(unigram(P), Text(store, [0, 2], 64), [20, 70], 10, 60)
    assert result["document_tokens"] == 70 and result["stride"] == 10


def test_a_number_a_window_is_kept_and_the_result_is_that_of_all_tokens(tmp_path):
    store, model = Memory([[0] * 100, [0] * 90]), by_position()
    journal = Journal(tmp_path)
    journal.begin("whole")
    text = Text(store, [0, 1], 64, journal)
    [row] = whole_window(model, text, [20], 10, None)["rows"]
    kept = [json.loads(line)[2] for line in (tmp_path / "whole.0.jsonl").read_text().splitlines()]
    assert [len(sums) for sums in kept] == [3, 3, 3, 3, 3, 3]  # 64 tokens a batch, 18 windows
    assert all(type(total) is float for sums in kept for total in sums)
    stream = Stream(store, [0, 1], [100, 90])
    plan = [Window(0, start, start + 20, start + 1) for start in range(0, 171, 10)]
    nlls = score_windows(model, stream, plan, 64, "all")
    owned = [replace(w, document=int(w.start >= 100)) for w in plan]
    assert {"length": 20, "windows": 18, **mean_over(owned, nlls).row()} == row


def test_the_stream_reads_across_borders():
    store = Memory([[1, 2, 3, 4], [5, 6, 7], [8, 9]])
    stream = Stream(store, [0, 2, 1], [3, 2, 3])
    want = [1, 2, 3, 8, 9, 5, 6, 7]
    assert stream.tokens(0).tolist() == want and stream.lengths.tolist() == [8]
    for a in range(8):
        for b in range(a + 1, 9):
            assert stream.tokens(0, a, b).tolist() == want[a:b]

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from longctx.eval.journal import Journal
from longctx.eval.perplexity import Text, single_pass_buckets, sliding_new_tokens
from longctx.eval.whole_window import Stream, whole_window
from longctx.eval.windows import Window, mean_over, score_windows
from tests.helpers.fakes import Memory, by_position, position_nll, unigram

P = [0.5, 0.3, 0.15, 0.05]


def random_documents(*lengths):
    rng = np.random.default_rng(0)
    return Memory([rng.integers(0, len(P), n) for n in lengths])


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

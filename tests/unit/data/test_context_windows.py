"""Windows as fields of a batch."""

import numpy as np
import pytest
import torch

from longctx.batch import IGNORE
from longctx.data.context_windows import WindowRows, in_documents, in_stream, warm_up
from longctx.data.corpus import Corpus
from longctx.data.loader import RowLoader
from longctx.errors import UserError
from tests.helpers.numbered import Numbered, stores


def test_a_window_is_chunks_of_context_and_decoder_tokens():
    corpus = Corpus([Numbered([5, 17])])
    rows = WindowRows(corpus, in_documents(corpus.lengths, 8, 4), chunk=2)
    assert len(rows) == 2
    row = rows.row(1)  # the second document begins with token 5; 4 further on
    assert row["contexts"].tolist() == [[9, 10], [11, 12], [13, 14], [15, 16]]
    assert set(row) == {"contexts", "tokens", "labels", "positions"}
    assert row["tokens"].tolist() == [17, 18, 19, 20]
    assert row["labels"].tolist() == [18, 19, 20, 21]  # the document goes on: 21 is its last token
    assert row["positions"].tolist() == [0, 1, 2, 3]


def test_the_last_label_of_a_document_is_not_scored():
    corpus = Corpus([Numbered([12])])
    row = WindowRows(corpus, in_documents(corpus.lengths, 8, 4), chunk=8).row(0)
    assert row["labels"].tolist() == [9, 10, 11, IGNORE]


def test_a_stream_window_runs_over_borders_and_stores():
    corpus = Corpus(stores([3, 4], [5]))
    plan = in_stream(corpus.lengths, 4, 4, seed=0)
    rows = WindowRows(corpus, plan, chunk=4)
    order = np.random.Generator(np.random.Philox(0)).permutation(3)
    texts = [range(3), range(3, 7), range(7, 12)]
    stream = [t for d in order for t in texts[d]]
    for number in range(len(rows)):
        row = rows.row(number)
        at = number * 4
        assert row["contexts"].tolist() == [stream[at : at + 4]]
        assert row["tokens"].tolist() == stream[at + 4 : at + 8]
        assert row["labels"][:-1].tolist() == row["tokens"][1:].tolist()
    assert len(rows) == 2


def test_warm_up_shows_the_encoder_what_the_decoder_reads():
    corpus = Corpus([Numbered([13])])
    rows = WindowRows(corpus, warm_up(in_documents(corpus.lengths, 0, 4)), chunk=2)
    for number in range(len(rows)):
        row = rows.row(number)
        assert row["contexts"].reshape(-1).tolist() == row["tokens"].tolist()
        assert row["tokens"].tolist() == list(range(4 * number, 4 * number + 4))
    assert len(rows) == 3
    assert rows.row(2)["labels"].tolist() == [9, 10, 11, 12]


@pytest.mark.parametrize("chunk", [3, 0, -2])
def test_context_must_be_whole_chunks(chunk):
    corpus = Corpus([Numbered([30])])
    with pytest.raises(UserError, match=f"8 context tokens cannot be cut into chunks of {chunk}$"):
        WindowRows(corpus, in_documents(corpus.lengths, 8, 4), chunk)


def test_long_documents_and_the_stream_are_mixed_two_to_one():
    corpus = Corpus([Numbered([40, 5, 60, 9, 14])])
    kinds = [in_documents(corpus.lengths, 16, 8), in_stream(corpus.lengths, 16, 8, seed=1)]
    data = RowLoader(
        [WindowRows(corpus, kind, chunk=4) for kind in kinds],
        [2, 1],
        batch_rows=6,
        micro_batch_rows=3,
        seed=0,
        identity={},
    )
    (first, second) = data.step(5, 0, 1)
    assert first.contexts.shape == (3, 4, 4) and first.context_mask is None
    assert first.tokens.shape == first.labels.shape == first.positions.shape == (3, 8)
    drawn = [data.place(n)[0] for n in range(30)]
    assert drawn.count(0) == 20
    assert not torch.equal(first.tokens, second.tokens)
    assert data.describe(12)[0].startswith(
        "data: 8 windows of 4 x 4 context + 8 decoder tokens; 66.7% of the rows; 1 epochs"
    )

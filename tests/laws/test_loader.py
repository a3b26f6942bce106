"""Laws of the loader: an epoch has every token once, no matter how many ranks or where it began."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.batch import IGNORE
from longctx.data.loader import Prefetch
from longctx.data.pack import PACKERS
from tests.helpers.numbered import loader

LENGTHS = st.lists(st.integers(2, 60), min_size=1, max_size=30)
MIXED = ([30, 7, 22, 15, 41], [9, 16, 3, 28, 60], [25, 25])
KINDS = {
    "concat": {"packing": "concat", "mask": False},
    "best_fit": {"packing": "best_fit"},
    "mixed": {"weights": [2, 1, 0.5]},
    "upsampled": {"long_tokens": 20, "short_keep": 0.5},
}


def order(data, step, dp, micro):
    """The rows of a step in global order, put together again from what the ranks got."""
    dealt = [data.step(step, rank, dp) for rank in range(dp)]
    passes = len(dealt[0])
    assert all(b.tokens.shape[0] == micro for rank in dealt for b in rank)
    return torch.cat([dealt[rank][p].tokens for p in range(passes) for rank in range(dp)])


@pytest.mark.parametrize("kind", KINDS)
def test_global_order_does_not_depend_on_ranks_or_accumulation(kind):
    whole = loader(*MIXED, rows=48, micro=48, **KINDS[kind])
    for dp, micro in [(1, 1), (2, 1), (3, 2), (8, 1), (8, 6), (3, 16)]:
        cut = loader(*MIXED, rows=48, micro=micro, **KINDS[kind])
        for step in (0, 1, 7, 10**6):
            expected = whole.step(step, 0, 1)[0].tokens
            assert torch.equal(order(cut, step, dp, micro), expected)


@pytest.mark.parametrize("kind", KINDS)
@given(begin=st.integers(0, 40), ahead=st.integers(0, 3))
@settings(max_examples=15, deadline=None)
def test_resuming_at_any_step_equals_running_through(kind, begin, ahead):
    through = loader(*MIXED, rows=3, **KINDS[kind])
    for step in range(begin):
        through.step(step, 0, 1)
    resumed = Prefetch(loader(*MIXED, rows=3, **KINDS[kind]), ahead, end=begin + 5)
    for step in range(begin, begin + 5):
        for a, b in zip(through.step(step, 0, 1), resumed.step(step, 0, 1), strict=True):
            assert a.tensors().keys() == b.tensors().keys()
            assert all(torch.equal(x, b.tensors()[f]) for f, x in a.tensors().items())
    resumed.close()


@given(lengths=LENGTHS, packing=st.sampled_from(sorted(PACKERS)), row=st.integers(2, 20))
@settings(max_examples=50, deadline=None)
def test_an_epoch_reads_every_token_once(lengths, packing, row):
    if sum(lengths) < row:
        return
    data = loader(lengths, packing=packing, seq_len=row)
    for epoch in range(2):
        size = len(data.sources[0])
        seen = []
        for sample in range(epoch * size, (epoch + 1) * size):
            batch = data.batch([sample])
            length = sum(n for _, _, n in data.sources[0].rows.pieces(data.place(sample)[1]))
            seen += batch.tokens[0, :length].tolist()
            assert not batch.tokens[0, length:].any()
            assert (batch.labels[0, length:] == IGNORE).all()
        assert sorted(seen) == list(range(sum(lengths)))


def test_an_epoch_holds_each_row_once_and_the_next_is_shuffled_anew():
    data = loader([16] * 12)
    first, second = ([data.place(e * 12 + i) for i in range(12)] for e in (0, 1))
    assert sorted(first) == sorted(second) == [(0, row) for row in range(12)]
    assert first != second


@given(lengths=LENGTHS, packing=st.sampled_from(sorted(PACKERS)))
@settings(max_examples=40, deadline=None)
def test_masked_rows_score_every_token_but_the_first_of_each_document(lengths, packing):
    data = loader(lengths, packing=packing, seq_len=2, rows=1)
    total = sum(lengths)
    scored = []
    for sample in range(len(data.sources[0])):
        batch = data.batch([sample])
        live = batch.labels != IGNORE
        assert torch.equal(batch.labels[live], batch.tokens[live] + 1)  # the next of the same text
        scored += batch.labels[live].tolist()
    firsts = set(np.cumsum([0, *lengths[:-1]]).tolist())
    assert sorted(scored) == sorted(set(range(total)) - firsts)


@given(lengths=LENGTHS)
@settings(max_examples=40, deadline=None)
def test_a_masked_document_never_sees_another(lengths):
    """Where positions do not restart, the text goes on."""
    data = loader(lengths, packing="concat", seq_len=2)
    starts = np.cumsum([0, *lengths])
    for sample in range(len(data.sources[0])):
        batch = data.batch([sample])
        tokens, positions = batch.tokens[0].numpy(), batch.positions[0].numpy()
        documents = np.searchsorted(starts, tokens, side="right")
        goes_on = np.flatnonzero(positions[1:] > 0)
        assert (documents[goes_on + 1] == documents[goes_on]).all()
        assert (tokens[goes_on + 1] == tokens[goes_on] + 1).all()


@given(weights=st.lists(st.sampled_from([0.1, 0.25, 1, 2, 5]), min_size=3, max_size=3))
@settings(max_examples=20, deadline=None)
def test_weights_decide_how_often_each_store_comes(weights):
    data = loader(*MIXED, seq_len=8, weights=weights)
    ends = np.cumsum([sum(n) for n in MIXED])
    counts = np.zeros(3)
    for sample in range(120):
        source, row = data.place(sample)
        tokens = data.batch([sample]).tokens
        first = int(data.sources[source].row(row)["tokens"][0])
        assert int(tokens[0, 0]) == first
        assert np.searchsorted(ends, first, side="right") == source
        counts[source] += 1
    shares = np.array(weights) / sum(weights)
    assert (np.abs(counts - 120 * shares) <= 0.5 + 1.5 * shares).all()


@pytest.mark.parametrize("weights", [[1, 1], [3, 1]])
def test_each_source_has_epochs_of_its_own(weights):
    data = loader([16] * 5, [16] * 9, weights=weights)
    drawn = {0: [], 1: []}
    for sample in range(200):
        source, row = data.place(sample)
        drawn[source].append(row)
    for source, size in ((0, 5), (1, 9)):
        for at in range(0, len(drawn[source]) - size, size):
            assert sorted(drawn[source][at : at + size]) == list(range(size))


def test_up_sampling_leaves_out_short_documents_only():
    lengths = [30] * 4 + [5] * 40
    data = loader(lengths, seq_len=8, long_tokens=20, short_keep=0.25)
    starts = np.cumsum([0, *lengths])
    seen = {
        int(np.searchsorted(starts, t, side="right")) - 1
        for n in range(len(data.sources[0]))
        for t in data.batch([n]).tokens[data.batch([n]).labels != IGNORE].tolist()
    }
    assert set(range(4)) <= seen
    assert 2 <= len(seen) - 4 <= 20

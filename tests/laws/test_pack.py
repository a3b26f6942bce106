"""Laws of packing and loading: nothing lost, nothing twice, no matter how many ranks."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.batch import IGNORE
from longctx.data.loader import PackedLoader
from longctx.data.pack import PACKERS, best_fit, concat

LENGTHS = st.lists(st.integers(2, 60), min_size=1, max_size=30)


class FakeStore:
    """Documents in memory, with the interface of `Store` that a loader uses."""

    def __init__(self, lengths):
        ends = np.cumsum(lengths)
        self.texts = [np.arange(e - n, e) for n, e in zip(lengths, ends, strict=True)]
        self.lengths = np.array(lengths, dtype=np.int64)
        self.meta = {"digest": str(lengths)}

    def tokens(self, document, start=0, stop=None):
        return self.texts[document][start:stop]


def loader(lengths, *, seq_len=16, packing="best_fit", mask=True, rows=4, micro=1, seed=3):
    """A loader over numbered tokens: token `n` of the corpus is the number `n`."""
    return PackedLoader(
        [FakeStore(lengths)],
        seq_len=seq_len,
        packing=packing,
        mask_documents=mask,
        batch_rows=rows,
        micro_batch_rows=micro,
        seed=seed,
    )


@pytest.mark.parametrize("packer", PACKERS.values(), ids=PACKERS)
@given(lengths=LENGTHS, row=st.integers(4, 40), seed=st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_every_token_is_placed_once(packer, lengths, row, seed):
    rows = packer(np.array(lengths), row, seed)
    seen = []
    for r in range(len(rows)):
        pieces = rows.pieces(r)
        assert 0 < sum(n for _, _, n in pieces) <= row
        seen += [(d, s + i) for d, s, n in pieces for i in range(n)]
    assert sorted(seen) == [(d, i) for d, n in enumerate(lengths) for i in range(n)]


@given(lengths=LENGTHS, row=st.integers(4, 40))
@settings(max_examples=60, deadline=None)
def test_best_fit_cuts_only_what_is_longer_than_a_row(lengths, row):
    rows = best_fit(np.array(lengths), row, 0)
    for document, start, length in (p for r in range(len(rows)) for p in rows.pieces(r)):
        if lengths[document] <= row:
            assert (start, length) == (0, lengths[document])
        else:
            assert start % row == 0


def test_best_fit_fills_the_fullest_row():
    rows = best_fit(np.array([6, 5, 4, 3, 2]), 10, 0)
    filled = sorted(sorted(n for _, _, n in rows.pieces(r)) for r in range(len(rows)))
    assert filled == [[2, 3, 5], [4, 6]]


@given(lengths=LENGTHS, row=st.integers(4, 40))
@settings(max_examples=30, deadline=None)
def test_concat_fills_every_row_but_the_last(lengths, row):
    rows = concat(np.array(lengths), row, 1)
    sizes = [sum(n for _, _, n in rows.pieces(r)) for r in range(len(rows))]
    assert sizes[:-1] == [row] * (len(sizes) - 1)


@pytest.mark.parametrize("packing", PACKERS)
def test_global_order_does_not_depend_on_ranks_or_accumulation(packing):
    lengths = [30, 7, 22, 15, 41, 9, 16, 3, 28]
    whole = loader(lengths, packing=packing, micro=4)
    for dp, micro in [(1, 1), (2, 1), (2, 2), (4, 1)]:
        cut = loader(lengths, packing=packing, micro=micro)
        for step in (0, 1, 7, 1000):
            dealt = [b.tokens for r in range(dp) for b in cut.step(step, r, dp)]
            expected = whole.step(step, 0, 1)[0].tokens
            assert sorted(torch.cat(dealt).tolist()) == sorted(expected.tolist())


def test_an_epoch_holds_each_row_once_and_the_next_is_shuffled_anew():
    data = loader([16] * 12)
    first, second = ([data.row_number(e * 12 + i) for i in range(12)] for e in (0, 1))
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second


@given(lengths=LENGTHS, packing=st.sampled_from(sorted(PACKERS)))
@settings(max_examples=40, deadline=None)
def test_masked_rows_score_every_token_but_the_first_of_each_document(lengths, packing):
    data = loader(lengths, packing=packing, seq_len=2, rows=1)
    total = sum(lengths)
    scored = []
    for sample in range(len(data)):
        batch = data.batch([sample])
        live = batch.labels != IGNORE
        assert torch.equal(batch.labels[live], batch.tokens[live] + 1)  # the next of the same text
        scored += batch.labels[live].tolist()
    firsts = set(np.cumsum([0, *lengths[:-1]]).tolist())
    assert sorted(scored) == sorted(set(range(total)) - firsts)


def test_positions_restart_at_documents_and_in_the_padding():
    data = loader([5, 4, 12], seq_len=12, rows=1)
    batch = next(b for b in map(data.batch, ([0], [1])) if int(b.positions.max()) < 11)
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2]]
    assert batch.labels[0, 9:].tolist() == [IGNORE] * 3


def test_unmasked_rows_are_one_stream():
    batch = loader([5, 4, 3], seq_len=12, rows=1, mask=False, packing="concat").batch([0])
    assert batch.positions.tolist() == [list(range(12))]
    assert batch.labels[0, :-1].tolist() == batch.tokens[0, 1:].tolist()
    assert int(batch.labels[0, -1]) == IGNORE


def test_the_digest_follows_what_decides_the_order():
    same, other = loader([9, 9]).digest, loader([9, 9], seed=4).digest
    assert same == loader([9, 9], rows=2).digest
    assert same != other

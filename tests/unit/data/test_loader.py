"""Rows as the loader builds them, what it says of itself, and what it refuses."""

import re

import pytest
import torch

from longctx.batch import IGNORE
from longctx.errors import UserError
from tests.helpers.numbered import loader


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


def test_several_stores_are_one_corpus_or_a_source_each():
    together = loader([9, 9], [9, 9], seq_len=36, packing="concat")
    assert sorted(together.batch([0]).tokens[0].tolist()) == list(range(36))
    apart = loader([9, 9], [9, 9], seq_len=18, packing="concat", weights=[1, 1])
    assert [sorted(apart.batch([n]).tokens[0].tolist()) for n in (0, 1)] == [
        list(range(18)),
        list(range(18, 36)),
    ]


def test_the_order_of_a_single_source_is_the_one_it_always_was():
    """Checkpoints made before there were mixtures go on with the same rows."""
    data = loader([16] * 8, seed=3)
    assert [data.place(n)[1] for n in range(16)] == [
        *[1, 0, 2, 5, 4, 3, 7, 6],
        *[7, 1, 0, 6, 2, 3, 5, 4],
    ]


def test_two_sources_of_one_size_have_orders_of_their_own():
    data = loader([16] * 30, [16] * 30, weights=[1, 1])
    orders = [[data.place(2 * n + source)[1] for n in range(30)] for source in (0, 1)]
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1]


@pytest.mark.parametrize(
    ("other", "differs"),
    [
        ({}, set()),
        ({"rows": 2, "micro": 2, "prefetch": 3}, set()),
        ({"seed": 4}, {"seed"}),
        ({"packing": "concat"}, {"data.packing"}),
        ({"seq_len": 8}, {"data.seq_len"}),
        ({"mask": False}, {"data.mask_documents"}),
        ({"weights": [1.0, 2.0]}, {"data.weights"}),
        ({"long_tokens": 5}, {"data.long_tokens", "data.short_keep"}),
        ({"short_keep": 0.3}, set()),  # nobody reads it without long_tokens
    ],
)
def test_the_identity_names_what_decides_the_rows(other, differs):
    same, changed = loader([90], [99]).identity, loader([90], [99], **other).identity
    assert {k for k in same | changed if same.get(k) != changed.get(k)} == differs


def test_the_identity_follows_the_content_and_place_of_stores():
    same, changed, swapped = (
        loader(*x).identity for x in (([90], [99]), ([90], [98]), ([99], [90]))
    )
    assert {k for k in same if same[k] != changed[k]} == {"data.store[1]"}
    assert {k for k in same if same[k] != swapped[k]} == {"data.store[0]", "data.store[1]"}


def test_what_a_run_reads_is_said_with_its_repetition():
    data = loader([30] * 10, [5] * 40, seq_len=10, weights=[3, 1], packing="concat")
    lines = data.describe(samples=400)
    assert lines == [
        "data: data.store[0]: 10 documents, 300 tokens in 30 rows of 10 (concat, padding 0.00%, "
        "10 documents cut); 75.0% of the rows; 10 epochs",
        "warning: that is 10 times the same text; beyond 4 epochs repetition helps little",
        "data: data.store[1]: 40 documents, 200 tokens in 20 rows of 10 (concat, padding 0.00%, "
        "0 documents cut); 25.0% of the rows; 5 epochs",
        "warning: that is 5 times the same text; beyond 4 epochs repetition helps little",
    ]
    assert len(data.describe(samples=40)) == 2


def test_up_sampling_says_what_it_changed():
    data = loader([30] * 2 + [3] * 40, seq_len=10, long_tokens=20, short_keep=0.0)
    assert "2 documents, tokens in long documents 33% -> 100%, 60 tokens" in data.describe(1)[0]


@pytest.mark.parametrize(
    ("lengths", "more", "line"),
    [
        ([[9]], {}, "data.store holds 9 tokens, less than one row of data.seq_len=16"),
        ([[]], {}, "data.store holds 0 tokens, less"),
        ([[90], [9]], {"weights": [1, 1]}, "data.store[1] holds 9 tokens, less"),
        (
            [[9, 9, 9]],
            {"long_tokens": 10, "short_keep": 0.0},
            "data.store holds 0 tokens after data.short_keep, less",
        ),
    ],
)
def test_less_than_a_row_is_refused(lengths, more, line):
    with pytest.raises(UserError, match=re.escape(line)):
        loader(*lengths, **more)


def test_batches_share_no_memory_with_each_other():
    data = loader([40], packing="concat", seq_len=8, rows=1)
    first = data.batch([0]).tokens
    kept = first.clone()
    data.batch([0]).tokens.zero_()
    assert torch.equal(first, kept)

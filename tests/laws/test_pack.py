"""Laws of packing: nothing lost, nothing twice, and best fit is what it says."""

from bisect import bisect_left, insort

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from longctx.data.corpus import Rows
from longctx.data.pack import PACKERS, best_fit, concat, describe

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=30)


def fillings(rows: Rows) -> list[list[tuple[int, int, int]]]:
    return [rows.pieces(r) for r in range(len(rows))]


@pytest.mark.parametrize("packer", PACKERS.values(), ids=PACKERS)
@given(lengths=LENGTHS, row=st.integers(1, 40), seed=st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_every_token_is_placed_once(packer, lengths, row, seed):
    rows = packer(np.array(lengths), row, seed)
    seen = []
    for pieces in fillings(rows):
        assert pieces and all(n > 0 for _, _, n in pieces)
        assert sum(n for _, _, n in pieces) <= row
        seen += [(d, s + i) for d, s, n in pieces for i in range(n)]
    assert sorted(seen) == [(d, i) for d, n in enumerate(lengths) for i in range(n)]
    facts = describe(rows, np.array(lengths), row)
    assert facts["tokens_in"] == facts["tokens_out"] == sum(lengths)
    assert facts["padding"] == pytest.approx(1 - sum(lengths) / (len(rows) * row))


@given(lengths=LENGTHS, row=st.integers(4, 40))
@settings(max_examples=60, deadline=None)
def test_best_fit_cuts_only_what_is_longer_than_a_row(lengths, row):
    rows = best_fit(np.array(lengths), row, 0)
    for document, start, length in (p for pieces in fillings(rows) for p in pieces):
        if lengths[document] <= row:
            assert (start, length) == (0, lengths[document])
        else:
            assert start % row == 0
    facts = describe(rows, np.array(lengths), row)
    assert facts["cut_needlessly"] == 0
    assert facts["cut"] == sum(n > row for n in lengths)


def one_by_one(lengths: np.ndarray, row: int, seed: int) -> list[list[tuple[int, int, int]]]:
    """Best fit as its definition says: a piece at a time into the fullest row with room for it."""
    pieces = [
        (d, at, min(row, int(n) - at))
        for d, n in enumerate(lengths)
        for at in range(0, int(n), row)
    ]
    tie = np.random.Generator(np.random.Philox(seed)).permutation(len(pieces))
    rooms: list[int] = []
    opened: dict[int, list[int]] = {}
    filled: list[list[tuple[int, int, int]]] = []
    for i in sorted(range(len(pieces)), key=lambda i: (-pieces[i][2], tie[i])):
        need = pieces[i][2]
        at = bisect_left(rooms, need)
        if at == len(rooms):
            filled.append([])
            target, room = len(filled) - 1, row
        else:
            room = rooms.pop(at)
            target = opened[room].pop()
        filled[target].append(pieces[i])
        if left := room - need:
            insort(rooms, left)
            opened.setdefault(left, []).append(target)
    return filled


@given(
    lengths=st.lists(st.integers(1, 90), max_size=150) | st.lists(st.integers(1, 9), max_size=150),
    row=st.integers(1, 64),
    seed=st.integers(0, 5),
)
@example(lengths=[3] * 7 + [2] * 9 + [1] * 5, row=10, seed=0)  # rows that fill up only in part
@settings(max_examples=200, deadline=None)
def test_best_fit_equals_placing_piece_by_piece(lengths, row, seed):
    found = fillings(best_fit(np.array(lengths, dtype=np.int64), row, seed))
    assert found == one_by_one(np.array(lengths, dtype=np.int64), row, seed)


def test_best_fit_fills_the_fullest_row():
    rows = best_fit(np.array([6, 5, 4, 3, 2]), 10, 0)
    filled = sorted(sorted(n for _, _, n in pieces) for pieces in fillings(rows))
    assert filled == [[2, 3, 5], [4, 6]]


@given(lengths=LENGTHS, row=st.integers(1, 40), seed=st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_concat_is_the_joined_documents_cut(lengths, row, seed):
    filled = fillings(concat(np.array(lengths), row, seed))
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(lengths))
    joined = [(d, i) for d in order for i in range(lengths[d])]
    rows = [[(d, s + i) for d, s, n in pieces for i in range(n)] for pieces in filled]
    assert rows == [joined[at : at + row] for at in range(0, len(joined), row)]


def test_ten_thousand_documents_in_little_padding():
    lengths = np.random.default_rng(0).lognormal(6, 1.2, 10_000).astype(np.int64) + 2
    for row in (2048, 8192, 131072):
        facts = describe(best_fit(lengths, row, 0), lengths, row)
        most = 1 / facts["rows"]  # the last row may be empty but for a token
        assert facts["padding"] < 0.005 + most

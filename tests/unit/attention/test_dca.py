"""Dual Chunk Attention: the paper's indices, both presets, and what the merge must not lose."""

import itertools

import pytest
import torch

from longctx.attention.dca import DualChunk
from longctx.attention.full import Full
from longctx.attention.ops import merge, oracle
from longctx.errors import UserError
from tests.helpers.methods import INV_FREQ, POSITIONS, B, S, call, inputs

GOLDEN = {  # s = 6, c = 10, w = 4: the relative positions of some rows, 2402.17463 figure 2
    9: [9, 8, 7, 6, 5, 4, 3, 2, 1, 0],
    11: [9, 8, 7, 6, 5, 4, 5, 4, 3, 2, 1, 0],
    12: [9, 8, 7, 6, 5, 4, 6, 5, 4, 3, 2, 1, 0],
    15: [9, 8, 7, 6, 5, 4, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0],
    17: [9, 8, 7, 6, 5, 4, 9, 8, 7, 6, 5, 4, 5, 4, 3, 2, 1, 0],
}


def distances(method, length):
    i, j = torch.arange(length)[:, None], torch.arange(length)[None]
    live, distance = method.definition(i, j, 0, torch.arange(1))
    return live, distance


@pytest.mark.parametrize("row", GOLDEN)
def test_rows_of_the_paper(row):
    _, distance = distances(DualChunk(6, 4, 10), 18)
    assert distance[row, : row + 1].tolist() == GOLDEN[row]


@pytest.mark.parametrize(("s", "w", "c"), [(6, 4, 10), (6, 2, 11), (12, 4, 16), (3, 1, 4)])
def test_distances_stay_trained_and_near_ones_stay_exact(s, w, c):
    live, distance = distances(DualChunk(s, w, c), 5 * s)
    i, j = torch.arange(5 * s)[:, None], torch.arange(5 * s)[None]
    assert int(live.sum()) == 5 * s * (5 * s + 1) // 2
    assert int(distance[live].min()) == 0 and int(distance[live].max()) == c - 1
    near = live & (i - j <= w)
    assert (distance[near] == (i - j)[near]).all()
    older = live & (i // s - j // s > 1)
    assert int(distance[older].min()) >= c - s


@pytest.mark.parametrize(("length", "s", "c", "w"), [(4096, 3072, 4096, 1024), (256, 192, 256, 64)])
def test_preset_of_the_paper(length, s, c, w):
    assert DualChunk().for_window(length) == DualChunk(s, w, c)


@pytest.mark.parametrize(
    ("length", "local", "s", "c"),
    [(4096, None, 2560, 3073), (4096, 1024, 2048, 3073), (8192, None, 5120, 6145),
     (32768, None, 20480, 24577)],
)  # fmt: skip
def test_preset_of_the_reference_code(length, local, s, c):
    """The code's (C, local): s = C - local, its largest distance C is our c - 1."""
    chosen = DualChunk(local_window=local, preset="reference_code").for_window(length)
    assert (chosen.chunk_len, chosen.max_positions) == (s, c)
    assert chosen.local_window == (local or length // 8) == c - 1 - s


def test_within_a_chunk_it_is_ordinary_attention():
    q, k, v = inputs(4, 2)
    ours = call(DualChunk(S, 3, S + 9), q, k, v, POSITIONS["one document"])
    plain = call(Full(), q, k, v, POSITIONS["one document"])
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-14)


def test_every_key_is_scored_once():
    for m, n, first in itertools.product((1, 5, 20), (20, 33), (0, 4)):
        seen = torch.zeros(n, n)
        for block in DualChunk(6, 4, 10)._blocks(m, n, first):
            for part in block.parts:
                rows = torch.arange(block.start, block.stop) + n - m
                for row in rows.tolist():
                    stop = row + 1 if part.causal else part.stop
                    seen[row, part.start : stop] += 1
        assert torch.equal(seen[n - m :], torch.ones(n, n).tril()[n - m :])


def test_frozen_merge_weights_would_be_noticed(monkeypatch):
    """The public code detaches the weights of the merge: each part then has its own sum."""
    q, k, v = (x.requires_grad_() for x in inputs(4, 2))
    method, positions = DualChunk(6, 4, 10), POSITIONS["one document"]
    weight = torch.randn(B, S, 4, 8, generator=torch.Generator().manual_seed(0)).double()
    right = torch.autograd.grad((call(method, q, k, v, positions) * weight).sum(), q)[0]
    exact = merge.flash_backward

    def frozen(q, k, v, grad, o, lse, causal, scaling):
        own, own_lse = merge.flash(q, k, v, causal, scaling)
        share = (own_lse - lse).exp()[..., None]
        return exact(q, k, v, grad * share, own, own_lse, causal, scaling)

    monkeypatch.setattr(merge, "flash_backward", frozen)
    wrong = torch.autograd.grad((call(method, q, k, v, positions) * weight).sum(), q)[0]
    assert float((wrong - right).norm() / right.norm()) > 0.05


def test_the_length_temperature_scales_scores_beyond_c_only():
    q, k, v = inputs(4, 2)
    positions = POSITIONS["one document"]
    plain = call(DualChunk(6, 4, 10), q, k, v, positions)
    warm = call(DualChunk(6, 4, 10, length_temperature=0.1), q, k, v, positions)
    torch.testing.assert_close(warm[:, :10], plain[:, :10], rtol=0, atol=1e-14)
    factor = (0.1 * (torch.arange(1, S + 1).double() / 10).clamp(min=1).log() + 1) ** 2
    scaled = call(DualChunk(6, 4, 10), q * factor[:, None], k, v, positions)
    torch.testing.assert_close(warm, scaled, rtol=0, atol=1e-13)


def test_interpolated_positions_compose():
    """PI divides every index by its factor, which is dividing the frequencies."""
    q, k, v = inputs(4, 2)
    method = DualChunk(6, 4, 10)
    positions = POSITIONS["one document"]
    live, distance = distances(method, S)
    angles = (distance / 4.0)[None, None, :, :, None] * INV_FREQ
    keys, values = (x.repeat_interleave(2, dim=1) for x in (k, v))
    scores = (oracle.rotate(q[:, :, :, None], angles) * keys[:, :, None]).sum(-1) * 8**-0.5
    want = scores.masked_fill(~live, -torch.inf).softmax(-1) @ values
    got = oracle.attend(method.definition, q, k, v, positions, inv_freq=INV_FREQ / 4)
    torch.testing.assert_close(got, want.transpose(1, 2), rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("numbers", "says"),
    [
        ({"chunk_len": 0}, "attention.chunk_len=0 must be at least 1"),
        ({"local_window": 0}, "attention.local_window=0 must be at least 1"),
        ({"chunk_len": 256}, "chunk_len=256 must be below attention.max_positions=256"),
        ({"chunk_len": 200, "local_window": 60}, "reach beyond attention.max_positions=256"),
        ({"max_positions": 300}, "max_positions=300 is beyond the model's window of 256 tokens"),
        ({"preset": "mine"}, "preset='mine' is not one of paper, reference_code"),
        ({"parts": "succ"}, "parts='succ' is not one of intra, intra"),
        ({"length_temperature": -1.0}, "length_temperature=-1.0 must be 0 or above"),
    ],
)
def test_numbers_that_do_not_fit(numbers, says):
    with pytest.raises(UserError, match=says):
        DualChunk(**numbers).for_window(256)

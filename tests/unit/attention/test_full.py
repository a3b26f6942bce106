"""Full attention against its definition in float64: forward, gradient, packed, padded, cached."""

import itertools

import pytest
import torch
from torch import nn

from longctx.attention.full import Full
from longctx.attention.ops import causal, oracle
from longctx.errors import UserError

FULL = Full()
B, S, D = 3, 24, 8
HEADS = [(4, 4), (4, 2), (4, 1)]


def inputs(heads, kv_heads, dtype=torch.float64, rows=B, length=S, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, h, length, D) for h in (heads, kv_heads, kv_heads)]
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]


def packed(*rows):
    return torch.tensor([[p for n in row for p in range(n)] for row in rows])


def call(q, k, v, positions, mask=None, **rest):
    return FULL.attend(nn.Module(), q, k, v, mask, position_ids=positions, **rest)[0]


def compare(tensors, positions, mask=None, scaling=None, tolerance=1e-12):
    """Forward and every gradient of the fast path and of the oracle."""
    n = tensors[1].shape[2]
    ours = call(*tensors, positions[:, n - tensors[0].shape[2] :], mask, scaling=scaling)
    full_positions = positions.expand(tensors[0].shape[0], n)
    theirs = oracle.attend(FULL.definition, *tensors, full_positions, mask, scaling=scaling)
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(theirs.shape, generator=generator, dtype=torch.float64)
    got = torch.autograd.grad((ours.double() * weight).sum(), tensors)
    want = torch.autograd.grad((theirs * weight).sum(), tensors)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=10 * tolerance, atol=10 * tolerance)


PACKINGS = {
    "one document": packed([S]).expand(B, S),
    "one row of positions": packed([S]),
    "alike": packed([10, 14], [10, 14], [10, 14]),
    "different": packed([S], [7, 1, 16], [1, 1, 2, 3, 5, 12]),
    "two alike": packed([8, 16], [8, 16], [20, 4]),
}
PADDINGS = {
    "left": torch.tensor([[i >= n for i in range(S)] for n in (0, 5, 23)]),
    "right": torch.tensor([[i < n for i in range(S)] for n in (24, 7, 1)]),
    "as many elsewhere": torch.tensor(
        [[i >= 5 for i in range(S)], [i < 19 for i in range(S)], [True] * S]
    ),
    "alike left": torch.tensor([[i >= 4 for i in range(S)]] * B),
    "hole": torch.tensor([[i not in (3, 4, 11) for i in range(S)]] * 2 + [[True] * S]),
    "empty row": torch.tensor([[True] * S, [False] * S, [i < 9 for i in range(S)]]),
}


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("packing", PACKINGS)
def test_documents(packing, heads, kv_heads):
    compare(inputs(heads, kv_heads), PACKINGS[packing])


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("packing", ["one document", "one row of positions", "different"])
def test_padding(packing, padding):
    compare(inputs(4, 2), PACKINGS[packing], PADDINGS[padding])


@pytest.mark.parametrize("padding", PADDINGS)
def test_padding_with_the_positions_that_generate_makes(padding):
    mask = PADDINGS[padding]
    positions = (mask.long().cumsum(1) - 1).masked_fill(~mask, 0)
    compare(inputs(4, 2), positions, mask)


def test_padding_is_zero_and_passes_no_gradient():
    q, k, v = inputs(4, 2)
    mask = PADDINGS["right"]
    out = call(q, k, v, PACKINGS["one document"], mask)
    assert (out[~mask] == 0).all()
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    for grad in grads:
        assert (grad.transpose(1, 2)[~mask] == 0).all()


def test_single_precision():
    compare(inputs(4, 2, torch.float32), PACKINGS["different"], tolerance=2e-6)


def test_scaling():
    compare(inputs(4, 2), PACKINGS["different"], scaling=0.3)


def test_packed_documents_equal_documents_alone():
    q, k, v = inputs(4, 2, rows=1)
    lengths = [7, 1, 16]
    together = call(q, k, v, packed(lengths))
    pieces = zip(*(x.split(lengths, dim=2) for x in (q, k, v)), strict=True)
    alone = [call(*piece, packed([n])) for piece, n in zip(pieces, lengths, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone, dim=1), rtol=0, atol=1e-14)
    weight = torch.randn_like(together)
    got = torch.autograd.grad((together * weight).sum(), (q, k, v))
    want = torch.autograd.grad((torch.cat(alone, dim=1) * weight).sum(), (q, k, v))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


def test_one_call_when_nothing_restarts(monkeypatch):
    calls = []
    plain = causal.sdpa
    monkeypatch.setattr(causal, "sdpa", lambda *a, **k: calls.append(1) or plain(*a, **k))
    call(*inputs(4, 2), PACKINGS["one document"])
    assert len(calls) == 1
    calls.clear()
    call(*inputs(4, 2), PACKINGS["alike"])
    assert len(calls) == 2
    calls.clear()
    call(*inputs(4, 2), PACKINGS["two alike"])
    assert len(calls) == 4


@pytest.mark.parametrize("new", [1, 2, 9])
@pytest.mark.parametrize("padding", [None, "left", "hole"])
@pytest.mark.parametrize("block", [512, 4])
def test_cached(new, padding, block, monkeypatch):
    monkeypatch.setattr(causal, "QUERY_BLOCK", block)
    q, k, v = inputs(4, 2)
    mask = None if padding is None else PADDINGS[padding]
    positions = torch.arange(S)[None].expand(B, S)
    if mask is not None:
        positions = (mask.long().cumsum(1) - 1).masked_fill(~mask, 0)
    tail = q[:, :, S - new :]
    compare([tail.detach().requires_grad_(), k, v], positions, mask)


def test_cached_equals_one_prefill():
    q, k, v = inputs(4, 2)
    positions = torch.arange(S)[None]
    whole = call(q, k, v, positions)
    seen = 0
    for step in (5, 1, 1, 9, 8):
        stop = seen + step
        part = call(q[:, :, seen:stop], k[:, :, :stop], v[:, :, :stop], positions[:, seen:stop])
        torch.testing.assert_close(part, whole[:, seen:stop], rtol=0, atol=1e-14)
        seen = stop


def test_a_document_that_starts_in_a_cached_row_is_refused():
    q, k, v = inputs(4, 2)
    with pytest.raises(UserError, match="one document"):
        call(q[:, :, -1:], k, v, torch.zeros(B, 1, dtype=torch.long))


@pytest.mark.parametrize(
    ("rest", "says"),
    [
        ({"sliding_window": 4}, "sliding_window"),
        ({"softcap": 30.0}, "softcap"),
        ({"s_aux": torch.zeros(4)}, "s_aux"),
        ({"is_causal": False}, "causal"),
    ],
)
def test_what_is_not_honoured_raises(rest, says):
    with pytest.raises(UserError, match=says):
        call(*inputs(4, 2), PACKINGS["one document"], **rest)


def test_a_4d_mask_raises():
    with pytest.raises(UserError, match=r"\[3, 1, 24, 24\]"):
        call(*inputs(4, 2), PACKINGS["one document"], torch.ones(B, 1, S, S, dtype=torch.bool))


def test_missing_positions_raise():
    q, k, v = inputs(4, 2)
    with pytest.raises(UserError, match="position_ids"):
        FULL.attend(nn.Module(), q, k, v, None)


def test_reference_rotation_is_rope():
    """The oracle's rotation by distance equals rotating queries and keys by position."""
    q, k, v = (x.detach() for x in inputs(4, 2))
    positions = PACKINGS["different"]
    inv_freq = 10000.0 ** -(torch.arange(0, D, 2, dtype=torch.float64) / D)
    angles = positions[:, None, :, None] * inv_freq
    rotated = [oracle.rotate(x, angles) for x in (q, k)]
    by_distance = oracle.attend(FULL.definition, q, k, v, positions, inv_freq=inv_freq)
    by_position = oracle.attend(FULL.definition, *rotated, v, positions)
    torch.testing.assert_close(by_distance, by_position, rtol=0, atol=1e-13)
    torch.testing.assert_close(call(*rotated, v, positions), by_distance, rtol=0, atol=1e-13)


def test_definition_counts_every_earlier_pair():
    i, j = torch.arange(9)[:, None], torch.arange(9)[None, :]
    live, distance = FULL.definition(i, j, 0, torch.arange(1))
    assert int(live.sum()) == 9 * 10 // 2
    pairs = itertools.product(range(9), range(9))
    assert all(bool(live[a, b]) == (b <= a) and int(distance[a, b]) == a - b for a, b in pairs)

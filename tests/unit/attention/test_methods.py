"""Every attention method against its definition in float64: forward, gradient, packed, cached.

A new method joins by one line in METHODS. What is special to a method stands in its own file.
"""

import types

import pytest
import torch
from torch import nn

from longctx.attention.dca import DualChunk
from longctx.attention.full import Full
from longctx.attention.lm_infinite import LmInfinite
from longctx.attention.longgen_blocks import LongGenBlocks
from longctx.attention.longgen_window import LongGenWindow
from longctx.attention.ops import oracle
from longctx.attention.streaming import Streaming
from longctx.errors import UserError

B, S, D = 3, 41, 8
INV_FREQ = 10000.0 ** -(torch.arange(0, D, 2, dtype=torch.float64) / D)
ROTARY = types.SimpleNamespace(inv_freq=INV_FREQ)
METHODS = {
    "full": Full(),
    "dca": DualChunk(6, 4, 10),
    "dca with a window below c - s": DualChunk(6, 2, 11),
    "dca of one chunk": DualChunk(50, 3, 60),
    "dca intra": DualChunk(6, 4, 10, parts="intra"),
    "dca intra+inter": DualChunk(6, 4, 10, parts="intra+inter"),
    "streaming": Streaming(3, 7),
    "streaming without sinks": Streaming(0, 5),
    "streaming of one": Streaming(2, 1),
    "lm_infinite": LmInfinite(3, 7),
    "lm_infinite of one": LmInfinite(1, 1),
    "longgen_window": LongGenWindow(3, 7),
    "longgen_window without sinks": LongGenWindow(0, 5),
    "longgen_window of one": LongGenWindow(2, 1),
    "longgen_blocks": LongGenBlocks(3, 3, 4),
    "longgen_blocks from 1": LongGenBlocks(2, 2, 3, offset=1),
    "longgen_blocks alike": LongGenBlocks(4, 2, 2, heads_share=True),
    "longgen_blocks of one": LongGenBlocks(2, 1, 5),
}
FROM_ZERO = [n for n in METHODS if n.startswith(("streaming", "lm_infinite", "longgen"))]
POSITIONS = {
    "one document": torch.arange(S)[None].expand(B, S),
    "one row of positions": torch.arange(S)[None],
    "packed alike": torch.tensor([[p for n in (20, 1, 20) for p in range(n)]] * B),
    "packed": torch.tensor(
        [[p for n in row for p in range(n)] for row in ((20, 1, 20), (41,), (7, 34))]
    ),
    "from position 17": torch.arange(17, 17 + S)[None].expand(B, S),
}
PADDINGS = {
    "left": torch.tensor([[i >= n for i in range(S)] for n in (0, 5, 33)]),
    "right": torch.tensor([[i < n for i in range(S)] for n in (S, 7, 1)]),
    "alike": torch.tensor([[i >= 4 for i in range(S)]] * B),
    "empty row": torch.tensor([[True] * S, [False] * S, [i < 9 for i in range(S)]]),
}


def inputs(heads, kv_heads, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, h, S, D) for h in (heads, kv_heads, kv_heads)]
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


def layer():
    module = nn.Module()
    module.layer_idx = 0
    return module


def of_model(method, query, key):
    """A method that asks for the architecture, with the heads of these tensors; layer 0 of 3."""
    return method.for_layers(3, query.shape[1], key.shape[1])


def call(method, query, key, value, positions, mask=None, **rest):
    """The fast path behind the rotation that the model's rotary module does."""
    m, n = query.shape[2], key.shape[2]
    method = of_model(method, query, key)
    rotated = method.key_positions(positions)
    angles = rotated[:, None, :, None] * INV_FREQ
    q = oracle.rotate(query, angles[:, :, n - m :])
    k = oracle.rotate(key, angles)
    rest |= {"position_ids": positions[:, n - m :], "rotary": ROTARY}
    return method.attend(layer(), q, k, value, mask, **rest)[0]


def compare(method, tensors, positions, mask=None, new=S, **rest):
    """Forward and every gradient of the last `new` tokens, and of the oracle."""
    query, key, value = (x.clone().requires_grad_() for x in tensors)
    query = query[:, :, S - new :]
    ours = call(method, query, key, value, positions, mask, **rest)
    expected = (
        of_model(method, query, key).definition,
        query,
        key,
        value,
        positions.expand(B, S),
        mask,
    )
    theirs = oracle.attend(*expected, inv_freq=INV_FREQ, **rest)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    weight = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(1)).double()
    got = torch.autograd.grad((ours * weight).sum(), (query, key, value))
    want = torch.autograd.grad((theirs * weight).sum(), (query, key, value))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=str)
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("method", METHODS)
def test_documents(method, positions, heads):
    if method in FROM_ZERO and positions == "from position 17":
        with pytest.raises(UserError, match="start at position 0"):
            compare(METHODS[method], inputs(*heads), POSITIONS[positions])
        return
    compare(METHODS[method], inputs(*heads), POSITIONS[positions])


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("positions", ["one document", "from position 17"])
@pytest.mark.parametrize("method", [name for name in METHODS if name not in FROM_ZERO])
def test_padding(method, positions, padding):
    compare(METHODS[method], inputs(4, 2), POSITIONS[positions], PADDINGS[padding])


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("method", METHODS)
def test_padding_with_the_positions_that_generate_makes(method, padding):
    mask = PADDINGS[padding]
    positions = (mask.long().cumsum(1) - 1).masked_fill(~mask, 0)
    compare(METHODS[method], inputs(4, 2), positions, mask)


@pytest.mark.parametrize("new", [1, 2, 9, 25])
@pytest.mark.parametrize("padding", [None, "left", "alike"])
@pytest.mark.parametrize("method", METHODS)
def test_cached(method, padding, new):
    mask = None if padding is None else PADDINGS[padding]
    positions = POSITIONS["one document"]
    if mask is not None:
        positions = (mask.long().cumsum(1) - 1).masked_fill(~mask, 0)
    compare(METHODS[method], inputs(4, 2), positions, mask, new=new)


@pytest.mark.parametrize("method", METHODS)
def test_appends_of_any_size_equal_one_prefill(method):
    q, k, v = inputs(4, 2)
    positions = POSITIONS["one document"]
    whole = call(METHODS[method], q, k, v, positions)
    generator = torch.Generator().manual_seed(2)
    for _ in range(20):
        seen = 0
        while seen < S:
            stop = min(S, seen + int(torch.randint(1, 10, (), generator=generator)))
            part = call(
                METHODS[method],
                *(q[:, :, seen:stop], k[:, :, :stop], v[:, :, :stop]),
                positions[:, :stop],
            )
            torch.testing.assert_close(part, whole[:, seen:stop], rtol=0, atol=1e-13)
            seen = stop


@pytest.mark.parametrize("method", METHODS)
def test_scaling(method):
    compare(METHODS[method], inputs(4, 2), POSITIONS["packed"], scaling=0.3)


@pytest.mark.parametrize("method", METHODS)
def test_padding_is_zero_and_passes_no_gradient(method):
    mask = PADDINGS["right"]
    tensors = [x.requires_grad_() for x in inputs(4, 2)]
    out = call(METHODS[method], *tensors, POSITIONS["one document"], mask)
    assert (out[~mask] == 0).all()
    for grad in torch.autograd.grad(out.sum(), tensors):
        assert (grad.transpose(1, 2)[~mask] == 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_a_document_that_starts_in_a_cached_row_is_refused(method):
    q, k, v = inputs(4, 2)
    positions = torch.cat([torch.arange(S - 1), torch.zeros(1, dtype=torch.long)])[None]
    with pytest.raises(UserError, match="continues a cache"):
        call(METHODS[method], q[:, :, -1:], k, v, positions)
    positions = torch.cat([torch.arange(S - 2), torch.tensor([0, 1])])[None]
    with pytest.raises(UserError, match="continues a cache"):
        call(METHODS[method], q[:, :, -4:], k, v, positions)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("rest", "says"),
    [({"sliding_window": 4}, "sliding_window"), ({"is_causal": False}, "causal")],
)
def test_what_is_not_honoured_raises(method, rest, says):
    with pytest.raises(UserError, match=says):
        call(METHODS[method], *inputs(4, 2), POSITIONS["one document"], **rest)

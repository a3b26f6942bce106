"""The evicting layer by itself: which entries it holds and returns, whatever is done to it."""

import copy
import random

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, MistralConfig, StaticCache
from transformers.cache_utils import DynamicLayer, QuantizedCache

from longctx.attention.full import Full
from longctx.errors import UserError
from longctx.models.evicting_cache import Call, KeptLayer, announce, cache_bytes, fit_layers
from tests.helpers.kept import HEADS, Blocks, Text, Window

PATTERNS = [Window(2, 5), Window(0, 4), Window(3, 1), Blocks()]


def sizes(total, seed):
    rng, left = random.Random(seed), total
    while left:
        yield (size := min(left, rng.choice([1, 1, 1, 1, 2, 3, 7])))
        left -= size


def padded(kind, b=3, n=40):
    real = torch.ones(b, n, dtype=torch.bool)
    if kind == "left":
        real[1, :4] = False
        real[2, :11] = False
    elif kind == "left, every row":
        real[:, :2] = False
        real[0, :9] = False
    elif kind == "anywhere":
        real = torch.rand(b, n, generator=torch.Generator().manual_seed(1)) < 0.7
    return real


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", ["none", "left", "left, every row", "anywhere"])
@pytest.mark.parametrize("method", PATTERNS)
@pytest.mark.parametrize("seed", range(4))
def test_random_appends(method, kind, grad, seed):
    real = padded(kind)
    text = Text(method, real)
    with torch.set_grad_enabled(grad):
        for size in sizes(real.shape[1], seed):
            before = real[:, : text.columns].sum(1)
            first = text.columns
            out = text.feed(size)
            k = out.shape[2] - size
            own = text.codes()[:, :, first : first + size, 0]
            if k == max(method.kept_tokens(int(n)) for n in before):  # in order, then the new ones
                assert torch.equal(out[:, :, k:], own)
                positions = method.kept_positions(before, torch.arange(HEADS))
                live = positions >= 0
                offset = text.codes()[:, :, :, 0] - (real.cumsum(1) - 1)[:, None]
                here = offset.max(2, keepdim=True).values + positions
                assert torch.equal(out[:, :, :k][live], here.to(out.dtype)[live])
            else:  # a ring: all that the new token sees, in any order
                assert size == 1
                assert not grad
                assert out.shape[2] == sum(method.ring()) <= int(before.min())
                for row in range(len(out)):
                    seen = (out[row, 0] - 1000 * row).tolist()
                    assert sorted(seen) == method.kept(int(before[row]) + 1, 0)
            text.check_held()


@torch.no_grad()
def test_the_ring_copies_nothing():
    text = Text(Window(2, 5), torch.ones(2, 40, dtype=torch.bool))
    text.feed(9)
    at = text.cache.layers[0].keys.data_ptr()
    for _ in range(12):
        out = text.feed(1)
        assert text.cache.layers[0].keys.data_ptr() == at
        assert out.shape[2] == text.held().shape[2] == 7
    text.feed(3)  # in order again
    assert text.held()[0, 0].tolist() == [0, 1, 19, 20, 21, 22, 23]


@torch.no_grad()
def test_caller_tensors_are_not_written():
    method = Window(1, 3)
    cache = DynamicCache()
    fit_layers(cache, method, 1)
    first = torch.arange(4.0)[None, None, :, None].repeat(1, HEADS, 1, 3)
    kept = first.clone()
    announce(cache, Call(method, 0, 4, None))
    out = cache.update(first, first, 0)
    assert out[0] is first
    for n in range(4, 9):
        announce(cache, Call(method, n, 1, None))
        cache.update(first[:, :, :1] + n, first[:, :, :1] + n, 0)
    assert torch.equal(first, kept)
    assert sorted(cache.layers[0].keys[0, 0, :, 0].tolist()) == [0, 6, 7, 8]


def test_tensors_of_a_graph_are_not_written():
    """Filled with gradients or in inference mode, decoded without: copies, and no error."""
    text = Text(Window(1, 3), torch.ones(1, 30, dtype=torch.bool))
    text.feed(6)
    held = text.cache.layers[0].keys
    kept = held.clone()
    with torch.no_grad():
        text.feed(1)
    assert torch.equal(held, kept)
    text.feed(1)
    text.check_held()
    with torch.inference_mode():
        inference = Text(Window(1, 3), torch.ones(1, 30, dtype=torch.bool))
        for size in (6, 1, 1):
            inference.feed(size)
    with torch.no_grad():
        inference.feed(1)
        inference.feed(1)
    inference.check_held()
    graph = Text(Window(1, 3), torch.ones(1, 30, dtype=torch.bool))
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    total = torch.zeros((), dtype=torch.float64)
    for n in range(6):
        new = torch.full((1, HEADS, 1, 3), float(n), dtype=torch.float64) * weight
        announce(graph.cache, Call(graph.method, n, 1, None))
        total = total + graph.cache.update(new, new, 0)[0].sum()
    seen = [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4], [0, 2, 3, 4, 5]]
    assert torch.autograd.grad(total, weight)[0] == sum(map(sum, seen)) * HEADS * 3


@pytest.mark.parametrize("method", PATTERNS)
@torch.no_grad()
def test_rows_move(method):
    real = padded("left")
    text = Text(method, real)
    for size in (12, 1, 1, 1):
        text.feed(size)
    order = torch.tensor([2, 0, 0])
    copied = copy.deepcopy(text)
    text.cache.reorder_cache(order)
    text.cache.batch_repeat_interleave(2)
    text.cache.batch_select_indices(torch.tensor([1, 2, 5]))
    kept = copied.cache.layers[0].keys
    assert torch.equal(text.cache.layers[0].keys, kept[order])
    # Rows of the same padding go on as they would alone.
    again = Text(method, real[order])
    for size in (12, 1, 1, 1, 1, 4):
        out = again.feed(size)
    text.real, moved = real[order], None
    for size in (1, 4):
        moved = text.feed(size)
    live = method.kept_positions(text.real[:, :16].sum(1), torch.arange(HEADS)) >= 0
    k = moved.shape[2] - 4
    assert torch.equal(moved[:, :, :k][live] % 100, out[:, :, :k][live] % 100)  # places
    copied.feed(1)  # the copy is as it was
    copied.check_held()


@torch.no_grad()
def test_cropping():
    text = Text(Window(2, 9), padded("left"))
    text.feed(10)
    text.cache.crop(0)
    text.cache.crop(-4)
    text.columns = 6
    text.check_held()
    for size in (1, 2, 1, 1, 1):
        text.feed(size)
        text.check_held()
    text.cache.crop(0)
    with pytest.raises(UserError, match=r"crop\(-1\): a cache that has evicted tokens .* assisted"):
        text.cache.crop(-1)
    ring = Text(Window(2, 5), padded("none"))
    ring.feed(7)
    ring.feed(1)
    with pytest.raises(UserError, match="evicted tokens"):
        ring.cache.layers[0].crop(-1)
    with pytest.raises(UserError, match="negative"):
        text.cache.layers[0].crop(3)
    empty = DynamicCache()
    fit_layers(empty, Window(2, 9), 1)
    empty.crop(-1)
    assert empty.get_seq_length() == 0


@torch.no_grad()
def test_other_padding_than_before():
    text = Text(Window(2, 5), padded("left"))
    text.feed(14)
    with pytest.raises(UserError, match="other padding in the first 14 tokens"):
        text.feed(1, mask=False)
    moved = Text(Window(2, 5), padded("left"), text.cache)
    text = Text(Window(2, 5), padded("left"))
    text.feed(14)
    moved.cache, moved.columns = text.cache, 14
    moved.real[1, 3], moved.real[1, 8] = True, False  # as many
    with pytest.raises(UserError, match="other padding"):
        moved.feed(1)
    with pytest.raises(UserError, match=r"the attention mask has 3 columns, .* have 5"):
        Call(Window(2, 5), 4, 1, torch.ones(1, 3))


@torch.no_grad()
def test_nobody_else_reads_it():
    text = Text(Window(2, 5), padded("none"))
    text.feed(9)
    new = text.codes()[:, :, 9:10]
    with pytest.raises(UserError, match="another attention asks for it"):
        text.cache.update(new, new, 0)
    announce(text.cache, Call(text.method, 8, 1, None))
    with pytest.raises(UserError, match="half filled"):
        text.cache.update(new, new, 0)
    announce(text.cache, Call(text.method, 9, 1, None))
    with pytest.raises(RuntimeError):  # rows do not spread over a batch, as in any cache
        text.cache.update(new[:1], new[:1], 0)


def test_layers_of_an_empty_cache():
    cache = DynamicCache()
    fit_layers(cache, Window(1, 1), 3)
    assert [type(layer) for layer in cache.layers] == [KeptLayer, DynamicLayer, KeptLayer]
    assert cache_bytes(cache) == 0
    fit_layers(cache, Full(), 3)
    assert [type(layer) for layer in cache.layers] == [DynamicLayer] * 3
    fit_layers(cache, Window(1, 1), 3)
    text = Text(Window(1, 3), padded("none"), cache)
    text.feed(8)
    assert cache_bytes(cache) == 2 * 3 * HEADS * 3 * 8 * (4 + 8 + 4)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.layers[0].keys is cache.layers[2].values is None
    text = Text(Window(1, 3), padded("left"), cache)
    text.feed(5)
    text.check_held()


def test_other_caches():
    config = LlamaConfig(num_hidden_layers=2, hidden_size=8, num_attention_heads=2)
    window = DynamicCache(config=MistralConfig(num_hidden_layers=2, sliding_window=4))
    static = StaticCache(config=config, max_cache_len=8)
    for cache, kind in ((window, "DynamicSlidingWindowLayer"), (static, "StaticLayer")):
        with pytest.raises(UserError, match=f"plain layers, not a {kind}"):
            fit_layers(cache, Window(1, 1), 2)
    quantised = object.__new__(QuantizedCache)
    quantised.layers = []
    with pytest.raises(UserError, match="not a QuantizedCache"):
        fit_layers(quantised, Window(1, 1), 2)

"""Models that evict: decoding, prefill in pieces, padding, beams, and what is refused."""

import copy
import random

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

import longctx
from longctx.errors import UserError
from longctx.models.choose import attention_method
from longctx.models.decode import continue_tokens, prefill
from longctx.models.evicting_cache import KeptLayer, cache_bytes
from tests.helpers.methods import EVICTING, FIRST
from tests.helpers.networks import KINDS, network, plain_twin, tokens

pytestmark = pytest.mark.long

WINDOW = {"name": "longgen_window", "sink_tokens": 2, "window_tokens": 5}
BLOCKS = {"name": "longgen_blocks", "block_size": 3, "local_blocks": 2, "stride": 3}
SPARSE = [*(FIRST[name] for name in EVICTING), BLOCKS | {"heads_share": True, "offset": 1}]
NAMES = [*EVICTING, "heads alike"]
LENGTH = 34
LONG = {"num_hidden_layers": 3, "max_position_embeddings": 64}


def hybrid(attention, kind="llama", **more):
    return network(kind, attention, **(LONG | more))


def feed(model, text, sizes, mask=None):
    """Logits of a text in pieces, and the cache."""
    cache, logits, at = None, [], 0
    for size in sizes:
        stop = at + size
        named = {}
        if mask is not None:
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            named = {"attention_mask": mask[:, :stop], "position_ids": positions[:, at:stop]}
        out = model(text[:, at:stop], past_key_values=cache, use_cache=True, **named)
        cache, at = out.past_key_values, stop
        logits.append(out.logits)
    return torch.cat(logits, dim=1), cache


def pieces(total, seed):
    rng, left = random.Random(seed), total
    while left:
        yield (size := min(left, rng.choice([1, 1, 1, 2, 4, 11])))
        left -= size


def same(a, b):
    return float((a - b).detach().abs().max()) <= 1e-12


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", SPARSE, ids=NAMES)
@torch.no_grad()
def test_decoding_is_the_row_of_a_whole_forward_pass(attention, kind):
    """Token by token, in random pieces, and the cache is as small as it says."""
    model, text = hybrid(attention, kind), tokens(2, LENGTH)
    want = model(text, use_cache=False).logits
    for sizes in (
        [1] * LENGTH,
        [20] + [1] * 14,
        [*pieces(LENGTH, 0)],
        [*pieces(LENGTH, 1)],
        [LENGTH],
    ):
        got, cache = feed(model, text, sizes)
        assert same(got, want)
        method = attention_method(model.config.longctx_attention)
        assert [type(x) is DynamicLayer for x in cache.layers] == [*map(method.is_full, range(3))]
        assert cache.get_seq_length() == LENGTH
        shape = next(x for x in cache.layers if type(x) is DynamicLayer).keys.shape
        assert shape[2] == LENGTH
        expected = method.cache_bytes(3, shape[1], shape[3], LENGTH, element=8, rows=2)
        assert cache_bytes(cache) == expected


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("full", [[], [0], [2]])
def test_the_cache_stops_at_sinks_and_window(full, grad):
    model, text = hybrid(WINDOW | {"full_layers": full}), tokens(1, LENGTH)
    cache, lengths = None, []
    with torch.set_grad_enabled(grad):
        want = model(text, use_cache=False).logits
        for at in range(LENGTH):
            out = model(text[:, at : at + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            lengths.append([layer.keys.shape[2] for layer in cache.layers])
            assert same(out.logits, want[:, at : at + 1])
    for at, found in enumerate(lengths, 1):
        assert found == [at if layer in full else min(at, 7) for layer in range(3)]


@pytest.mark.parametrize("padding", [(0, 6), (3, 14), (13, 1)])
@pytest.mark.parametrize("attention", SPARSE, ids=NAMES)
@torch.no_grad()
def test_left_padding(attention, padding):
    """Rows of a padded batch are what they are alone, however the batch is cut."""
    model, text = hybrid(attention), tokens(2, LENGTH)
    mask = torch.ones_like(text)
    for row, pad in enumerate(padding):
        mask[row, :pad] = 0
    for sizes in (
        [LENGTH],
        [20] + [1] * 14,
        [1] * LENGTH,
        *([*pieces(LENGTH, n)] for n in range(3)),
    ):
        got, _ = feed(model, text, sizes, mask)
        for row, pad in enumerate(padding):
            alone = model(text[row : row + 1, pad:], use_cache=False).logits
            assert same(got[row : row + 1, pad:], alone), sizes


@pytest.mark.parametrize("attention", SPARSE, ids=NAMES)
@torch.no_grad()
def test_padding_between(attention):
    """Tokens that are padding inside a cached row: as if they were not there."""
    model, text = hybrid(attention), tokens(2, LENGTH)
    mask = torch.ones_like(text)
    mask[0, 9:14] = mask[0, 25] = mask[1, 19:21] = 0
    for sizes in ([16, 9] + [1] * 9, [18, 3, 6, 1, 1, 4, 1], [10] + [1] * 24):
        got, _ = feed(model, text, sizes, mask)
        for row in range(2):
            real = mask[row].bool()
            alone = model(text[row : row + 1, real], use_cache=False).logits
            assert same(got[row : row + 1, real], alone), sizes


@pytest.mark.parametrize(
    "settings", [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}]
)
@pytest.mark.parametrize("attention", SPARSE[:-1], ids=EVICTING)
@torch.no_grad()
def test_generate(attention, settings):
    model, text = hybrid(attention), tokens(2, 17)
    mask = torch.ones_like(text)
    mask[1, :8] = 0
    for given in (torch.ones_like(text), mask):
        out = [
            model.generate(
                text, attention_mask=given, max_new_tokens=14, do_sample=False, pad_token_id=0,
                use_cache=cached, **settings,
            )
            for cached in (True, False)
        ]  # fmt: skip
        assert torch.equal(*out)


@pytest.mark.parametrize("attention", SPARSE[:-1], ids=EVICTING)
@torch.no_grad()
def test_prefill_in_pieces(attention):
    model, text = hybrid(attention), tokens(1, 29)
    cache = prefill(model, text, 7, lambda count: None)
    method = attention_method(model.config.longctx_attention)
    assert [type(x) is DynamicLayer for x in cache.layers] == [*map(method.is_full, range(3))]
    assert cache.get_seq_length() == 28
    held = next(x for x in cache.layers if type(x) is KeptLayer).keys.shape[2]
    assert held == method.kept_tokens(28)
    want = model.generate(text, max_new_tokens=9, do_sample=False, pad_token_id=0, use_cache=False)
    for size in (7, 29):
        got = continue_tokens(model, text, size, max_new_tokens=9, do_sample=False, pad_token_id=0)
        assert torch.equal(got, want)
    chunks = {"prefill_chunk_size": 6, "max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(text, **chunks), want)


@torch.no_grad()
def test_two_models_and_copies():
    """Each cache belongs to the settings of its model; a copy of a cache goes its own way."""
    text = tokens(1, LENGTH)
    models = [hybrid(a) for a in (WINDOW, WINDOW | {"window_tokens": 9}, BLOCKS)]
    caches = [feed(model, text[:, :20], [20])[1] for model in models]
    for model, cache in zip(models, caches, strict=True):
        twin, want = copy.deepcopy(cache), model(text, use_cache=False).logits
        for at in range(20, 28):
            out = model(text[:, at : at + 1], past_key_values=cache)
            assert same(out.logits, want[:, at : at + 1])
        out = model(text[:, 20:], past_key_values=twin)
        assert same(out.logits, want[:, 20:])
        for other in (*models, network(**LONG), hybrid("streaming")):
            if other is not model:
                with pytest.raises(UserError, match=r"as far as .* start with an empty cache"):
                    other(text[:, 28:29], past_key_values=cache)
    with pytest.raises(UserError, match="another attention asks for it"):
        plain_twin(network(**LONG))(text[:, 28:29], past_key_values=caches[0])
    with pytest.raises(UserError, match="as far as"):
        models[0](text[:, :1], past_key_values=feed(network(**LONG), text, [5])[1])


@torch.no_grad()
def test_switching_there_and_back():
    text, given = tokens(2, LENGTH), DynamicCache()
    model = network(**LONG)
    want, old = feed(model, text, [20, 1, 13])
    longctx.load_model(model, WINDOW | {"full_layers": []})
    model(text, past_key_values=given)
    assert given.layers[0].keys.shape[2] == 7
    with pytest.raises(UserError, match="start with an empty cache"):
        model(text[:, :1], past_key_values=old)
    longctx.load_model(model, "full")
    with pytest.raises(UserError, match="start with an empty cache"):
        model(text[:, :1], past_key_values=given)
    given.reset()
    for cache in (None, given):
        first = model(text[:, :20], past_key_values=cache, use_cache=True)
        rest = model(text[:, 20:], past_key_values=first.past_key_values)
        assert same(torch.cat((first.logits, rest.logits), dim=1), want)
        assert not any(isinstance(x, KeptLayer) for x in first.past_key_values.layers)
    assert feed(hybrid("streaming"), text, [20])[1].layers[0].keys.shape[2] == 20


@pytest.mark.parametrize("attention", [*SPARSE, WINDOW | {"full_layers": [0]}])
@torch.no_grad()
def test_positions_that_restart(attention):
    model, text = hybrid(attention), tokens(2, LENGTH)
    _, cache = feed(model, text, [20, 1])
    for begin in (0, 19, 20, 22):
        for size in (1, 3):
            at = torch.arange(begin, begin + size)[None]
            with pytest.raises(UserError, match="continues a cache"):
                model(text[:, 21 : 21 + size], past_key_values=cache, position_ids=at)
    with pytest.raises(UserError, match="continues a cache"):
        at = torch.tensor([[21, 22, 0, 1]])
        model(text[:, 21:25], past_key_values=cache, position_ids=at)
    out = model(text[:, 21:24], past_key_values=cache)  # and the cache is as it was
    assert same(out.logits, model(text[:, :24], use_cache=False).logits[:, 21:])
    with pytest.raises(UserError, match="other padding in the first 24 tokens"):
        mask = torch.ones(2, 25)
        mask[0, 3] = 0
        at = torch.tensor([[23], [24]])
        model(text[:, 24:25], past_key_values=cache, attention_mask=mask, position_ids=at)


@torch.no_grad()
def test_caches_and_ways_of_decoding_that_are_refused():
    model, text = hybrid(WINDOW), tokens(1, 20)
    config = plain_twin(network(**LONG)).config
    static = StaticCache(config=config, max_cache_len=40)
    with pytest.raises(UserError, match="static cache"):
        model(text, past_key_values=static)
    config.sliding_window = 4
    sliding = DynamicCache(config=config)
    with pytest.raises(UserError, match="plain layers, not a DynamicSlidingWindowLayer"):
        model(text, past_key_values=sliding)
    with pytest.raises(UserError, match="assisted"):
        repeated = text[:, :5].repeat(1, 4)
        model.generate(repeated, prompt_lookup_num_tokens=4, max_new_tokens=20, pad_token_id=0)
    with pytest.raises(UserError, match="'longgen_window' evicts cached keys"):
        hybrid(WINDOW, rope={"name": "dynamic_ntk", "factor": 2.0})

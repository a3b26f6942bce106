"""A cache is refused by an attention that would read its keys at other positions."""

import copy

import pytest
import torch
from transformers import DynamicCache

import longctx
from longctx.errors import UserError
from tests.helpers.networks import network, plain_twin, tokens

DCA = {"name": "dca", "chunk_len": 8, "local_window": 2, "max_positions": 11}
ROPE = {"name": "dynamic_ntk", "factor": 1.0}
OTHERS = [
    (DCA, "full"),
    ("full", DCA),
    (DCA, DCA | {"chunk_len": 6}),
    (DCA, DCA | {"local_window": 1}),
    ("streaming", DCA),
]


@torch.no_grad()
def fill(model, rows=1, length=20):
    return model(tokens(rows, length), use_cache=True).past_key_values


@pytest.mark.parametrize(("first", "second"), OTHERS)
@torch.no_grad()
def test_a_cache_of_another_method(first, second):
    model = network(attention=first)
    cache = fill(model)
    kept = [layer.keys.clone() for layer in cache.layers]
    longctx.load_model(model, second)
    with pytest.raises(
        UserError, match=r"the cache holds keys rotated for .*: start with an empty"
    ):
        model(tokens(1, 3), past_key_values=cache)
    assert all(torch.equal(a, b.keys) for a, b in zip(kept, cache.layers, strict=True))
    longctx.load_model(model, first)
    model(tokens(1, 3), past_key_values=cache)


@torch.no_grad()
def test_a_cache_of_a_plain_model():
    model = network()
    cache = fill(plain_twin(model))
    model(tokens(1, 1), past_key_values=copy.deepcopy(cache))  # the same positions
    with pytest.raises(UserError, match=r"rotated for true positions, .* for longctx_dca"):
        longctx.load_model(model, "dca")(tokens(1, 1), past_key_values=cache)


@torch.no_grad()
def test_keys_that_are_not_rotated_yet():
    cache = fill(network(rope=ROPE))
    with pytest.raises(UserError, match="late_rotary"):
        network()(tokens(1, 1), past_key_values=cache)
    with pytest.raises(UserError, match="late_rotary"):
        network(rope=ROPE)(tokens(1, 1), past_key_values=fill(network()))


@torch.no_grad()
def test_true_positions_are_shared():
    cache = fill(network(attention="streaming"))
    network(attention="full")(tokens(1, 2), past_key_values=cache)
    network(attention="lm_infinite")(tokens(1, 2), past_key_values=cache)


@torch.no_grad()
def test_what_is_done_to_a_cache_keeps_its_mark():
    model, plain = network(attention=DCA), network()
    cache = fill(model, rows=2)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3]))
    cache.crop(-5)
    cache = copy.deepcopy(cache)
    model(tokens(2, 3), past_key_values=cache)
    with pytest.raises(UserError, match="start with an empty cache"):
        plain(tokens(2, 1), past_key_values=cache)
    cache.reset()
    plain(tokens(2, 4), past_key_values=cache)


@torch.no_grad()
def test_copies_of_a_model_and_their_own_caches():
    model = network(attention=DCA)
    twin = longctx.load_model(copy.deepcopy(model), "full")
    cache = DynamicCache(config=model.config)
    twin(tokens(1, 4), past_key_values=cache)
    with pytest.raises(UserError, match="start with an empty cache"):
        model(tokens(1, 4), past_key_values=cache)


@pytest.mark.parametrize("more", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}])
def test_generate(more):
    out = network(attention=DCA).generate(tokens(2, 20), max_new_tokens=8, pad_token_id=0, **more)
    assert out.shape[1] == 28

"""Attention methods inside stock transformers models: definition, cache, padding, generate.

Methods are found, at the first set of numbers of their examples (`tests/helpers/methods.py`).
"""

import pytest
import torch

from longctx.attention.ops import oracle
from longctx.errors import UserError
from longctx.models.evicting_cache import cache_bytes
from longctx.models.export.restore import recorded
from longctx.models.load import build_model
from longctx.models.wrap_attention import wrap_attention
from tests.helpers.methods import LAYERS, NAMES, first
from tests.helpers.networks import KINDS, WINDOW, network, tokens


def decoder_of(kind, name):
    return network(kind, first(name), num_hidden_layers=LAYERS)


def plain_up_to(method):
    """Tokens up to which a method is full attention."""
    i, j, heads = torch.arange(40)[:, None], torch.arange(40)[None], torch.arange(4)[:, None, None]
    least = 40
    for layer in range(LAYERS):
        live, distance = method.definition(i, j, layer, heads)
        differs = (live != (j <= i)) | (live & (distance != i - j))
        rows = differs.expand(4, 40, 40).any(0).any(1).nonzero()
        least = min([least, *rows[:1, 0].tolist()])
    return least


def generate(decoder, prompt, **more):
    return decoder.generate(
        prompt, max_new_tokens=15, do_sample=False, pad_token_id=0, eos_token_id=None, **more
    )[:, prompt.shape[1] :]


def definition_in(decoder, method, label):
    """Lets a model call the oracle in place of the method's fast path."""
    inv_freq = decoder.model.rotary_emb.inv_freq.double()

    def dense(module, query, key, value, mask, scaling=None, dropout=0.0, **rest):
        at = rest["position_ids"].expand(len(query), -1)
        angles = method.key_positions(at)[:, None, :, None] * inv_freq
        q, k = oracle.rotate(query, -angles), oracle.rotate(key, -angles)  # as projected
        given = method.definition, q, k, value, at
        index = module.layer_idx
        return oracle.attend(*given, inv_freq=inv_freq, scaling=scaling, layer=index), None

    wrap_attention(decoder.model, lambda attend: dense, label)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_model_is_the_definition(kind, name):
    """Rotary module, positions and layer numbers reach the method; the model rotates in fp32."""
    decoder, text = decoder_of(kind, name), tokens(2, 40)
    packed = torch.cat([torch.arange(27), torch.arange(13)]).expand(2, 40)
    found = [decoder(text, position_ids=at).logits for at in (None, packed)]
    definition_in(decoder, recorded(decoder.config), f"definition_{kind}_{name}")
    for ours, at in zip(found, (None, packed), strict=True):
        theirs = decoder(text, position_ids=at, use_cache=False).logits
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_cache_padding_and_generate(kind, name):
    decoder = decoder_of(kind, name)
    text, method = tokens(2, 40), recorded(decoder.config)
    whole = decoder(text).logits
    plain = decoder_of(kind, "full")
    inside = text[:, : plain_up_to(method)]
    turned = 1e-5 if method.turns_queries else 1e-12  # the model rotates in fp32, a turn exactly
    torch.testing.assert_close(decoder(inside).logits, plain(inside).logits, rtol=0, atol=turned)
    assert torch.allclose(whole, plain(text).logits, atol=1e-3) == method.plain

    cache, parts, seen = None, [], 0
    for size in (5, 1, 1, 9, 3, 13, 8):
        done = decoder(text[:, seen : seen + size], past_key_values=cache, use_cache=True)
        cache, seen = done.past_key_values, seen + size
        parts.append(done.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-12)
    _, heads, _, size = cache.layers[0].keys.shape
    assert cache_bytes(cache) == method.cache_bytes(LAYERS, heads, size, 40, element=8, rows=2)

    alone = [generate(decoder, text[:1]), generate(decoder, text[1:, :28])]
    mask = torch.tensor([[int(i >= n) for i in range(45)] for n in (5, 17)])
    padded = torch.zeros(2, 45, dtype=torch.long)
    padded[0, 5:], padded[1, 17:] = text[0], text[1, :28]
    assert torch.equal(generate(decoder, padded, attention_mask=mask), torch.cat(alone))
    longer = text[:1]
    for _ in range(15):
        following = decoder(longer, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        longer = torch.cat([longer, following], dim=1)
    assert torch.equal(longer[:, 40:], alone[0])


@pytest.mark.parametrize("name", NAMES)
def test_beams_may_be_reordered(name):
    decoder = decoder_of("llama", name)
    text = tokens(1, 30)
    cached = generate(decoder, text, num_beams=3)
    assert torch.equal(cached, generate(decoder, text, num_beams=3, use_cache=False))


@pytest.mark.parametrize("name", ["dca", "streaming", "lm_infinite"])
@torch.no_grad()
def test_default_numbers_follow_from_the_window(name):
    """Of 12 tokens: a method is full attention inside its window, and another one beyond it."""
    decoder, plain, text = network("llama", name), network("llama", "full"), tokens(2, 40)
    short = text[:, :8]
    torch.testing.assert_close(decoder(short).logits, plain(short).logits, rtol=0, atol=1e-12)
    assert not torch.allclose(decoder(text).logits, plain(text).logits, atol=1e-3)


@pytest.mark.parametrize("rope", ["pi", "ntk", "yarn"])
@torch.no_grad()
def test_dca_stands_on_scaled_rope(rope):
    scaled = {"name": rope, "factor": 2.0}
    scaled |= {"beta_fast": 32.0, "beta_slow": 1.0} if rope == "yarn" else {}
    decoder = network("llama", "dca", scaled)
    assert decoder.config.longctx_attention["max_positions"] == 2 * WINDOW
    plain = network("llama", "full", scaled)
    text = tokens(1, 60)
    short = text[:, : 3 * WINDOW // 2]  # one chunk
    torch.testing.assert_close(decoder(short).logits, plain(short).logits, rtol=0, atol=1e-12)
    assert not torch.allclose(decoder(text).logits, plain(text).logits, atol=1e-3)


def test_two_models_with_other_numbers_live_in_one_process():
    text = tokens(1, 40)
    numbers = [{"name": "dca", "chunk_len": n, "local_window": 2} for n in (6, 9)]
    first, second = (network("llama", n) for n in numbers)
    before = first(text).logits
    second(text)
    assert torch.equal(first(text).logits, before)
    assert not torch.allclose(second(text).logits, before, atol=1e-3)


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="needs one rope for all lengths; 'llama' has dynamic"):
        network("llama", "dca", {"name": "dynamic_ntk", "factor": 2.0})
    with pytest.raises(UserError, match=r"chunk_len=12 must be below attention\.max_positions=12"):
        network("llama", {"name": "dca", "chunk_len": 12})
    with pytest.raises(UserError, match="reach beyond the model's window of 12 tokens"):
        network("llama", {"name": "streaming", "window": 10})
    with pytest.raises(UserError, match=r"window=13 is beyond the model's window of 12 tokens"):
        network("llama", {"name": "lm_infinite", "window": 13})


def test_another_layout_of_rotary_pairs_is_refused():
    architecture = {
        "model_type": "cohere", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": WINDOW,
    }  # fmt: skip
    with pytest.raises(UserError, match="'cohere' lays out its rotary pairs otherwise"):
        build_model(architecture, "dca")

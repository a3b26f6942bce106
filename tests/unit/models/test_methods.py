"""Attention methods inside stock transformers models: cache, padding, generate, what is refused."""

import pytest
import torch

from longctx.errors import UserError
from longctx.models.load import build_model
from tests.helpers.networks import KINDS, WINDOW, network, tokens

METHODS = ("dca", "streaming", "lm_infinite")


def generate(decoder, prompt, **more):
    return decoder.generate(
        prompt, max_new_tokens=15, do_sample=False, pad_token_id=0, eos_token_id=None, **more
    )[:, prompt.shape[1] :]


@pytest.mark.parametrize("attention", METHODS)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_cache_padding_and_generate(kind, attention):
    decoder = network(kind, attention)
    text = tokens(2, 40)
    whole = decoder(text).logits
    plain = network(kind, "full")
    inside = slice(0, 8)
    torch.testing.assert_close(
        decoder(text[:, inside]).logits, plain(text[:, inside]).logits, rtol=0, atol=1e-12
    )
    assert not torch.allclose(whole, plain(text).logits, atol=1e-3)

    cache, parts, seen = None, [], 0
    for size in (5, 1, 1, 9, 3, 13, 8):
        done = decoder(text[:, seen : seen + size], past_key_values=cache, use_cache=True)
        cache, seen = done.past_key_values, seen + size
        parts.append(done.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-12)

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


@pytest.mark.parametrize("attention", METHODS)
def test_beams_may_be_reordered(attention):
    decoder = network("llama", attention)
    text = tokens(1, 30)
    cached = generate(decoder, text, num_beams=3)
    assert torch.equal(cached, generate(decoder, text, num_beams=3, use_cache=False))


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

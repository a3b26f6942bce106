import copy

import pytest
import torch
from torch import nn

from longctx.errors import UserError
from longctx.models.cepe import cross_attention
from longctx.models.cepe.cross_attention import CrossAttention
from longctx.models.load import build_model
from tests.helpers.networks import network

KINDS = ["llama", "mistral", "qwen2", "qwen3"]


def module(kind="llama", width=24, **more):
    torch.manual_seed(0)
    made = CrossAttention(network(kind, **more).model.layers[0], width)
    with torch.no_grad():
        for weight in made.parameters():
            weight.normal_()
    return made


def inputs(rows=2, s=3, n=11, width=24):
    random = torch.Generator().manual_seed(1)
    hidden = torch.randn(rows, s, 32, generator=random, dtype=torch.float64)
    return hidden, torch.randn(rows, n, width, generator=random, dtype=torch.float64)


def padding(n=11):
    """One row with gaps, one without any."""
    mask = torch.ones(2, n, dtype=torch.bool)
    mask[0, :3] = mask[0, 7:9] = False
    return mask


def plain(made, hidden, states, mask):
    """The definition, head by head."""
    q, d = made.q_proj(made.layernorm(hidden)), made.head_dim
    k, v = made.k_proj(states), made.v_proj(states)
    out = torch.zeros_like(q)
    for row in range(len(q)):
        seen = torch.ones(k.shape[1], dtype=torch.bool) if mask is None else mask[row]
        if not seen.any():
            continue
        for head in range(made.heads):
            own = slice(head * d, head * d + d)
            key = head // (made.heads // made.key_heads)
            shared = slice(key * d, key * d + d)
            scores = q[row, :, own] @ k[row, seen, shared].T / d**0.5
            out[row, :, own] = scores.softmax(-1) @ v[row, seen, shared]
    return made.o_proj(out)


def forms(made, hidden, states, mask):
    """By each of the three ways."""
    b, s, _ = hidden.shape
    query = made.q_proj(made.layernorm(hidden)).view(b, s, -1, made.head_dim).transpose(1, 2)
    for form in (made.projected, made.streamed, made.absorbed):
        yield made.o_proj(form(query, states, mask).transpose(1, 2).reshape(b, s, -1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask", [None, padding()])
@pytest.mark.parametrize("slabs", [cross_attention.SLAB_BYTES, 1, 4 * 2 * 2 * 16 * 8])
@torch.no_grad()
def test_all_three_ways_are_the_definition(kind, mask, slabs, monkeypatch):
    monkeypatch.setattr(cross_attention, "SLAB_BYTES", slabs)  # all, one or four states at a time
    made, (hidden, states) = module(kind), inputs()
    want = plain(made, hidden, states, mask)
    for found in forms(made, hidden, states, mask):
        assert torch.allclose(found, want, atol=1e-11)


@torch.no_grad()
def test_absorbed_scores_come_in_bounded_blocks(monkeypatch):
    made, (hidden, states) = module(), inputs(s=7)
    want = plain(made, hidden, states, padding())
    seen, whole = [], cross_attention._weights
    monkeypatch.setattr(cross_attention, "SCORES_BYTES", 4 * 2 * 11 * 3)  # of three rows

    def counted(query, *rest):
        seen.append(query.shape[1])
        return whole(query, *rest)

    monkeypatch.setattr(cross_attention, "_weights", counted)
    *_, found = forms(made, hidden, states, padding())
    assert torch.allclose(found, want, atol=1e-11)
    assert max(seen) == 3
    assert sum(seen) == 7 * 4


@torch.no_grad()
def test_keys_of_a_slab_exist_at_a_time(monkeypatch):
    made, (hidden, states) = module(), inputs()
    sizes, whole = [], CrossAttention._keys_and_values

    def counted(self, part):
        sizes.append(part.shape[1])
        return whole(self, part)

    monkeypatch.setattr(CrossAttention, "_keys_and_values", counted)
    monkeypatch.setattr(cross_attention, "SLAB_BYTES", 4 * 2 * 2 * 16 * 8)
    monkeypatch.setattr(made, "absorbs", lambda rows: False)
    made(hidden, states)
    assert sizes == [4, 4, 3]


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("absorbs", [True, False])
def test_a_row_that_sees_nothing_gets_zero(grad, absorbs, monkeypatch):
    made, (hidden, states) = module(), inputs()
    monkeypatch.setattr(made, "absorbs", lambda rows: absorbs)
    mask = padding()
    mask[0] = False
    states[0] = 1e3  # whatever stands there
    with torch.set_grad_enabled(grad):
        out = made(hidden, states, mask)
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert out[1].abs().max() > 0.1


def test_a_row_that_sees_nothing_has_no_gradient():
    made, (hidden, states) = module(), inputs()
    mask = padding()
    mask[0] = False
    hidden.requires_grad_()
    states.requires_grad_()
    made(hidden, states, mask).square().sum().backward()
    for x in (hidden, states):
        assert torch.equal(x.grad[0], torch.zeros_like(x.grad[0]))
        assert x.grad[1].abs().max() > 0
    alone = copy.deepcopy(made)
    alone.zero_grad()
    alone(hidden[1:], states[1:]).square().sum().backward()
    for own, other in zip(made.parameters(), alone.parameters(), strict=True):
        assert torch.allclose(own.grad, other.grad, rtol=1e-9)


def test_gradients_are_those_of_the_definition():
    made, (hidden, states) = module("qwen3"), inputs()
    for mask in (None, padding()):
        found = torch.autograd.grad(made(hidden, states, mask).square().sum(), made.parameters())
        want = plain(made, hidden, states, mask).square().sum()
        for own, other in zip(found, torch.autograd.grad(want, made.parameters()), strict=True):
            assert torch.allclose(own, other, rtol=1e-8)


def test_what_is_cheaper_at_7b():
    with torch.device("meta"):
        layer = build_model(
            {"model_type": "llama", "num_hidden_layers": 1}, meta=True
        ).model.layers[0]
        made = CrossAttention(layer, 1024)
    assert made.absorbs(1)
    assert made.absorbs(146)  # 146 * 32 * (1024 - 128) < 1024 * 4096
    assert not made.absorbs(147)


@torch.no_grad()
def test_half_precision_is_near():
    made, (hidden, states) = module(), inputs()
    want = plain(made, hidden, states, padding())
    half = copy.deepcopy(made).bfloat16()
    for found in forms(half, hidden.bfloat16(), states.bfloat16(), padding()):
        assert found.dtype == torch.bfloat16
        assert (found.double() - want).norm() / want.norm() < 0.05


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [24, 40])  # narrower and wider than the decoder's 32
def test_it_starts_from_self_attention(kind, width):
    layer = network(kind).model.layers[0]
    nn.init.normal_(layer.post_attention_layernorm.weight)
    cross_attention.insert(layer, width)
    cross_attention.initialise(layer, "copy")
    own, cross = layer.self_attn, layer.cross_attn
    shared = min(width, 32)
    assert torch.equal(cross.q_proj.weight, own.q_proj.weight)
    assert torch.equal(cross.o_proj.weight, own.o_proj.weight)
    assert torch.equal(cross.layernorm.weight, layer.post_attention_layernorm.weight)
    assert cross.layernorm.weight is not layer.post_attention_layernorm.weight
    for name in ("k_proj", "v_proj"):
        new, old = getattr(cross, name).weight, getattr(own, name).weight
        assert torch.equal(new[:, :shared], old[:, :shared])
        assert not new[:, shared:].any()
    assert all(x.bias is None for x in (cross.q_proj, cross.k_proj, cross.v_proj, cross.o_proj))
    cross_attention.initialise(layer, "zero")
    assert not cross.o_proj.weight.any()
    cross_attention.initialise(layer, "normal")
    assert float(cross.o_proj.weight.detach().std()) == pytest.approx(
        (2 / 32) ** 0.5, rel=0.1
    )  # Kaiming
    with pytest.raises(UserError, match="init"):
        cross_attention.initialise(layer, "random")


def test_other_layers_are_refused():
    fields = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    olmo = build_model({"model_type": "olmo2", "intermediate_size": 48, **fields})
    with pytest.raises(UserError, match=r"Llama-style layers.*'olmo2'.*post_feedforward"):
        cross_attention.require_llama_style(olmo)
    granite = build_model({"model_type": "granite", "intermediate_size": 48, **fields})
    with pytest.raises(UserError, match=r"unscaled.*'granite'"):
        cross_attention.require_llama_style(granite)
    neox = build_model({"model_type": "gpt_neox", "intermediate_size": 48, **fields})
    with pytest.raises(UserError, match=r"Llama-style decoders.*'gpt_neox'"):
        cross_attention.require_llama_style(neox)
    decoder = network()
    cross_attention.insert(decoder.model.layers[1], 24)
    with pytest.raises(UserError, match="has cross-attention already"):
        cross_attention.require_llama_style(decoder)

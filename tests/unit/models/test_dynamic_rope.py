"""Dynamic NTK with keys cached unrotated: decoding, padding, and transformers' own scaling."""

import copy

import pytest
import torch
from transformers import DynamicCache

from longctx import rope as scaling
from longctx.attention.full import Full
from longctx.attention.ops import oracle
from longctx.config import RopeConfig
from longctx.errors import UserError
from longctx.models import attach, dynamic_rope
from longctx.models.load import build_model, load_model

WINDOW, BASE = 12, 10000.0
KINDS = {"llama": {}, "mistral": {"sliding_window": None}, "qwen2": {}, "qwen3": {"head_dim": 8}}


def model(kind="llama", factor=2.0, attention="full", **more):
    architecture = {
        "model_type": kind, "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": WINDOW, "initializer_range": 0.3,
        "eos_token_id": None, "bos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": BASE},
    } | KINDS[kind] | more  # fmt: skip
    rope = {"name": "dynamic_ntk", "factor": factor}
    return build_model(architecture, attention, rope, torch.float64).eval()


def tokens(rows, length, seed=0):
    return torch.randint(1, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded(mask):
    return (mask.long().cumsum(1) - 1).masked_fill(~mask, 1)


@pytest.mark.parametrize("positions", ["from the mask", "by column"])
@pytest.mark.parametrize("padding", [(0, 0), (3, 0), (2, 9)])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_decoding_is_the_last_row_of_a_fresh_prefill(kind, padding, positions):
    """Across the window, for each length, in pieces of several sizes.

    One layer: keys of a second one come from hidden states of shorter calls.
    """
    network = model(kind, num_hidden_layers=1)
    text = tokens(2, 33)
    mask = torch.tensor([[i >= n for i in range(33)] for n in padding])
    at = padded(mask) if positions == "from the mask" else torch.arange(33)[None].expand(2, -1)

    def last(cache, seen, stop):
        given = {"attention_mask": mask[:, :stop].long()} if any(padding) else {}
        return network(
            text[:, seen:stop], position_ids=at[:, seen:stop], past_key_values=cache, **given
        ).logits[:, -1]

    cache, seen = DynamicCache(config=network.config), 0
    for size in (10, 1, 1, 1, 1, 5, 2, 1, 1, 7, 1, 1, 1):
        decoded = last(cache, seen, seen + size)
        seen += size
        fresh = last(None, 0, seen)
        torch.testing.assert_close(decoded, fresh, rtol=0, atol=1e-12)
    assert seen == 33


@torch.no_grad()
def test_an_earlier_row_of_a_longer_prefill_is_another_definition():
    """All angles of a call follow its whole length: only the last row is what decoding gives."""
    network, text = model(), tokens(1, 33)
    short, long = network(text[:, :20]).logits, network(text).logits
    assert not torch.allclose(short, long[:, :20], atol=1e-3)
    inside, row = network(text[:, :WINDOW]).logits, network(text[:, :5]).logits
    torch.testing.assert_close(inside[:, :5], row, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_without_a_cache_it_is_transformers_own(kind):
    """One document, packed rows and a batch with padding; and a short call after a long one."""
    network = model(kind)
    stock = copy.deepcopy(network)
    stock.set_attn_implementation("sdpa")
    assert attach.rotates_late(network.config) and not attach.rotates_late(stock.config)
    for length in (33, 7, 50, WINDOW):
        ids = tokens(2, length, seed=length)
        ours, theirs = (m(ids, use_cache=False).logits for m in (network, stock))
        # The stock module has fp32 angles.
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
    ids = tokens(2, 40)
    lengths = (20, 1, 19)
    at = torch.cat([torch.arange(n) for n in lengths])[None]
    whole = network(ids, position_ids=at.expand(2, -1), use_cache=False).logits
    first = network(ids[:, :20]).logits  # the longest document gives the length
    torch.testing.assert_close(whole[:, :20], first, rtol=0, atol=1e-12)
    mask = torch.tensor([[i >= n for i in range(40)] for n in (0, 15)])
    given = {"attention_mask": mask.long(), "position_ids": padded(mask)}
    ours, theirs = (m(ids, **given).logits for m in (network, stock))
    torch.testing.assert_close(ours[mask], theirs[mask], rtol=0, atol=2e-5)


@torch.no_grad()
def test_a_shorter_call_does_not_see_an_earlier_longer_one():
    network = model()
    texts = [tokens(1, n) for n in (8, 20, 40)]
    fresh = [model()(x).logits for x in texts]
    for i in (2, 1, 0, 2, 0, 1):
        assert torch.equal(network(texts[i]).logits, fresh[i])


@torch.no_grad()
def test_generate_with_padding_and_beams_equals_no_cache():
    network, text = model(num_hidden_layers=1), tokens(2, 20)
    more = {"max_new_tokens": 15, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mask = torch.tensor([[int(i >= n) for i in range(20)] for n in (0, 7)])
    for beams in (1, 3):
        given = {**more, "attention_mask": mask, "num_beams": beams}
        cached = network.generate(text, **given)
        assert torch.equal(cached, network.generate(text, **given, use_cache=False))


@torch.no_grad()
def test_deeper_layers_keep_hidden_states_but_no_stale_angles():
    """Within the window all is exact; beyond it far nearer than with transformers' rotated keys."""
    network, text = model(num_hidden_layers=3, initializer_range=0.15), tokens(4, 40)
    stock = copy.deepcopy(network)
    stock.set_attn_implementation("sdpa")
    errors = {}
    for name, decoder in (("late", network), ("rotated", stock)):
        cache = DynamicCache(config=network.config)
        decoder(text[:, :6], past_key_values=cache)
        errors[name] = []
        for t in range(6, 40):
            row = decoder(text[:, t : t + 1], past_key_values=cache).logits[:, -1]
            fresh = decoder(text[:, : t + 1], use_cache=False).logits[:, -1]
            errors[name].append(float((row - fresh).square().mean()))
    assert max(errors["late"][: WINDOW - 6]) < 1e-24
    assert sum(errors["late"]) < sum(errors["rotated"]) / 5


def test_gradients_run_through_the_rotation_and_checkpointing():
    ids, grads = tokens(2, 30), []
    for checkpointing in (False, True):
        network = model()
        if checkpointing:
            network.train()
            network.gradient_checkpointing_enable({"use_reentrant": False})
        loss = network(ids, use_cache=False).logits.square().mean()
        network(tokens(1, 50), use_cache=False)  # between forward and backward: another length
        loss.backward()
        grads.append([p.grad for p in network.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert network.model.layers[0].self_attn.k_proj.weight.grad.abs().max() > 0


@pytest.mark.parametrize("length", [5, WINDOW, WINDOW + 1, 100])
@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_frequencies_of_a_call(factor, length):
    rotary = model(factor=factor).model.rotary_emb
    rope = RopeConfig("dynamic_ntk", factor=factor)
    want, _ = scaling.inv_freq(rope, BASE, WINDOW, 8, length)
    positions = torch.tensor([[3, 1], [length - 1, 0]])
    assert torch.equal(dynamic_rope.frequencies(rotary, positions), want)
    scale = max(1.0, factor * length / WINDOW - (factor - 1))
    by_hand = (BASE * scale ** (8 / 6)) ** -(torch.arange(0, 8, 2).double() / 8)
    torch.testing.assert_close(want, by_hand, rtol=1e-12, atol=0)


@pytest.mark.parametrize("new", [1, 6, 23])
def test_one_layer_is_the_definition_at_the_frequencies_of_the_call(new):
    """Against the float64 oracle, over a cache of unrotated keys."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, h, 23, 8, generator=generator, dtype=torch.float64) for h in (4, 2, 2)
    )
    mask = torch.tensor([[i >= n for i in range(23)] for n in (0, 4)])
    at = padded(mask)
    decoder = model().model
    layer, named = decoder.layers[0].self_attn, {"rotary": decoder.rotary_emb}
    attend = dynamic_rope.rotating("full", Full().attend)
    ours = attend(layer, q[:, :, -new:], k, v, mask, position_ids=at[:, -new:], **named)[0]
    rope = RopeConfig("dynamic_ntk", factor=2.0)
    inv_freq, _ = scaling.inv_freq(rope, BASE, WINDOW, 8, 23)
    expected = (Full().definition, q[:, :, -new:], k, v, at.masked_fill(~mask, 0), mask)
    theirs = oracle.attend(*expected, inv_freq=inv_freq)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_key_positions():
    own = torch.tensor([[7, 8], [4, 5], [0, 1]])
    assert dynamic_rope.key_positions(own, None, 2) is own
    assert dynamic_rope.key_positions(own, None, 4)[:, :2].tolist() == [[5, 6], [2, 3], [-2, -1]]
    mask = torch.tensor([[0, 1, 1, 0, 1, 1], [1, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 1]]).bool()
    own = torch.tensor([[2, 3], [1, 2], [9, 0]])
    found = dynamic_rope.key_positions(own, mask, 6)
    assert [row[m].tolist() for row, m in zip(found, mask, strict=True)] == [
        [0, 1, 2, 3], [0, 1, 2], [0],
    ]  # fmt: skip


def test_exported_it_is_a_plain_checkpoint(tmp_path):
    network, text = model(), tokens(1, 30)
    network.save_pretrained(tmp_path / "model")
    again = load_model(str(tmp_path / "model"))
    assert again.config.rope_parameters["rope_type"] == "dynamic"
    assert attach.rotates_late(again.config)
    torch.testing.assert_close(again(text).logits, network(text).logits, rtol=0, atol=1e-12)
    kept = (tmp_path / "model" / "config.json").read_text()
    assert attach.LATE not in kept


def test_what_cannot_be_rotated_late_is_refused():
    architecture = {
        "model_type": "cohere", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": WINDOW,
    }  # fmt: skip
    rope = {"name": "dynamic_ntk", "factor": 2.0}
    with pytest.raises(UserError, match="dynamic rope: 'cohere' lays out its rotary pairs"):
        build_model(architecture, "full", rope)
    with pytest.raises(UserError, match="needs one rope for all lengths"):
        model(attention="streaming")
    small = architecture | {"model_type": "smollm3", "num_hidden_layers": 4, "pad_token_id": 0}
    with pytest.raises(UserError, match="'smollm3' has layers that do not rotate"):
        build_model(small, "full", rope)
    with pytest.raises(UserError, match="'smollm3' has layers that do not rotate"):
        build_model(small, "dca")

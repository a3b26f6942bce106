"""Another attention for a built model: as if it had been loaded so, and back again."""

import pytest
import torch
from transformers import LlamaForCausalLM

import longctx
from longctx.errors import UserError
from tests.helpers.methods import FIRST, kind_of
from tests.helpers.networks import KINDS, WINDOW, network, plain_twin, tokens

DCA = {"name": "dca", "chunk_len": 8, "local_window": 2, "max_positions": 11}
METHODS = ["dca", DCA, "streaming", {"name": "lm_infinite", "first": 2, "window": 9}]
METHODS += [numbers for name, numbers in FIRST.items() if not kind_of(name).plain]


def close(first, second):
    torch.testing.assert_close(first, second, rtol=0, atol=1e-12)


@pytest.mark.parametrize("attention", METHODS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_plain_model_is_switched_and_back(kind, attention):
    loaded = network(kind, attention, num_hidden_layers=3)
    plain = plain_twin(loaded)
    text = tokens(2, 40)
    before = plain(text).logits
    assert longctx.load_model(plain, attention) is plain
    close(plain(text).logits, loaded(text).logits)
    assert plain.config.longctx_attention == loaded.config.longctx_attention
    assert not torch.allclose(plain(text).logits, before, atol=1e-3)
    longctx.load_model(plain, "full")
    close(plain(text).logits, before)
    assert not hasattr(plain.config, "longctx_attention")


@torch.no_grad()
def test_from_method_to_method():
    text, model = tokens(1, 40), network(attention="dca")
    for attention in ("streaming", DCA, "lm_infinite", "full", "dca"):
        longctx.load_model(model, attention)
        close(model(text).logits, network(attention=attention)(text).logits)
    longctx.load_model(model)  # None: what its configuration records
    close(model(text).logits, network(attention="dca")(text).logits)


@torch.no_grad()
def test_models_with_other_settings_live_in_one_process():
    text = tokens(1, 40)
    first, second, third = (plain_twin(network()) for _ in range(3))
    longctx.load_model(first, DCA)
    before = first(text).logits
    longctx.load_model(second, DCA | {"chunk_len": 6})
    assert not torch.allclose(second(text).logits, before, atol=1e-3)
    close(third(text).logits, network()(text).logits)
    longctx.load_model(second, "full")
    close(second(text).logits, third(text).logits)
    assert torch.equal(first(text).logits, before)


@torch.no_grad()
def test_on_scaled_rope():
    text = tokens(1, 40)
    for rope in ({"name": "pi", "factor": 2.0}, {"name": "ntk", "factor": 2.0}):
        loaded = network(attention="dca", rope=rope)
        plain = plain_twin(network(rope=rope))
        close(longctx.load_model(plain, "dca")(text).logits, loaded(text).logits)
        assert plain.config.longctx_attention["max_positions"] == 2 * WINDOW


@torch.no_grad()
def test_dynamic_ntk():
    text, rope = tokens(1, 30), {"name": "dynamic_ntk", "factor": 1.0}
    loaded, plain = network(rope=rope), plain_twin(network(rope=rope))
    close(longctx.load_model(plain, "full")(text).logits, loaded(text).logits)
    with pytest.raises(UserError, match="needs one rope for all lengths"):
        longctx.load_model(plain, "dca")
    close(plain(text).logits, loaded(text).logits)


def test_type_and_device():
    model = longctx.load_model(plain_twin(network()), "dca", dtype="bf16", device="cpu")
    assert model.dtype == model.config.dtype == torch.bfloat16
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


@torch.no_grad()
def test_rounded_frequencies_are_restored():
    """`model.to(bfloat16)` of a plain model rounds them, which gives wrong angles at length."""
    model = plain_twin(network()).to(torch.bfloat16)
    assert model.model.rotary_emb.inv_freq.dtype == torch.bfloat16
    longctx.load_model(model, "full")
    assert torch.equal(model.model.rotary_emb.inv_freq, network().model.rotary_emb.inv_freq)


@torch.no_grad()
def test_what_does_not_fit_changes_nothing():
    text, model = tokens(1, 40), plain_twin(network())
    before = model(text).logits
    longctx.load_model(model, DCA)
    switched = model(text).logits
    for attention, line in (
        ({"name": "dca", "chunk_len": 12}, r"chunk_len=12 must be below attention\.max_positions"),
        ({"name": "dca", "chunk_len": 0}, r"chunk_len=0 must be at least 1"),
        ("nope", r"attention\.name='nope' is not one of"),
    ):
        with pytest.raises(UserError, match=line):
            longctx.load_model(model, attention)
        assert torch.equal(model(text).logits, switched)
    with pytest.raises(UserError, match="rope= cannot change a model that is built"):
        longctx.load_model(model, "dca", rope={"name": "pi", "factor": 2})
    assert torch.equal(model(text).logits, switched)
    close(longctx.load_model(model, "full")(text).logits, before)


def cohere():
    from transformers import CohereConfig, CohereForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": WINDOW}
    return CohereForCausalLM(CohereConfig(**sizes, **heads, bos_token_id=None)).double().eval()


@torch.no_grad()
def test_an_architecture_that_cannot_is_left_as_it_was():
    model, text = cohere(), tokens(1, 30)
    before, name = model(text).logits, model.config._attn_implementation
    with pytest.raises(UserError, match="'cohere' lays out its rotary pairs otherwise"):
        longctx.load_model(model, "dca")
    assert model.config._attn_implementation == name
    close(model(text).logits, before)


def test_a_switched_model_is_saved_and_loaded(tmp_path):
    model = longctx.load_model(plain_twin(network()), DCA)
    assert isinstance(model, LlamaForCausalLM)
    model.save_pretrained(tmp_path)
    assert longctx.load_model(tmp_path).config.longctx_attention == model.config.longctx_attention

"""Adapters: what trains, what stays, and that merging changes nothing but the form."""

import copy

import pytest
import torch

from longctx.config import AdapterConfig
from longctx.errors import UserError
from longctx.models.export.directory import export
from longctx.models.load import build_model, load_model
from longctx.models.lora import add_lora, merge_lora

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
LONGLORA = AdapterConfig("lora", 4, 8, TARGETS, ["embed_tokens", "norm"])


def tiny(tied, seed=0):
    return build_model(
        {
            "model_type": "llama", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 32, "tie_word_embeddings": tied,
        },
        seed=seed,
    )  # fmt: skip


def step(model, ids):
    """One optimizer step on everything that is trainable."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    logits = model.get_output_embeddings()(hidden)
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    optimizer.step()


IDS = torch.randint(0, 96, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("tied", [False, True])
def test_starts_as_the_base_model(tied):
    base = tiny(tied)
    expected = base(IDS).logits
    assert torch.equal(add_lora(copy.deepcopy(base), LONGLORA)(IDS).logits, expected)


@pytest.mark.parametrize("tied", [False, True])
def test_trains_adapters_embeddings_and_norms_and_nothing_else(tied):
    model = add_lora(tiny(tied), LONGLORA)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    step(model, IDS)
    for name, parameter in model.named_parameters():
        expected = any(part in name for part in ("lora_", "embed_tokens", "norm"))
        assert parameter.requires_grad == expected, name
        moved = not torch.equal(parameter, before[name])
        # B starts at zero, so A has no gradient in the first step.
        assert moved == (expected and "lora_A" not in name) or "lora_A" in name, name


@pytest.mark.parametrize("tied", [False, True])
def test_merged_equals_adapted_and_embeddings_stay_tied(tied, tmp_path):
    base = tiny(tied)
    plain_names = list(base.state_dict())
    model = add_lora(base, LONGLORA)
    for _ in range(3):
        step(model, IDS)
    with torch.no_grad():
        adapted = model(IDS).logits
        merged = merge_lora(model)
        assert list(merged.state_dict()) == plain_names
        torch.testing.assert_close(merged(IDS).logits, adapted, rtol=0, atol=1e-5)
        same = merged.lm_head.weight is merged.model.embed_tokens.weight
        assert same == tied
        path = export(merged, None, tmp_path / "hf")
        torch.testing.assert_close(load_model(str(path))(IDS).logits, adapted, rtol=0, atol=1e-5)
    assert (adapted - tiny(tied)(IDS).logits).abs().max() > 1e-3


def test_seed_decides_the_adapters():
    one, same, other = (
        dict(add_lora(tiny(False), LONGLORA, seed=s).named_parameters()) for s in (0, 0, 1)
    )
    name = next(n for n in one if "lora_A" in n)
    assert torch.equal(one[name], same[name])
    assert not torch.equal(one[name], other[name])


def test_none_gives_the_model_back():
    model = tiny(False)
    assert add_lora(model, AdapterConfig("none", 0, 0, [], [])) is model
    assert merge_lora(model) is model
    assert all(p.requires_grad for p in model.parameters())


def test_adapters_keep_the_dtype_of_the_model():
    model = add_lora(tiny(False).to(torch.bfloat16), LONGLORA)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("adapter", "says"),
    [
        (AdapterConfig("lora", 4, 8, ["qkv"], []), "no layer named 'qkv'"),
        (AdapterConfig("lora", 4, 8, TARGETS, ["embedding"]), "'embedding'"),
        (AdapterConfig("lora", 0, 8, TARGETS, []), "rank >= 1"),
        (AdapterConfig("dora", 4, 8, TARGETS, []), "none, lora"),
    ],
)
def test_faults_of_the_input(adapter, says):
    with pytest.raises(UserError, match=says):
        add_lora(tiny(False), adapter)

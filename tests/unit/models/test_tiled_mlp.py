"""An FFN in tiles computes what it computes whole, and holds less."""

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from longctx.config import AdapterConfig
from longctx.errors import UserError
from longctx.models.load import build_model
from longctx.models.lora import add_lora
from longctx.models.tiled_mlp import tile_mlps
from longctx.plan.live import Live

SHAPE = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 56, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}  # fmt: skip
KINDS = ["llama", "mistral", "qwen3", "qwen2", "phi3"]
MLP = AdapterConfig("lora", 3, 6, ["gate_proj", "up_proj", "down_proj"], [])


def model_of(kind, **more):
    more = {"sliding_window": None, **more} if kind in ("mistral", "qwen2") else more
    more = {**more, "pad_token_id": 0} if kind == "phi3" else more
    return build_model({"model_type": kind, **SHAPE, **more}, dtype=torch.float64).train()


def loss_of(model, tokens):
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    return model(input_ids=tokens, position_ids=positions, use_cache=False).logits.pow(2).mean()


def gradients(model, tokens):
    model.zero_grad()
    loss = loss_of(model, tokens)
    loss.backward()
    return loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def furthest(found, expected):
    assert found.keys() == expected.keys()
    return max(float((found[n] - g).abs().max() / g.abs().max()) for n, g in expected.items())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_the_whole(kind, checkpointing):
    model, tokens = model_of(kind), torch.randint(0, 61, (2, 23))
    names = [name for name, _ in model.named_parameters()]
    loss, expected = gradients(model, tokens)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert tile_mlps(model, 10) == 2  # 46 tokens: tiles across rows, and a short one
    assert [name for name, _ in model.named_parameters()] == names
    tiled, found = gradients(model, tokens)
    assert abs(float(tiled - loss)) <= 1e-12 * abs(float(loss))
    assert furthest(found, expected) <= 1e-12


@pytest.mark.parametrize("also", [[], ["mlp.up_proj.base_layer"]])
def test_adapters_inside_an_ffn_train_as_without_tiles(also):
    plain = add_lora(model_of("llama"), MLP)
    tiled = model_of("llama")
    tile_mlps(tiled, 7)
    tiled = add_lora(tiled, MLP)
    for model in (plain, tiled):
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
            parameter.requires_grad_(parameter.requires_grad or any(a in name for a in also))
    tokens = torch.randint(0, 61, (2, 23))
    (loss, expected), (other, found) = gradients(plain, tokens), gradients(tiled, tokens)
    assert abs(float(other - loss)) <= 1e-12 * abs(float(loss))
    assert furthest(found, expected) <= 1e-12
    assert any("lora_A" in name and "gate_proj" in name for name in expected)


def test_bf16_gradients_are_added_up_in_fp32():
    model = build_model({"model_type": "llama", **SHAPE}, dtype="bf16").train()
    mlp = model.model.layers[0].mlp
    x = torch.randn(512, 24).to(torch.bfloat16)
    exact = [g.float() for g in torch.autograd.grad(mlp(x).float().sum(), list(mlp.parameters()))]
    tile_mlps(model, 4)  # 128 parts: in bf16 their sum would lose them
    found = torch.autograd.grad(mlp(x).float().sum(), list(mlp.parameters()))
    for a, b in zip(found, exact, strict=True):
        assert a.dtype == torch.bfloat16
        assert float((a.float() - b).norm() / b.norm()) < 6e-3  # rounding once: 2^-8


def saved_bytes(model, tokens):
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        loss_of(model, tokens)
    return sum(kept.values())


def test_an_ffn_in_tiles_saves_its_input_alone():
    tokens = torch.randint(0, 61, (1, 60))
    model = model_of("llama", intermediate_size=512)
    whole = saved_bytes(model, tokens)
    tile_mlps(model, 6)
    # gate, its activation, up and their product of two layers are not saved any more
    assert whole - saved_bytes(model, tokens) >= 2 * 4 * 60 * 512 * 8


def test_what_an_ffn_holds_grows_with_the_tile():
    peaks = {}
    for tile in (16, 64, 1024):
        with torch.device("meta"):
            ffn = nn.ModuleDict({"mlp": _Ffn(32, 2048)})
            tile_mlps(ffn, tile)
            live = Live(ffn.parameters())
            x = torch.empty(1024, 32, requires_grad=True)
            with live:
                torch.autograd.backward([ffn["mlp"](x).sum()])
        peaks[tile] = live.peaks[""][""]
    weights = 3 * 32 * 2048 * 4
    inner = {tile: peak - peaks[16] for tile, peak in peaks.items()}
    per_token = 2048 * 4
    assert 3 * 48 * per_token <= inner[64] <= 8 * 48 * per_token
    assert inner[1024] >= 4 * 1008 * per_token - weights


class _Ffn(nn.Module):
    def __init__(self, h, i):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(h, i), nn.Linear(h, i), nn.Linear(i, h)

    def forward(self, x):
        return self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))


def test_what_is_no_plain_ffn_is_refused():
    with pytest.raises(UserError, match=r"Linear has no FFN called mlp"):
        tile_mlps(nn.Linear(2, 2), 4)
    strange = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))})
    with pytest.raises(UserError, match=r"mlp_tile: Sequential has LayerNorm, not linear layers"):
        tile_mlps(strange, 4)

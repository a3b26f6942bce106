import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.cache_utils import Cache

from longctx.errors import UserError
from longctx.models.cepe.encoder import (
    EncoderForMaskedLM,
    build_encoder,
    encoder_config,
    load_encoder,
)
from longctx.train.loss import chunked_cross_entropy
from tests.helpers.networks import tokens
from tests.helpers.tiny_cepe import ENCODER, encoder


def states(model, ids, mask=None):
    with torch.no_grad():
        return model.encoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state


def plain(model, ids, real):
    """The encoder's formulas in plain torch: `[l]` tokens, of which `real` may be seen."""
    weights, config = model.encoder.state_dict(), model.config
    dim, eps = config.hidden_size // config.num_attention_heads, config.rms_norm_eps
    angles = torch.arange(len(ids))[:, None] * 10000.0 ** (-torch.arange(0, dim, 2).double() / dim)
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)

    def norm(x, name):
        return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * weights[name]

    def heads(x, name):
        return (x @ weights[name].T).view(len(ids), -1, dim).transpose(0, 1)

    def turned(x):
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    x = weights["embed_tokens.weight"][ids]
    for i in range(config.num_hidden_layers):
        own = f"layers.{i}."
        y = norm(x, own + "input_layernorm.weight")
        q, k, v = (heads(y, f"{own}self_attn.{n}_proj.weight") for n in "qkv")
        scores = (turned(q) @ turned(k).mT / dim**0.5).masked_fill(~real, -torch.inf)
        y = (scores.softmax(-1) @ v).transpose(0, 1).reshape(len(ids), -1)
        x = x + y @ weights[own + "self_attn.o_proj.weight"].T
        y = norm(x, own + "post_attention_layernorm.weight")
        gate, up = (y @ weights[f"{own}mlp.{n}_proj.weight"].T for n in ("gate", "up"))
        x = x + (gate * gate.sigmoid() * up) @ weights[own + "mlp.down_proj.weight"].T
    return norm(x, "norm.weight")


def test_states_are_those_of_the_formulas():
    model, ids = encoder(), tokens(2, 9)
    assert torch.allclose(
        states(model, ids)[1], plain(model, ids[1], torch.ones(9).bool()), atol=1e-5
    )
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 6:] = False
    found = states(model, ids, mask)[1, :6]
    assert torch.allclose(found, plain(model, ids[1], mask[1])[:6], atol=1e-5)


def test_the_last_token_reaches_the_first():
    model, ids = encoder(), tokens(1, 9)
    other = ids.clone()
    other[0, -1] = 1 + ids[0, -1] % 60
    assert (states(model, ids) - states(model, other))[0, 0].abs().max() > 1e-3


def test_padding_left_or_right_gives_the_same_states():
    model, ids = encoder(), tokens(1, 6)
    pad = torch.full((1, 4), 2)
    right, left = torch.cat([ids, pad], 1), torch.cat([pad, ids], 1)
    real = torch.ones(1, 6, dtype=torch.bool)
    no = torch.zeros(1, 4, dtype=torch.bool)
    alone = states(model, ids)
    assert torch.allclose(states(model, right, torch.cat([real, no], 1))[:, :6], alone, atol=1e-5)
    assert torch.allclose(states(model, left, torch.cat([no, real], 1))[:, 4:], alone, atol=1e-5)


def test_a_chunk_of_padding_is_finite():
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[1] = True
    assert states(encoder(), tokens(2, 6), mask).isfinite().all()


def test_no_cache_is_kept():
    out = encoder().encoder(input_ids=tokens(1, 6), use_cache=False)
    assert out.past_key_values is None
    held = [x for x in vars(out).values() if isinstance(x, Cache)]
    assert held == []


def test_the_head_is_tied_and_its_loss_is_that_of_the_logits():
    model, ids = encoder(), tokens(2, 8)
    labels = torch.where(torch.arange(8) % 3 == 0, ids, -100)
    hidden = model.hidden_for_head(ids)
    total, count = chunked_cross_entropy(hidden, model.get_output_embeddings(), labels)
    whole = model(ids, labels=labels)
    assert model.lm_head.weight is model.encoder.embed_tokens.weight
    assert whole.logits.shape == (2, 8, 65)
    assert float((total / count).detach()) == pytest.approx(float(whole.loss.detach()), rel=1e-6)
    total.backward()
    assert model.lm_head.bias.grad.abs().sum() > 0
    assert model.lm_dense.weight.grad.abs().sum() > 0


def test_parameters_of_the_released_shape():
    with torch.device("meta"):
        sizes = {"vocab_size": 32001, "hidden_size": 1024, "intermediate_size": 4096}
        more = {"num_hidden_layers": 24, "num_attention_heads": 16, "max_position_embeddings": 512}
        model = EncoderForMaskedLM(encoder_config(sizes | more))
    h, f, v = 1024, 4096, 32001
    formula = v * h + 24 * (4 * h * h + 3 * h * f + 2 * h) + h
    assert sum(p.numel() for p in model.encoder.parameters()) == formula == 435_472_384
    assert sum(p.numel() for p in model.parameters()) == 436_555_009


def test_the_seed_decides_and_bf16_is_the_same_rounded():
    first, second = build_encoder(ENCODER, seed=4), build_encoder(ENCODER, seed=4)
    half = build_encoder(ENCODER, "bf16", seed=4)
    other = build_encoder(ENCODER, seed=5)
    name = "encoder.layers.0.mlp.up_proj.weight"
    assert torch.equal(first.state_dict()[name], second.state_dict()[name])
    assert torch.equal(first.state_dict()[name].bfloat16(), half.state_dict()[name])
    assert not torch.equal(first.state_dict()[name], other.state_dict()[name])
    assert half.encoder.rotary_emb.inv_freq.dtype == torch.float32
    assert first.mask_token_id == 64


def test_saved_and_loaded(tmp_path):
    model, ids = encoder(), tokens(2, 6)
    model.save_pretrained(tmp_path)
    again = load_encoder(tmp_path).eval()
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert again.lm_head.weight is again.encoder.embed_tokens.weight
    assert load_encoder(tmp_path, "bf16").dtype == torch.bfloat16
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "longctx_encoder"


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_the_public_codes_layout_loads(tmp_path, file):
    model, ids = encoder(), tokens(2, 6)
    weights = {
        k.replace("encoder.", "model."): v.clone()
        for k, v in model.state_dict().items()
        if k != "lm_head.weight"
    }
    weights["lm_bias"] = weights.pop("lm_head.bias")
    if file.endswith(".bin"):  # names of one tensor are all there
        weights |= {"lm_head.bias": weights["lm_bias"]}
        weights |= {"lm_head.weight": weights["model.embed_tokens.weight"]}
        torch.save(weights, tmp_path / file)
    else:
        save_file(weights, tmp_path / file)
    fields = {
        "model_type": "llama",
        "architectures": ["LlamaForMLM"],
        "is_encoder": True,
        **ENCODER,
    }
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert torch.equal(load_encoder(tmp_path).eval()(ids).logits, model(ids).logits)


def test_what_cannot_be_loaded_is_said_in_one_line(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_encoder("./nowhere")
    model = encoder()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    del weights["lm_dense.weight"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks weights .*lm_dense") as error:
        load_encoder(tmp_path)
    assert "\n" not in str(error.value)
    torch.save(weights, tmp_path / "pytorch_model.bin")
    file.unlink()
    with pytest.raises(UserError, match="cannot load the weights"):
        load_encoder(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layers": 3}, "encoder.layers is not a field"),
        ({"model_type": "bert"}, "bidirectional llama"),
        ({"hidden_act": "none"}, "cannot build the encoder"),
        ({"hidden_size": "wide"}, "cannot build the encoder"),
    ],
)
def test_a_wrong_architecture_is_refused(change, words):
    with pytest.raises(UserError, match=words):
        build_encoder(ENCODER | change)


def test_a_row_longer_than_the_positions_is_refused():
    with pytest.raises(UserError, match="rows of 17 tokens, and the encoder reads 16"):
        encoder().hidden_for_head(tokens(1, 17))

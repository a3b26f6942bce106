"""Released checkpoints: a synthetic one, and its logits from the reference's formulas alone."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from longctx.errors import UserError
from longctx.models.cepe.checkpoints import from_reference_checkpoint, to_reference_checkpoint
from tests.helpers.tiny_cepe import cepe

DECODER = {
    "model_type": "llama", "architectures": ["LlamaForCausalContextLM"], "vocab_size": 50,
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "rope_scaling": None,
    "max_position_embeddings": 64, "tie_word_embeddings": False, "torch_dtype": "float32",
    "bos_token_id": 1, "eos_token_id": 2, "pretraining_tp": 1, "transformers_version": "4.34.1",
}  # fmt: skip
ENCODER = {
    "model_type": "llama", "is_encoder": True, "vocab_size": 51, "hidden_size": 16,
    "intermediate_size": 28, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu",
    "max_position_embeddings": 32, "pad_token_id": 0, "_name_or_path": "enc", "use_cache": True,
}  # fmt: skip
REFERENCE = DECODER | {
    "encoder_config": ENCODER,
    "encoder_hidden_size": 16,
    "num_cross_attn_layers": 3,
    "do_cross_attention": True,
}
FEWER = REFERENCE | {"num_cross_attn_layers": 2}


def block_shapes(config, kind):
    d = config["hidden_size"] // config["num_attention_heads"]
    h, f, k = config["hidden_size"], config["intermediate_size"], config["num_key_value_heads"] * d
    shapes = {f"self_attn.{n}_proj": (h, h) for n in "qo"}
    shapes |= {f"self_attn.{n}_proj": (k, h) for n in "kv"}
    shapes |= {"mlp.gate_proj": (f, h), "mlp.up_proj": (f, h), "mlp.down_proj": (h, f)}
    shapes |= {"input_layernorm": (h,), "post_attention_layernorm": (h,)}
    if kind == "cross":
        e = REFERENCE["encoder_hidden_size"]
        shapes |= {f"cross_attn.{n}_proj": (h, h) for n in "qo"}
        shapes |= {f"cross_attn.{n}_proj": (k, e) for n in "kv"}
        shapes |= {"cross_attn.layernorm": (h,)}
    return shapes


def synthetic(config):
    """Weights of a reference model, by the released names."""
    random = torch.Generator().manual_seed(0)
    sizes = {"model.embed_tokens": (50, 24), "model.norm": (24,), "lm_head": (50, 24)}
    sizes |= {"encoder.embed_tokens": (51, 16), "encoder.norm": (16,)}
    for i in range(3):
        cross = "cross" if i >= 3 - config["num_cross_attn_layers"] else "plain"
        sizes |= {f"model.layers.{i}.{k}": v for k, v in block_shapes(DECODER, cross).items()}
    for i in range(2):
        sizes |= {f"encoder.layers.{i}.{k}": v for k, v in block_shapes(ENCODER, "plain").items()}
    return {
        f"{name}.weight": torch.randn(size, generator=random) * 0.3 + (len(size) == 1)
        for name, size in sizes.items()
    }


def norm(x, weight, eps):
    return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * weight


def rope(x):
    """`[... s d]` rotated in halves, from position 0."""
    d = x.shape[-1]
    angles = torch.arange(x.shape[-2])[:, None] / 10000.0 ** (torch.arange(0, d, 2) / d)
    a, b = x.chunk(2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


def heads(x, weight, d):
    return (x @ weight.T).unflatten(-1, (-1, d)).transpose(-3, -2)


def attend(q, k, v, seen):
    """`[b hq s d]` over `[b hk n d]`, where `seen` `[b 1 s n]`."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~seen, torch.finfo(q.dtype).min)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def run(w, prefix, config, ids, seen, context=None):
    """The stack of blocks below `prefix`; cross-attention where there are weights of it."""
    d, eps = config["hidden_size"] // config["num_attention_heads"], config["rms_norm_eps"]
    x = w[f"{prefix}.embed_tokens.weight"][ids]
    for i in range(config["num_hidden_layers"]):
        p = f"{prefix}.layers.{i}"
        y = norm(x, w[f"{p}.input_layernorm.weight"], eps)
        q, k, v = (heads(y, w[f"{p}.self_attn.{n}_proj.weight"], d) for n in "qkv")
        x = x + attend(rope(q), rope(k), v, seen) @ w[f"{p}.self_attn.o_proj.weight"].T
        if context is not None and f"{p}.cross_attn.q_proj.weight" in w:
            states, real = context
            y = norm(x, w[f"{p}.cross_attn.layernorm.weight"], eps)
            q = heads(y, w[f"{p}.cross_attn.q_proj.weight"], d)
            k, v = (heads(states, w[f"{p}.cross_attn.{n}_proj.weight"], d) for n in "kv")
            wide = real[:, None, None].expand(-1, 1, ids.shape[1], -1)
            x = x + attend(q, k, v, wide) @ w[f"{p}.cross_attn.o_proj.weight"].T
        y = norm(x, w[f"{p}.post_attention_layernorm.weight"], eps)
        gate, up = (y @ w[f"{p}.mlp.{n}_proj.weight"].T for n in ("gate", "up"))
        x = x + (F.silu(gate) * up) @ w[f"{p}.mlp.down_proj.weight"].T
    return norm(x, w[f"{prefix}.norm.weight"], eps)


def reference_logits(w, ids, context_ids, context_mask):
    """What the reference computes from (b, n_ctx, len) contexts."""
    b, c, length = context_ids.shape
    flat, real = context_ids.reshape(b * c, length), context_mask.reshape(b * c, length)
    both = real[:, None, None].expand(-1, 1, length, -1)
    states = run(w, "encoder", ENCODER, flat, both).reshape(b, c * length, -1)
    causal = torch.ones(ids.shape[1], ids.shape[1]).tril().bool()[None, None]
    context = (states, context_mask.reshape(b, -1))
    return run(w, "model", DECODER, ids, causal, context) @ w["lm_head.weight"].T


def write(path, config, weights, form="safetensors"):
    """A directory of one of the forms in which models were released."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    if form == "bin":
        torch.save(weights, path / "pytorch_model.bin")
        return path
    if form == "safetensors":
        save_file(weights, path / "model.safetensors", {"format": "pt"})
        return path
    names = sorted(weights)
    shards = {"a": names[::2], "b": names[1::2]}
    index = {"metadata": {"total_size": 1}, "weight_map": {}}
    for shard, own in shards.items():
        file = f"model-{shard}.safetensors"
        save_file({n: weights[n] for n in own}, path / file, {"format": "pt"})
        index["weight_map"] |= dict.fromkeys(own, file)
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def inputs():
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 50, (2, 11), generator=random)
    contexts = torch.randint(3, 50, (2, 3, 8), generator=random)
    mask = torch.ones_like(contexts, dtype=torch.bool)
    mask[0, 2, 5:] = mask[1, 0, 3:] = False
    return ids, contexts, mask


@pytest.mark.parametrize("form", ["safetensors", "sharded", "bin"])
@pytest.mark.parametrize("config", [REFERENCE, FEWER], ids=["all layers", "two layers"])
def test_logits_are_the_references(tmp_path, config, form):
    weights = synthetic(config)
    model = from_reference_checkpoint(write(tmp_path, config, weights, form)).eval()
    ids, contexts, mask = inputs()
    want = reference_logits(weights, ids, contexts, mask)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            found = model(ids, context_ids=contexts, context_mask=mask).logits
        assert found.dtype == torch.float32
        assert torch.allclose(found, want, atol=1e-4, rtol=1e-4)
    whole = torch.ones_like(mask)
    with torch.no_grad():
        found = model(ids, context_ids=contexts).logits
    assert torch.allclose(
        found, reference_logits(weights, ids, contexts, whole), atol=1e-4, rtol=1e-4
    )
    assert (found - want).abs().max() > 0.01
    assert model.config.mask_token_id == 50


def test_there_and_back_is_exact(tmp_path):
    weights = synthetic(FEWER)
    source = write(tmp_path / "a", FEWER, weights)
    model = from_reference_checkpoint(source).eval()
    to_reference_checkpoint(model, tmp_path / "b")
    written = load_file(tmp_path / "b" / "model.safetensors")
    assert written.keys() == weights.keys()
    assert all(torch.equal(written[k], weights[k]) for k in weights)
    fields = json.loads((tmp_path / "b" / "config.json").read_text())
    for key, value in FEWER.items():
        if key not in ("encoder_config", "transformers_version", "torch_dtype", "rope_scaling"):
            assert fields[key] == value, key
    for key, value in ENCODER.items():
        assert key in ("_name_or_path", "use_cache") or fields["encoder_config"][key] == value
    ids, contexts, mask = inputs()
    again = from_reference_checkpoint(tmp_path / "b").eval()
    with torch.no_grad():
        own = [m(ids, context_ids=contexts, context_mask=mask).logits for m in (model, again)]
    assert torch.equal(*own)


def test_dtype_and_attention_of_choice(tmp_path):
    source = write(tmp_path, REFERENCE, synthetic(REFERENCE))
    model = from_reference_checkpoint(
        source, dtype="bf16", attention={"name": "dca", "chunk_len": 8}
    )
    assert model.dtype == torch.bfloat16
    assert model.config.decoder_config.longctx_attention["chunk_len"] == 8


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"do_cross_attention": False}, "do_cross_attention=false"),
        ({"encoder_hidden_size": 8}, "encoder_hidden_size=8 is not"),
        ({"num_cross_attn_hidden_states": 3}, "states of several layers"),
        ({"num_attention_heads": 8}, r"k_proj.weight is \[12, 16\] there.* make it \[6, 16\]"),
        ({"num_hidden_layers": 4, "num_cross_attn_layers": 4}, "lacks weights.*layers.3"),
        ({"num_hidden_layers": 2, "num_cross_attn_layers": 2}, "unknown weights.*layers.2"),
        ({"num_cross_attn_layers": 5}, "cross_layers=5 must be 1 to 3"),
    ],
)
def test_checkpoints_of_something_else(tmp_path, change, words):
    source = write(tmp_path, REFERENCE | change, synthetic(REFERENCE))
    with pytest.raises(UserError, match=words) as error:
        from_reference_checkpoint(source)
    assert "\n" not in str(error.value)


def test_a_plain_decoder_is_not_one(tmp_path):
    with pytest.raises(UserError, match=r"not a checkpoint of the CEPE reference.*encoder_config"):
        from_reference_checkpoint(write(tmp_path, DECODER, synthetic(REFERENCE)))
    with pytest.raises(UserError, match="does not exist"):
        from_reference_checkpoint("./nowhere")


def test_a_pickle_of_more_than_tensors_is_not_opened(tmp_path):
    class Harm:
        def __reduce__(self):
            return (exec, ("raise SystemExit('opened')",))

    source = write(tmp_path, REFERENCE, {"lm_head.weight": Harm()}, "bin")
    with pytest.raises(UserError, match="more than tensors") as error:
        from_reference_checkpoint(source)
    assert "\n" not in str(error.value)


def test_what_the_layout_cannot_say_is_refused(tmp_path):
    with pytest.raises(UserError, match="Llama decoder, not 'mistral'"):
        to_reference_checkpoint(cepe("mistral"), tmp_path)
    with pytest.raises(UserError, match="no rope scaling 'linear'"):
        to_reference_checkpoint(
            cepe(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
            tmp_path,
        )

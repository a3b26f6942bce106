"""Loading and building: rope is what longctx.rope says, attention is what was asked."""

import copy
import json
import shutil

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig

import longctx
from longctx import rope as scaling
from longctx.attention import full
from longctx.config import RopeConfig
from longctx.errors import UserError
from longctx.models import attach
from longctx.models.configure import native_window
from longctx.models.load import build_model, describe, load_model, load_tokenizer

WINDOW = 32
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": WINDOW,
}
LLAMA = {"model_type": "llama", **SIZES}
MODELS = {
    "llama": LLAMA,
    "mistral": {"model_type": "mistral", **SIZES, "sliding_window": None},
    "qwen2": {"model_type": "qwen2", **SIZES},
    "qwen3": {"model_type": "qwen3", **SIZES, "head_dim": 8},
}
ROPES = {
    "none": RopeConfig(),
    "pi": RopeConfig("pi", factor=4),
    "ntk": RopeConfig("ntk", target=4 * WINDOW),
    "dynamic_ntk": RopeConfig("dynamic_ntk", factor=1),
    "yarn": RopeConfig("yarn", factor=4, beta_fast=32, beta_slow=1),
}


def tokens(rows, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 96, (rows, length), generator=generator)


def saved(tmp_path, architecture=None, **options):
    build_model(architecture or LLAMA, **options).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A plain Llama on disk; not to be changed."""
    return saved(tmp_path_factory.mktemp("checkpoint"))


# --- rope ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [1e4, 1e6])
@pytest.mark.parametrize("name", ROPES)
def test_our_formula_is_transformers(name, base):
    """A plain transformers model with our parameters has our frequencies."""
    native = {"rope_type": "default", "rope_theta": base}
    config = LlamaConfig(**{**SIZES, "hidden_size": 256, "max_position_embeddings": 512})
    config.rope_parameters = scaling.rope_parameters(ROPES[name], native, 512, 64)
    config.max_position_embeddings = scaling.extended_window(ROPES[name], 512)
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    frequencies, attention_factor = scaling.inv_freq(ROPES[name], base, 512, 64)
    torch.testing.assert_close(rotary.inv_freq.double(), frequencies, rtol=2e-6, atol=0)
    assert rotary.attention_scaling == pytest.approx(attention_factor)


@pytest.mark.parametrize("name", ROPES)
def test_rope_of_a_loaded_model(name, checkpoint):
    model = load_model(str(checkpoint), rope=ROPES[name])
    window = scaling.extended_window(ROPES[name], WINDOW)
    frequencies, factor = scaling.inv_freq(ROPES[name], 1e4, WINDOW, 8)
    rotary = model.model.rotary_emb
    torch.testing.assert_close(rotary.inv_freq.double(), frequencies, rtol=2e-6, atol=0)
    assert rotary.attention_scaling == pytest.approx(factor)
    assert native_window(model.config) == window
    if name == "dynamic_ntk":  # which rotates late (test_late_rotary.py), but not behind sdpa
        model.set_attn_implementation("sdpa")
    position = torch.tensor([[0, 1, WINDOW - 1]])  # within the window: dynamic leaves it alone
    cos, _ = rotary(torch.zeros(1), position)
    angles = position[0, :, None].double() * frequencies
    torch.testing.assert_close(cos[0, :, :4].double(), angles.cos() * factor, rtol=0, atol=1e-5)


def test_pi_shows_in_the_logits(checkpoint):
    """PI at positions s m is the unscaled model at positions m: the scaling is really applied."""
    ids = tokens(1, 12)
    plain = load_model(str(checkpoint))(ids).logits
    pi = load_model(str(checkpoint), rope=ROPES["pi"])
    # Positions that do not restart: 0, 4, 8, ...
    spread = pi(ids, position_ids=4 * torch.arange(12)[None]).logits
    torch.testing.assert_close(spread, plain, rtol=0, atol=1e-5)
    assert (pi(ids).logits - plain).abs().max() > 1e-3


def test_a_rope_that_is_not_applied_is_refused(monkeypatch):
    wrong = lambda *a, **k: {"rope_type": "default", "rope_theta": 1e4}  # noqa: E731
    monkeypatch.setattr(scaling, "rope_parameters", wrong)
    with pytest.raises(RuntimeError, match=r"differs from longctx\.rope"):
        build_model(LLAMA, rope=ROPES["pi"])


def test_a_scaled_checkpoint_keeps_its_rope(tmp_path):
    path = saved(tmp_path, rope=ROPES["yarn"])
    model = load_model(str(path))
    assert describe(model)["rope_type"] == "yarn"
    assert native_window(model.config) == 4 * WINDOW
    with pytest.raises(UserError, match=r"\(yarn\).*rope\.name=pi"):
        load_model(str(path), rope=ROPES["pi"])


def test_dynamic_ntk_depends_on_this_call_only():
    model = build_model(LLAMA, rope=ROPES["dynamic_ntk"]).eval()
    model.set_attn_implementation("sdpa")
    inside, beyond, longest = tokens(1, 20), tokens(1, 3 * WINDOW), tokens(1, 5 * WINDOW)
    first = [model(x).logits for x in (inside, beyond)]
    model(longest)
    again = [model(x).logits for x in (beyond, inside)]
    assert torch.equal(first[0], again[1])
    assert torch.equal(first[1], again[0])
    rotary = model.model.rotary_emb
    model(beyond)
    frequencies, _ = scaling.inv_freq(ROPES["dynamic_ntk"], 1e4, WINDOW, 8, 3 * WINDOW)
    torch.testing.assert_close(rotary.inv_freq.double(), frequencies, rtol=2e-6, atol=0)


@pytest.mark.parametrize("cast", ["to", "bfloat16", "deepcopy", "build"])
def test_angles_are_fp32_under_bf16(cast):
    """A plain cast would round the frequencies: at position 4000 that is off by whole turns."""
    model = build_model(LLAMA, dtype="bf16" if cast == "build" else "fp32")
    model = {
        "to": lambda m: m.to(torch.bfloat16),
        "bfloat16": torch.nn.Module.bfloat16,  # what DeepSpeed calls
        "deepcopy": lambda m: copy.deepcopy(m).to(torch.bfloat16),
        "build": lambda m: m,
    }[cast](model)
    rotary = model.model.rotary_emb
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert rotary.inv_freq.dtype == torch.float32
    position = torch.tensor([[4001]])
    cos, _ = rotary(torch.zeros(1), position)
    exact = (4001 * scaling.inv_freq(RopeConfig(), 1e4, WINDOW, 8)[0]).cos()
    torch.testing.assert_close(cos[0, 0, :4].double(), exact, rtol=0, atol=1e-3)
    assert torch.isfinite(model(tokens(1, 8)).logits).all()


# --- attention -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_stock_model(name):
    """Same logits as sdpa in one document; packed documents as each alone; forward and gradient."""
    model = build_model(MODELS[name]).double()
    stock = copy.deepcopy(model)
    stock.set_attn_implementation("sdpa")
    ids = tokens(2, 20)
    torch.testing.assert_close(model(ids).logits, stock(ids).logits, rtol=0, atol=1e-12)

    lengths = (6, 1, 13)
    positions = torch.cat([torch.arange(n) for n in lengths])[None].expand(2, -1)
    weight = torch.randn(2, 20, 96, dtype=torch.float64)
    packed = model(ids, position_ids=positions).logits
    alone = torch.cat([stock(part).logits for part in ids.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-12)
    (packed * weight).sum().backward()
    (alone * weight).sum().backward()
    for ours, theirs in zip(model.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_positions_reach_the_attention(name, checkpointing, monkeypatch):
    seen = []
    plain = full.Full.attend

    def spy(self, *args, **kwargs):
        seen.append(kwargs["position_ids"])
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(full.Full, "attend", spy)
    model = build_model(MODELS[name]).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3, 4]] * 2)
    model(tokens(2, 10), position_ids=positions, use_cache=False).logits.sum().backward()
    assert len(seen) == (4 if checkpointing else 2)
    assert all(torch.equal(p, positions) for p in seen)


@pytest.mark.parametrize("name", MODELS)
def test_generate_with_cache_and_left_padding(name):
    """A batch of unequal prompts gives what each prompt gives alone without a cache."""
    model = build_model(MODELS[name]).eval()
    prompts = [tokens(1, n, seed=n)[0] for n in (9, 4, 6)]
    ids = torch.zeros(3, 9, dtype=torch.long)
    mask = torch.zeros(3, 9, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, 9 - len(prompt) :] = prompt
        mask[row, 9 - len(prompt) :] = 1
    options = {
        "max_new_tokens": 7, "min_new_tokens": 7, "do_sample": False, "pad_token_id": 0,
        "output_logits": True, "return_dict_in_generate": True,
    }  # fmt: skip
    batch = model.generate(ids, attention_mask=mask, **options)
    for row, prompt in enumerate(prompts):
        alone = model.generate(prompt[None], use_cache=False, **options)
        for together, single in zip(batch.logits, alone.logits, strict=True):
            torch.testing.assert_close(together[row], single[0], rtol=0, atol=1e-5)


def test_chunked_prefill():
    model = build_model(LLAMA).eval()
    ids = tokens(2, 20)
    whole = model(ids).logits
    start = model(ids[:, :7], use_cache=True)
    rest = model(ids[:, 7:], past_key_values=start.past_key_values).logits
    torch.testing.assert_close(torch.cat((start.logits, rest), 1), whole, rtol=0, atol=1e-5)


def test_masks_that_would_be_dropped_are_refused():
    model = build_model(LLAMA)
    ids = tokens(1, 8)
    with pytest.raises(UserError, match=r"\[1, 1, 8, 8\]"):
        model(ids, attention_mask=torch.ones(1, 1, 8, 8, dtype=torch.bool))
    cache = transformers.StaticCache(config=model.config, max_cache_len=16)
    with pytest.raises(UserError, match="static cache"):
        model(ids, past_key_values=cache)


def test_other_models_in_the_process_are_untouched(checkpoint):
    before = dict(transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS)
    names = {n: f for n, f in before.items() if not n.startswith("longctx_")}
    build_model(LLAMA)
    after = dict(transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS)
    assert all(after[n] is f for n, f in names.items())
    stock = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert stock.config._attn_implementation == "sdpa"
    assert not isinstance(stock.model.rotary_emb, attach._Rotary)


def test_unknown_attention_and_numbers():
    with pytest.raises(UserError, match=r"'flash' is not one of .*full"):
        build_model(LLAMA, attention="flash")
    with pytest.raises(UserError, match=r"attention\.window is not a number of 'full'"):
        build_model(LLAMA, attention={"name": "full", "window": 3})
    for helper in ("kernels", "reference"):
        with pytest.raises(UserError, match="is not one of"):
            build_model(LLAMA, attention=helper)


@pytest.mark.parametrize(
    "architecture",
    [
        {"model_type": "mistral", **SIZES, "sliding_window": 16},
        {"model_type": "qwen2", **SIZES, "use_sliding_window": True, "sliding_window": 16,
         "max_window_layers": 1},
    ],
)  # fmt: skip
def test_an_active_sliding_window_is_refused(architecture):
    with pytest.raises(UserError, match="sliding window"):
        build_model(architecture)


# --- building ------------------------------------------------------------------------------------


def test_seed_decides_the_weights_and_leaves_the_generator():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, same, other = (build_model(LLAMA, seed=s).state_dict() for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[k], same[k]) for k in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])
    half = build_model(LLAMA, seed=1, dtype="bf16").state_dict()
    assert all(torch.equal(one[k].bfloat16(), half[k]) for k in one)


def test_meta_counts_llama2_7b_without_memory():
    sizes = {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096,
    }  # fmt: skip
    model = build_model({"model_type": "llama", **sizes}, rope=ROPES["pi"], meta=True)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    facts = describe(model)
    assert facts["parameters"] == 6_738_415_616
    assert facts["window"] == 16384


def test_faults_in_an_architecture():
    with pytest.raises(UserError, match="model_type"):
        build_model(SIZES)
    with pytest.raises(UserError, match=r"hiden_size is not a field of 'llama'"):
        build_model({**LLAMA, "hiden_size": 3})
    with pytest.raises(UserError, match="multiple"):
        build_model({**LLAMA, "num_attention_heads": 5})
    with pytest.raises(UserError, match="dtype='fp8'"):
        build_model(LLAMA, dtype="fp8")
    with pytest.raises(UserError, match=r"rope\.scale is not one of"):
        build_model(LLAMA, rope={"name": "pi", "scale": 2})


def test_describe(checkpoint):
    facts = describe(load_model(str(checkpoint), rope={"name": "pi", "factor": 2}, dtype="bf16"))
    assert facts["attention"] == "full" and "kernel" not in facts
    assert (facts["rope_type"], facts["rope_factor"], facts["rope_base"]) == ("linear", 2.0, 1e4)
    assert facts["inv_freq_first"] == 0.5
    assert (facts["window"], facts["dtype"]) == (2 * WINDOW, "bfloat16")


# --- faults of a path ----------------------------------------------------------------------------


def one_line(error):
    return "\n" not in str(error.value)


@pytest.mark.parametrize("path", ["/no/such/place", "./missing", "a/b/c", "missing.gguf"])
def test_a_missing_path(path):
    with pytest.raises(UserError, match="does not exist") as error:
        load_model(path)
    assert one_line(error)


def test_a_hub_name_that_cannot_be_reached():
    with pytest.raises(UserError, match="no-such-owner/no-such-model") as error:
        load_model("no-such-owner/no-such-model")
    assert one_line(error)


def test_a_file_that_is_no_model(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="neither a model directory"):
        load_model(str(tmp_path / "model.bin"))


def test_an_empty_directory(tmp_path):
    with pytest.raises(UserError, match="configuration") as error:
        load_model(str(tmp_path))
    assert one_line(error)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "t5"}, "not a decoder-only"),
        ({"model_type": "vit"}, "not a decoder-only"),
        ({"model_type": "gpt2", "n_embd": 32, "n_head": 4, "n_layer": 1}, "no rotary"),
        ({"model_type": "nonsense"}, "cannot read the configuration"),
    ],
)
def test_not_a_rotary_decoder(tmp_path, config, says):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=says) as error:
        load_model(str(tmp_path))
    assert one_line(error)


def test_corrupt_missing_and_foreign_weights(tmp_path, checkpoint):
    def copy_of(name):
        return shutil.copytree(checkpoint, tmp_path / name)

    torn = copy_of("torn") / "model.safetensors"
    torn.write_bytes(torn.read_bytes()[: torn.stat().st_size // 2])
    (copy_of("absent") / "model.safetensors").unlink()
    (copy_of("pickled") / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    wide = copy_of("wide") / "config.json"
    wide.write_text(json.dumps({**json.loads(wide.read_text()), "intermediate_size": 64}))
    for name in ("torn", "absent", "pickled", "wide"):
        with pytest.raises(UserError, match="cannot load the weights") as error:
            load_model(str(tmp_path / name))
        assert one_line(error)
    for name, layers, says in (("deep", 3, "lacks weights"), ("flat", 1, "unknown weights")):
        config = copy_of(name) / "config.json"
        config.write_text(
            json.dumps({**json.loads(config.read_text()), "num_hidden_layers": layers})
        )
        with pytest.raises(UserError, match=says):
            load_model(str(tmp_path / name))


def test_a_missing_tokenizer(tmp_path, checkpoint):
    with pytest.raises(UserError, match="cannot read the tokenizer") as error:
        load_tokenizer(str(checkpoint))
    assert one_line(error)


def test_top_level_name():
    assert longctx.load_model is load_model
    with pytest.raises(AttributeError, match="no_such"):
        _ = longctx.no_such

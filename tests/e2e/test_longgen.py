"""LongGen: the numbers of its recipe; a model is trained, exported, decodes; what it can learn."""

import json
import math

import pytest
import torch
from torch.nn import functional

from longctx import cli
from longctx.config import RunConfig
from longctx.models.evicting_cache import KeptLayer
from longctx.models.load import build_model, load_model
from longctx.plan import describe
from longctx.recipes.causal_lm import RECIPE
from tests.helpers.entry import run_entry
from tests.helpers.tiny import make_store, tiny_arguments

TINY = [
    "recipe=longgen",
    "model=lab_scratch",
    "data.seq_len=96",
    "data.long_tokens=null",
    "train.dtype=fp32",
    "train.keep_last=1",
    "parallel=zero0",
    "attention.full_layers=[1]",  # two layers have no middle third
]
PATTERNS = {
    "window": ["attention.sink_tokens=2", "attention.window_tokens=10"],
    "blocks": ["attention=longgen_blocks", "attention.block_size=4", "attention.local_blocks=2",
               "attention.stride=4"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("model", "full", "saved"),
    [("llama2_7b", "10..21", "24.625 GiB, with full attention 64 GiB; 61.52% saved"),
     ("llama2_70b", "26..53", "14.406 GiB, with full attention 40 GiB; 63.98% saved")],
)  # fmt: skip
def test_as_stated(model, full, saved, tmp_path):
    """2410.01485 with what docs/methods/longgen.md says of Fu et al. and of ours."""
    stores = ",".join(f"{tmp_path}/{name}" for name in "abcdefg")
    given = ["recipe=longgen", f"model={model}", "data=by_source", f"data.store=[{stores}]"]
    run = cli.compose(given, RunConfig, "train", "run_schema")
    assert run.train.max_steps * run.train.batch_rows * run.data.seq_len == 1192 * 32 * 131_072
    assert (run.rope.name, run.rope.base) == ("abf", 5e6)
    assert (run.optim.lr, run.optim.betas, run.optim.schedule) == (2e-5, [0.9, 0.95], "constant")
    assert len(run.data.store) == 7 and sum(run.data.weights) == 100
    assert run.parallel.zero_stage == 3 and run.parallel.activation_checkpointing
    said = describe.report(run, RECIPE)
    numbers = f"sink_tokens=64, window_tokens=1984, full_layers=[{full}]"
    assert f"attention longgen_window({numbers}), window 131072, rope_type default" in said
    assert "rope_base 5000000" in said
    assert "= 4,194,304 tokens per step; x 1,192 steps = 5B tokens" in said
    assert f"\ncache of a row of 131,072 tokens: {saved}\n" in said


@pytest.mark.parametrize("name", PATTERNS)
def test_the_loss_falls_and_the_export_decodes(name, tmp_path):
    store = make_store(tmp_path / "store", few=True)
    arguments = tiny_arguments(store, tmp_path / "run", *TINY, *PATTERNS[name])
    arguments.remove("recipe=pretrain")
    done = run_entry(arguments, tmp_path / "log")
    assert done.code == 0, done.err[-2000:]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert len(losses) == 20 and losses[-1] < losses[0] - 0.5

    model = load_model(tmp_path / "run" / "hf").eval()
    assert model.config.longctx_attention["name"] == f"longgen_{name}"
    tokens = torch.randint(4, 12, (1, 40), generator=torch.Generator().manual_seed(0))
    end = {"do_sample": False, "max_new_tokens": 30, "eos_token_id": None, "pad_token_id": 0}
    out = model.generate(tokens, return_dict_in_generate=True, **end)
    sparse, full = out.past_key_values.layers
    assert isinstance(sparse, KeptLayer) and sparse.keys.shape[2] < 40 < full.keys.shape[2]
    with torch.no_grad():
        whole = model(out.sequences, use_cache=False).logits[:, 39:-1]
    assert torch.equal(whole.argmax(-1), out.sequences[:, 40:])


# --- what the full layer is for -----------------------------------------------------------------

LENGTH, KEYS, REACH = 32, 4, 3 * 7
SMALL = {
    "model_type": "llama", "vocab_size": KEYS + 2, "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}  # fmt: skip


def asked(rows, generator):
    """Filler with one key in it, farther back than sparse layers reach, and the key."""
    tokens = torch.full((rows, LENGTH), KEYS)
    tokens[:, -1] = KEYS + 1
    keys = torch.randint(KEYS, (rows,), generator=generator)
    where = torch.randint(2, LENGTH - 1 - REACH, (rows,), generator=generator)
    tokens[torch.arange(rows), where] = keys
    return tokens, keys


@pytest.mark.parametrize(("full", "learns"), [("hourglass", True), ([], False)])
def test_a_full_layer_finds_what_is_beyond_the_window(full, learns):
    attention = {"name": "longgen_window", "sink_tokens": 2, "window_tokens": 8}
    model = build_model(SMALL, attention={**attention, "full_layers": full})
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        tokens, keys = asked(16, generator)
        loss = functional.cross_entropy(model(tokens).logits[:, -1], keys)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    tokens, keys = asked(512, generator)
    with torch.no_grad():
        logits = model(tokens).logits[:, -1]
    loss = float(functional.cross_entropy(logits, keys))
    assert loss < 0.1 if learns else loss > 0.98 * math.log(KEYS)

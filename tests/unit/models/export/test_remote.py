"""A checkpoint with an attention that transformers lacks: refused, or loaded as it was saved."""

import ast
import itertools
import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    LlamaForCausalLM,
)
from transformers.dynamic_module_utils import get_relative_import_files

import longctx
from longctx.errors import UserError
from longctx.models.cepe.encoder import build_encoder
from longctx.models.cepe.model import CepeForCausalLM
from longctx.models.export.directory import export
from longctx.models.export.remote import closure
from longctx.models.load import architecture_of, build_model
from tests.helpers.methods import FIRST, kind_of
from tests.helpers.networks import KINDS, WINDOW, network, tokens

pytestmark = pytest.mark.long

DCA = {"name": "dca", "chunk_len": 6, "local_window": 3, "max_positions": 10}
RECORDED = [name for name in FIRST if not kind_of(name).plain]  # these bring code of their own
# Without longctx first, then with it, imported after transformers.
STRANGER = """
import sys
sys.modules["longctx"] = None
import torch
from transformers import AutoModelForCausalLM
path, again, out = sys.argv[1:]
try:
    AutoModelForCausalLM.from_pretrained(path)
    raise SystemExit("loaded without its attention")
except ValueError as error:
    assert "trust_remote_code=True" in str(error), error

def read(model):
    model.eval().generation_config.eos_token_id = None
    ids = torch.arange(1, 41)[None]
    with torch.no_grad():
        logits = model(ids).logits
        made = model.generate(ids, do_sample=False, max_new_tokens=12, pad_token_id=0)
        whole = model(made[:, :-1]).logits.argmax(-1)
    assert torch.equal(made[:, 40:], whole[:, 39:])  # the cache holds what a long call sees
    return logits, made

model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
logits, made = read(model)
torch.save({"logits": logits, "made": made}, out)
model.save_pretrained(again)
del model
for same in (path, again):
    copy = read(AutoModelForCausalLM.from_pretrained(same, trust_remote_code=True))
    assert torch.equal(copy[0], logits) and torch.equal(copy[1], made)
assert not [name for name in sys.modules if name.startswith("longctx.")]
del sys.modules["longctx"]
import longctx
for same in (path, again):
    for load in (AutoModelForCausalLM.from_pretrained, longctx.load_model):
        copy = load(same)
        assert type(copy).__module__ == "longctx.models.export.classes"
        assert torch.equal(read(copy)[0], logits)
"""
LONGCTX_FIRST = """
import sys
import longctx, longctx.data.store
assert not {"torch", "transformers", "huggingface_hub"} & set(sys.modules)
import torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    torch.save(model(torch.arange(1, 41)[None]).logits, sys.argv[2])
assert not [f for f in sys.meta_path if type(f).__module__ == "longctx.models.export.register"]
"""

# A model of our own class, its encoder, and a cache of our own layers.
OWN = """
import sys
sys.modules["longctx"] = None
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
cepe, encoder, longgen, again, out = sys.argv[1:]
ids, contexts = torch.arange(1, 41)[None], torch.arange(1, 33).view(1, 2, 16)
trust = {"trust_remote_code": True}
with torch.no_grad():
    model = AutoModelForCausalLM.from_pretrained(cepe, **trust).eval()
    found = {"cepe": model(ids, context_ids=contexts).logits}
    model.save_pretrained(again)
    copy = AutoModelForCausalLM.from_pretrained(again, **trust).eval()
    assert torch.equal(copy(ids, context_ids=contexts).logits, found["cepe"])
    found["encoder"] = AutoModelForMaskedLM.from_pretrained(encoder, **trust).eval()(ids).logits
    model = AutoModelForCausalLM.from_pretrained(longgen, **trust).eval()
    found["longgen"] = model(ids).logits
    made = model.generate(ids, do_sample=False, max_new_tokens=9, pad_token_id=0, eos_token_id=63,
        return_dict_in_generate=True)
    found["made"] = made.sequences
    held = [layer.keys.shape[2] for layer in made.past_key_values.layers]
    assert held[0] < held[1] == made.sequences.shape[1] - 1, held
torch.save(found, out)
"""

# Each method by the code beside it.
EVERY = """
import sys
sys.modules["longctx"] = None
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM
out, *paths = sys.argv[1:]
ids, found = torch.arange(1, 41)[None], {}
for path in paths:
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).eval()
    with torch.no_grad():
        made = model.generate(ids, do_sample=False, max_new_tokens=9, pad_token_id=0)
        found[Path(path).name] = model(ids).logits, made
torch.save(found, out)
"""


def run(script, *arguments, home):
    """The script in a fresh process that nobody answers questions of."""
    more = {"HF_HOME": str(home), "HF_MODULES_CACHE": str(home / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(
        command, check=False, env=os.environ | more, stdin=subprocess.DEVNULL,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A directory with a DCA model, and its logits of tokens 1..40."""
    model = network("llama", DCA).float()
    path = export(model, None, tmp_path_factory.mktemp("dca") / "hf")
    with torch.no_grad():
        return path, model(torch.arange(1, 41)[None]).logits


def test_the_folder_is_enough_and_nothing_less(exported, tmp_path):
    path, logits = exported
    run(STRANGER, path, tmp_path / "again", tmp_path / "out.pt", home=tmp_path)
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    torch.testing.assert_close(found["logits"], logits, rtol=0, atol=1e-5)
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == json.loads(
        (path / "config.json").read_text()
    )


def test_importing_longctx_is_enough(exported, tmp_path):
    """Before transformers; it is not imported by it."""
    path, logits = exported
    run(LONGCTX_FIRST, path, tmp_path / "out.pt", home=tmp_path)
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    torch.testing.assert_close(found, logits, rtol=0, atol=1e-5)


def test_models_of_our_own_and_caches_of_our_own(tmp_path):
    text, contexts = torch.arange(1, 41)[None], torch.arange(1, 33).view(1, 2, 16)
    plain, window = network().float(), {"sink_tokens": 4, "window_tokens": 8, "full_layers": [1]}
    longgen = network(attention={"name": "longgen_window", **window}, num_hidden_layers=3).float()
    with torch.no_grad():
        expected = {"longgen": longgen(text).logits}
        settings = {"do_sample": False, "max_new_tokens": 9, "pad_token_id": 0, "eos_token_id": 63}
        expected["made"] = longgen.generate(text, **settings)
        encoder = build_encoder(
            {"vocab_size": 65, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
             "num_attention_heads": 2, "max_position_embeddings": 48}
        ).eval()  # fmt: skip
        expected["encoder"] = encoder(text).logits
        cepe = CepeForCausalLM.from_parts(plain, encoder, init="normal", seed=1).eval()
        expected["cepe"] = cepe(text, context_ids=contexts).logits
        for read, model in ((AutoModelForCausalLM, cepe), (AutoModelForMaskedLM, encoder)):
            path = export(model, None, tmp_path / type(model).__name__)
            assert type(read.from_pretrained(path)) is type(model)
        assert torch.equal(
            AutoModelForCausalLM.from_pretrained(tmp_path / "CepeForCausalLM")
            .eval()(text, context_ids=contexts)
            .logits,
            expected["cepe"],
        )
        paths = [tmp_path / "CepeForCausalLM", path, export(longgen, None, tmp_path / "longgen")]
    run(OWN, *paths, tmp_path / "again", tmp_path / "out.pt", home=tmp_path)
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    assert torch.equal(found.pop("made"), expected.pop("made"))
    for name, logits in expected.items():
        torch.testing.assert_close(found[name], logits, rtol=0, atol=1e-5)
    assert type(longctx.load_model(paths[0])) is CepeForCausalLM


@torch.no_grad()
def test_every_method_travels_with_its_checkpoint(tmp_path):
    """One process without longctx reads an export of each."""
    text, expected = torch.arange(1, 41)[None], {}
    for name in RECORDED:
        model = network(attention=FIRST[name], num_hidden_layers=3).float()
        path = export(model, None, tmp_path / name)
        files = {file.stem for file in path.glob("longctx_attention_*")}
        assert {file for file in files if "attention_ops_" not in file} == {
            "longctx_attention_method", f"longctx_attention_{name}",
        }  # fmt: skip
        made = model.generate(text, do_sample=False, max_new_tokens=9, pad_token_id=0)
        expected[name] = model(text).logits, made
    run(EVERY, tmp_path / "out.pt", *(tmp_path / name for name in RECORDED), home=tmp_path)
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    assert found.keys() == set(RECORDED)
    for name, (logits, made) in expected.items():
        torch.testing.assert_close(found[name][0], logits, rtol=0, atol=1e-5)
        assert torch.equal(found[name][1], made), name


@pytest.mark.parametrize(
    ("kind", "attention"),
    [
        *(("mistral", "dca"), ("qwen2", DCA)),
        *((kind, FIRST[name]) for kind, name in zip(itertools.cycle(KINDS), RECORDED)),
    ],
    ids=str,
)
@torch.no_grad()
def test_from_pretrained_restores_and_saves_again(kind, attention, tmp_path):
    ours, text = network(kind, attention, num_hidden_layers=3), tokens(2, 40)
    ours.save_pretrained(tmp_path / "first")  # as `export` does, but without a tokenizer
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    plain = network(kind, num_hidden_layers=3)
    assert isinstance(again, type(plain)) and type(again) is type(ours)
    assert again.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(again(text).logits, ours(text).logits)
    again.save_pretrained(tmp_path / "second")
    second = longctx.load_model(tmp_path / "second")
    assert torch.equal(second(text).logits, ours(text).logits)
    files = [
        {p.name: p.read_bytes() for p in (tmp_path / d).iterdir()} for d in ("first", "second")
    ]
    assert files[0] == files[1]


@torch.no_grad()
def test_full_attention_stays_plain_and_is_plain_again(tmp_path):
    text, model = tokens(1, 40), network()
    before = model(text).logits
    for attention, plain in ((None, True), (DCA, False), ("full", True)):
        model = longctx.load_model(model, attention)
        path = export(model, None, tmp_path / "hf")
        config = json.loads((path / "config.json").read_text())
        assert (config["model_type"], type(model) is LlamaForCausalLM) == (
            ("llama", True) if plain else ("longctx", False)
        )
        assert plain == (not list(path.glob("*.py")))
        assert plain == (not [key for key in config if "longctx" in key or key == "auto_map"])
        assert plain == torch.equal(AutoModelForCausalLM.from_pretrained(path)(text).logits, before)
    path = export(longctx.load_model(model, DCA), None, tmp_path / "dca")
    full = longctx.load_model(path, "full")
    assert type(full) is LlamaForCausalLM and torch.equal(full(text).logits, before)


@torch.no_grad()
def test_weights_that_transformers_stores_otherwise(tmp_path):
    """Mixtral's experts are one tensor in the model and many in a checkpoint."""
    fields = {
        "model_type": "mixtral", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": WINDOW, "num_local_experts": 3, "sliding_window": None,
    }  # fmt: skip
    build_model(fields).save_pretrained(tmp_path / "full")
    ours, text = longctx.load_model(tmp_path / "full", DCA), tokens(1, 30)
    ours.save_pretrained(tmp_path / "dca")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dca")
    assert torch.equal(loaded(text).logits, ours(text).logits)


def test_another_attention_is_not_put_beside_what_is_set_up(exported):
    path, _ = exported
    with pytest.raises(UserError, match="'sdpa' would replace the attention"):
        AutoModelForCausalLM.from_pretrained(path, attn_implementation="sdpa")
    model = AutoModelForCausalLM.from_pretrained(path)
    with pytest.raises(UserError, match="'eager' would replace the attention"):
        model.set_attn_implementation("eager")


def test_what_reads_the_configuration_alone(exported, tmp_path):
    path, _ = exported
    assert AutoConfig.from_pretrained(path).longctx_attention["chunk_len"] == 6
    architecture = architecture_of(str(path))
    assert architecture["model_type"] == "llama"
    assert architecture["max_position_embeddings"] == WINDOW
    config = json.loads((path / "config.json").read_text()) | {"longctx_base": "newer"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="longctx_base='newer' is not a decoder"):
        longctx.load_model(tmp_path)


def test_transformers_finds_every_file_and_no_file_needs_longctx(exported):
    path, _ = exported
    files = sorted(str(p) for p in path.glob("*.py"))
    main = str(path / "modeling_longctx.py")
    assert sorted({main, *get_relative_import_files(main)}) == files
    for file in path.glob("*.py"):
        source = file.read_text()
        assert source.startswith("# ") and ", Apache-2.0" in source.splitlines()[0]
        for node in ast.walk(ast.parse(source)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names.append(node.module)
            assert not [name for name in names if name.split(".")[0] in ("longctx", "recipes")]


def test_closure_holds_a_method_and_not_the_others():
    found = closure(["longctx.attention.streaming"])
    assert {"longctx.attention.streaming", "longctx.attention.ops.merge", "longctx.errors"} <= set(
        found
    )
    assert not {"longctx.attention.dca", "longctx.models.load"} & set(found)

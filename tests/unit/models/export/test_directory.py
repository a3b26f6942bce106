"""An export is a model directory for people who have transformers and nothing of ours."""

import json
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from longctx.config import RopeConfig
from longctx.errors import UserError
from longctx.models.export.directory import export
from longctx.models.load import build_model, load_model, load_tokenizer

pytestmark = pytest.mark.long

TINY = {
    "model_type": "llama", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 32, "tie_word_embeddings": True,
}  # fmt: skip
YARN = RopeConfig("yarn", factor=4, beta_fast=32, beta_slow=1)
FRESH = """
import sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = torch.arange(40)[None]
with torch.no_grad():
    logits = model(ids).logits
torch.save({"logits": logits, "attention": model.config._attn_implementation}, sys.argv[2])
assert not any(name.startswith("longctx") for name in sys.modules)
"""


@pytest.fixture
def tokenizer(tmp_path):
    words = {f"w{i}": i for i in range(96)}
    model = Tokenizer(WordLevel(words, unk_token="w0"))
    model.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=model).save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def test_plain_transformers_gets_the_same_logits(tmp_path, tokenizer):
    """In a fresh process that imports transformers only."""
    model = build_model(TINY, rope=YARN).eval()
    ids = torch.arange(40)[None]
    with torch.no_grad():
        expected = model(ids).logits
    path = export(model, str(tokenizer), tmp_path / "out" / "hf")
    fresh = [sys.executable, "-c", FRESH, str(path), str(tmp_path / "logits.pt")]
    subprocess.run(fresh, check=True, cwd=tmp_path, capture_output=True)
    result = torch.load(tmp_path / "logits.pt", weights_only=True)
    assert result["attention"] == "sdpa"
    torch.testing.assert_close(result["logits"], expected, rtol=0, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(load_model(str(path))(ids).logits, expected)


def test_what_is_written(tmp_path, tokenizer):
    path = export(build_model(TINY, rope=YARN, dtype="bf16"), str(tokenizer), tmp_path / "hf")
    config = json.loads((path / "config.json").read_text())
    assert not [key for key in config if "longctx" in key or "attn_impl" in key]
    assert config["dtype"] == "bfloat16"
    assert config["rope_parameters"]["rope_type"] == "yarn"
    assert config["max_position_embeddings"] == 128
    assert (path / "model.safetensors").is_file()
    for file in tokenizer.iterdir():
        assert (path / file.name).read_bytes() == file.read_bytes()
    assert load_tokenizer(str(path))("w7 w3")["input_ids"] == [7, 3]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "tokenizer"]
    assert load_model(str(path)).dtype == torch.bfloat16


def test_an_earlier_export_is_replaced_and_anything_else_refused(tmp_path):
    first, second = (build_model(TINY, seed=s) for s in (1, 2))
    path = export(first, None, tmp_path / "hf")
    (path / "stale.txt").write_text("old")
    export(second, None, path)
    assert not (path / "stale.txt").exists()
    weights = load_model(str(path)).state_dict()
    assert torch.equal(weights["lm_head.weight"], second.state_dict()["lm_head.weight"])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not a model directory"):
        export(first, None, tmp_path / "other")
    assert (tmp_path / "other" / "thesis.txt").read_text() == "mine"


def test_a_failed_export_leaves_nothing(tmp_path, monkeypatch):
    model = build_model(TINY)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no tokenizer"):
        export(model, str(tmp_path / "empty"), tmp_path / "hf")

    def full_disk(directory):
        (directory / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model, "save_pretrained", full_disk)
    with pytest.raises(UserError, match="No space left"):
        export(model, None, tmp_path / "hf")
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]

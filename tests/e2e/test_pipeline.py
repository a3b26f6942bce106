"""Pretrain, extend, export: each step feeds the next, and plain transformers loads the result."""

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors import safe_open

from longctx.data.store import tokenizer_sha256
from longctx.models.load import load_model
from longctx.recipes.causal_lm import build_model
from longctx.train.checkpoint.export_checkpoint import checkpoint_model
from tests.helpers.entry import Done, run_entry
from tests.helpers.process import ROOT
from tests.helpers.tiny import make_store, tiny_arguments

LINE = {
    "step",
    "tokens",
    "loss",
    "lr",
    "grad_norm",
    "seconds",
    "tokens_per_second",
    "mfu",
    "peak_memory_bytes",
    "data_seconds",
    "skipped",
}
# What a user of the export has: transformers, and nothing of ours.
STRANGER = """
import sys
import numpy, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokens = torch.from_numpy(numpy.load(sys.argv[2]))
with torch.no_grad():
    numpy.save(sys.argv[3], model(tokens).logits.numpy())
assert AutoTokenizer.from_pretrained(sys.argv[1]).encode("a key")
assert not [name for name in sys.modules if name.startswith(("longctx", "peft"))]
"""


class Place(NamedTuple):
    store: Path
    base: Path
    path: Path

    def extend(self, name: str, *more: str) -> Path:
        """Extends the base model from 32 to 64 tokens; the run's directory."""
        run_dir = self.path / name
        arguments = [
            "recipe=pi",
            f"model='{self.base}'",
            f"data.store=['{self.store}']",
            f"data.held_out=['{self.store}']",
            "data.seq_len=64",
            "optim.lr=1e-2",
            "train.max_steps=2",
            "train.batch_rows=2",
            "train.eval_rows=2",
            "train.dtype=fp32",
            "train.export_dtype=fp32",
            f"run_dir='{run_dir}'",
            "logger=none",
            *more,
        ]
        good(run_entry(arguments, self.path / f"{name}-log"))
        return run_dir


def good(done: Done) -> None:
    assert done.code == 0, done.err[-2000:]


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(x) for x in (run_dir / "metrics.jsonl").read_text().splitlines()]


def weight_names(directory: Path) -> set[str]:
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        return set(file.keys())


def no_wandb() -> None:
    assert "wandb" not in sys.modules
    sys.modules["wandb"] = None  # importing it fails from here on


@pytest.fixture(scope="module")
def place(tmp_path_factory, lab_model):
    path = tmp_path_factory.mktemp("pipeline")
    store = make_store(path / "store", tokenizer=tokenizer_sha256(lab_model))
    more = ("train.max_steps=3", "train.eval_every=2", f"model.tokenizer='{lab_model}'")
    good(run_entry(tiny_arguments(store, path / "pretrain", *more), path / "log", no_wandb))
    return Place(store, path / "pretrain" / "hf", path)


def test_metrics_have_every_documented_key(place):
    found = metrics(place.path / "pretrain")
    assert [m["step"] for m in found] == [1, 2, 3]
    assert [m["tokens"] for m in found] == [256, 512, 768]
    assert [set(m) - LINE for m in found] == [set(), {"eval_loss"}, {"eval_loss"}]
    assert all(set(m) >= LINE for m in found)
    assert all(isinstance(v, int | float) for m in found for v in m.values())
    assert (place.path / "pretrain" / "config.yaml").is_file()
    assert not (place.path / "pretrain" / "wandb").exists()


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_extended_export_loads_in_plain_transformers(place, adapter, tmp_path):
    run_dir = place.extend(f"pi-{adapter}", f"adapter={adapter}")
    exported = run_dir / "hf"
    config = json.loads((exported / "config.json").read_text())
    rope = config["rope_parameters"]
    assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == ("linear", 2.0, 10000.0)
    assert config["max_position_embeddings"] == 64
    assert weight_names(exported) == weight_names(place.base)

    tokens = torch.randint(4, 64, (2, 64), generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "tokens.npy", tokens.numpy())
    files = [exported, tmp_path / "tokens.npy", tmp_path / "logits.npy"]
    command = [sys.executable, "-c", STRANGER, *map(str, files)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    strangers = torch.from_numpy(np.load(tmp_path / "logits.npy"))

    trained, _ = checkpoint_model(run_dir / "checkpoints" / "step_00000002", build_model)
    base = load_model(str(place.base), rope={"name": "pi", "factor": 2.0})
    with torch.no_grad():
        ours = load_model(str(exported))(tokens).logits
        assert torch.allclose(strangers, ours, rtol=0, atol=1e-6)
        assert torch.allclose(trained(tokens).logits, ours, rtol=0, atol=1e-6)
        assert not torch.allclose(base(tokens).logits, ours, rtol=0, atol=1e-3)  # it did learn


def test_the_exported_tokenizer_is_the_same_file(place, lab_model):
    assert tokenizer_sha256(place.base) == tokenizer_sha256(lab_model)


def test_wandb_offline(place, tmp_path):
    more = ("train.max_steps=1", "logger=wandb", "wandb.mode=offline")
    good(run_entry(tiny_arguments(place.store, tmp_path / "run", *more), tmp_path / "log"))
    runs = list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(runs) == 1 and runs[0].stat().st_size > 0
    assert not (ROOT / "wandb").exists()

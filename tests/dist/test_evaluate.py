"""`evaluate.py` on several processes gives what it gives on one."""

import json
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest

from longctx import cli
from longctx.data.store import StoreWriter, tokenizer_sha256
from longctx.eval.config import EvalConfig
from longctx.eval.evaluate import evaluate
from longctx.models.load import build_model
from longctx.parallel import mesh
from tests.helpers.process import ROOT, start
from tests.helpers.spawn import free_port, spawn

TOKENIZER = ROOT / "assets" / "lab-llama"
TINY = {
    "model_type": "llama", "vocab_size": 4096, "hidden_size": 32, "intermediate_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}  # fmt: skip


def arguments(folder, out, *more):
    return [
        f"model={folder / 'model'}", f"held_out={folder / 'store'}", f"out={out}", "device=cpu",
        "lengths=[128,250]", "batch_tokens=300", "samples=3", "tasks=[perplexity,passkey]",
        "perplexity.protocols=[token_matched]", "passkey.depths=[0,1]", *more,
    ]  # fmt: skip


def config(folder, out, *more):
    return cli.compose(arguments(folder, out, *more), EvalConfig, "evaluate", "eval_schema")


def spread(folder, out):
    """On each rank: all ranks share every row, for plain and for two-chunk attention."""
    ranks = mesh.start(2)
    for name in ("full", "dca"):
        asked = config(folder, out / f"{name}2", "parallel_sp=2", *METHODS[name])
        evaluate(asked, ranks)


METHODS = {
    "full": [],
    "dca": [
        "attention=dca",
        "attention.chunk_len=96",
        "attention.local_window=32",
        "attention.max_positions=128",
    ],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    build_model(TINY).save_pretrained(folder / "model")
    for file in TOKENIZER.glob("tokenizer*"):
        shutil.copy(file, folder / "model")
    rng = np.random.default_rng(0)
    sha = tokenizer_sha256(folder / "model")
    with StoreWriter(folder / "store", sha, 4096, 1, 2, {}) as writer:
        for length in (300, 100, 260, 290):
            writer.add([1, *rng.integers(4, 4096, length - 2).tolist(), 2])
    return folder


def found(out):
    samples = (out / "samples.jsonl").read_text()
    tasks = json.loads((out / "results.json").read_text())["tasks"]
    for task in tasks.values():
        assert task.pop("made")["command"]  # differs between the runs
    return tasks, samples


@pytest.mark.dist
def test_two_processes_share_the_samples(made, tmp_path):
    evaluate(config(made, tmp_path / "one"))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_port", str(free_port()), "evaluate.py"]
    process = start([*command, *arguments(made, tmp_path / "two")], tmp_path / "log")
    assert process.wait(240) == 0, (tmp_path / "log").read_text()
    assert found(tmp_path / "two") == found(tmp_path / "one")
    log = (tmp_path / "log").read_text()
    assert log.count("passkey: 12 x prompt in") == 1 and log.count("# Evaluation") == 1
    assert sorted(p.name for p in (tmp_path / "two").glob("report.*")) == [
        "report.html",
        "report.md",
    ]


@pytest.mark.dist
def test_two_processes_share_a_row(made, tmp_path):
    spawn(spread, 2, made, tmp_path)
    for name, more in METHODS.items():
        alone = config(made, tmp_path / f"{name}1", *more)
        evaluate(replace(alone, out=str(tmp_path / f"{name}1")))
        one, two = (found(tmp_path / f"{name}{n}") for n in (1, 2))
        assert two[0]["passkey"] == one[0]["passkey"] and two[1] == one[1], name
        for protocol, result in one[0]["perplexity"]["result"]["protocols"].items():
            rows = two[0]["perplexity"]["result"]["protocols"][protocol]["rows"]
            for a, b in zip(result["rows"], rows, strict=True):
                assert b["nll"] == pytest.approx(a["nll"], rel=1e-6), (name, protocol)
                assert b["tokens"] == a["tokens"]
